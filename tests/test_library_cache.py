"""Transformers' quantized cache through our runner: its own texts, its bytes, its habits, and what is refused."""

import dataclasses

import pytest
import tiny
import torch
from test_inject import generate, loaded  # noqa: F401  the fixture
from transformers import QuantizedCache as TransformersQuantizedCache

from vidkv_eval import library_cache
from vidkv_eval.cache import QuantizedCache
from vidkv_eval.inject import PrefillMemo, injected, injected_rows
from vidkv_eval.library_cache import LibraryCache, LibraryRecipe, make_cache
from vidkv_eval.recipe import Recipe, RecipeError, load_recipe

HEADS, WIDTH, GROUP = 2, 64, 64
CONFIG = {
    "_target_": "vidkv_eval.library_cache.LibraryRecipe", "name": "mine", "label": "Mine", "source": "here",
    "backend": "quanto", "nbits": 2, "axis": 0,
}  # fmt: skip

every_recipe = pytest.mark.parametrize("name", tiny.LIBRARY_RECIPES)


def short(name):
    """A recipe that quantizes again during an answer, in groups of which hqq can pack any number of tokens of the tiny models."""
    return dataclasses.replace(load_recipe(name), group_size=8, residual_length=10)


def own_cache(model, recipe):
    axes = {"axis_key": recipe.axis, "axis_value": recipe.axis}
    settings = {"nbits": recipe.nbits, "q_group_size": recipe.group_size, "residual_length": recipe.residual_length}
    return TransformersQuantizedCache(recipe.backend, model.config, **axes, **settings)


def make_states(length, batch=1, seed=0, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, HEADS, length, WIDTH, generator=generator).to(dtype)


def feed(cache, *parts):
    for states in parts:
        seen = cache.update(states, states, 0)[0]
    return seen


@every_recipe
def test_texts_are_those_of_generate_with_the_cache_of_the_library(name, loaded):  # noqa: F811
    model, prompts = loaded
    recipe, memo = short(name), PrefillMemo()
    plain = [generate(model, prompt) for prompt in prompts]
    for prompt, exact in zip(prompts, plain, strict=True):
        expected = model.generate(**prompt, max_new_tokens=24, do_sample=False, past_key_values=own_cache(model, recipe))[0].tolist()
        with injected(model, lambda: make_cache(model, recipe)):
            assert generate(model, prompt) == expected
        with injected(model, lambda: make_cache(model, recipe), memo):
            assert generate(model, prompt) == expected
        length = prompt["input_ids"].shape[1]
        assert expected[: length + 1] == exact[: length + 1] and (expected != exact or recipe.nbits == 4)


@every_recipe
def test_a_row_of_a_batch_gives_the_tokens_and_bytes_of_generate_with_one_cache(name, loaded):  # noqa: F811
    model, (prompt, _) = loaded
    recipes = [tiny.FP16, short(name), tiny.LOW_BIT, short(name)]
    with injected_rows(model, [make_cache(model, recipe, keep_dense=True) for recipe in recipes], PrefillMemo()) as calls:
        together = [(generate(model, prompt), calls[-1].footprint) for _ in recipes]
    for recipe, (tokens, footprint) in zip(recipes, together, strict=True):
        with injected(model, lambda recipe=recipe: make_cache(model, recipe)) as calls:
            assert generate(model, prompt) == tokens
        assert calls[0].footprint == footprint


@every_recipe
def test_what_attention_sees_is_what_the_layer_of_the_library_returns(name):
    recipe = load_recipe(name)
    cache, own = LibraryCache(recipe, 1), LibraryCache(recipe, 1).layers[0].layer
    for step in range(140):
        states = make_states(64 if step == 0 else 1, seed=step)
        expected = own.update(states, states)
        for found, seen in zip(cache.update(states, states, 0), expected, strict=True):
            assert torch.equal(found, seen)
    assert cache.get_seq_length() == 64 + 139


def test_codes_of_quanto_are_unpacked_as_its_own_code_packs_them():
    from optimum.quanto.tensor.packed import PackedTensor

    LibraryCache(load_recipe("quanto_k2_v2"), 1)
    for bits in (2, 4):
        for rows in (1, 5, 8, 33):
            codes = torch.randint(2**bits, (rows, 7), dtype=torch.uint8)
            packed = PackedTensor.pack(codes, bits)
            assert torch.equal(packed.unpack(), codes)
            on_no_device = torch.ops.quanto.unpack.default._op_dk
            expected = on_no_device(torch._C.DispatchKey.CompositeExplicitAutograd, packed._data, bits)
            assert torch.equal(torch.ops.quanto.unpack(packed._data, bits), expected)


# What is stored


@every_recipe
def test_bytes_are_those_of_codes_scales_zero_points_and_residual(name):
    recipe, tokens, waiting = load_recipe(name), 64, 5
    cache = LibraryCache(recipe, 1)
    assert cache.footprint().key_elements == 0
    feed(cache, make_states(tokens), *[make_states(1)] * waiting)
    history, residual = tokens * HEADS * WIDTH, waiting * HEADS * WIDTH
    expected = history * recipe.nbits / 8 + history / GROUP * 2 * 2 + residual * 2
    footprint = cache.footprint()
    assert (footprint.key_bytes, footprint.value_bytes) == (expected, expected)
    assert footprint.key_elements == footprint.value_elements == history + residual
    feed(cache, *[make_states(1)] * (recipe.residual_length - waiting))
    assert cache.footprint().key_bits == recipe.nbits + 32 / GROUP


@every_recipe
def test_a_storage_dtype_stores_and_reads_as_a_model_of_that_dtype_would(name):
    recipe = load_recipe(name)
    half, cast = LibraryCache(recipe, 1), LibraryCache(recipe, 1, storage_dtype=torch.float16)
    states = make_states(64)
    assert torch.equal(feed(cast, states.float() + 1e-6), states.float() + 1e-6), "the pass over a prompt sees exact states"
    feed(half, states)
    for step in range(3):
        new = make_states(1, seed=step).float() + 1e-6
        expected, found = feed(half, new.half()), feed(cast, new)
        assert found.dtype == torch.float32
        assert torch.equal(found[:, :, :-1], expected[:, :, :-1].float())
        assert torch.equal(found[:, :, -1:], new)
    assert cast.footprint() == half.footprint()


# Habits of the library, which make a difference to its numbers


def error_of_the_prompt_after_flushes(recipe, flushes):
    """Relative error of the prompt as read back, after each time that the residual was full; hqq packs multiples of 4 tokens."""
    recipe = dataclasses.replace(recipe, residual_length=4)
    cache, prompt, errors = LibraryCache(recipe, 1), make_states(64), []
    feed(cache, prompt)
    for step in range(flushes + 1):
        seen = feed(cache, make_states(4, seed=step + 1))[:, :, :64]
        errors.append(((seen - prompt).float().norm() / prompt.float().norm()).item())
    return errors


@pytest.mark.parametrize("name", [name for name in tiny.LIBRARY_RECIPES if not name.endswith("axis0")])
def test_quantizing_history_again_costs_little_along_the_channels_of_a_token(name):
    errors = error_of_the_prompt_after_flushes(load_recipe(name), 8)
    assert errors[8] < 1.01 * errors[0]


def test_quantizing_history_again_adds_error_with_the_default_axis_of_hqq():
    errors = error_of_the_prompt_after_flushes(load_recipe("hqq_k2_v2_axis0"), 8)
    assert all(later > earlier for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[8] > 1.5 * errors[0]


def test_sequences_of_a_batch_share_groups_with_the_default_axis_of_hqq():
    states = make_states(64, batch=2)
    states[1] *= 40
    cache, alone = (LibraryCache(load_recipe("hqq_k2_v2_axis0"), 1) for _ in range(2))
    together = feed(cache, states, states[:, :, :1])
    assert not torch.equal(together[:1], feed(alone, states[:1], states[:1, :, :1]))


def test_the_residual_is_emptied_by_the_token_that_fills_it():
    cache = LibraryCache(dataclasses.replace(load_recipe("quanto_k4_v4"), residual_length=4), 1)
    residual = cache.layers[0].stored
    feed(cache, make_states(64))
    lengths = []
    for step in range(6):
        seen = feed(cache, make_states(1, seed=step))
        assert torch.equal(seen[:, :, -1:], make_states(1, seed=step))
        residual = cache.layers[0].stored["key"].residual
        lengths.append(residual.shape[2] if residual.numel() else 0)
    assert lengths == [1, 2, 3, 0, 1, 2]


# What is refused


@pytest.mark.parametrize("name", ["quanto_k2_v2", "hqq_k1_v1"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(name, monkeypatch):
    recipe = load_recipe(name)
    monkeypatch.setitem(library_cache.PACKAGES, recipe.backend, "a-package-that-nobody-has")
    with pytest.raises(RecipeError, match=f"recipe {name} needs a-package-that-nobody-has, .* pip install \"vidkv-eval\\[rivals\\]\""):
        LibraryCache(recipe, 1)


def test_the_cache_of_another_kind_of_recipe_is_refused():
    with pytest.raises(ValueError, match="quanto_k2_v2 is a recipe of another library's cache; make it with .*make_cache"):
        QuantizedCache(load_recipe("quanto_k2_v2"), 1)


@every_recipe
def test_what_the_library_would_answer_wrongly_is_refused(name):
    cache = LibraryCache(load_recipe(name), 1)
    feed(cache, make_states(64, batch=2), make_states(1, batch=2))
    with pytest.raises(ValueError, match="tokens cannot be removed"):
        cache.crop(-1)
    for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(ValueError, match="sequences of the library's quantized cache cannot be selected or repeated"):
            change()
    with pytest.raises(ValueError, match="1 sequences for a cache that holds 2"):
        feed(cache, make_states(1))


def test_a_padded_prompt_is_refused(loaded):  # noqa: F811
    model, (prompt, _) = loaded
    mask = prompt["attention_mask"].clone()
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="quanto_k2_v2: the library's cache stores padding like tokens"):
        model.generate(
            **prompt | {"attention_mask": mask}, max_new_tokens=2, past_key_values=make_cache(model, load_recipe("quanto_k2_v2"))
        )


def test_beams_are_reordered():
    cache = LibraryCache(load_recipe("quanto_k4_v4"), 1)
    states = make_states(64, batch=2)
    feed(cache, states, states[:, :, :1])
    before = feed(cache, states[:, :, 1:2])
    cache.reorder_cache(torch.tensor([1, 1]))
    after = feed(cache, states[:, :, 2:3])
    assert torch.equal(after[:, :, :66], before[[1, 1]])


def test_a_cache_that_is_reset_starts_anew():
    cache = LibraryCache(load_recipe("quanto_k4_v4"), 1)
    expected = feed(cache, make_states(64), make_states(1))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(feed(cache, make_states(64), make_states(1)), expected)


@pytest.mark.parametrize(("name", "multiple"), [("hqq_k1_v1", 8), ("hqq_k2_v2", 4), ("hqq_k4_v4", 2)])
def test_numbers_of_tokens_that_hqq_cannot_pack_are_named(name, multiple):
    recipe = load_recipe(name)
    message = f"layer 0: hqq cannot cut 1 sequences x 1 heads x 9 tokens .* groups of 64 along axis 1 .* multiple of {multiple}"
    with pytest.raises(ValueError, match=message):
        feed(LibraryCache(recipe, 1), make_states(9)[:, :1])
    cache = LibraryCache(dataclasses.replace(recipe, residual_length=1), 1)
    feed(cache, make_states(8)[:, :1])
    with pytest.raises(ValueError, match=message):
        feed(cache, make_states(1)[:, :1])


def test_what_quanto_cannot_group_is_named():
    recipe = dataclasses.replace(load_recipe("quanto_k2_v2"), axis=-1)
    with pytest.raises(ValueError, match="layer 0: optimum-quanto cannot cut .* 33 tokens x 64 channels into groups of 64 along axis -1"):
        feed(LibraryCache(recipe, 1), make_states(33))


@every_recipe
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused(name, bad):
    states = make_states(64)
    states[0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match="layer 0, key states cannot be quantized: they hold NaN or infinity in torch.float16"):
        feed(LibraryCache(load_recipe(name), 1), states)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fp8"}, "LibraryRecipe.backend is 'fp8'; allowed: quanto, hqq"),
        ({"nbits": 1}, "LibraryRecipe.nbits is 1; allowed: 2, 4"),
        ({"backend": "hqq", "nbits": 5}, "LibraryRecipe.nbits is 5; allowed: 1, 2, 4, 8"),
        ({"axis": 1}, "LibraryRecipe.axis is 1; allowed: 0, -1"),
        ({"backend": "hqq", "axis": -1}, "LibraryRecipe.axis is -1; allowed: 0, 1"),
        ({"group_size": 0}, "LibraryRecipe.group_size is 0; allowed: integers above 0"),
        ({"residual_length": True}, "LibraryRecipe.residual_length is True; allowed: integers above 0"),
        ({"flush": "append"}, "recipe: unknown field 'flush'"),
    ],
)
def test_an_impossible_recipe_names_the_field_and_what_is_allowed(change, message):
    assert Recipe.from_config(CONFIG) == LibraryRecipe("mine", "Mine", "here", "quanto", 2, 0)
    with pytest.raises(RecipeError) as error:
        Recipe.from_config({**CONFIG, **change})
    assert message in str(error.value)

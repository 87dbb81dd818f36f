"""Every recipe file builds and has the properties of a recipe; impossible recipes are refused with a message that helps."""

import csv
import importlib.util
from pathlib import Path

import pytest
import tiny
import torch

from vidkv_eval.library_cache import LibraryCache
from vidkv_eval.quant.affine import Affine
from vidkv_eval.quant.centred import Centred
from vidkv_eval.quant.fitted import Fitted
from vidkv_eval.quant.growing import GrowingStates
from vidkv_eval.quant.hadamard import Hadamard
from vidkv_eval.quant.released import ReleasedAffine
from vidkv_eval.quant.sign import Sign
from vidkv_eval.quant.spectral import Spectral
from vidkv_eval.quant.split_channels import SplitChannels
from vidkv_eval.quant.split_tokens import SplitTokens
from vidkv_eval.quant.ternary import Ternary
from vidkv_eval.recipe import RECIPE_FOLDER, Recipe, RecipeError, load_recipe, recipe_names
from vidkv_eval.report.published import PUBLISHED

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_quantize.py"
SPEC = importlib.util.spec_from_file_location("bench_quantize", SCRIPT)
bench_quantize = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench_quantize)

HEADS, LENGTH, WIDTH = 2, 128, 64
SIDES = ("key", "value")
TABLE1 = {
    "fp16",
    "kivi_k2_v2",
    "kivi_k1_v1",
    "vidkv_k200_v200",
    *(
        f"vidkv_{setting}_{variant}"
        for setting in ("k150_v158", "k150_v158_tokenvalue", "k150_v200", "k150_v200_variance", "k150_v200_outlier", "k100_v100")
        for variant in ("published", "scaled")
    ),
}
AFFINE = {"_target_": "vidkv_eval.quant.affine.Affine", "nbits": 2, "granularity": "per_channel", "group_size": 32}
CONFIG = {"name": "mine", "label": "Mine", "source": "here", "key": AFFINE, "value": AFFINE}

def option(name, key, value):
    """A recipe of settings that no recipe file has."""
    return Recipe(f"option_{name}", "An option", "here", key, value)


CHANNEL, TOKEN = ("per_channel", 32), ("per_token", 32)
OPTIONS = [
    option("affine_float8", Affine(2, *CHANNEL, "fields", "float8"), Affine(2, *TOKEN, "planes", "float8")),
    option("sign_ternary_float8", Sign("mean_plus_minus", *CHANNEL, "planes", "float8"), Ternary(0.7, True, *CHANNEL, "fields", "float8")),
    option(
        "split_per_head_float8",
        SplitChannels(
            wide=Affine(2, *CHANNEL, "capacity", "float8"),
            normal=Spectral(Sign("mean_plus_minus", *CHANNEL, "fields", "float8")),
            fraction=0.5,
            per_head=True,
        ),
        Ternary(0.5, True, *TOKEN, "planes", "float8"),
    ),
    option(
        "split_per_head_outlier",
        SplitChannels(Affine(2, *CHANNEL), Sign("mean_plus_minus", *CHANNEL), 0.25, "outlier", per_head=True),
        SplitChannels(Affine(4, *TOKEN), Affine(1, *TOKEN, "planes"), 0.5, "variance", per_head=True),
    ),
    option("fitted", Fitted(4, 1.0, *CHANNEL, "planes"), Fitted(3, 0, *TOKEN, "fields", "float8")),
    option("fitted_uint4", Fitted(2, 0.5, *CHANNEL, "capacity", "uint4"), Fitted(16, 1.0, *CHANNEL, "capacity", "uint4")),
    option("centred_hadamard", Centred(Affine(2, *CHANNEL, metadata="float8")), Hadamard(Fitted(3, 0.5, *TOKEN))),
    option("affine_sign_uint4", Affine(2, *CHANNEL, "fields", "uint4"), Sign("mean_plus_minus", *CHANNEL, "planes", "uint4")),
]
RECIPES = {name: load_recipe(name) for name in recipe_names()} | {recipe.name: recipe for recipe in OPTIONS}

every_side = pytest.mark.parametrize(("name", "side"), [(name, side) for name in RECIPES for side in SIDES])
every_quantizer = pytest.mark.parametrize(
    ("name", "side"), [(name, side) for name in RECIPES if name not in tiny.LIBRARY_RECIPES for side in SIDES]
)


def make_states(batch=2, dtype=torch.float16, seed=0):
    """States with channels of different size and mean, as keys have."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(1, HEADS, 1, WIDTH, generator=generator) * 4 + 0.25
    return (size * (torch.randn(batch, HEADS, LENGTH, WIDTH, generator=generator) + 0.5)).to(dtype)


class LibrarySide:
    """What a library does to keys or to values of a prompt, to be asked like a quantizer."""

    def __init__(self, recipe, side):
        self.recipe, self.side = recipe, side
        self.nominal_bits = getattr(recipe, f"{side}_bits")
        # The default axis of hqq makes groups of elements of several sequences.
        self.is_batch_independent = (recipe.backend, recipe.axis) != ("hqq", 0)

    def quantize(self, states):
        cache = LibraryCache(self.recipe, 1)
        cache.update(states, states, 0)
        return cache.layers[0].stored[self.side]

    def dequantize(self, stored, dtype):
        return stored.read(torch.empty(0, dtype=dtype)).to(dtype)


def quantizer_of(name, side):
    recipe = RECIPES[name]
    return LibrarySide(recipe, side) if name in tiny.LIBRARY_RECIPES else getattr(recipe, side)


def quantize(quantizer, states):
    """Quantize a prompt; of a recipe that chooses tokens, every fourth is chosen."""
    if not isinstance(quantizer, SplitTokens):
        return quantizer.quantize(states)
    tokens = torch.arange(0, LENGTH, 4).expand(states.shape[0], -1)
    return quantizer.quantize(states, like=quantizer.choice(tokens, WIDTH))


def read_back(quantizer, states):
    return quantizer.dequantize(quantize(quantizer, states), states.dtype)


def static_bytes(quantized):
    own = sum(tensor.nbytes for tensor in quantized.static.values())
    return own + sum(static_bytes(part) for part in quantized.parts.values())


@every_side
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_shape_and_dtype_are_kept_and_values_finite(name, side, dtype):
    states = make_states(dtype=dtype)
    found = read_back(quantizer_of(name, side), states)
    assert found.shape == states.shape
    assert found.dtype == dtype
    assert found.isfinite().all()


@every_side
def test_stored_bytes_shrink_and_are_at_least_the_nominal_bits(name, side):
    quantizer, states = quantizer_of(name, side), make_states()
    bits = 8 * quantize(quantizer, states).nbytes / states.numel()
    assert bits >= quantizer.nominal_bits
    assert bits < 16 or name == "fp16"


@every_quantizer
def test_doubling_the_states_doubles_what_is_read_back(name, side):
    quantizer, states = quantizer_of(name, side), make_states(dtype=torch.float32)
    factor = torch.full((LENGTH, 1), 2 if quantizer.is_scaled else 1)
    if isinstance(quantizer, SplitTokens):
        factor[::4] = 2 if quantizer.chosen.is_scaled else 1
    assert torch.equal(read_back(quantizer, 2 * states), factor * read_back(quantizer, states))


def test_only_ternary_values_as_published_or_released_are_unscaled():
    unscaled = {(name, side) for name in tiny.QUANTIZER_RECIPES for side in SIDES if not quantizer_of(name, side).is_scaled}
    ternary = {name for name in recipe_names() if name.split("_")[2:3] in (["v158"], ["v166"]) and name.endswith(("published", "released"))}
    assert unscaled == {(name, "value") for name in ternary}


def test_only_released_keys_of_mixed_precision_let_sequences_influence_each_other():
    shared = {(name, side) for name in tiny.QUANTIZER_RECIPES for side in SIDES if not quantizer_of(name, side).is_batch_independent}
    mixed = {name for name in recipe_names() if name.startswith("vidkv_k1") and name.endswith("released")}
    assert shared == {(name, "key") for name in mixed}


def test_released_recipes_and_no_others_requantize():
    for name in tiny.QUANTIZER_RECIPES:
        recipe = load_recipe(name)
        assert (recipe.flush == "requantize") == (recipe.variant == "released")


@every_side
def test_zero_states_read_back_as_zero(name, side):
    assert (read_back(quantizer_of(name, side), torch.zeros(1, HEADS, LENGTH, WIDTH)) == 0).all()


@every_side
@pytest.mark.parametrize("constant", [3.0, -0.75, 921.0])
def test_constant_states_are_exact_unless_published_or_released_levels_forbid_it(name, side, constant):
    states = torch.full((1, HEADS, LENGTH, WIDTH), constant)
    found = read_back(quantizer_of(name, side), states)
    if name == "calibquant_k1_v1":
        assert found.isfinite().all()  # its range shrinks towards zero
    elif RECIPES[name].variant in ("published", "released") and not isinstance(quantizer_of(name, side), Affine | ReleasedAffine):
        assert found.isfinite().all()
    else:
        # A constant is an irrational number after the transform, which metadata round; only levels mean - s and mean + s store
        # what rounding left of it as s.
        normal = getattr(quantizer_of(name, side), "normal", None)
        rounds = isinstance(normal, Spectral) and isinstance(normal.inner, Fitted)
        torch.testing.assert_close(found, states, rtol=2**-12 if rounds else 1e-6, atol=0)


@every_side
def test_sequences_of_a_batch_do_not_influence_each_other(name, side):
    quantizer, states = quantizer_of(name, side), make_states(batch=3)
    states[1] *= 40
    together = read_back(quantizer, states)
    if quantizer.is_batch_independent:
        for item in range(3):
            assert torch.equal(together[item : item + 1], read_back(quantizer, states[item : item + 1]))


@every_quantizer
def test_sequences_of_a_batch_can_be_selected(name, side):
    quantizer, states = quantizer_of(name, side), make_states(batch=3)
    together = read_back(quantizer, states)
    selected = quantize(quantizer, states).select_batch(torch.tensor([2, 0, 0]))
    assert torch.equal(quantizer.dequantize(selected, states.dtype), together[[2, 0, 0]])


@every_quantizer
def test_appending_gives_both_parts_back_as_if_quantized_apart(name, side):
    quantizer = quantizer_of(name, side)
    first, second = quantize(quantizer, make_states(seed=1)), make_states(seed=2)
    later = quantizer.quantize(second, like=first)
    before = quantizer.dequantize(first, torch.float32)
    growing = GrowingStates(first)
    growing.append(later)
    both = growing.states
    expected = torch.cat([before, quantizer.dequantize(later, torch.float32)], dim=2)
    assert torch.equal(quantizer.dequantize(both, torch.float32), expected)
    assert torch.equal(quantizer.dequantize(first, torch.float32), before)
    assert (both.length, both.nbytes) == (2 * LENGTH, first.nbytes + later.nbytes - static_bytes(later))


@every_quantizer
def test_no_intermediate_is_larger_than_keys_and_values_in_float32(name, side):
    quantizer, states = quantizer_of(name, side), make_states(batch=8)
    with bench_quantize.LargestTensor() as largest:
        stored = quantize(quantizer, states)
        quantizer.dequantize(stored, states.dtype)
    assert largest.nbytes <= 2 * states.numel() * 4


@every_side
def test_stored_form_does_not_share_memory_with_the_states(name, side):
    quantizer, states = quantizer_of(name, side), make_states()
    quantized = quantize(quantizer, states)
    expected = quantizer.dequantize(quantized, states.dtype).clone()
    states.zero_()
    assert torch.equal(quantizer.dequantize(quantized, states.dtype), expected)


@every_side
def test_states_need_not_be_contiguous(name, side):
    quantizer, states = quantizer_of(name, side), make_states()
    strided = states.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(read_back(quantizer, strided), read_back(quantizer, states))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_equals_itself_read_again_and_says_where_it_comes_from(name):
    recipe = load_recipe(name)
    assert recipe == load_recipe(RECIPE_FOLDER / f"{name}.yaml") == Recipe.from_config(recipe.to_config())
    assert hash(recipe) == hash(load_recipe(name))
    assert recipe.label
    assert recipe.source
    assert recipe.variant == (name.rsplit("_", 1)[-1] if name.endswith(("published", "released", "scaled")) else "")


def test_every_row_of_table_1_has_its_recipes():
    assert TABLE1 <= set(recipe_names())


def test_every_printed_row_without_protected_tokens_has_recipes_of_its_bits_and_transform():
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        entries = [entry for entry in csv.DictReader(file) if entry["method"] in ("KIVI", "VidKV") and entry["value_bits"] != "1.66"]
    rows = {(entry["method"], float(entry["key_bits"]), float(entry["value_bits"]), "FFT=no" in entry["extra"]) for entry in entries}
    assert len(rows) == 12
    for method, key_bits, value_bits, is_plain in rows:
        digits = 100 if method == "VidKV" else 1
        stem = f"{method.lower()}_k{digits * key_bits:.0f}_v{digits * value_bits:.0f}"
        stem += "_nofft" if is_plain and key_bits < 2 else ""
        assert {stem} <= set(recipe_names()) or {f"{stem}_published", f"{stem}_scaled"} <= set(recipe_names()), stem


@pytest.mark.parametrize(
    ("name", "key_bits", "value_bits"),
    [
        ("fp16", 16, 16),
        ("kivi_k2_v2", 2, 2),
        ("kivi_k1_v1", 1, 1),
        ("vidkv_k150_v158_scaled", 1.5, 1.58),
        ("vidkv_k150_v200_published", 1.5, 2),
    ],
)
def test_nominal_bits(name, key_bits, value_bits):
    recipe = load_recipe(name)
    assert (recipe.key_bits, recipe.value_bits) == (key_bits, value_bits)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("vidkv_k")])
def test_names_give_the_nominal_bits(name):
    key_bits, value_bits = (int(part[1:]) / 100 for part in name.split("_")[1:3])
    recipe = load_recipe(name)
    assert (round(recipe.key_bits, 6), round(recipe.value_bits, 2)) == (key_bits, value_bits)


@pytest.mark.parametrize("variant", ["published", "scaled"])
@pytest.mark.parametrize("value_bits", ["v158", "v200"])
@pytest.mark.parametrize(
    ("key_bits", "has_transform"),
    [(f"k{bits}", bits in (150, 175)) for bits in (100, 110, 120, 125, 130, 140, 150, 160, 170, 175, 180, 190)],
)
def test_the_fourier_transform_is_used_for_the_key_fractions_of_the_paper(key_bits, value_bits, has_transform, variant):
    key = load_recipe(f"vidkv_{key_bits}_{value_bits}_{variant}").key
    assert isinstance(getattr(key, "normal", key), Spectral) == has_transform


def test_recipes_with_other_settings_differ():
    assert Recipe.from_config(CONFIG) != Recipe.from_config({**CONFIG, "residual_length": 64})
    assert len({load_recipe(name) for name in recipe_names()}) == len(recipe_names())


def test_a_recipe_is_read_from_a_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((RECIPE_FOLDER / "kivi_k2_v2.yaml").read_text().replace("name: kivi_k2_v2", "name: mine"))
    assert load_recipe(path).key == load_recipe("kivi_k2_v2").key
    path.rename(tmp_path / "other.yaml")
    with pytest.raises(RecipeError, match="recipe.name is 'mine' in other.yaml; allowed: 'other'"):
        load_recipe(tmp_path / "other.yaml")


def test_an_unknown_recipe_gets_the_nearest_name_and_all_names():
    with pytest.raises(RecipeError) as error:
        load_recipe("kivi_k2v2")
    assert "did you mean 'kivi_k2_v2'?" in str(error.value)
    assert all(name in str(error.value) for name in recipe_names())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": 128}, "recipe: unknown field 'residual'; did you mean 'residual_length'?"),
        ({"residual_length": 100}, "Recipe.residual_length is 100; allowed: multiples of 32"),
        ({"residual_length": 0}, "Recipe.residual_length is 0; allowed: multiples of 32"),
        ({"prefill": "dense"}, "Recipe.prefill is 'dense'; allowed: 'exact', 'quantized'"),
        ({"flush": "drop"}, "Recipe.flush is 'drop'; allowed: 'append', 'requantize'"),
        ({"variant": "best"}, "Recipe.variant is 'best'; allowed: '', 'published', 'released', 'scaled'"),
        ({"key": 2}, "Recipe.key is 2; allowed: a quantizer"),
        ({"key": {**AFFINE, "bits": 2}}, "recipe.key: unknown field 'bits'"),
        ({"key": {**AFFINE, "nbits": 9}}, "recipe.key: Affine.nbits is 9; allowed: 1, 2, 4, 8"),
        ({"key": {**AFFINE, "layout": "tight"}}, "recipe.key: Affine.layout is 'tight'; allowed: capacity, fields, planes"),
        ({"key": {**AFFINE, "metadata": "fp8"}}, "recipe.key: Affine.metadata is 'fp8'; allowed: float16, float8, uint4"),
        ({"key": {"_target_": AFFINE["_target_"], "nbits": 2}}, "recipe.key: missing granularity, group_size"),
        ({"key": {"_target_": "os.system"}}, "recipe.key: _target_ is 'os.system'; allowed"),
        ({"key": {"_target_": "vidkv_eval.quant.affine.Afine"}}, "recipe.key: _target_ is 'vidkv_eval.quant.affine.Afine', which is not"),
        ({"key": {"_target_": "vidkv_eval.recipe.load_recipe"}}, "recipe.key: _target_ is 'vidkv_eval.recipe.load_recipe', which is not"),
    ],
)
def test_an_impossible_recipe_names_the_field_and_what_is_allowed(change, message):
    with pytest.raises(RecipeError) as error:
        Recipe.from_config({**CONFIG, **change})
    assert message in str(error.value)

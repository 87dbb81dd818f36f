"""Scores of coarsely quantized tokens brought closer together, from the function up to the texts of a model."""

import dataclasses

import pytest
import tiny
import torch
from test_inject import generate, loaded  # noqa: F401  the fixture

from vidkv_eval import attention
from vidkv_eval.attention import GROUPED, attend_with_drop, use_attention
from vidkv_eval.inject import PrefillMemo, injected, injected_rows
from vidkv_eval.library_cache import make_cache
from vidkv_eval.quant.choose_tokens import AllVisual
from vidkv_eval.quant.identity import Identity
from vidkv_eval.quant.split_tokens import SplitTokens
from vidkv_eval.recipe import Recipe, RecipeError, load_recipe
from vidkv_eval.score_drop import ScoreDrop, drop_scores, put_note, read_note

NAMES = ("calibquant_k1_v1", "calibquant_k2_v2")
HEADS, QUERY_HEADS, WIDTH = 2, 6, 16
EXACT_VISUAL = Recipe("exact_visual", "Exact", "", *(2 * [SplitTokens(Identity(), Identity(), AllVisual())]))


@pytest.fixture
def grouped(loaded):  # noqa: F811
    """The model with the attention that can lower scores, and its prompts."""
    model, prompts = loaded
    use_attention(model, GROUPED)
    yield model, prompts
    use_attention(model, "sdpa")


def make_states(tokens, queries=1, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, QUERY_HEADS, queries, WIDTH), (batch, HEADS, tokens, WIDTH), (batch, HEADS, tokens, WIDTH)
    return [3 * torch.randn(shape, generator=generator) for shape in shapes]


# The map


def test_scores_by_hand():
    scores = torch.tensor([[0.0, 2, 6], [5, 5, 5], [-1, 1, 0]])
    # [0, 6] goes to [0, 3]; equal scores stay; a spread of 2 is less than 3, so that all become the minimum
    assert drop_scores(scores, 3).tolist() == [[0, 1, 3], [5, 5, 5], [-1, -1, -1]]
    assert drop_scores(scores[0], 6).tolist() == [0, 0, 0]


@pytest.mark.parametrize("drop", [0.25, 3, 40])
@pytest.mark.parametrize("size", [1e-3, 1, 30])
def test_order_is_never_reversed_and_ends_are_where_they_should_be(drop, size):
    scores = size * torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = drop_scores(scores, drop)
    ascending = scores.argsort(dim=-1)
    assert (found.gather(-1, ascending).diff(dim=-1) >= 0).all()
    low, high = scores.aminmax(dim=-1)
    torch.testing.assert_close(found.amin(-1), low)
    torch.testing.assert_close(found.amax(-1), torch.maximum(high - drop, low))


def test_without_a_drop_scores_are_the_same_bits():
    scores = torch.randn(5, 7)
    assert torch.equal(drop_scores(scores, 0.0), scores)


# Attention


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("mask_kind", ["none", "boolean", "additive"])
def test_attention_with_a_drop_equals_a_loop_over_heads_and_queries(queries, mask_kind):
    tokens, positions = 20, torch.tensor([2, 3, 4, 9])
    query, key, value = (states[0] for states in make_states(tokens, queries))
    visible = torch.ones(1, queries, tokens, dtype=torch.bool).tril(tokens - queries) if mask_kind != "none" else None
    mask = torch.zeros(1, queries, tokens).masked_fill(~visible, -torch.inf) if mask_kind == "additive" else visible
    found = attend_with_drop(query, key, value, mask, 0.3, ScoreDrop(positions, 3.0))
    for head in range(QUERY_HEADS):
        for place in range(queries):
            scores = key[head // 3] @ query[head, place] * 0.3
            block = scores[positions]
            spread = block.max() - block.min()
            scores[positions] = block.min() + (block - block.min()) * max(0, spread - 3) / spread
            if visible is not None:
                scores[~visible[0, place]] = -torch.inf
            torch.testing.assert_close(found[place, head], scores.softmax(-1) @ value[head // 3])


@pytest.mark.parametrize("queries", [1, 4])
def test_only_sequences_with_a_note_are_changed(queries):
    query, key, value = make_states(12, queries, batch=3)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = QUERY_HEADS // HEADS, False
    plain, _ = attention.grouped_sdpa(module, query, key, value, None, 0.25)
    put_note(key, {1: ScoreDrop(torch.arange(2, 8), 3.0)})
    found, _ = attention.grouped_sdpa(module, query, key, value, None, 0.25)
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    expected = attend_with_drop(query[1], key[1], value[1], None, 0.25, ScoreDrop(torch.arange(2, 8), 3.0))
    assert torch.equal(found[1], expected)
    assert not torch.allclose(found[1], plain[1])
    unchanged = attend_with_drop(query[1], key[1], value[1], None, 0.25, ScoreDrop(torch.arange(2, 8), 0.0))
    torch.testing.assert_close(unchanged, plain[1])


def test_a_tensor_without_a_note_has_none():
    assert read_note(torch.zeros(1)) == {}


# Models


def test_exact_visual_tokens_without_a_drop_give_the_tokens_of_plain_generation(grouped):
    model, prompts = grouped
    for prompt in prompts:
        plain = generate(model, prompt)
        with injected(model, lambda: make_cache(model, EXACT_VISUAL)):
            assert generate(model, prompt) == plain
        with injected(model, lambda: make_cache(model, dataclasses.replace(EXACT_VISUAL, score_drop=3.0))):
            assert generate(model, prompt) != plain


@pytest.mark.parametrize("name", NAMES)
def test_all_visual_tokens_are_lowered_in_every_layer_and_step_and_no_other(name, grouped, monkeypatch):
    model, (prompt, _) = grouped
    seen = []

    def note(query, key, value, mask, scaling, drop):
        seen.append((drop.positions.tolist(), drop.drop, key.shape[1]))
        return attend_with_drop(query, key, value, mask, scaling, drop)

    monkeypatch.setattr(attention, "attend_with_drop", note)
    with injected(model, lambda: make_cache(model, load_recipe(name))):
        answer = generate(model, prompt)[prompt["input_ids"].shape[1] :]
    config = model.config
    visual_id = getattr(config, "video_token_id", None) or config.video_token_index
    visual = (prompt["input_ids"][0] == visual_id).nonzero().squeeze(-1).tolist()
    length, layers = prompt["input_ids"].shape[1], config.get_text_config().num_hidden_layers
    assert len(visual) > 64
    assert seen == [(visual, 3.0, length + step) for step in range(1, len(answer)) for _ in range(layers)]


@pytest.mark.parametrize("name", NAMES)
def test_only_visual_tokens_are_read_back_changed(name, grouped):
    model, (prompt, _) = grouped
    recipe, caches = load_recipe(name), []
    with injected(model, lambda: caches.append(make_cache(model, recipe)) or caches[-1]):
        generate(model, prompt)
    with injected(model, lambda: caches.append(make_cache(model, tiny.FP16)) or caches[-1]):
        generate(model, prompt)
    length = prompt["input_ids"].shape[1]
    chosen = caches[0].layers[0].stored["key"].quantized.static["tokens"][0].long()
    others = torch.tensor(sorted(set(range(length)) - set(chosen.tolist())))
    for side in ("key", "value"):
        found, exact = (cache.layers[0].stored[side].read(torch.empty(1, HEADS, 0, 32)) for cache in caches)
        assert torch.equal(found[:, :, others], exact[:, :, others])
        levels = [len(channel.unique()) for head in found[0, :, chosen] for channel in head.T]
        assert max(levels) == 2 ** getattr(recipe, side).chosen.nbits


@pytest.mark.parametrize("name", NAMES)
def test_a_row_gives_what_it_gives_alone_and_changes_no_other(name, grouped):
    model, prompts = grouped

    def answer(prompt, recipes):
        caches = [make_cache(model, recipe, keep_dense=True) for recipe in [*recipes, *[recipes[0]] * (4 - len(recipes))]]
        with injected_rows(model, caches, PrefillMemo()) as calls:
            return [(generate(model, prompt), calls[-1].footprint) for _ in recipes]

    recipes = [tiny.FP16, load_recipe(name), tiny.LOW_BIT]
    for prompt in prompts:
        together = answer(prompt, recipes)
        assert together == [answer(prompt, [recipe])[0] for recipe in recipes]
        with injected(model, lambda: make_cache(model, recipes[1])) as calls:
            assert generate(model, prompt) == together[1][0]
        assert calls[0].footprint == together[1][1]


def test_padding_moves_the_tokens_that_are_lowered(grouped):
    model, (prompt, _) = grouped
    recipe = load_recipe(NAMES[0])

    def answer(prompt):
        with injected(model, lambda: make_cache(model, recipe)):
            return generate(model, prompt)[prompt["input_ids"].shape[1] :]

    pad = {"input_ids": model.generation_config.pad_token_id or 0, "attention_mask": 0, "mm_token_type_ids": 0}
    padded = {
        name: torch.nn.functional.pad(value, (3, 0), value=pad[name]) if name in pad else value for name, value in prompt.items()
    }
    assert answer(padded) == answer(prompt)


def test_nothing_is_lowered_while_all_tokens_are_kept_as_newest(grouped):
    model, (prompt, _) = grouped
    with injected(model, lambda: make_cache(model, load_recipe(NAMES[0]), keep_newest=1000)):
        found = generate(model, prompt)
    assert found == generate(model, prompt)


def test_an_attention_that_cannot_lower_scores_is_refused(loaded):  # noqa: F811
    model, _ = loaded
    message = "calibquant_k1_v1 lowers attention scores, which attention 'sdpa' does not do; set model.attn_implementation=grouped_sdpa"
    with pytest.raises(ValueError, match=message):
        make_cache(model, load_recipe(NAMES[0]))
    make_cache(model, dataclasses.replace(load_recipe(NAMES[0]), score_drop=0.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_drop": -1}, "Recipe.score_drop is -1; allowed: numbers from 0"),
        ({"score_drop": "3"}, "Recipe.score_drop is '3'; allowed: numbers from 0"),
        ({"prefill": "quantized"}, "Recipe.score_drop is 3.0; allowed: 0, unless keys choose tokens"),
        ({"key": {"_target_": "vidkv_eval.quant.identity.Identity"}}, "Recipe.score_drop is 3.0; allowed: 0, unless keys choose tokens"),
    ],
)
def test_an_impossible_recipe_names_the_field_and_what_is_allowed(change, message):
    with pytest.raises(RecipeError) as error:
        Recipe.from_config({**load_recipe(NAMES[0]).to_config(), **change})
    assert message in str(error.value)

"""Several caches side by side as the rows of a batch: each row answers as if it were alone."""

import dataclasses

import pytest
import tiny
from test_inject import generate, loaded  # noqa: F401  the fixture

from vidkv_eval.attention import GROUPED, use_attention
from vidkv_eval.cache import QuantizedCache
from vidkv_eval.inject import GenerateFailed, PrefillMemo, injected, injected_rows
from vidkv_eval.recipe import load_recipe
from vidkv_eval.rows import RowCache

ROWS = 4


def make_cache(model, recipe):
    return QuantizedCache.for_model(model, recipe, keep_dense=True)


def answer(model, prompt, recipes, memo=None):
    """Tokens and bytes of each recipe, answered in one batch of ROWS rows."""
    caches = [make_cache(model, recipe) for recipe in [*recipes, *[recipes[0]] * (ROWS - len(recipes))]]
    with injected_rows(model, caches, memo or PrefillMemo()) as calls:
        return [(generate(model, prompt), calls[-1].footprint) for _ in recipes]


def test_a_row_gives_the_tokens_and_bytes_it_gives_in_other_company(loaded):  # noqa: F811
    model, prompts = loaded
    memo = PrefillMemo()
    for prompt in prompts:
        together = answer(model, prompt, tiny.RECIPES, memo)
        assert together == [answer(model, prompt, [recipe])[0] for recipe in tiny.RECIPES]


def test_rows_give_the_tokens_and_bytes_of_generate_with_one_cache(loaded):  # noqa: F811
    model, (prompt, _) = loaded
    for recipe, (tokens, footprint) in zip(tiny.RECIPES, answer(model, prompt, tiny.RECIPES), strict=True):
        with injected(model, lambda recipe=recipe: make_cache(model, recipe)) as calls:
            assert generate(model, prompt) == tokens
        assert calls[0].footprint == footprint


@pytest.mark.parametrize("name", ["kivi_k2_v2_released", "vidkv_k150_v158_released"])
def test_rows_quantize_the_whole_history_anew_as_one_cache_does(name, loaded):  # noqa: F811
    model, (prompt, _) = loaded
    recipe = dataclasses.replace(load_recipe(name), residual_length=32)
    (_, other), (tokens, footprint) = answer(model, prompt, [tiny.LOW_BIT, recipe])
    with injected(model, lambda: make_cache(model, recipe)) as calls:
        assert generate(model, prompt) == tokens
    assert calls[0].footprint == footprint != other


def test_a_row_that_ends_early_is_cut_after_its_end_and_stores_nothing_more(loaded):  # noqa: F811
    model, (prompt, _) = loaded
    length = prompt["input_ids"].shape[1]
    answers = [tokens[length:] for tokens, _ in answer(model, prompt, tiny.RECIPES)]
    early = answers[0][5]
    expected = [tokens[: tokens.index(early) + 1] if early in tokens else tokens for tokens in answers]
    assert len(set(map(len, expected))) > 1, "the test needs rows that end at different steps"
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = early
    try:
        ended = answer(model, prompt, tiny.RECIPES)
    finally:
        model.generation_config.eos_token_id = before
    assert [tokens[length:] for tokens, _ in ended] == expected
    for (tokens, footprint), recipe in zip(ended, tiny.RECIPES, strict=True):
        elements = 2 * 2 * 32 * (len(tokens) - 1)  # 2 layers, 2 heads, width 32; the last token is never stored
        assert (footprint.key_elements, recipe.name) == (elements, recipe.name)


def test_grouped_attention_gives_the_tokens_of_the_stock_one(loaded):  # noqa: F811
    model, prompts = loaded
    stock = [answer(model, prompt, tiny.RECIPES) for prompt in prompts]
    plain = [generate(model, prompt) for prompt in prompts]
    use_attention(model, GROUPED)
    try:
        assert model.config.get_text_config()._attn_implementation == GROUPED
        assert [answer(model, prompt, tiny.RECIPES) for prompt in prompts] == stock
        assert [generate(model, prompt) for prompt in prompts] == plain
    finally:
        use_attention(model, "sdpa")


def test_an_error_in_any_row_comes_out_as_generate_failed(loaded):  # noqa: F811
    model, (prompt, _) = loaded
    caches = [make_cache(model, recipe) for recipe in tiny.RECIPES]
    caches[1].layers[0].update = None
    with pytest.raises(GenerateFailed), injected_rows(model, caches, PrefillMemo()):
        generate(model, prompt)


def test_caches_without_a_working_copy_or_with_quantized_prefill_are_refused(loaded):  # noqa: F811
    model, _ = loaded
    with pytest.raises(ValueError, match="keep_dense: true"):
        RowCache([QuantizedCache.for_model(model, tiny.FP16)])
    with pytest.raises(ValueError, match="prefill: exact"):
        RowCache([make_cache(model, dataclasses.replace(tiny.LOW_BIT, prefill="quantized"))])

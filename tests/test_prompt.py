"""What a cache learns about its prompt, and what a batch padded on the left stores."""

import pytest
import tiny
import torch
from test_cache import KIVI, VIDKV, feed, generate, make_states, prompt, tiny_model
from test_inject import loaded  # noqa: F401  the fixture

from vidkv_eval.cache import QuantizedCache
from vidkv_eval.prompt import Prompt, describe, saliency
from vidkv_eval.quant.marks import TokenMarks
from vidkv_eval.recipe import load_recipe

STP, RTP = "vidkv_k150_v166_scaled", "vidkv_k150_v166_rtp_scaled"
PADDING = (0, 7, 40)


@pytest.fixture(scope="module")
def qwen2():
    return tiny_model("qwen2")


def padded_batch(batch_states):
    """States of several sequences with NaN as padding before them, so that whoever reads padding is found out."""
    return tuple(
        torch.cat([torch.nn.functional.pad(alone[index], (0, 0, skip, 0), value=float("nan")) for alone, skip in batch_states])
        for index in range(2)
    )


def marks(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    visual = torch.zeros(tokens, dtype=torch.bool)
    visual[4 + seed : tokens - 20] = True
    return TokenMarks(visual, torch.rand(tokens, generator=generator))


# Left padding


# The released code chooses channels over the batch; tokens are chosen in the first call.
INDEPENDENT = [name for name in tiny.KINDS if load_recipe(name).key.is_batch_independent]
CASES = [(name, (230,)) for name in INDEPENDENT]
CASES += [(name, (3, 20, 230)) for name in INDEPENDENT if not load_recipe(name).chooses_tokens]


@pytest.mark.parametrize(("name", "cuts"), CASES, ids=str)
@pytest.mark.parametrize("options", [{}, {"keep_dense": True}], ids=str)
def test_a_padded_row_stores_and_shows_what_it_does_alone(name, options, cuts):
    recipe, total, steps = load_recipe(name), 230, 140
    alone_states = [make_states(total - skip + steps, seed=row) for row, skip in enumerate(PADDING)]
    descriptions = tuple(marks(total - skip, row) for row, skip in enumerate(PADDING))
    together = QuantizedCache(recipe, 1, **options)
    together.describe_prompt(Prompt(PADDING, descriptions))
    states = padded_batch(list(zip(alone_states, PADDING, strict=True)))
    stops = (*cuts, *range(total + 1, total + steps + 1))
    for start, stop in zip((0, *stops), stops, strict=False):
        seen = feed(together, states, start, stop)
    footprints = []
    for row, skip in enumerate(PADDING):
        alone = QuantizedCache(recipe, 1, **options)
        alone.describe_prompt(Prompt((0,), (descriptions[row],)))
        cut = [max(0, stop - skip) for stop in stops]
        for start, stop in zip([0, *cut], cut, strict=False):
            if stop > start:
                expected = feed(alone, alone_states[row], start, stop)
        for found, whole in zip(seen, expected, strict=True):
            assert torch.equal(found[row : row + 1, :, skip:], whole)
        footprints.append(alone.footprint())
    assert together.footprint() == sum(footprints[1:], footprints[0])
    assert together.get_seq_length() == total + steps


@pytest.mark.parametrize("name", ["fp16", KIVI, VIDKV, "kivi_k2_v2_released"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_of_a_padded_batch_is_that_of_each_prompt(name, attention):
    model = tiny_model("qwen2", attention)
    prompts = [prompt(90, seed=1), prompt(61, seed=2)]
    input_ids = torch.cat([prompts[0], torch.nn.functional.pad(prompts[1], (29, 0))])
    mask = (input_ids > 0).long()
    together, _ = generate(model, input_ids, QuantizedCache.for_model(model, load_recipe(name)), 80, attention_mask=mask)
    for row, alone_ids in enumerate(prompts):
        alone, _ = generate(model, alone_ids, QuantizedCache.for_model(model, load_recipe(name)), 80)
        assert torch.equal(together[row, 90:], alone[0, alone_ids.shape[1] :])


def test_beams_of_a_padded_batch_are_those_of_each_prompt(qwen2):
    prompts = [prompt(90, seed=1), prompt(61, seed=2)]
    input_ids = torch.cat([prompts[0], torch.nn.functional.pad(prompts[1], (29, 0))])
    options = {"num_beams": 3, "attention_mask": (input_ids > 0).long()}
    together, _ = generate(qwen2, input_ids, QuantizedCache.for_model(qwen2, load_recipe(KIVI)), 40, **options)
    for row, alone_ids in enumerate(prompts):
        alone, _ = generate(qwen2, alone_ids, QuantizedCache.for_model(qwen2, load_recipe(KIVI)), 40, num_beams=3)
        assert torch.equal(together[row, 90:], alone[0, alone_ids.shape[1] :])


def test_rows_of_a_padded_batch_are_selected_with_their_padding():
    cache = QuantizedCache(load_recipe(KIVI), 1)
    cache.describe_prompt(Prompt(PADDING))
    states = make_states(100, batch=3)
    feed(cache, states, 0, 99)
    before = cache.layers[0].read(*(tensor[:, :, 99:] for tensor in states))
    order = torch.tensor([2, 0, 2, -2])
    cache.batch_select_indices(order)
    after = cache.layers[0].read(*(tensor[order, :, 99:] for tensor in states))
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[order], new)
    assert [group.padding for group in cache.layers[0].groups] == [0, 7, 40]
    cache.batch_select_indices(torch.tensor([False, True, False, False]))
    assert cache.layers[0].batch_size == 1
    assert [group.padding for group in cache.layers[0].groups] == [0]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0, 0], [1, 1, 1, 1]], "pad prompts on the left"),
        ([[1, 0, 1, 1], [1, 1, 1, 1]], "pad prompts on the left"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "hidden entirely"),
    ],
)
def test_padding_elsewhere_is_refused(qwen2, mask, message):
    cache = QuantizedCache.for_model(qwen2, load_recipe(KIVI))
    with pytest.raises(ValueError, match=message):
        qwen2(input_ids=prompt(4, batch=2), attention_mask=torch.tensor(mask), past_key_values=cache)


def test_padding_is_read_from_masks_of_two_and_four_dimensions():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    causal = torch.ones(4, 4).tril().bool() & mask.bool()[:, None, None, :]
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~causal, torch.finfo(torch.float32).min)
    for given in (mask, mask.bool(), causal, additive):
        assert describe(None, given, set(), (2, 4)).padding == (2, 0)
    assert describe(None, None, set(), (2, 4)).padding == (0, 0)


def test_a_prompt_is_described_before_its_first_tokens_and_for_as_many_sequences():
    cache = QuantizedCache(load_recipe(KIVI), 1)
    cache.describe_prompt(Prompt((0, 1)))
    with pytest.raises(ValueError, match="3 sequences, but the prompt was described as a batch of 2"):
        feed(cache, make_states(64, batch=3), 0, 64)
    feed(cache, make_states(64, batch=2), 0, 64)
    with pytest.raises(ValueError, match="holds 64 tokens; describe the prompt before"):
        cache.describe_prompt(Prompt((0, 0)))


# Visual tokens and their saliency


def test_saliency_is_the_mean_inner_product_with_the_text_after_the_video():
    embeddings = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [4.0, 0.0], [0.0, 1.0]])
    visual = torch.tensor([False, True, True, False, False])
    assert saliency(embeddings, visual)[1:3].tolist() == [2.0, 1.0]
    # No text after the last visual token: all text takes its place.
    assert saliency(embeddings[:3], visual[:3])[1:].tolist() == [9.0, 18.0]
    assert saliency(embeddings[1:3], visual[1:3]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", [STP, RTP, "vidkv_k150_v166_published", "vidkv_k150_v166_released"])
def test_video_prompts_get_a_share_of_their_visual_tokens_protected(loaded, name):  # noqa: F811
    model, (video, _) = loaded
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    cache = QuantizedCache.for_model(model, load_recipe(name))
    model.generate(**video, past_key_values=cache, max_new_tokens=3, do_sample=False)
    handle.remove()
    visual = torch.isin(video["input_ids"][0], torch.tensor([model.config.video_token_id]))
    assert 64 < visual.sum() < len(visual)
    assert torch.equal(cache.prompt.marks[0].visual, visual)
    assert torch.equal(cache.prompt.marks[0].saliency, saliency(seen[0][0], visual))
    for layer in cache.layers:
        (quantized,) = layer.quantized("value")
        tokens = quantized.static["tokens"][0].long()
        assert visual[tokens].all()
        released_count = max(0, max(32, int(visual.sum() * 0.2) // 32 * 32) - 32)
        assert len(tokens) == (released_count if name.endswith("released") else round(visual.sum().item() * 0.2 / 32) * 32)
        if name == STP:
            reachable = cache.prompt.marks[0].saliency[: quantized.length][visual[: quantized.length]]
            assert (reachable > cache.prompt.marks[0].saliency[tokens].min()).sum() == len(tokens) - 1


def test_protected_tokens_change_values_only_and_random_ones_are_others(loaded):  # noqa: F811
    model, (video, _) = loaded
    tokens, keys = {}, {}
    for name in (STP, RTP, VIDKV):
        cache = QuantizedCache.for_model(model, load_recipe(name))
        model.generate(**video, past_key_values=cache, max_new_tokens=2, do_sample=False)
        (value,), (key,) = cache.layers[0].quantized("value"), cache.layers[0].quantized("key")
        tokens[name] = value.static.get("tokens")
        keys[name] = load_recipe(name).key.dequantize(key, torch.float32)
    assert tokens[VIDKV] is None
    assert tokens[STP].shape == tokens[RTP].shape and not torch.equal(tokens[STP], tokens[RTP])
    assert torch.equal(keys[STP], keys[VIDKV]) and torch.equal(keys[RTP], keys[VIDKV])


def test_text_prompts_have_nothing_to_protect(qwen2):
    stp, plain = (generate(qwen2, prompt(), QuantizedCache.for_model(qwen2, load_recipe(name)), 60)[0] for name in (STP, VIDKV))
    assert torch.equal(stp, plain)


def test_later_visual_tokens_are_refused_only_by_recipes_that_choose_among_them(loaded):  # noqa: F811
    model, (video, _) = loaded
    for name, refuses in ((STP, True), (KIVI, False)):
        cache = QuantizedCache.for_model(model, load_recipe(name))
        model.generate(**video, past_key_values=cache, max_new_tokens=2, do_sample=False)
        later = torch.full((1, 4), model.config.video_token_id)
        if refuses:
            with pytest.raises(ValueError, match="visual tokens after the first call"):
                model(input_ids=later, past_key_values=cache)
        else:
            model(inputs_embeds=model.get_input_embeddings()(later), past_key_values=cache)


def test_an_undescribed_prompt_is_refused_by_recipes_that_choose_tokens():
    with pytest.raises(ValueError, match="make the cache with QuantizedCache.for_model"):
        feed(QuantizedCache(load_recipe(STP), 1), make_states(64), 0, 64)

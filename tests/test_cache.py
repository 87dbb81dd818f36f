"""The cache as Transformers sees it: against plain generation, over flushes, batches, turns and crops."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vidkv_eval.cache import Footprint, QuantizedCache
from vidkv_eval.prompt import Prompt
from vidkv_eval.quant.affine import Affine
from vidkv_eval.quant.identity import Identity
from vidkv_eval.quant.marks import TokenMarks
from vidkv_eval.recipe import Recipe, load_recipe

LAYERS, HEADS, WIDTH, VOCABULARY = 2, 2, 32, 97
FP16, KIVI, VIDKV = "fp16", "kivi_k2_v2", "vidkv_k150_v158_scaled"
RESIDUAL = 128


def tiny_model(family, attention="sdpa", dtype=torch.float32):
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=4 * WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=attention, dtype=dtype).eval()


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def qwen2():
    return tiny_model("qwen2")


def prompt(length=70, batch=1, seed=0):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, input_ids, cache=None, new_tokens=60, **options):
    """Tokens and logits of a generation."""
    options = {"do_sample": False, "max_new_tokens": new_tokens, "attention_mask": torch.ones_like(input_ids), **options}
    output = model.generate(input_ids, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options)
    return output.sequences, torch.stack(output.logits)


def make_states(length, batch=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, length, WIDTH, generator=generator).to(dtype) for _ in range(2))


def one_layer_cache(recipe=KIVI, **options):
    """A cache that is told that tokens 3 to 63 of its prompt are visual, in case its recipe chooses among them."""
    cache = QuantizedCache(load_recipe(recipe) if isinstance(recipe, str) else recipe, 1, **options)
    visual = torch.zeros(1000, dtype=torch.bool)
    visual[3:64] = True
    cache.describe_prompt(Prompt((0,), (TokenMarks(visual, torch.linspace(0, 1, 1000).cos()),)))
    return cache


def cache_for(model, name, **options):
    """A cache for a model with stock attention; what some recipes ask of attention is tested with `score_drop`."""
    return QuantizedCache.for_model(model, dataclasses.replace(load_recipe(name), score_drop=0), **options)


def feed(cache, states, start, stop, layer=0):
    """Give tokens start .. stop to a layer; return copies of what attention sees."""
    keys, values = cache.update(states[0][:, :, start:stop], states[1][:, :, start:stop], layer)
    return keys.clone(), values.clone()


def feed_one_by_one(cache, states, start, stop):
    for position in range(start, stop):
        seen = feed(cache, states, position, position + 1)
    return seen


def stored_tensors(quantized):
    own = [*quantized.tensors.values(), *quantized.static.values()]
    return own + [tensor for part in quantized.parts.values() for tensor in stored_tensors(part)]


# Equivalence


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("keep_dense", [False, True])
def test_identity_recipe_generates_what_plain_generation_does(model, batch, keep_dense):
    input_ids = prompt(batch=batch)
    expected, expected_logits = generate(model, input_ids, new_tokens=150)
    cache = QuantizedCache.for_model(model, load_recipe(FP16), keep_dense=keep_dense)
    found, logits = generate(model, input_ids, cache, new_tokens=150)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_identity_recipe_equals_plain_generation_in_every_dtype(attention, dtype):
    model = tiny_model("qwen2", attention, dtype)
    expected, _ = generate(model, prompt(), new_tokens=20)
    found, _ = generate(model, prompt(), QuantizedCache.for_model(model, load_recipe(FP16)), new_tokens=20)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", tiny.KINDS)
def test_dense_working_copy_changes_nothing(qwen2, name):
    input_ids = prompt()
    options = {"new_tokens": 2 * RESIDUAL + 20}  # flushes at steps 122 and 250
    plain = cache_for(qwen2, name, storage_dtype=torch.float16)
    dense = cache_for(qwen2, name, storage_dtype=torch.float16, keep_dense=True)
    expected, expected_logits = generate(qwen2, input_ids, plain, **options)
    found, logits = generate(qwen2, input_ids, dense, **options)
    assert torch.equal(found, expected)
    assert torch.equal(logits, expected_logits)
    assert dense.footprint() == plain.footprint()


@pytest.mark.parametrize("name", tiny.KINDS)
@pytest.mark.parametrize("flush", ["append", "requantize"])
def test_dense_working_copy_shows_the_same_states(name, flush):
    recipe = dataclasses.replace(load_recipe(name), flush=flush)
    plain, dense = one_layer_cache(recipe), one_layer_cache(recipe, keep_dense=True)
    states = make_states(500, batch=2)
    for start, stop in [(0, 70), (70, 71), (71, 330), (330, 331), (331, 420), (420, 421)]:
        for expected, found in zip(feed(plain, states, start, stop), feed(dense, states, start, stop), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", tiny.KINDS)
def test_first_token_never_sees_quantization(qwen2, name):
    _, expected = generate(qwen2, prompt(), new_tokens=1)
    _, logits = generate(qwen2, prompt(), cache_for(qwen2, name), new_tokens=1)
    assert torch.equal(logits, expected)


def test_beam_search_with_identity_recipe_equals_plain_beam_search(qwen2):
    expected, _ = generate(qwen2, prompt(batch=2), new_tokens=40, num_beams=3)
    cache = QuantizedCache.for_model(qwen2, load_recipe(FP16), keep_dense=True)
    found, _ = generate(qwen2, prompt(batch=2), cache, new_tokens=40, num_beams=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [KIVI, VIDKV])
@pytest.mark.parametrize("keep_dense", [False, True])
def test_sequences_of_a_batch_generate_what_they_generate_alone(qwen2, name, keep_dense):
    input_ids = prompt(batch=2)
    together, _ = generate(qwen2, input_ids, QuantizedCache.for_model(qwen2, load_recipe(name), keep_dense=keep_dense), 80)
    for item in range(2):
        alone, _ = generate(qwen2, input_ids[item : item + 1], QuantizedCache.for_model(qwen2, load_recipe(name)), 80)
        assert torch.equal(together[item : item + 1], alone)


def test_second_turn_on_the_same_cache_with_identity_recipe_equals_plain(qwen2):
    first, second = prompt(), prompt(40, seed=1)
    results = []
    for cache in (DynamicCache(), QuantizedCache.for_model(qwen2, load_recipe(FP16))):
        answer, _ = generate(qwen2, first, cache, new_tokens=10)
        results.append(generate(qwen2, torch.cat([answer, second], dim=1), cache, new_tokens=10)[0])
    assert torch.equal(*results)


# When tokens are quantized


@pytest.mark.parametrize("keep_dense", [False, True])
def test_flush_schedule_is_that_of_the_paper(keep_dense):
    cache, states = one_layer_cache(keep_dense=keep_dense), make_states(400)
    feed(cache, states, 0, 70)
    stored = cache.layers[0].stored["key"]
    assert (stored.history_length, stored.residual.shape[2]) == (64, 6)
    feed_one_by_one(cache, states, 70, 191)
    assert (stored.history_length, stored.residual.shape[2]) == (64, 127)
    feed(cache, states, 191, 192)
    assert (stored.history_length, stored.residual.shape[2]) == (192, 0)
    feed_one_by_one(cache, states, 192, 320)
    assert (stored.history_length, stored.residual.shape[2]) == (320, 0)
    assert cache.get_seq_length() == 320


@pytest.mark.parametrize("keep_dense", [False, True])
def test_attention_sees_quantized_history_and_exact_new_tokens(keep_dense):
    recipe, states = load_recipe(VIDKV), make_states(300)
    cache = QuantizedCache(recipe, 1, keep_dense=keep_dense)
    assert all(torch.equal(seen, exact[:, :, :70]) for seen, exact in zip(feed(cache, states, 0, 70), states, strict=True))
    for index, quantizer in enumerate((recipe.key, recipe.value)):
        exact = states[index]
        history = quantizer.quantize(exact[:, :, :64])
        caches = QuantizedCache(recipe, 1, keep_dense=keep_dense)
        feed(caches, states, 0, 70)
        seen = feed_one_by_one(caches, states, 70, 192)[index]  # this step fills the residual: still exact
        assert torch.equal(seen, torch.cat([quantizer.dequantize(history, torch.float32), exact[:, :, 64:192]], dim=2))
        later = quantizer.quantize(exact[:, :, 64:192], like=history)
        seen = feed(caches, states, 192, 193)[index]
        read_back = [quantizer.dequantize(part, torch.float32) for part in (history, later)]
        assert torch.equal(seen, torch.cat([*read_back, exact[:, :, 192:193]], dim=2))


@pytest.mark.parametrize("name", [name for name in tiny.QUANTIZER_RECIPES if load_recipe(name).flush == "append"])
def test_flushes_leave_stored_history_untouched(name):
    cache, states = one_layer_cache(name), make_states(330)
    feed(cache, states, 0, 70)
    stored = cache.layers[0].stored
    before = {side: [tensor.clone() for tensor in stored_tensors(stored[side].quantized)] for side in stored}
    feed(cache, states, 70, 330)
    for side in stored:
        assert stored[side].quantized.length >= 320
        for found, expected in zip(stored_tensors(stored[side].quantized), before[side], strict=True):
            assert torch.equal(found[:, :, : expected.shape[2]] if found.ndim > 3 else found, expected)


@pytest.mark.parametrize("name", [FP16, KIVI, VIDKV])
def test_what_is_stored_does_not_depend_on_how_later_tokens_are_divided(name):
    states = make_states(600)
    reads = []
    for cuts in ([70, 600], [70, 71, 300, 301, 600], [70, *range(71, 601)]):
        cache = one_layer_cache(name)
        for start, stop in zip([0, *cuts], cuts, strict=False):
            feed(cache, states, start, stop)
        reads.append((*feed(cache, make_states(1), 0, 1), cache.footprint()))
    for keys, values, footprint in reads[1:]:
        assert torch.equal(keys, reads[0][0])
        assert torch.equal(values, reads[0][1])
        assert footprint == reads[0][2]


def test_prompts_shorter_than_a_group_stay_in_the_residual(qwen2):
    cache, states = one_layer_cache(), make_states(20)
    feed(cache, states, 0, 20)
    assert cache.layers[0].stored["key"].quantized is None
    assert all(torch.equal(seen[:, :, :20], exact) for seen, exact in zip(feed(cache, make_states(1), 0, 1), states, strict=True))
    expected, _ = generate(qwen2, prompt(20), new_tokens=50)
    found, _ = generate(qwen2, prompt(20), QuantizedCache.for_model(qwen2, load_recipe(KIVI)), new_tokens=50)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("keep_dense", [False, True])
def test_quantized_prefill_sees_what_later_steps_see(keep_dense):
    recipe, states = dataclasses.replace(load_recipe(VIDKV), prefill="quantized"), make_states(71)
    cache = QuantizedCache(recipe, 1, keep_dense=keep_dense)
    first, later = feed(cache, states, 0, 70), feed(cache, states, 70, 71)
    for index in range(2):
        assert torch.equal(first[index], later[index][:, :, :70])
        assert not torch.equal(first[index], states[index][:, :, :70])


@pytest.mark.parametrize("keep_dense", [False, True])
def test_requantize_reads_history_back_and_quantizes_it_again(keep_dense):
    recipe, states = dataclasses.replace(load_recipe(VIDKV), flush="requantize"), make_states(193)
    cache = QuantizedCache(recipe, 1, keep_dense=keep_dense)
    feed(cache, states, 0, 70)
    whole = feed(cache, states, 70, 192)
    seen = feed(cache, states, 192, 193)
    for index, quantizer in enumerate((recipe.key, recipe.value)):
        expected = quantizer.dequantize(quantizer.quantize(whole[index]), torch.float32)
        assert torch.equal(seen[index][:, :, :192], expected)


@pytest.mark.parametrize("length", [20, 70, 96])
def test_values_in_blocks_of_one_token_are_all_quantized_with_the_prompt_and_with_each_flush_if_history_is_requantized(length):
    cache, states = one_layer_cache("kivi_k2_v2_released"), make_states(500, dtype=torch.float16)
    feed(cache, states, 0, length)
    key, value = (cache.layers[0].stored[side] for side in ("key", "value"))
    assert (key.history_length, value.history_length) == (length - length % 32, length)
    flush = length - length % 32 + RESIDUAL
    feed_one_by_one(cache, states, length, flush - 1)
    assert (key.residual.shape[2], value.residual.shape[2]) == (RESIDUAL - 1, flush - 1 - length)
    feed(cache, states, flush - 1, flush)
    assert (key.history_length, value.history_length) == (flush, flush)
    seen = feed(cache, states, flush, 500)
    assert seen[0].shape == seen[1].shape == (1, HEADS, 500, WIDTH)
    feed(cache, make_states(1, dtype=torch.float16), 0, 1)
    assert key.length == value.length == cache.get_seq_length() == 501


def test_no_more_tokens_are_cropped_than_keys_and_values_both_hold_exactly():
    cache, states = one_layer_cache("kivi_k2_v2_released"), make_states(75, dtype=torch.float16)
    feed(cache, states, 0, 70)
    feed(cache, states, 70, 75)
    with pytest.raises(ValueError, match="crop of 6 tokens, but only the newest 5"):
        cache.layers[0].crop(-6)
    cache.layers[0].crop(-5)
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("name", [FP16, KIVI])
def test_storage_dtype_rounds_states_from_the_step_after_they_came(name, keep_dense):
    cache, states = one_layer_cache(name, storage_dtype=torch.float16, keep_dense=keep_dense), make_states(80)
    feed(cache, states, 0, 64)
    feed(cache, states, 64, 70)
    seen = feed(cache, states, 70, 71)
    for found, exact in zip(seen, states, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found[:, :, 64:70], exact[:, :, 64:70].half().float())
        assert torch.equal(found[:, :, 70:], exact[:, :, 70:71])


# Bytes


def test_sixteen_bit_storage_is_sixteen_bits():
    cache = one_layer_cache(FP16, storage_dtype=torch.float16)
    feed(cache, make_states(70), 0, 70)
    assert cache.footprint() == Footprint(2 * 70 * HEADS * WIDTH, 2 * 70 * HEADS * WIDTH, 70 * HEADS * WIDTH, 70 * HEADS * WIDTH)
    assert cache.footprint().effective_bits == 16


@pytest.mark.parametrize(
    ("name", "key_bits", "value_bits"),
    [
        # codes + (scale and minimum) / 32
        ("kivi_k2_v2", 2 + 32 / 32, 2 + 32 / 32),
        ("kivi_k1_v1", 1 + 32 / 32, 1 + 32 / 32),
        ("vidkv_k200_v200", 2 + 32 / 32, 2 + 32 / 32),
        # codes + scale / 32
        ("vidkv_k100_v100_published", 1 + 16 / 32, 1 + 16 / 32),
        # half 2-bit, half 1-bit with mean and scale, and 16 one-byte channel indices for 2 heads of 64 tokens of 32 channels;
        # 1024 trits in 205 bytes, and a scale
        ("vidkv_k150_v158_scaled", (3 + 2) / 2 + 16 * 8 / (HEADS * 64 * WIDTH), 205 * 8 / 1024 + 16 / 32),
        # half 1-bit with scale; trits alone
        ("vidkv_k150_v158_published", (3 + 1.5) / 2 + 16 * 8 / (HEADS * 64 * WIDTH), 205 * 8 / 1024),
    ],
)
def test_effective_bits_by_hand(name, key_bits, value_bits):
    cache, states = one_layer_cache(name, storage_dtype=torch.float16), make_states(70)
    feed(cache, states, 0, 64)
    assert cache.footprint().key_bits == key_bits
    assert cache.footprint().value_bits == value_bits
    assert cache.footprint().effective_bits == (key_bits + value_bits) / 2
    feed(cache, states, 64, 70)
    assert cache.footprint().key_bits == (64 * key_bits + 6 * 16) / 70


def test_footprint_counts_all_layers_and_sequences():
    cache = QuantizedCache(load_recipe(KIVI), 3)
    assert cache.footprint() == Footprint()
    for layer in range(3):
        feed(cache, make_states(64, batch=2), 0, 64, layer)
    assert cache.footprint().key_elements == 3 * 2 * HEADS * 64 * WIDTH
    assert cache.footprint().effective_bits == 3


# The rest of the Transformers interface


def test_lengths_and_masks_are_those_of_a_plain_cache():
    cache, plain, states = one_layer_cache(), DynamicCache(), make_states(200)
    for start, stop in [(0, 70), (70, 71), (71, 200)]:
        assert cache.get_mask_sizes(stop - start, 0) == plain.get_mask_sizes(stop - start, 0)
        feed(cache, states, start, stop)
        feed(plain, states, start, stop)
        assert cache.get_seq_length() == plain.get_seq_length() == stop
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    assert cache.is_initialized


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("name", [FP16, VIDKV])
@pytest.mark.parametrize(
    ("change", "order"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ],
    ids=["reorder", "repeat", "select", "mask"],
)
def test_batch_operations_move_whole_sequences(name, keep_dense, change, order):
    changed, states = one_layer_cache(name, keep_dense=keep_dense), make_states(300, batch=3)
    expected = one_layer_cache(name)
    feed(changed, states, 0, 70)
    feed(changed, states, 70, 71)
    change(changed)
    moved = tuple(tensor[order] for tensor in states)
    feed(expected, moved, 0, 70)
    feed(expected, moved, 70, 71)
    for start, stop in [(71, 72), (72, 290), (290, 291)]:
        for found, wanted in zip(feed(changed, moved, start, stop), feed(expected, moved, start, stop), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("keep_dense", [False, True])
def test_crop_within_the_residual_forgets_tokens(keep_dense):
    cropped, states = one_layer_cache(keep_dense=keep_dense), make_states(100)
    expected = one_layer_cache()
    feed(cropped, states, 0, 70)
    feed(cropped, make_states(5, seed=9), 0, 3)
    feed(cropped, make_states(5, seed=9), 3, 5)
    cropped.crop(-5)
    assert cropped.get_seq_length() == 70
    feed(expected, states, 0, 70)
    for found, wanted in zip(feed(cropped, states, 70, 72), feed(expected, states, 70, 72), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("keep_dense", [False, True])
def test_a_cache_cropped_to_nothing_is_like_a_new_one(keep_dense):
    cache, states = one_layer_cache(keep_dense=keep_dense), make_states(70)
    feed(cache, make_states(10, seed=9), 0, 9)
    feed(cache, make_states(10, seed=9), 9, 10)
    cache.crop(-10)
    assert cache.get_seq_length() == 0
    feed(cache, states, 0, 20)
    assert all(torch.equal(seen, exact[:, :, :21]) for seen, exact in zip(feed(cache, states, 20, 21), states, strict=True))


def test_crop_beyond_the_residual_is_refused():
    cache, states = one_layer_cache(), make_states(70)
    feed(cache, states, 0, 70)
    with pytest.raises(ValueError, match="crop of 7 tokens, but only the newest 6"):
        cache.crop(-7)
    with pytest.raises(ValueError, match="negative number, found 3"):
        cache.crop(3)


@pytest.mark.parametrize("keep_dense", [False, True])
def test_reset_makes_a_fresh_cache(keep_dense):
    cache = one_layer_cache(VIDKV, keep_dense=keep_dense)
    feed(cache, make_states(200, batch=2, seed=5), 0, 200)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.footprint() == Footprint()
    fresh, states = one_layer_cache(VIDKV), make_states(200)
    for start, stop in [(0, 70), (70, 199), (199, 200)]:
        for found, wanted in zip(feed(cache, states, start, stop), feed(fresh, states, start, stop), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("index", "side"), [(0, "key"), (1, "value")])
def test_states_that_are_not_finite_are_refused_naming_layer_and_tensor(bad, index, side):
    cache, states = QuantizedCache(load_recipe(VIDKV), 2), make_states(64)
    states[index][0, 1, 3, 4] = bad
    with pytest.raises(ValueError, match=f"layer 1, {side} states cannot be quantized: they hold NaN or infinity"):
        feed(cache, states, 0, 64, layer=1)


def test_states_too_large_for_metadata_are_refused_naming_layer_and_tensor():
    with pytest.raises(ValueError, match="layer 0, key states cannot be quantized: .* float16 metadata holds at most 65504"):
        feed(one_layer_cache(), tuple(1e6 * states for states in make_states(64)), 0, 64)


def test_states_of_another_batch_size_are_refused():
    cache = one_layer_cache()
    feed(cache, make_states(64, batch=2), 0, 64)
    with pytest.raises(ValueError, match="1 sequences for a cache that holds 2"):
        feed(cache, make_states(1), 0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.KINDS)
def test_every_recipe_generates_in_half_precision(name, dtype):
    model = tiny_model("qwen2", dtype=dtype)
    cache = cache_for(model, name)
    found, logits = generate(model, prompt(), cache, new_tokens=5)
    assert found.shape == (1, 75)
    assert logits.isfinite().all()


def test_different_blocks_of_keys_and_values_share_their_history_length():
    recipe = Recipe("mixed", "mixed", "test", Affine(2, "per_channel", 16), Identity(), residual_length=32)
    cache = QuantizedCache(recipe, 1)
    feed(cache, make_states(70), 0, 70)
    assert {side: stored.history_length for side, stored in cache.layers[0].stored.items()} == {"key": 64, "value": 64}


@pytest.mark.parametrize(
    "config",
    [Qwen2Config(num_hidden_layers=3), LlamaConfig(num_hidden_layers=3), LlavaOnevisionConfig(), Qwen2_5_VLConfig()],
    ids=lambda config: config.model_type,
)
def test_cache_has_a_layer_for_each_layer_of_the_text_decoder(config):
    text_config = config.get_text_config(decoder=True)
    text_config.num_hidden_layers = 3
    model = torch.nn.Module()
    model.config = config
    assert len(QuantizedCache.for_model(model, load_recipe(KIVI))) == 3


def test_models_without_attention_in_a_layer_are_refused():
    config = Qwen2Config(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layers of type linear_attention; QuantizedCache serves full_attention, sliding_attention"):
        QuantizedCache.for_model(SimpleNamespace(config=config), load_recipe(KIVI))


# Assisted decoding


@pytest.mark.parametrize("name", [FP16, KIVI, VIDKV])
def test_assisted_decoding_crops_what_was_guessed_wrong(qwen2, name):
    input_ids = prompt(90)
    guesses = {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1}
    cropped = []
    cache = QuantizedCache.for_model(qwen2, load_recipe(name), keep_newest=7)
    plain_crop = cache.crop
    cache.crop = lambda tokens: cropped.append(tokens) or plain_crop(tokens)
    found = qwen2.generate(input_ids, past_key_values=cache, do_sample=False, max_new_tokens=70, **guesses)
    assert min(cropped) < 0
    assert cache.get_seq_length() == found.shape[1] - 1
    if name == FP16:
        assert torch.equal(found, generate(qwen2, input_ids, new_tokens=70)[0])
    assert cache.footprint().key_elements == LAYERS * HEADS * WIDTH * (found.shape[1] - 1)


def test_tokens_that_were_cropped_leave_no_trace():
    states = make_states(400, seed=3)
    caches = [one_layer_cache(keep_newest=7) for _ in range(2)]
    for start, stop in [(0, 100), (100, 220), (220, 263)]:
        for cache in caches:
            feed(cache, states, start, stop)
        feed(caches[1], make_states(6, seed=stop), 0, 6)
        caches[1].crop(-6)
    for expected, seen in zip(*(feed(cache, states, 263, 264) for cache in caches), strict=True):
        assert torch.equal(seen, expected)


def test_crop_says_what_to_do_when_the_tokens_are_already_quantized(qwen2):
    cache = QuantizedCache.for_model(qwen2, load_recipe(KIVI))
    with pytest.raises(ValueError, match="keep_newest=6 or more, as assisted decoding needs it"):
        feed(cache, make_states(96), 0, 96)
        cache.layers[0].crop(-6)


@pytest.mark.parametrize("bad", [-1, 1.5, None])
def test_keep_newest_is_a_number_of_tokens(bad):
    with pytest.raises(ValueError, match="keep_newest is .*; allowed: integers from 0"):
        one_layer_cache(keep_newest=bad)


@pytest.mark.parametrize("name", tiny.KINDS)
def test_the_newest_tokens_stay_exact_through_every_flush(name):
    recipe, states = load_recipe(name), make_states(400, dtype=torch.float16)
    cache = one_layer_cache(name, keep_newest=9)
    cuts = [100, 101, 230, 231, 240, 360, 361, 399, 400]
    for start, stop in zip([0, *cuts], cuts, strict=False):
        for seen, exact in zip(feed(cache, states, start, stop), states, strict=True):
            newest = max(0, start - 9)
            assert torch.equal(seen[:, :, newest:], exact[:, :, newest:stop])
    if recipe.key.nominal_bits < 16:
        assert not torch.equal(seen[:, :, :380], states[1][:, :, :380])


# Nothing in full precision is read that is not stored


@pytest.mark.parametrize("name", [name for name in tiny.KINDS if name != FP16])
@pytest.mark.parametrize("keep_newest", [0, 5])
def test_nothing_reads_full_precision_states_again_or_rooms_that_are_not_filled(name, keep_newest):
    states = make_states(500, dtype=torch.float16)
    caches = [one_layer_cache(name, keep_newest=keep_newest) for _ in range(2)]
    for start, stop in [(0, 70), (70, 71), (71, 330), (330, 331), (331, 420), (420, 421)]:
        given = tuple(tensor[:, :, start:stop].clone() for tensor in states)
        expected = feed(caches[0], states, start, stop)
        found = tuple(tensor.clone() for tensor in caches[1].update(*given, 0))
        for seen, exact in zip(found, expected, strict=True):
            assert torch.equal(seen, exact)
        for tensor in given:
            tensor.fill_(float("nan"))
        for stored in caches[1].layers[0].stored.values():
            stored._residual_buffer[:, :, stored.residual.shape[2] :] = float("nan")
            poison_spare_room(stored._history)


def poison_spare_room(growing):
    """Fill what lies behind the stored tensors, in this form and its parts, with NaN or the largest code."""
    for name, buffer in growing._buffers.items():
        buffer[:, :, growing._used[name] :] = float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max
    for part in growing._parts.values():
        poison_spare_room(part)

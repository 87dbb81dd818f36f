"""Attention over packed history against the same cache with dequantized states: what is read, generated text, bytes, fallbacks."""

import dataclasses
import gc
import importlib
import logging
import types
import weakref

import pytest
import tiny
import torch
from test_cache import generate, make_states, prompt, tiny_model
from test_references import PACKABLE, UNPACKABLE
from transformers import Qwen2Config, Qwen2ForCausalLM

from vidkv_eval import cache as cache_module
from vidkv_eval import fused_states
from vidkv_eval.attention import FUSED, GROUPED, fused, use_attention
from vidkv_eval.cache import Footprint, FusedGroup, QuantizedCache
from vidkv_eval.fused_states import PackedStep
from vidkv_eval.graphs import KNOWN, StepGraphs, _Captured
from vidkv_eval.harness import Session
from vidkv_eval.library_cache import make_cache
from vidkv_eval.prompt import Prompt
from vidkv_eval.quant.marks import TokenMarks
from vidkv_eval.recipe import load_recipe
from vidkv_eval.settings import PROJECT, compose
from vidkv_eval.shared_lengths import SharedLengths
from vidkv_kernels import attend_cuda
from vidkv_kernels.attend import attend_reference
from vidkv_kernels.fragment_history import FragmentHistory
from vidkv_kernels.packed import PackedLayer

HEADS, WIDTH = 2, 32
KIVI, SCALED, PROTECTED, OURS = "kivi_k2_v2", "vidkv_k150_v158_scaled", "vidkv_k150_v166_scaled", "ours_k182_v158"
FORMS = [KIVI, "kivi_k1_v1", SCALED, "vidkv_k150_v158_published", "vidkv_k150_v158_tokenvalue_scaled", PROTECTED]
FORMS += [OURS]
FUSED_SETTINGS = ["model.attn_implementation=fused", "profile.cache.rows=null", "profile.cache.keep_dense=false"]
CUTS = [(0, 70), (70, 71), (71, 330), (330, 331), (331, 420), (420, 421), (421, 422)]


@pytest.fixture(scope="module")
def model():
    model = tiny_model("qwen2")
    use_attention(model, FUSED)
    return model


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """What is said of recipes that kernels do not read; nothing, unless a test clears it."""
    messages = []
    fused_states.say_once.cache_clear()
    logger = logging.getLogger(fused_states.__name__)
    monkeypatch.setattr(logger, "warning", lambda message, *arguments: messages.append(message % arguments))
    yield messages
    assert not messages


def one_layer_cache(name, **options):
    """A cache that is told that tokens 3 to 63 of its prompt are visual, in case its recipe chooses among them."""
    cache = QuantizedCache(load_recipe(name) if isinstance(name, str) else name, 1, **options)
    visual = torch.zeros(1000, dtype=torch.bool)
    visual[3:64] = True
    cache.describe_prompt(Prompt((0,), (TokenMarks(visual, torch.linspace(0, 1, 1000).cos()),)))
    return cache


def feed(cache, states, start, stop):
    """Give tokens start .. stop; return copies of what attention reads, dequantized where it is packed."""
    keys, values = cache.update(states[0][:, :, start:stop], states[1][:, :, start:stop], 0)
    if isinstance(keys, PackedStep):
        assert keys is values
        keys, values = keys.dense()
    return keys.clone(), values.clone()


def assert_same(found, expected):
    """Equal to rounding of float32: spectra are undone by a matrix product instead of a Fourier transform."""
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * right.abs().max().item())


def set_visual(cache, length):
    """Let a cache take tokens of a text prompt for visual ones, as `tiny_model` has none."""
    visual = torch.zeros(length, dtype=torch.bool)
    visual[3:64] = True
    cache.describe_prompt = lambda _: QuantizedCache.describe_prompt(cache, Prompt((0,), (TokenMarks(visual, torch.arange(length) % 7.0),)))
    return cache


# What is read


@pytest.mark.parametrize("name", PACKABLE)
def test_what_is_read_back_is_what_the_dense_cache_reads_back(name):
    plain, packed = one_layer_cache(name), one_layer_cache(name, fused=True)
    states = make_states(500)
    for start, stop in CUTS:
        assert_same(feed(packed, states, start, stop), feed(plain, states, start, stop))
    assert isinstance(packed.layers[0].groups[0], FusedGroup)


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("storage_dtype", [None, torch.float16], ids=str)
def test_a_step_is_attention_over_what_the_dense_cache_reads_back(name, storage_dtype):
    plain = one_layer_cache(name, storage_dtype=storage_dtype)
    packed = one_layer_cache(name, storage_dtype=storage_dtype, fused=True)
    states = make_states(330)
    module = torch.nn.Module()
    for start, stop in [(0, 70), *((position, position + 1) for position in range(70, 75)), (75, 191), (191, 192), (192, 193)]:
        keys, values = feed(plain, states, start, stop)
        step, same = packed.update(*(tensor[:, :, start:stop] for tensor in states), 0)
        assert step is same if stop - start == 1 else not isinstance(step, PackedStep)
        if stop - start == 1:
            poison_spare_room(step)
            query = torch.randn(1, 3 * HEADS, 1, WIDTH)
            found, _ = fused(module, query, step, step, None, 0.3)
            expected, _ = fused(module, query, keys, values, None, 0.3)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    history = step.states.history
    assert history.keys.codes.shape[2] * 32 > history.max_length == 192, "the test needs a history with spare room"


def poison_spare_room(step):
    """Fill what lies behind residual and history with NaN, the largest code, or a place where no token is."""
    history = step.states.history
    for tensor in step.states._buffers.values():
        tensor[:, :, step.states.residual_length :] = float("nan")
    parts = [(history.keys, history.max_length, history.keys.codes.shape[2] * 32)]
    parts += [(run, int(run.lengths[0]), run.entries) for run in history.values]
    for part, held, room in parts:
        for tensor in (part.codes, part.scale, part.offset):
            if tensor is not None:
                poison = {torch.int32: -1, torch.uint8: 255}.get(tensor.dtype, float("nan"))
                tensor[:, :, tensor.shape[2] * held // room :] = poison
        if getattr(part, "tokens", None) is not None:
            part.tokens[:, held:] = 1 << 30


# Models


@pytest.mark.parametrize("name", PACKABLE)
def test_generated_tokens_are_those_of_the_dense_cache(model, name, monkeypatch):
    steps = []
    attend = PackedStep.attend
    monkeypatch.setattr(PackedStep, "attend", lambda *arguments: steps.append(1) or attend(*arguments))
    recipe = dataclasses.replace(load_recipe(name), residual_length=32)
    input_ids, new_tokens = prompt(70), 36  # a flush at step 26
    caches = [set_visual(QuantizedCache.for_model(model, recipe, fused=is_fused), 70) for is_fused in (False, True)]
    expected, expected_logits = generate(model, input_ids, caches[0], new_tokens)
    assert not steps
    found, logits = generate(model, input_ids, caches[1], new_tokens)
    assert len(steps) == 2 * (new_tokens - 1)
    assert torch.equal(found, expected)
    # Sums of float32 in another order, through two layers. They may put a state on the other side of a level when it is
    # quantized, which shows from then on; logits are as large as 15.
    torch.testing.assert_close(logits[:26], expected_logits[:26], rtol=1e-3, atol=1e-3)
    assert (logits - expected_logits).abs().max() < 0.02


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_a_step_errs_no_more_than_attention_over_dequantized_states(name, dtype):
    plain, packed, states = one_layer_cache(name), one_layer_cache(name, fused=True), make_states(260, dtype=dtype)
    for cache in (plain, packed):
        cache.update(*(tensor[:, :, :220] for tensor in states), 0)
    module, errors, rounding = torch.nn.Module(), [], []
    for position in range(220, 260):
        new = tuple(tensor[:, :, position : position + 1] for tensor in states)
        keys, values = plain.update(*new, 0)
        step, _ = packed.update(*new, 0)
        query = torch.randn(1, 3 * HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(position)).to(dtype)
        exact = step_in_float32(step, query)
        outputs = (fused(module, query, step, step, None, 0.3)[0], fused(module, query, keys, values, None, 0.3)[0])
        errors.append([(output.float() - exact).abs().max().item() for output in outputs])
        rounding.append(torch.finfo(dtype).eps * exact.abs().max().item())
    fused_error, dense_error = torch.tensor(errors).amax(0)
    # As for kernels: twice the error of plain torch in the same precision, and one rounding step.
    assert fused_error <= 2 * dense_error + max(rounding)


def step_in_float32(step, query):
    """What the step means, without rounding of states or sums to half precision."""
    keys, values = step.states.history.unpack()
    residual = step.states.residual()
    residual = dataclasses.replace(residual, keys=residual.keys.float(), values=residual.values.float())
    return attend_reference(query.float(), PackedLayer(keys, values, residual), 0.3).transpose(1, 2)


@pytest.mark.parametrize("name", [KIVI, PROTECTED])
def test_a_model_in_bfloat16_differs_less_from_the_dense_cache_than_two_dense_ways_from_each_other(name):
    """Tokens cannot be compared: in bfloat16 the two attention functions of Transformers already give other tokens."""
    input_ids = prompt(230, seed=4)
    logits = {}
    for attention in ("sdpa", "eager", FUSED):
        model = tiny_model("qwen2", dtype=torch.bfloat16)
        use_attention(model, attention)
        logits[attention] = feed_model(model, set_visual(QuantizedCache.for_model(model, load_recipe(name)), 70), input_ids, 70)

    def distance(left, right):
        return (logits[left] - logits[right]).square().mean().sqrt()

    assert torch.equal(logits[FUSED][0], logits["sdpa"][0])
    assert distance(FUSED, "sdpa") <= distance("sdpa", "eager")


@torch.no_grad()
def feed_model(model, cache, input_ids, prompt_tokens):
    """Logits after a prompt and after each further token, whatever the model would have said."""
    cuts = [0, *range(prompt_tokens, input_ids.shape[1] + 1)]
    steps = (input_ids[:, start:stop] for start, stop in zip(cuts, cuts[1:], strict=False))
    return torch.stack([model(step, past_key_values=cache).logits[:, -1].float() for step in steps])


@pytest.mark.parametrize("name", [KIVI, SCALED])
def test_sequences_of_a_batch_and_beams_generate_what_they_do_with_the_dense_cache(model, name):
    for options in ({}, {"num_beams": 3}):
        input_ids = prompt(100, batch=2)
        caches = [QuantizedCache.for_model(model, load_recipe(name), fused=is_fused) for is_fused in (False, True)]
        expected, found = (generate(model, input_ids, cache, 40, **options)[0] for cache in caches)
        assert torch.equal(found, expected)
        assert all(isinstance(layer.groups[0], FusedGroup) for layer in caches[1].layers)


def test_a_second_turn_and_assisted_decoding_give_what_they_do_with_the_dense_cache(model):
    found = []
    for is_fused in (False, True):
        cache = QuantizedCache.for_model(model, load_recipe(SCALED), fused=is_fused)
        answer, _ = generate(model, prompt(100), cache, 50)
        answer, _ = generate(model, torch.cat([answer, prompt(40, seed=1)], dim=1), cache, 20)
        guessing = QuantizedCache.for_model(model, load_recipe(KIVI), fused=is_fused, keep_newest=7)
        guesses = {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1}
        guessed = model.generate(prompt(90), past_key_values=guessing, do_sample=False, max_new_tokens=70, **guesses)
        found.append((answer.tolist(), guessed.tolist(), cache.get_seq_length()))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", [KIVI, SCALED, PROTECTED])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_padded_prompts_generate_what_they_do_with_the_dense_cache(model, name, options, monkeypatch):
    steps, attend = [], PackedStep.attend
    monkeypatch.setattr(PackedStep, "attend", lambda *arguments: steps.append(1) or attend(*arguments))
    # Of 100, 70 and 20 tokens: the last is quantized for the first time when its residual is full.
    paddings, length, new_tokens, beams = [0, 30, 80], 100, 140, options.get("num_beams", 1)
    input_ids, mask = prompt(length, batch=3), torch.ones(3, length, dtype=torch.int64)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    found = []
    for is_fused in (False, True):
        cache = QuantizedCache.for_model(model, load_recipe(name), fused=is_fused)
        marks = []
        for count in (length - padding for padding in paddings for _ in range(beams)):
            visual = torch.zeros(count, dtype=torch.bool)
            visual[3 : count - 10] = True
            marks.append(TokenMarks(visual, torch.arange(count) % 7.0))
        described = Prompt(tuple(padding for padding in paddings for _ in range(beams)), tuple(marks))
        cache.describe_prompt = lambda _, cache=cache, described=described: QuantizedCache.describe_prompt(cache, described)
        found.append((*generate(model, input_ids, cache, new_tokens, attention_mask=mask, **options), cache.layers[0].footprint()))
    (expected, expected_logits, dense), (tokens, logits, packed) = found
    assert len(steps) == 2 * (new_tokens - 1)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=2e-3)
    assert packed.key_elements == dense.key_elements and packed.key_bytes >= dense.key_bytes


def test_a_mask_that_hides_tokens_is_obeyed(model):
    step = None
    caches = [one_layer_cache(SCALED, fused=is_fused) for is_fused in (False, True)]
    states = make_states(71)
    for cache in caches:
        feed(cache, states, 0, 70)
    keys, values = feed(caches[0], states, 70, 71)
    step, _ = caches[1].update(*(tensor[:, :, 70:] for tensor in states), 0)
    mask = torch.ones(1, 1, 1, 71, dtype=torch.bool)
    mask[..., :20] = False
    query, module = torch.randn(1, 6, 1, WIDTH), torch.nn.Module()
    found, expected = fused(module, query, step, step, mask, 0.3)[0], fused(module, query, keys, values, mask, 0.3)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, fused(module, query, keys, values, None, 0.3)[0])


def test_attention_that_does_not_know_packed_states_fails_on_them_instead_of_reading_less(model):
    cache = QuantizedCache(load_recipe(KIVI), 2, fused=True)
    stock = tiny_model("qwen2")
    with pytest.raises((TypeError, AttributeError)):
        generate(stock, prompt(100), cache, 5)
    with pytest.raises(ValueError, match="a fused cache needs attention 'fused', and the model has 'sdpa'"):
        QuantizedCache.for_model(stock, load_recipe(KIVI), fused=True)


@pytest.mark.parametrize("name", ["mini_llava_onevision", "mini_qwen2_5_vl"])
def test_mini_models_say_what_they_say_with_the_dense_cache(name, monkeypatch):
    settings = compose(["profile=mini", f"model={name}", "benchmark=video_dc", *FUSED_SETTINGS])
    session = Session(settings["model"], settings["benchmark"], settings["profile"]["data"], device="cpu", limit=2)
    recipes, steps, attend = [load_recipe(KIVI), load_recipe(SCALED)], [], PackedStep.attend
    monkeypatch.setattr(PackedStep, "attend", lambda *arguments: steps.append(1) or attend(*arguments))
    answers, given = {}, set()
    graphs = session.adapter.model.get_decoder().forward
    forward = graphs.forward

    def noting(**arguments):
        given.update(name for name, value in arguments.items() if value is not None)
        return forward(**arguments)

    graphs.forward = noting
    for attention in (FUSED, GROUPED):
        if attention == GROUPED:
            graphs.forward = forward
            # On a GPU, where steps are repeated as graphs, these models are called with nothing that graphs do not know.
            assert given <= KNOWN
            use_attention(session.adapter.model, GROUPED)
            assert not isinstance(session.adapter.model.get_decoder().forward, StepGraphs)
        answers[attention] = [answer for sample in (0, 1) for answer in session.answer(sample, recipes, settings["profile"]["cache"])]
        layers = session.adapter.model.config.get_text_config().num_hidden_layers
        assert len(steps) == layers * sum(answer.output_tokens - 1 for answer in answers[FUSED])
    assert [answer.text for answer in answers[FUSED]] == [answer.text for answer in answers[GROUPED]]
    # An order of all channels takes more room than a list of wide ones.
    assert all(packed.key_bytes >= dense.key_bytes for packed, dense in zip(*answers.values(), strict=True))


def test_lengths_that_layers_share_keep_their_place_and_are_right():
    lengths, cpu = SharedLengths(), torch.device("cpu")
    first = lengths.on(cpu, (3, 4))
    for wanted in [(3, 4), (4, 5), (7, 7), (1, 9), (0, 8), (2, 2)]:
        assert lengths.on(cpu, wanted) is first and first.tolist() == list(wanted)
    assert lengths.on(cpu, (1, 2, 3)).tolist() == [1, 2, 3]


# Batch operations, crops and resets


@pytest.mark.parametrize("name", [KIVI, SCALED])
@pytest.mark.parametrize("length", [71, 192])  # at 192 tokens a full residual is yet to be quantized
@pytest.mark.parametrize(
    ("change", "order"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ],
    ids=["reorder", "repeat", "mask"],
)
def test_batch_operations_move_whole_sequences(name, length, change, order):
    changed, expected, states = one_layer_cache(name, fused=True), one_layer_cache(name), make_states(400, batch=3)
    moved = tuple(tensor[order] for tensor in states)
    for cache, given in ((changed, states), (expected, moved)):
        feed(cache, given, 0, 70)
        for position in range(70, length):
            feed(cache, given, position, position + 1)
    change(changed)
    for start, stop in [(length, length + 1), (length + 1, 330), (330, 331)]:
        assert_same(feed(changed, moved, start, stop), feed(expected, moved, start, stop))


def test_crop_within_the_residual_forgets_tokens():
    cropped, expected, states = one_layer_cache(KIVI, fused=True), one_layer_cache(KIVI), make_states(100)
    feed(cropped, states, 0, 70)
    for position in range(5):
        feed(cropped, make_states(5, seed=9), position, position + 1)
    cropped.crop(-5)
    feed(expected, states, 0, 70)
    for start, stop in [(70, 71), (71, 73), (73, 74)]:
        assert_same(feed(cropped, states, start, stop), feed(expected, states, start, stop))
    with pytest.raises(ValueError, match="crop of 11 tokens, but only the newest 10"):
        cropped.crop(-11)


def test_a_full_residual_cannot_be_cropped_any_more_as_in_the_dense_cache():
    for is_fused in (False, True):
        cache, states = one_layer_cache(KIVI, fused=is_fused), make_states(192)
        feed(cache, states, 0, 70)
        for position in range(70, 192):
            feed(cache, states, position, position + 1)
        with pytest.raises(ValueError, match="only the newest 0"):
            cache.crop(-1)


def test_reset_makes_a_fresh_cache():
    cache, fresh, states = one_layer_cache(SCALED, fused=True), one_layer_cache(SCALED, fused=True), make_states(200)
    feed(cache, make_states(200, batch=2, seed=5), 0, 200)
    cache.reset()
    assert (cache.get_seq_length(), cache.footprint()) == (0, Footprint())
    for start, stop in [(0, 70), (70, 199), (199, 200)]:
        for found, expected in zip(feed(cache, states, start, stop), feed(fresh, states, start, stop), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("step", [1, 122])
def test_states_that_are_not_finite_are_refused_naming_layer_and_tensor(step):
    cache, states = one_layer_cache(SCALED, fused=True), make_states(193)
    states[1][0, 1, 130, 4] = float("nan")
    feed(cache, states, 0, 70)
    with pytest.raises(ValueError, match="layer 0, value states cannot be quantized: they hold NaN or infinity"):
        for start in range(70, 193, step):
            feed(cache, states, start, start + step)


# Bytes


def test_bytes_by_hand():
    cache, states = one_layer_cache(SCALED, storage_dtype=torch.float16, fused=True), make_states(192)
    feed(cache, states, 0, 70)
    channels, half = WIDTH, WIDTH // 2
    # half 2 bits and half 1 bit; scale and offset of 2 bytes for 32 tokens; the order of channels, and the list of 16 wide ones
    keys = HEADS * 64 * (2 * half + half) // 8 + HEADS * 2 * channels * 4 + channels + half
    # ternary codes in 2 bits, a scale, and the number of tokens
    values = HEADS * 64 * channels * 2 // 8 + HEADS * 2 * channels * 2 + 4
    residual = HEADS * 6 * channels * 2
    elements = HEADS * 70 * channels
    assert cache.footprint() == Footprint(keys + residual, values + residual, elements, elements)
    for position in range(70, 192):
        feed(cache, states, position, position + 1)
    # Twice more codes and metadata; no residual is left.
    keys += 2 * (HEADS * 64 * (2 * half + half) // 8 + HEADS * 2 * channels * 4)
    values += 2 * (HEADS * 64 * channels * 2 // 8 + HEADS * 2 * channels * 2)
    assert cache.footprint() == Footprint(keys, values, HEADS * 192 * channels, HEADS * 192 * channels)


@pytest.mark.parametrize("cuts", [[70, 600], [70, 71, 300, 301, 600], [70, *range(71, 601)]], ids=len)
def test_what_is_stored_does_not_depend_on_how_later_tokens_are_divided(cuts):
    cache, states = one_layer_cache(PROTECTED, fused=True), make_states(600)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        feed(cache, states, start, stop)
    plain = one_layer_cache(PROTECTED)
    feed(plain, states, 0, 70)
    feed(plain, states, 70, 600)
    assert_same(feed(cache, make_states(1), 0, 1), feed(plain, make_states(1), 0, 1))
    whole = one_layer_cache(PROTECTED, fused=True)
    feed(whole, states, 0, 70)
    feed(whole, states, 70, 600)
    feed(whole, make_states(1), 0, 1)
    assert cache.footprint() == whole.footprint()


@pytest.mark.parametrize("name", [KIVI, PROTECTED])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_cache_frees_its_memory_when_it_is_deleted(name, is_fused):
    cache, states = one_layer_cache(name, fused=is_fused), make_states(200)
    for start, stop in [(0, 70), (70, 71), (71, 199), (199, 200)]:
        feed(cache, states, start, stop)
    held = weakref.ref(cache.layers[0].groups[0].states if is_fused else cache.layers[0].groups[0].stored["key"])
    gc.disable()
    try:
        del cache
        assert held() is None, "something in the cache refers to what holds it"
    finally:
        gc.enable()


# What kernels do not read


@pytest.mark.parametrize("name", UNPACKABLE)
def test_a_recipe_that_kernels_do_not_read_says_so_once_and_is_read_dequantized(name, said):
    dtype = torch.float16
    plain, states = one_layer_cache(name), make_states(300, dtype=dtype)
    cache = one_layer_cache(name, fused=True)
    seen = [feed(cache, states, start, stop) for start, stop in [(0, 70), (70, 71), (71, 299), (299, 300)]]
    feed(one_layer_cache(name, fused=True), states, 0, 70)
    (message,) = said
    said.clear()
    assert message.startswith(f"{name}: attention reads dequantized states instead of packed ones, because ")
    for found, (start, stop) in zip(seen, [(0, 70), (70, 71), (71, 299), (299, 300)], strict=True):
        for left, right in zip(found, feed(plain, states, start, stop), strict=True):
            assert torch.equal(left, right)
    assert cache.footprint() == plain.footprint()


def test_a_cache_of_the_library_says_so_and_is_read_as_ever(model, said):
    name = tiny.LIBRARY_RECIPES[0]
    make_cache(model, load_recipe(name))
    assert [message.startswith(f"{name}: ") for message in said] == [True]
    said.clear()


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"prefill": "quantized"}, {}, "prefill is quantized and flush is append"),
        ({"flush": "requantize"}, {}, "prefill is exact and flush is requantize"),
        ({}, {"keep_dense": True}, "keep_dense is set"),
    ],
)
def test_options_that_need_dequantized_states_say_so(change, options, reason, said):
    recipe = dataclasses.replace(load_recipe(SCALED), **change)
    feed(one_layer_cache(recipe, fused=True, **options), make_states(70), 0, 70)
    (message,) = said
    said.clear()
    assert message.startswith(f"{SCALED}: ") and f"because {reason}" in message


def test_short_histories_can_be_left_to_dequantized_states(monkeypatch):
    monkeypatch.setattr(cache_module, "SHORTEST", 72)
    cache, states = one_layer_cache(SCALED, fused=True), make_states(80)
    kinds = []
    for start, stop in [(0, 70), *((position, position + 1) for position in range(70, 74))]:
        kinds.append(type(cache.update(*(tensor[:, :, start:stop] for tensor in states), 0)[0]))
    assert kinds == 3 * [torch.Tensor] + 2 * [PackedStep]


# The history of the CUDA kernels, without them: its bytes are those that the kernels read


class Attend:
    """What `attend_cuda.Attend` does, in torch."""

    def __init__(self, history, residual, query_heads, scaling):
        self.history, self.residual, self.scaling = history, residual, scaling

    def __call__(self, query, new):
        lengths = self.residual.lengths.tolist()
        for buffer, token in zip((self.residual.keys, self.residual.values), new, strict=True):
            for row, length in enumerate(lengths):
                buffer[row, :, length] = token[row, :, 0]
        residual = dataclasses.replace(self.residual, lengths=self.residual.lengths + 1)
        packed = self.history.unpack() if self.history else (None, ())
        return attend_reference(query, PackedLayer(*packed, residual), self.scaling)



def keep_fragments(monkeypatch):
    monkeypatch.setattr(fused_states, "reads_fragments", lambda recipe, like: True)
    monkeypatch.setattr(attend_cuda, "Attend", Attend)


@pytest.mark.parametrize("name", [KIVI, SCALED, PROTECTED])
def test_repeating_the_launches_of_a_step_does_what_the_step_does(name, monkeypatch):
    keep_fragments(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    states = tuple(torch.randn(2, HEADS, 700, 64, generator=generator) for _ in range(2))
    query, module = torch.randn(2, 3 * HEADS, 1, 64, generator=generator), torch.nn.Module()
    stepped, repeated = one_layer_cache(name, fused=True), one_layer_cache(name, fused=True)
    captured, repeats = None, 0
    cuts = [0, *range(70, 401), 500, 501, 502, 503]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        new = tuple(tensor[:, :, start:stop] for tensor in states)
        found, _ = stepped.update(*new, 0)
        if stop - start > 1:
            repeated.update(*new, 0)
            continue
        expected = fused(module, query, found, found, None, 0.2)[0].transpose(1, 2)
        ready = repeated.prepare_repeat(torch.device("cpu"))
        if ready == captured:
            # What a graph does: the launches that were captured, which know nothing but memory.
            (attention,) = repeated.layers[0].groups[0]._states._attention.values()
            outcome = attention(query, new)
            repeated.count_repeat()
            repeats += 1
        else:
            step, _ = repeated.update(*new, 0)
            outcome, captured = step.attend(query, 0.2), ready
        assert torch.equal(outcome, expected)
        assert repeated.get_seq_length() == stepped.get_seq_length() == stop
    assert repeats > 325
    assert repeated.footprint() == stepped.footprint()
    empty = torch.zeros(2, HEADS, 0, 64)
    for left, right in zip(repeated.layers[0].read(empty, empty), stepped.layers[0].read(empty, empty), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", [KIVI, SCALED, "vidkv_k150_v158_published"])
@pytest.mark.parametrize("prompt_tokens, new", [(100, 5), (96, 130), (40, 200)])
def test_bytes_are_those_of_the_formula_that_full_size_runs_are_held_to(name, prompt_tokens, new, monkeypatch):
    keep_fragments(monkeypatch)
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    formula = importlib.import_module("check_fused").expected_bytes
    cache = one_layer_cache(name, fused=True)
    generator = torch.Generator().manual_seed(0)
    for tokens in (prompt_tokens, *[1] * (new - 1)):
        cache.update(*(torch.randn(1, 3, tokens, 128, generator=generator).half() for _ in range(2)), 0)
    footprint = cache.footprint()
    assert (footprint.key_bytes, footprint.value_bytes) == formula(name, prompt_tokens, new, 1, 3)


@pytest.mark.parametrize("layers_done", [0, 1, 2])
def test_a_step_that_cannot_be_captured_is_taken_back_and_done_as_usual(layers_done, monkeypatch, caplog):
    keep_fragments(monkeypatch)
    config = Qwen2Config(
        vocab_size=97, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    use_attention(model, FUSED)
    graphs, layers = model.get_decoder().forward, model.get_decoder().layers

    def fail(cache, tokens, positions, counts_positions):
        """Get so many layers far, as a capture does: counted and not launched."""
        attend, forward = PackedStep.attend, layers[layers_done].forward if layers_done < 2 else None
        monkeypatch.setattr(PackedStep, "attend", lambda self, query, scaling: torch.zeros_like(query))
        if forward:
            layers[layers_done].forward = lambda *arguments, **options: torch.empty(-1)
        try:
            graphs.forward(**tokens, position_ids=positions, past_key_values=cache)
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            monkeypatch.setattr(PackedStep, "attend", attend)
            if forward:
                layers[layers_done].forward = forward

    monkeypatch.setattr(graphs, "_record", fail)
    outputs = []
    for is_step in (lambda cache, arguments: cache.get_seq_length() > 100, lambda *_: False):
        monkeypatch.setattr(graphs, "_can_be_step", is_step)
        cache = QuantizedCache.for_model(model, load_recipe(KIVI))
        outputs.append((*generate(model, prompt(100), cache, 150), cache.footprint()))
    assert [record.message for record in caplog.records if "could not be captured" in record.message]
    (tokens, scores, footprint), expected = outputs
    assert torch.equal(tokens, expected[0]) and torch.equal(scores, expected[1]) and footprint == expected[2]


def test_a_repeated_step_knows_its_position():
    """The graph raises the position by itself; it is set anew where the next step is not at the next position."""
    positions, seen = torch.tensor([[7]]), []

    def replay():
        seen.append((int(ids), int(positions)))
        positions.add_(1)

    ids = torch.zeros(1, 1, dtype=torch.int64)
    captured = _Captured(types.SimpleNamespace(replay=replay), ("input_ids", ids), positions, 7, torch.empty(0))
    for token, position in [(3, 7), (4, 8), (5, 20), (6, 21)]:
        captured.replay(torch.tensor([[token]]), None, position)
    assert seen == [(3, 7), (4, 8), (5, 20), (6, 21)]
    assert captured.takes("input_ids", ids, None)
    assert not captured.takes("input_ids", ids, positions) and not captured.takes("inputs_embeds", ids, None)
    assert not captured.takes("input_ids", ids.expand(2, 1), None)


@pytest.mark.parametrize("name", [PROTECTED, "vidkv_k150_v166_published"])
def test_tokens_after_the_prompt_are_quantized_straight_into_a_history_with_protected_tokens(name, monkeypatch):
    keep_fragments(monkeypatch)
    states = tuple(torch.randn(2, HEADS, 700, 64, generator=torch.Generator().manual_seed(side)) for side in range(2))
    plain, packed = one_layer_cache(name), one_layer_cache(name, fused=True)
    visual = torch.zeros(330, dtype=torch.bool)
    visual[3:300] = True  # a fifth of them, in whole blocks, is 64
    for cache in (plain, packed):
        cache.describe_prompt(Prompt((0,), (TokenMarks(visual, torch.arange(330.0).cos()),)))
    calls, quantize = [], FragmentHistory.quantize
    monkeypatch.setattr(FragmentHistory, "quantize", lambda *arguments, **options: calls.append(1) or quantize(*arguments, **options))
    for start, stop in [(0, 330), (330, 331), (331, 447), (447, 448), (448, 449), (449, 600), (600, 601), (601, 699), (699, 700)]:
        found, expected = feed(packed, states, start, stop), plain.update(*(tensor[:, :, start:stop] for tensor in states), 0)
        for left, right in zip(found, expected, strict=True):
            # Sums in another order may round a scale to its neighbour in float16.
            torch.testing.assert_close(left, right, rtol=0, atol=2**-10 * right.abs().max().item())
    history = packed.layers[0].groups[0].states.history
    assert len(calls) == 2 and history.protected.held == [64, 64] and history.held == [576, 576]


@pytest.mark.parametrize("name", [KIVI, "kivi_k1_v1", SCALED, "vidkv_k150_v158_published", "vidkv_k150_v158_tokenvalue_scaled", OURS])
def test_fragment_history_is_filled_selected_and_read_back_like_the_portable_one(name, monkeypatch):
    keep_fragments(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    states = tuple(torch.randn(2, HEADS, 600, 64, generator=generator) for _ in range(2))
    plain, packed = one_layer_cache(name), one_layer_cache(name, fused=True)
    query, module = torch.randn(2, 3 * HEADS, 1, 64, generator=generator), torch.nn.Module()
    for start, stop in [(0, 70), (70, 71), (71, 191), (191, 192), (192, 193), (193, 480), (480, 481), (481, 599), (599, 600)]:
        new = tuple(tensor[:, :, start:stop] for tensor in states)
        keys, values = plain.update(*new, 0)
        found, _ = packed.update(*new, 0)
        if stop - start == 1:
            assert isinstance(found.states.history, FragmentHistory)
            outputs = fused(module, query, found, found, None, 0.2)[0], fused(module, query, keys, values, None, 0.2)[0]
            assert_same(found.dense(), (keys, values))
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        if start == 192:
            for cache in (plain, packed):
                cache.reorder_cache(torch.tensor([1, 0]))
    group = packed.layers[0].groups[0]
    history = group.states.history
    form = history.form
    records = 2 * HEADS * history.max_length // 32
    residual = 2 * HEADS * 64 * 4 * (600 - history.max_length)
    # The order of channels, for all heads or for each.
    indices = {"vidkv": 2 * 64, "ours_": 2 * HEADS * 64}.get(name[:5], 0)
    # Three units of 2 bytes for each channel as stored; those of keys come in sixteens, and wide ones are two.
    key_units, value_units = (2 * HEADS * 3 * 2 * 80, 2 * HEADS * 3 * 2 * 64) if name == OURS else (0, 0)
    key_bytes = records * form.key_record_bytes + indices + key_units + residual + history.lengths.nbytes + 2 * HEADS * 4
    value_bytes = records * form.value_record_bytes + value_units + residual + 2 * HEADS * 4
    assert packed.footprint() == Footprint(key_bytes, value_bytes, 2 * HEADS * 600 * 64, 2 * HEADS * 600 * 64)

"""Attention over packed history against the same cache with dequantized states: what is read, generated text, bytes, fallbacks."""

import dataclasses
import warnings

import pytest
import tiny
import torch
from test_cache import generate, make_states, prompt, tiny_model
from test_references import PACKABLE, UNPACKABLE

from vidkv_eval import cache as cache_module
from vidkv_eval import fused_states
from vidkv_eval.attention import FUSED, fused, use_attention
from vidkv_eval.cache import Footprint, FusedGroup, QuantizedCache
from vidkv_eval.fused_states import PackedStep
from vidkv_eval.prompt import Prompt
from vidkv_eval.quant.marks import TokenMarks
from vidkv_eval.recipe import load_recipe
from vidkv_kernels import attend_cuda
from vidkv_kernels.attend import attend_reference
from vidkv_kernels.fragment_history import FragmentHistory
from vidkv_kernels.packed import PackedLayer

HEADS, WIDTH = 2, 32
KIVI, SCALED, PROTECTED = "kivi_k2_v2", "vidkv_k150_v158_scaled", "vidkv_k150_v166_scaled"
FORMS = [KIVI, "kivi_k1_v1", SCALED, "vidkv_k150_v158_published", "vidkv_k150_v158_tokenvalue_scaled", PROTECTED]
CUTS = [(0, 70), (70, 71), (71, 330), (330, 331), (331, 420), (420, 421), (421, 422)]


@pytest.fixture(scope="module")
def model():
    model = tiny_model("qwen2")
    use_attention(model, FUSED)
    return model


@pytest.fixture(autouse=True)
def warnings_are_errors():
    fused_states.say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


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


def set_prompt(cache, length):
    """Make the first tokens of a text prompt visual, as `tiny_model` has no visual ones."""
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
            query = torch.randn(1, 3 * HEADS, 1, WIDTH)
            found, _ = fused(module, query, step, step, None, 0.3)
            expected, _ = fused(module, query, keys, values, None, 0.3)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Models


@pytest.mark.parametrize("name", FORMS)
def test_generated_tokens_are_those_of_the_dense_cache(model, name, monkeypatch):
    steps = []
    attend = PackedStep.attend
    monkeypatch.setattr(PackedStep, "attend", lambda *arguments: steps.append(1) or attend(*arguments))
    input_ids = prompt(100)
    caches = [set_prompt(QuantizedCache.for_model(model, load_recipe(name), fused=is_fused), 100) for is_fused in (False, True)]
    expected, expected_logits = generate(model, input_ids, caches[0], new_tokens=170)  # flushes at steps 124
    assert not steps
    found, logits = generate(model, input_ids, caches[1], new_tokens=170)
    assert len(steps) == 2 * 169
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-3)

"""Every operation, every case, compiled: the Triton version agrees with the reference. Also what only a GPU can show."""

import pytest
import torch
from kernel_checks import check_agreement, check_error

from vidkv_kernels.attend import OP as ATTEND
from vidkv_kernels.attend import attend_reference
from vidkv_kernels.choose_channels import OP as CHOOSE_CHANNELS
from vidkv_kernels.ops import OPS
from vidkv_kernels.packed import Segment
from vidkv_kernels.quantize_keys import OP as QUANTIZE_KEYS
from vidkv_kernels.quantize_keys import make_keys, quantize_keys_reference, real_fourier
from vidkv_kernels.random_layer import random_layer
from vidkv_kernels.span import Span

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS for name in op.cases(torch.device("cpu"))], ids=lambda part: getattr(part, "name", part)
)
def test_triton_agrees_with_the_reference(gpu, op, name):
    check_agreement(op, name, gpu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_histories_of_many_sequences(gpu, dtype):
    generator = torch.Generator(gpu).manual_seed(0)
    layer = random_layer(generator, dtype, [8192, 31, 4097], [128, 1, 77], heads=4, width=128)
    query = torch.randn(3, 28, 1, 128, generator=generator, device=gpu).to(dtype)
    plain, truth = (attend_reference(query, layer, 128**-0.5, dtype=side) for side in (None, torch.float64))
    check_error(ATTEND(query, layer, 128**-0.5), plain, truth)


def test_attention_follows_lengths_that_change_between_replays_of_a_graph(gpu):
    generator = torch.Generator(gpu).manual_seed(0)
    layer = random_layer(generator, torch.float16, [512, 512], [64, 64], heads=2, width=128)
    query = torch.randn(2, 14, 1, 128, generator=generator, device=gpu).half()
    ATTEND(query, layer, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ATTEND(query, layer, 0.1)
    for history, residual in ((512, 64), (32, 1), (0, 3), (100, 0)):
        layer.values[0].lengths.fill_(history)
        layer.residual.lengths.fill_(residual)
        graph.replay()
        plain, truth = (attend_reference(query, layer, 0.1, dtype=side) for side in (None, torch.float64))
        check_error(found, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_spectrum_gets_the_codes_of_the_reference_but_for_ties(gpu, dtype):
    generator = torch.Generator(gpu).manual_seed(0)
    states = (torch.randn(2, 4, 1024, 128, generator=generator, device=gpu) * torch.arange(1, 129, device=gpu) / 32).to(dtype)
    span = Span.of(gpu, [0, 0], [1024, 992], [0, 0])
    order = CHOOSE_CHANNELS(states, span, 64)
    segments = (Segment(64, 2, "minimum"), Segment(64, 1, "mean"))
    found, expected = (make_keys(2, 4, 1024, segments, 32, gpu) for _ in range(2))
    QUANTIZE_KEYS(states, span, order, real_fourier(64, gpu), found)
    quantize_keys_reference(states, span, order, real_fourier(64, gpu), expected)
    assert (found.unpack() != expected.unpack()).float().mean() < 1e-4
    torch.testing.assert_close(found.scale, expected.scale, rtol=2e-3, atol=1e-3, equal_nan=True)
    torch.testing.assert_close(found.offset, expected.offset, rtol=2e-3, atol=1e-3, equal_nan=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_operation_runs_on_the_device_of_its_tensors(gpu):
    query, layer, scaling = ATTEND.cases(torch.device("cuda", 1))["query groups of 7"]
    plain, truth = (attend_reference(query, layer, scaling, dtype=side) for side in (None, torch.float64))
    check_error(ATTEND(query, layer, scaling), plain, truth)


def test_places_beyond_two_to_the_31_are_reached(gpu):
    # 2^31 elements of states: 2^31 / 128 / 4 tokens, of which the last 64 are quantized.
    tokens = 2**22 + 128
    states = torch.zeros(1, 4, tokens, 128, dtype=torch.float16, device=gpu)
    states[:, :, -64:] = torch.randn(1, 4, 64, 128, device=gpu).half()
    small = states[:, :, -64:].clone()
    segments = (Segment(128, 2, "minimum"),)
    order = torch.arange(128, dtype=torch.int32, device=gpu).view(1, 128)
    found, expected = make_keys(1, 4, 64, segments, 32, gpu), make_keys(1, 4, 64, segments, 32, gpu)
    QUANTIZE_KEYS(states, Span.of(gpu, [tokens - 64], [64], [0]), order, None, found)
    QUANTIZE_KEYS(small, Span.of(gpu, [0], [64], [0]), order, None, expected)
    assert torch.equal(found.codes, expected.codes)

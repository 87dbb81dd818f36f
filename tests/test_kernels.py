"""Every operation, every case: the Triton version, interpreted on the CPU, agrees with the reference."""

import dataclasses
import importlib
import platform

import pytest
import torch
from kernel_checks import check_agreement, check_error, tensors

from vidkv_kernels.append import append_residual
from vidkv_kernels.attend import OP as ATTEND
from vidkv_kernels.attend import attend_reference
from vidkv_kernels.fit_codes import OP as FIT_CODES
from vidkv_kernels.ops import OPS
from vidkv_kernels.packed import FullPrecision, PackedLayer, Segment
from vidkv_kernels.quantize_keys import OP as QUANTIZE_KEYS
from vidkv_kernels.quantize_keys import make_keys
from vidkv_kernels.quantize_values import OP as QUANTIZE_VALUES
from vidkv_kernels.quantize_values import make_values
from vidkv_kernels.random_layer import random_layer

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(platform.system() != "Linux", reason="Triton is made for Linux only"),
]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in op.cases(CPU)], ids=lambda part: getattr(part, "name", part))
def test_triton_agrees_with_the_reference(op, name):
    check_agreement(op, name, CPU)


def test_a_kernel_that_errs_by_2_percent_or_leaves_a_block_unwritten_is_seen():
    query, layer, scaling = ATTEND.cases(CPU)["protected tokens"]
    plain, truth = attend_reference(query, layer, scaling), attend_reference(query, layer, scaling, dtype=torch.float64)
    check_error(plain, plain, truth)
    with pytest.raises(AssertionError, match="a rounding step"):
        check_error(plain * 1.02, plain, truth)
    plain[..., -1] = float("nan")
    with pytest.raises(AssertionError, match="a rounding step"):
        check_error(plain, plain, truth)


@pytest.mark.parametrize("programs", [1, 1024])
def test_programs_that_take_several_steps_agree_with_the_reference(programs, monkeypatch):
    attend_triton = importlib.import_module("vidkv_kernels.attend_triton")
    monkeypatch.setattr(attend_triton, "PROGRAMS", programs)
    monkeypatch.setattr(attend_triton, "SPLITS_AT_ONCE", 2)
    generator = torch.Generator().manual_seed(0)
    layer = random_layer(generator, torch.float32, [400], [30])
    query = 4 * torch.randn(1, 2, 1, 64, generator=generator)
    plain, truth = attend_reference(query, layer, 0.125), attend_reference(query, layer, 0.125, dtype=torch.float64)
    check_error(ATTEND.triton(query, layer, 0.125), plain, truth)


def test_a_residual_without_room_and_no_history_give_zeros():
    empty = FullPrecision(torch.empty(1, 1, 0, 64), torch.empty(1, 1, 0, 64), torch.zeros(1, dtype=torch.int32))
    assert (ATTEND.triton(torch.randn(1, 2, 1, 64), PackedLayer(None, (), empty), 1.0) == 0).all()


def test_appending_full_residuals_gives_what_quantizing_at_once_gives(monkeypatch):
    for op in (QUANTIZE_KEYS, QUANTIZE_VALUES):
        monkeypatch.setattr(type(op), "__call__", lambda op, *arguments: op.triton(*arguments))
    segments = (Segment(32, 2, "minimum"), Segment(32, 1, "mean"))
    residual = FullPrecision(
        torch.randn(2, 1, 64, 64).half(), torch.randn(2, 1, 64, 64).half(), torch.tensor([64, 63], dtype=torch.int32)
    )
    keys = make_keys(2, 1, 128, segments, 32, CPU)
    values = make_values(2, 1, 128, 64, CPU, levels=4, offset_kind="minimum")
    values.lengths.copy_(torch.tensor([32, 64], dtype=torch.int32))
    layer = PackedLayer(keys, (values,), residual)
    order = torch.arange(64, dtype=torch.int32).repeat(2, 1)
    append_residual(layer, 64, order, None, 0.7)
    assert values.lengths.tolist() == [96, 64]
    assert residual.lengths.tolist() == [0, 63]
    assert torch.isfinite(keys.scale[0, :, 1:3]).all() and torch.isfinite(values.scale[0, :, 1:3]).all()
    assert torch.isnan(keys.scale[0, :, [0, 3]]).all() and torch.isnan(keys.scale[1]).all() and torch.isnan(values.scale[1]).all()
    read = values.decode(torch.float32)[0, :, 32:96]
    assert (read - residual.values[0].float()).abs().max() < 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, layer: (q[:, :1, 0], layer), "query has shape"),
        (lambda q, layer: (q.double(), layer), "query is torch.float64; allowed: torch.float16"),
        (lambda q, layer: (q.expand(-1, -1, 2, -1), layer), "query has shape"),
        (lambda q, layer: (q.to("meta"), layer), "query is on meta"),
        (lambda q, layer: (q.transpose(1, 3).contiguous().transpose(1, 3), layer), "query has stride"),
    ],
)
@pytest.mark.parametrize("side", ["reference", "triton"])
def test_a_query_that_does_not_fit_is_refused_before_anything_runs(change, message, side):
    query, layer, scaling = ATTEND.cases(CPU)["lengths that fill neither groups nor blocks"]
    with pytest.raises(ValueError, match=message):
        getattr(ATTEND, side)(*change(query, layer), scaling)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("codes", lambda t: t.long(), "keys.codes is torch.int64; allowed: torch.int32"),
        ("codes", lambda t: t[..., 1:], "keys.codes has shape"),
        ("codes", lambda t: t.repeat(1, 1, 2, 1)[:, :, ::2], "make it .contiguous()"),
        ("scale", lambda t: t.float(), "keys.scale is torch.float32"),
        ("scale", lambda t: t[:, :, :-1], "keys.scale has shape"),
        ("scale", lambda t: t.to("meta"), "keys.scale is on meta; allowed: cpu"),
        ("offset", lambda t: None, "keys.offset is None; give a tensor"),
        ("scale", lambda t: t.to(torch.float8_e4m3fn), "its unit is missing"),
        ("matrix", lambda t: t[..., :-1], "keys.matrix has shape"),
        ("matrix", lambda t: t.expand(1, -1, -1), "keys.matrix has shape"),
        ("order", lambda t: t[..., :-1], "keys.order has shape"),
        ("order", lambda t: t.long(), "keys.order is torch.int64; allowed: torch.uint8"),
    ],
)
def test_packed_keys_that_no_kernel_takes_are_refused(field, change, message):
    keys = ATTEND.cases(CPU)["lengths that fill neither groups nor blocks"][1].keys
    with pytest.raises(ValueError) as error:
        dataclasses.replace(keys, **{field: change(getattr(keys, field))})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((Segment(32, 1, "mean"), Segment(32, 2, "minimum")), "2 bits before 1 bit"),
        ((Segment(32, 2, "centred"), Segment(32, 1, "none")), "centred kinds last"),
        ((Segment(64, 3, "mean"),), "nbits 1 or 2"),
        ((), "allowed: channels above 0"),
    ],
)
def test_segments_that_no_kernel_takes_are_refused(segments, message):
    keys = ATTEND.cases(CPU)["lengths that fill neither groups nor blocks"][1].keys
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(keys, segments=segments)


def test_nothing_but_the_span_is_written():
    states, span, threshold, values = QUANTIZE_VALUES.cases(CPU)["sequences of different length, one empty"]
    QUANTIZE_VALUES.triton(states, span, threshold, values)
    assert torch.isnan(values.scale[1]).all() and (values.codes[1] == -1).all()
    assert torch.isnan(values.scale[0, :, 3:]).all() and torch.isfinite(values.scale[0, :, :3]).all()
    assert all(tensor.shape[0] == 3 for tensor in tensors(values))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, with which Triton interprets
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_fitting_says_if_a_state_is_not_finite(value):
    states, *others, faults, bit = FIT_CODES.cases(CPU)["all numbers of levels, channels not a power of two"]
    states[1, 2, 95, 95] = value
    for fit_codes in (FIT_CODES.reference, FIT_CODES.triton):
        found = faults.clone()
        fit_codes(states, *others, found, bit)
        assert found.tolist() == [8 if value == 3e38 else 12]

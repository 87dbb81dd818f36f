"""`attend` in CUDA C++ against the reference in float64, over awkward inputs. Run with `make test-gpu`; without a device these fail."""

from dataclasses import replace

import pytest
import torch

from vidkv_kernels.attend import attend_reference
from vidkv_kernels.attend_cuda import Attend, Plan, attend
from vidkv_kernels.fragment_history import FragmentHistory, _write_values
from vidkv_kernels.fragments import Form, UnsupportedForm
from vidkv_kernels.packed import FullPrecision, PackedLayer, Segment
from vidkv_kernels.protected_values import ProtectedValues
from vidkv_kernels.random_layer import random_layer

pytestmark = pytest.mark.usefixtures("gpu", "poisoned_memory")
DEVICE = torch.device("cuda")
HALF, BRAIN = torch.float16, torch.bfloat16


def split(width: int, wide: int, wide_offset: str, *narrow: str) -> tuple[Segment, ...]:
    """`wide` channels of 2 bits, the others of 1 bit in as many kinds as named."""
    segments = [Segment(wide, 2, wide_offset)] if wide else []
    left = width - wide
    for index, offset in enumerate(narrow):
        count = left // (len(narrow) - index) + (left % (len(narrow) - index) > 0)
        left -= count
        segments.append(Segment(count, 1, offset))
    return tuple(segments)


def ternary(width: int, wide: int) -> tuple[Segment, ...]:
    """Ternary codes, and `wide` channels of 16 levels, as two digits of 4."""
    return (Segment(wide, 2, "mean"), Segment(width - wide, 2, "mean", is_ternary=True), Segment(wide, 2, "centred"))


SCALED, PUBLISHED = ("minimum", "mean"), ("minimum", "none", "centred")
FOUR_BITS = {"metadata": torch.uint8}
OURS = {"width": 128, "segments": ternary(128, 12), "values": ("per_channel", 3, "mean"), **FOUR_BITS}
VALUES = {
    "ternary": ("per_channel", 3, "centred"),
    "unscaled": ("per_channel", 3, "unscaled"),
    "per token": ("per_token", 4, "minimum"),
    "ternary per token": ("per_token", 3, "centred"),
    "min-max": ("per_channel", 4, "minimum"),
    "1 bit": ("per_channel", 2, "minimum"),
    "signs": ("per_channel", 2, "mean"),
    "signs around 0": ("per_channel", 2, "centred"),
    "1 bit per token": ("per_token", 2, "minimum"),
    "signs per token": ("per_token", 2, "mean"),
    "codes as they are": ("per_channel", 4, "none"),
    "ternary with mean": ("per_channel", 3, "mean"),
}


def make(dtype, history, residual, query_heads, **form):
    generator = torch.Generator(DEVICE).manual_seed(sum(history) + len(history) + query_heads)
    layer = random_layer(generator, dtype, history, residual, **form)
    width = layer.residual.keys.shape[3]
    query = torch.randn(len(history), query_heads, 1, width, generator=generator, device=DEVICE).to(dtype)
    return query, layer



def run(query, layer, scaling=None, plan=None):
    history = None if layer.keys is None else FragmentHistory.from_packed(layer.keys, layer.values)
    return attend(query, history, layer.residual, scaling or query.shape[3] ** -0.5, layer.prefix, plan)


def maps(layer):
    return {"order": layer.keys.order, "matrix": layer.keys.matrix}


def assert_close(fast, query, layer, scaling=None):
    """Twice the error of the reference in the working precision, and one rounding step of the output."""
    scaling = scaling or query.shape[3] ** -0.5
    truth = attend_reference(query, layer, scaling, torch.float64)
    plain = attend_reference(query, layer, scaling)
    allowed = 2 * (plain.double() - truth).abs().nan_to_num(0).amax() + truth.abs().amax() * torch.finfo(query.dtype).eps
    error = (fast.double() - truth).abs().amax()
    assert torch.isfinite(fast).all()
    assert error <= allowed, f"error {error.item():.3e}, allowed {allowed.item():.3e}, largest {truth.abs().amax().item():.3e}"


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("segments", [SCALED, PUBLISHED], ids=["scaled", "published"])
def test_every_kind_of_values(values, width, dtype, segments):
    form = {"width": width, "segments": split(width, width // 2, *segments), "values": VALUES[values], "heads": 2}
    query, layer = make(dtype, [256, 77, 0], [9, 40, 1], 14, **form)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("values", [name for name, (granularity, *_) in VALUES.items() if granularity == "per_channel"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("keys", ["ternary", "scaled", "published"])
def test_every_kind_of_values_with_metadata_of_4_bits(values, width, dtype, keys):
    segments = {"ternary": ternary(width, 6), "scaled": split(width, 20, *SCALED), "published": split(width, 20, *PUBLISHED)}[keys]
    form = {"width": width, "segments": segments, "values": VALUES[values], "heads": 2, **FOUR_BITS}
    query, layer = make(dtype, [256, 77, 0], [9, 40, 1], 14, **form)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("wide", [1, 12, 33, 64])
@pytest.mark.parametrize("metadata", [HALF, torch.uint8], ids=str)
def test_every_share_of_channels_with_16_levels(width, wide, metadata):
    form = {"width": width, "segments": ternary(width, min(wide, width - 1)), "values": ("per_channel", 3, "mean"), "metadata": metadata}
    query, layer = make(HALF, [192, 33], [20, 3], 7, **form)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("prefix", [None, 37])
def test_groups_and_lengths_with_metadata_of_4_bits(group_size, prefix):
    form = {**OURS, "heads": 2, "group_size": group_size, "prefix": None if prefix is None else [prefix] * 4}
    query, layer = make(HALF, [5000, 0, 129, 1], [160, 3, 0, 2], 14, **form)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_a_key_bias_with_metadata_of_4_bits_stays_accurate(dtype):
    query, layer = make(dtype, [512, 2048], [16, 1], 7, **OURS)
    layer.keys.offset_center[..., 3] = 300.0
    layer.keys.offset_center[..., 40] = -120.0
    layer.keys.offset_unit[..., 3] = 2.0
    layer.keys.scale_unit[..., 3] = 1.0
    assert_close(run(query * 0.3, layer), query * 0.3, layer)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 30.0, 3e3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 2e3])
def test_queries_and_units_of_any_size_stay_finite(size, scale):
    query, layer = make(BRAIN, [512], [16], 7, **OURS)
    for part in (layer.keys, layer.values[0]):
        for unit in (part.scale_unit, part.offset_unit, part.offset_center):
            unit.mul_(scale)
    query = query * size
    scaling = 128**-0.5 / max(1.0, size * scale)
    assert_close(run(query, layer, scaling), query, layer, scaling)


@pytest.mark.parametrize("ratio", [1 / 256, 256.0])
def test_scales_and_offsets_of_very_different_size(ratio):
    query, layer = make(HALF, [512], [16], 7, **OURS)
    for part in (layer.keys, layer.values[0]):
        part.scale_unit.mul_(ratio**0.5)
        part.offset_unit.mul_(ratio**-0.5)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("fraction", [0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.66, 0.75, 0.9, 1])
@pytest.mark.parametrize("kinds", [SCALED, PUBLISHED, ("minimum", "centred"), ("none", "none"), ("minimum", "minimum")], ids="-".join)
def test_every_share_of_2_bit_channels(width, fraction, kinds):
    wide = int(width * fraction)
    segments = split(width, wide, kinds[0], *(kinds[1:] if wide < width else ()))
    query, layer = make(HALF, [192, 33], [20, 3], 7, width=width, segments=segments)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("values", ["ternary", "min-max", "per token", "unscaled", "signs"])
def test_every_group_size(group_size, values):
    form = {"width": 128, "segments": split(128, 64, *SCALED), "group_size": group_size, "values": VALUES[values]}
    query, layer = make(HALF, [1000, 129, 128], [5, 16, 17], 7, **form)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 7, 8, 9, 16, 28])
def test_every_head_ratio(ratio, dtype):
    query, layer = make(dtype, [300, 64], [33, 150], 2 * ratio, width=128, segments=split(128, 64, *SCALED), heads=2)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize(
    "history, residual",
    [([0], [1]), ([1], [0]), ([1], [1]), ([31, 32, 33, 0], [0, 15, 16, 17]), ([5000, 0, 64, 1], [160, 0, 128, 2]), ([0, 0], [0, 0])],
    ids=str,
)
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("prefix", [None, 4, 37])
def test_lengths(history, residual, dtype, prefix):
    form = {"width": 128, "segments": split(128, 64, *SCALED), "heads": 2}
    query, layer = make(dtype, history, residual, 14, prefix=None if prefix is None else [prefix] * len(history), **form)
    assert_close(run(query, layer), query, layer)


def test_a_sequence_without_tokens_gets_zeros():
    query, layer = make(HALF, [64, 0], [3, 0], 7, width=128, segments=split(128, 64, *SCALED))
    assert run(query, layer)[1].eq(0).all()


def test_no_history():
    query, layer = make(BRAIN, [0, 0], [3, 130], 7, width=128, segments=None)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("chunks, warps, blocks", [(1, 8, 1), (2, 8, 2), (2, 4, 4), (4, 8, 1), (4, 12, 1), (8, 8, 1)])
@pytest.mark.parametrize("splits", [1, 2, 5, 16, 60, 200])
@pytest.mark.parametrize("kinds", [SCALED, PUBLISHED], ids=["scaled", "published"])
def test_every_plan_gives_the_same(chunks, warps, blocks, splits, kinds):
    values = VALUES["ternary" if kinds is SCALED else "unscaled"]
    query, layer = make(HALF, [3000, 700], [100, 3], 7, width=128, segments=split(128, 64, *kinds), values=values)
    assert_close(run(query, layer, plan=Plan(chunks, warps, blocks, splits)), query, layer)


@pytest.mark.parametrize("chunks, warps", [(1, 4), (2, 8), (4, 8)])
@pytest.mark.parametrize("splits", [1, 5, 60])
def test_every_plan_gives_the_same_with_metadata_of_4_bits(chunks, warps, splits):
    query, layer = make(HALF, [3000, 700], [100, 3], 7, **OURS)
    assert_close(run(query, layer, plan=Plan(chunks, warps, 1, splits)), query, layer)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_a_key_bias_as_in_qwen_stays_accurate(dtype):
    query, layer = make(dtype, [512, 2048], [16, 1], 7, width=128, segments=split(128, 64, *SCALED))
    layer.keys.offset[..., 3] = 300.0
    layer.keys.offset[..., 40] = -120.0
    layer.keys.scale[..., 3] = 4.0
    assert_close(run(query * 0.3, layer), query * 0.3, layer)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 30.0, 3e3])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 2e3])
@pytest.mark.parametrize("values", ["ternary", "per token"])
def test_queries_and_scales_of_any_size_stay_finite(size, scale, values):
    query, layer = make(BRAIN, [512], [16], 7, width=128, segments=split(128, 64, *SCALED), values=VALUES[values])
    layer.keys.scale.mul_(scale)
    layer.values[0].scale.mul_(scale)
    if layer.values[0].offset is not None:
        layer.values[0].offset.mul_(scale)
    query = query * size
    fast = run(query, layer, scaling=128**-0.5 / max(1.0, size * scale))
    assert_close(fast, query, layer, scaling=128**-0.5 / max(1.0, size * scale))


def test_one_token_far_above_the_others():
    query, layer = make(HALF, [4096], [16], 7, width=128, segments=split(128, 64, *SCALED))
    layer.residual.keys[:, :, 5] = query[:, :1, 0].view(1, 1, 128) * 2
    assert_close(run(query, layer), query, layer)


def test_maximum_that_rises_with_every_group():
    query, layer = make(HALF, [2048], [0], 7, width=128, segments=split(128, 64, *SCALED))
    rising = torch.linspace(0, 60, layer.keys.scale.shape[2], device=DEVICE)[:, None]
    ordered = query[0, 0, 0].float()[layer.keys.order[0, 0].long()]
    layer.keys.offset.copy_((ordered @ layer.keys.matrix * rising / 20).half())
    for splits in (1, 8):
        assert_close(run(query, layer, plan=Plan(4, 8, 1, splits)), query, layer)


@pytest.mark.parametrize("given", [("order",), ("matrix",), ()], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("center", [0.0, 2.0])
def test_order_and_matrix_by_themselves(given, width, center):
    segments = split(width, 12, "minimum", "centred")
    query, layer = make(HALF, [200, 64], [12, 1], 14, width=width, heads=2, segments=segments, maps=given, center=center)
    assert_close(run(query, layer), query, layer)
    for plan in (Plan(1, 4, 1, 3), Plan(4, 12, 1, 1)):
        assert_close(run(query, layer, plan=plan), query, layer)


def test_center_and_more_key_channels_than_the_query_has():
    doubled = (Segment(32, 2, "minimum"), Segment(33, 1, "none"), Segment(31, 1, "centred"))
    query, layer = make(HALF, [200], [12], 7, segments=doubled)
    assert layer.keys.channels == 96
    assert_close(run(query, layer), query, layer)
    query, layer = make(BRAIN, [200, 64], [12, 1], 14, width=128, heads=2, segments=split(128, 38, *SCALED), center=2.0)
    assert_close(run(query, layer), query, layer)


def test_a_captured_graph_follows_the_lengths():
    query, layer = make(HALF, [1024, 512], [16, 9], 7, width=128, segments=split(128, 64, *SCALED))
    history = FragmentHistory.from_packed(layer.keys, layer.values)
    attend(query, history, layer.residual, 0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(query, history, layer.residual, 0.1)
    for lengths, residual in (([1024, 512], [16, 9]), ([96, 31], [2, 0]), ([0, 480], [1, 7])):
        for tensor, numbers in ((history.lengths, lengths), (layer.values[0].lengths, lengths), (layer.residual.lengths, residual)):
            tensor.copy_(torch.tensor(numbers, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, query, layer, 0.1)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("ratio", [7, 16])
@pytest.mark.parametrize("history, residual", [([160, 64, 0], [0, 15, 127]), ([0, 0], [16, 31]), ([5000, 31], [40, 0])], ids=str)
def test_a_new_token_is_attended_to_and_written_behind_the_residual(history, residual, dtype, width, ratio):
    form = {"width": width, "segments": split(width, width // 2, *SCALED) if any(history) else None, "heads": 2}
    query, layer = make(dtype, history, residual, 2 * ratio, **form)
    packed = None if layer.keys is None else FragmentHistory.from_packed(layer.keys, layer.values)
    # As a model gives them: a token's heads beside each other.
    new = [torch.randn(len(history), 1, 2, width, device=DEVICE).to(dtype).transpose(1, 2) for _ in range(2)]
    fast = Attend(packed, layer.residual, query.shape[1], width**-0.5)(query, tuple(new))
    for row, length in enumerate(residual):
        for buffer, token in zip((layer.residual.keys, layer.residual.values), new, strict=True):
            assert torch.equal(buffer[row, :, length], token[row, :, 0])
            assert buffer[row, :, length + 1 :].isnan().all()
    layer.residual.lengths.add_(1)
    assert_close(fast, query, layer)
    assert torch.equal(fast, run(query, layer))


# Protected tokens


def make_protected(dtype, history, protected, query_heads=7, residual=None, values="ternary", width=128, kinds=SCALED, **form):
    segments = split(width, width // 2, *kinds)
    residual = [9] * len(history) if residual is None else residual
    return make(dtype, history, residual, query_heads, protected=protected, values=VALUES[values], width=width, segments=segments, **form)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype, width", [(HALF, 64), (HALF, 128), (BRAIN, 128)], ids=str)
def test_protected_tokens_among_every_kind_of_values(values, width, dtype):
    query, layer = make_protected(dtype, [700, 77, 0], [137, 64, 0], 14, [9, 40, 1], values, width, heads=2)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize(
    "history, protected",
    [
        ([1, 1], [0, 1]), ([31, 32, 33], [1, 16, 32]), ([96, 96], [0, 0]), ([96, 500], [96, 500]), ([1000, 0, 64], [200, 0, 64]),
        ([5000, 40, 5000], [1000, 8, 4999]), ([20000], [4000]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kinds, values", [(SCALED, "ternary"), (PUBLISHED, "unscaled")], ids=["scaled", "published"])
def test_any_number_of_protected_tokens(history, protected, kinds, values):
    query, layer = make_protected(HALF, history, protected, kinds=kinds, values=values)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("runs", [[(0, 300)], [(700, 1000)], [(10, 20), (100, 400), (401, 900)], [(k, k + 1) for k in range(31, 1000, 32)]])
def test_protected_tokens_beside_each_other(runs):
    query, layer = make_protected(HALF, [1000], [sum(stop - start for start, stop in runs)])
    chosen = torch.cat([torch.arange(*pair) for pair in runs])
    others = torch.tensor(sorted(set(range(1000)) - set(chosen.tolist())))
    for part, tokens in zip(layer.values, (chosen, others), strict=True):
        part.tokens[0, : len(tokens)] = tokens.to(DEVICE, torch.int32)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("values", ["ternary", "per token", "unscaled"])
def test_protected_tokens_in_groups_of_every_size(group_size, values):
    query, layer = make_protected(HALF, [1000, 129, 128], [300, 128, 1], values=values, group_size=group_size)
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("ratio", [1, 7, 8, 9, 16])
def test_protected_tokens_with_every_head_ratio(ratio):
    query, layer = make_protected(BRAIN, [300, 64], [100, 2], 2 * ratio, [33, 150], heads=2, prefix=[4, 37])
    assert_close(run(query, layer), query, layer)


@pytest.mark.parametrize("chunks, warps, blocks", [(1, 4, 1), (1, 8, 2), (2, 8, 1), (4, 8, 1), (8, 4, 1)])
@pytest.mark.parametrize("splits", [1, 2, 5, 33, 200])
@pytest.mark.parametrize("kinds, values", [(SCALED, "ternary"), (PUBLISHED, "unscaled")], ids=["scaled", "published"])
def test_every_plan_gives_the_same_with_protected_tokens(chunks, warps, blocks, splits, kinds, values):
    query, layer = make_protected(HALF, [9000, 700], [1800, 350], residual=[100, 3], kinds=kinds, values=values)
    assert_close(run(query, layer, plan=Plan(chunks, warps, blocks, splits)), query, layer)


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("chunks", [1, 4])
def test_a_maximum_that_rises_while_probabilities_of_protected_tokens_wait(splits, chunks):
    query, layer = make_protected(HALF, [2048], [40], residual=[0])
    rising = torch.linspace(0, 60, layer.keys.scale.shape[2], device=DEVICE)[:, None]
    ordered = query[0, 0, 0].float()[layer.keys.order[0, 0].long()]
    layer.keys.offset.copy_((ordered @ layer.keys.matrix * rising / 20).half())
    assert_close(run(query, layer, plan=Plan(chunks, 8, 1, splits)), query, layer)


def test_a_captured_graph_follows_the_lengths_with_protected_tokens():
    query, layer = make_protected(HALF, [1024, 512], [300, 31], residual=[16, 9])
    history = FragmentHistory.from_packed(layer.keys, layer.values)
    held = [chosen.lengths.clone() for chosen in layer.values]
    attend(query, history, layer.residual, 0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(query, history, layer.residual, 0.1)
    for lengths, residual in (([0, 31], [1, 7]), ([95, 96], [2, 0]), ([1000, 480], [16, 8]), ([1024, 512], [16, 9])):
        history.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        layer.residual.lengths.copy_(torch.tensor(residual, dtype=torch.int32))
        for part, counts in zip(layer.values, held, strict=True):
            is_held = torch.arange(part.entries, device=DEVICE) < counts[:, None]
            part.lengths.copy_((is_held & (part.tokens < history.lengths[:, None])).sum(1))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, query, layer, 0.1)


def test_tokens_appended_later_stand_behind_protected_ones():
    query, layer = make_protected(HALF, [256, 256], [64, 32])
    history = FragmentHistory.from_packed(layer.keys, layer.values, capacity=384)
    _, later = make_protected(HALF, [128, 128], None, residual=[1, 1])
    later = replace(later.keys, **maps(layer)), later.values[0]
    tokens = torch.arange(256, 384, device=DEVICE, dtype=torch.int32).expand(2, -1).contiguous()
    ready = Attend(history, layer.residual, 7, 0.1)
    history.append(later[0], (replace(later[1], tokens=tokens),))
    whole = PackedLayer(*history.unpack(), layer.residual)
    assert whole.values[0].lengths.tolist() == [64, 32] and whole.values[1].lengths.tolist() == [320, 352]
    assert_close(ready(query), query, whole, 0.1)
    history.reserve(512)
    with pytest.raises(ValueError, match="history has moved"):
        ready(query)
    assert_close(attend(query, history, layer.residual, 0.1), query, whole, 0.1)


def test_kernels_pack_protected_tokens_as_torch_does():
    _, layer = make_protected(HALF, [384, 100], [100, 40], values="per token", heads=2)
    fast = FragmentHistory.from_packed(layer.keys, layer.values).protected
    plain = ProtectedValues(fast.form, 2, 2, 12, DEVICE)
    plain.reserve(layer.values[0])
    _write_values(fast.form, layer.values[0], plain.values, torch.zeros(2, 2, device=DEVICE), plain.lengths, 128)
    for row, records in enumerate((4, 2)):
        assert torch.equal(fast.values[row, :, :records], plain.values[row, :, :records])


def test_results_do_not_depend_on_the_run():
    query, layer = make(HALF, [4096, 100], [16, 9], 7, width=128, segments=split(128, 64, *SCALED))
    first = run(query, layer)
    assert all(torch.equal(first, run(query, layer)) for _ in range(20))


def part(layer, start, stop, lengths):
    """Tokens `start` to `stop` of the history of a layer without values per token."""
    keys, run_ = layer.keys, layer.values[0]
    blocks, groups = slice(start // 32, stop // 32), slice(start // keys.group_size, stop // keys.group_size)
    cut = {name: getattr(keys, name)[:, :, groups].contiguous() for name in ("scale", "offset")}
    values = replace(run_, lengths=lengths, codes=run_.codes[:, :, blocks].contiguous(), scale=run_.scale[:, :, groups].contiguous())
    return replace(keys, codes=keys.codes[:, :, blocks].contiguous(), **cut), (values,)


def test_append_equals_packing_at_once():
    query, layer = make(HALF, [256, 256], [16, 9], 7, width=128, segments=split(128, 64, *SCALED))
    whole = FragmentHistory.from_packed(layer.keys, layer.values)
    grown = FragmentHistory(whole.form, batch=2, heads=1, capacity=64, device=DEVICE, **maps(layer))
    for start, stop in ((0, 64), (64, 128), (128, 256)):
        grown.reserve(stop)
        grown.append(*part(layer, start, stop, torch.full_like(whole.lengths, stop - start)))
    assert torch.equal(grown.keys, whole.keys) and torch.equal(grown.values, whole.values) and torch.equal(grown.lengths, whole.lengths)
    assert torch.equal(grown.key_scale_max, whole.key_scale_max)
    assert torch.equal(attend(query, grown, layer.residual, 0.1), attend(query, whole, layer.residual, 0.1))


def test_rows_grow_at_their_own_time():
    query, layer = make(HALF, [256, 128], [16, 9], 7, width=128, segments=split(128, 64, *SCALED))
    form = Form.of(layer.keys, layer.values)
    grown = FragmentHistory(form, batch=2, heads=1, capacity=512, device=DEVICE, **maps(layer))
    for start, stop, counts in ((0, 128, [128, 0]), (0, 128, [0, 128]), (128, 256, [128, 0])):
        grown.append(*part(layer, start, stop, torch.tensor(counts, dtype=torch.int32, device=DEVICE)))
    assert grown.lengths.tolist() == [256, 128]
    assert_close(attend(query, grown, layer.residual, 128**-0.5), query, layer)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("wide", [0, 12, 38, 64, 115, 128])
@pytest.mark.parametrize("group_size", [32, 128])
def test_kernels_pack_as_torch_does(values, wide, group_size):
    segments = split(128, wide, "minimum", *(("mean", "centred") if wide < 128 else ()))
    _, layer = make(HALF, [384, 100], [1, 1], 1, width=128, heads=2, segments=segments, values=VALUES[values], group_size=group_size)
    fast = FragmentHistory.from_packed(layer.keys, layer.values)
    plain = FragmentHistory(fast.form, batch=2, heads=2, capacity=fast.capacity, device=DEVICE, **maps(layer))
    plain._append_plain(layer.keys, layer.values[0], fast.capacity)
    for row, length in enumerate((384, 100)):
        records = -(-length // group_size)
        assert torch.equal(fast.keys[row, :, :records], plain.keys[row, :, :records])
        assert torch.equal(fast.values[row, :, :records], plain.values[row, :, :records])
    assert torch.equal(fast.key_scale_max, plain.key_scale_max) and torch.equal(fast.value_scale_max, plain.value_scale_max)


@pytest.mark.parametrize("values", [name for name, (granularity, *_) in VALUES.items() if granularity == "per_channel"])
@pytest.mark.parametrize("segments", [ternary(128, 12), ternary(128, 33), split(128, 38, *SCALED)], ids=str)
@pytest.mark.parametrize("group_size", [32, 128])
def test_kernels_pack_metadata_of_4_bits_as_torch_does(values, segments, group_size):
    form = {"width": 128, "heads": 2, "segments": segments, "values": VALUES[values], "group_size": group_size, **FOUR_BITS}
    _, layer = make(HALF, [384, 100], [1, 1], 1, **form)
    fast = FragmentHistory.from_packed(layer.keys, layer.values)
    plain = FragmentHistory(fast.form, batch=2, heads=2, capacity=fast.capacity, device=DEVICE, units=fast.units, **maps(layer))
    plain._append_plain(layer.keys, layer.values[0], fast.capacity)
    for row, length in enumerate((384, 100)):
        records = -(-length // group_size)
        assert torch.equal(fast.keys[row, :, :records], plain.keys[row, :, :records])
        assert torch.equal(fast.values[row, :, :records], plain.values[row, :, :records])


def test_more_than_2_to_the_31_bytes():
    records = 2**31 // 2560 // 4 + 1000
    query, layer = make(HALF, [96], [1], 28, width=128, segments=split(128, 64, *SCALED), heads=4)
    small = FragmentHistory.from_packed(layer.keys, layer.values)
    large = FragmentHistory(small.form, batch=1, heads=4, capacity=records * 32 * 2, device=DEVICE, **maps(layer))
    large.keys[:, :, :3], large.values[:, :, :3] = small.keys, small.values
    large.lengths, large.held = small.lengths, [96]
    large.key_scale_max, large.value_scale_max = small.key_scale_max, small.value_scale_max
    assert_close(attend(query, large, layer.residual, 0.1), query, layer, 0.1)


@pytest.mark.parametrize(
    "form, message",
    [({"metadata": torch.float8_e4m3fn}, "float8"), ({"width": 32}, "32 channels")],
)
def test_forms_that_are_not_read_are_refused(form, message):
    segments = split(form.get("width", 64), form.get("width", 64) // 2, *SCALED)
    _, layer = make(HALF, [96], [3], 1, segments=segments, **form)
    with pytest.raises(UnsupportedForm, match=message):
        FragmentHistory.from_packed(layer.keys, layer.values)


def test_bad_tensors_are_refused_by_name():
    query, layer = make(HALF, [96], [3], 7, width=128, segments=split(128, 64, *SCALED))
    history = FragmentHistory.from_packed(layer.keys, layer.values)
    residual = layer.residual
    with pytest.raises(ValueError, match="query is torch.float32"):
        attend(query.float(), history, residual, 1.0)
    with pytest.raises(ValueError, match="query has strides"):
        attend(query.repeat(1, 2, 1, 1)[:, ::2], history, residual, 1.0)
    shifted = torch.zeros(1, 1, 8, 129, device=DEVICE, dtype=HALF)[..., 1:]
    with pytest.raises(ValueError, match="residual.keys has strides"):
        attend(query, history, FullPrecision(shifted, shifted, residual.lengths), 1.0)
    with pytest.raises(ValueError, match="query is torch.float16; allowed: torch.bfloat16"):
        attend(query, history, FullPrecision(residual.keys.bfloat16(), residual.values.bfloat16(), residual.lengths), 1.0)
    prepared, new = Attend(history, residual, 7, 1.0), torch.zeros(1, 1, 1, 128, device=DEVICE, dtype=HALF)
    with pytest.raises(ValueError, match="query has shape"):
        prepared(query[:, :3].contiguous())
    with pytest.raises(ValueError, match="new values has shape"):
        prepared(query, (new, new[..., :64]))
    with pytest.raises(ValueError, match="new keys is torch.bfloat16"):
        prepared(query, (new.bfloat16(), new))
    with pytest.raises(ValueError, match="new keys and values have strides"):
        prepared(query, (new, shifted[:, :, :1]))
    with pytest.raises(ValueError, match="call reserve first"):
        history.append(layer.keys, layer.values)
    _, other = make(HALF, [96], [3], 7, width=128, segments=split(128, 32, *SCALED))
    with pytest.raises(ValueError, match="appended tokens have form"):
        history.append(other.keys, other.values)


def test_a_layer_can_be_read_back():
    _, layer = make(HALF, [96, 64], [3, 1], 7, width=128, segments=split(128, 38, *SCALED), values=VALUES["per token"])
    keys, values = FragmentHistory.from_packed(layer.keys, layer.values).unpack()
    for row, length in enumerate((96, 64)):
        assert torch.equal(keys.decode(torch.float32)[row, :, :length], layer.keys.decode(torch.float32)[row, :, :length])
        assert torch.equal(values[0].decode(torch.float32)[row, :, :length], layer.values[0].decode(torch.float32)[row, :, :length])
    assert isinstance(PackedLayer(keys, values, layer.residual), PackedLayer)

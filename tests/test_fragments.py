"""History in fragment order: what goes in comes out, bits lie where the layout says, appending is packing, and compiling is remembered."""

import builtins
import dataclasses
import itertools
import types

import pytest
import torch

from vidkv_kernels import attend_cuda, nvrtc
from vidkv_kernels.fragment_history import FragmentHistory
from vidkv_kernels.fragments import Form, UnsupportedForm, matrix_fragments, pack_keys, pack_values
from vidkv_kernels.packed import PackedKeys, PackedValues, Segment
from vidkv_kernels.packed_history import PackedHistory
from vidkv_kernels.random_layer import random_layer

SCALED = (Segment(64, 2, "minimum"), Segment(64, 1, "mean"))
KEYS = {
    "half wide": SCALED,
    "published": (Segment(38, 2, "minimum"), Segment(46, 1, "none"), Segment(44, 1, "centred")),
    "few wide": (Segment(12, 2, "minimum"), Segment(116, 1, "mean")),
    "all wide": (Segment(128, 2, "minimum"),),
    "none wide": (Segment(128, 1, "minimum"),),
    "ternary": (Segment(12, 2, "mean"), Segment(116, 2, "mean", is_ternary=True), Segment(12, 2, "centred")),
}
VALUES = {
    "ternary": ("per_channel", 3, "centred"),
    "unscaled": ("per_channel", 3, "unscaled"),
    "min-max": ("per_channel", 4, "minimum"),
    "per token": ("per_token", 4, "minimum"),
    "signs": ("per_channel", 2, "mean"),
    "1 bit per token": ("per_token", 2, "minimum"),
    "ternary with mean": ("per_channel", 3, "mean"),
}


def make(history: list[int], keys=SCALED, values=VALUES["ternary"], width=128, **form):
    generator = torch.Generator().manual_seed(sum(history))
    return random_layer(generator, torch.float16, history, [1] * len(history), heads=2, width=width, segments=keys, values=values, **form)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("keys", KEYS)
def test_what_goes_in_comes_out(keys, values, group_size, metadata=torch.float16):
    layer = make([384, 70], KEYS[keys], VALUES[values], group_size=group_size, metadata=metadata)
    found_keys, (found_values,) = FragmentHistory.from_packed(layer.keys, layer.values).unpack()
    for row, length in enumerate((384, 70)):
        for found, given in ((found_keys, layer.keys), (found_values, layer.values[0])):
            assert torch.equal(found.decode(torch.float32)[row, :, :length], given.decode(torch.float32)[row, :, :length])


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("values", [name for name, (granularity, *_) in VALUES.items() if granularity == "per_channel"])
@pytest.mark.parametrize("keys", KEYS)
def test_metadata_of_4_bits_comes_out_too(keys, values, group_size):
    test_what_goes_in_comes_out(keys, values, group_size, torch.uint8)


def test_more_key_channels_than_a_query_has_come_out_too():
    segments = (Segment(32, 2, "minimum"), Segment(33, 1, "none"), Segment(31, 1, "centred"))
    layer = make([96], segments, width=64)
    keys, _ = FragmentHistory.from_packed(layer.keys, layer.values).unpack()
    assert torch.equal(keys.decode(torch.float32)[:, :, :96], layer.keys.decode(torch.float32)[:, :, :96])


def test_a_key_code_lies_at_the_bit_that_the_layout_says():
    codes = torch.zeros(1, 1, 32, 128, dtype=torch.uint8)
    codes[0, 0, 27, 29] = 3  # token 16 + 8 + 3: m 1, rr 1, g 3; channel 16 + 8 + 4 + 1: fragment 1, kh 1, t 2, e 1
    codes[0, 0, 3, 64 + 16 + 4] = 1  # g 3; 1-bit fragment 1, which shares a word with fragment 0: kh 0, t 2, e 0
    metadata = torch.zeros(1, 1, 1, 128, dtype=torch.float16)
    words = pack_keys(Form(128, SCALED), codes, metadata, metadata)[0, 0, 0, :768].view(torch.int32)
    lane = 4 * 3 + 2
    expected = torch.zeros(192, dtype=torch.int32)
    expected[lane * 4 + 1] = (3 << 30) - (1 << 32)
    expected[128 + lane * 2] = 1 << 1
    assert torch.equal(words, expected)


def test_a_value_code_lies_at_the_bit_that_the_layout_says():
    codes = torch.zeros(1, 1, 32, 128, dtype=torch.uint8)
    codes[0, 0, 29, 47] = 2  # token 16 + 8 + 4 + 1: m 1, kh 1, t 2, e 1; channel 32 + 8 + 4 + 2 + 1: fragment 3, rr 1, g 3
    scale = torch.zeros(1, 1, 1, 128, dtype=torch.float16)
    words = pack_values(Form(128, SCALED), codes, scale, None)[0, 0, 0, :1024].view(torch.int32)
    expected = torch.zeros(256, dtype=torch.int32)
    expected[(4 * 3 + 2) * 4 + 3] = (2 << 30) - (1 << 32)
    assert torch.equal(words, expected)


def test_metadata_of_4_bits_lies_in_the_byte_that_the_layout_says():
    segments = KEYS["ternary"]
    form = Form(128, segments, offset_kind="mean", metadata_bits=4)
    scale, offset = torch.zeros(1, 1, 1, 140, dtype=torch.uint8), torch.zeros(1, 1, 1, 128, dtype=torch.uint8)
    scale[..., 16 * 5 + 8 + 4 + 1], offset[..., 16 * 5 + 8 + 4 + 1] = 13, 6  # step 5, kh 1, t 2, e 1
    scale[..., 128 + 2 * 3] = 9  # step 8, the last one by itself: kh 0, t 3, e 0
    codes = torch.zeros(1, 1, 32, 140, dtype=torch.uint8)
    metadata = pack_keys(form, codes, scale, offset)[0, 0, 0, 9 * 128 :].tolist()
    # Fragments 4 to 7, then lanes of four words; e and kh make the byte. Fragment 8: lanes of one word.
    expected = {64 + (2 * 4 + 1) * 4 + 2 + 1: 13 * 16 + 6, 128 + 3 * 4: 9 * 16}
    assert {place: byte for place, byte in enumerate(metadata) if byte} == expected and len(metadata) == 144
    scale, offset = scale[..., :128] * 0, offset * 0
    scale[..., 47], offset[..., 47] = 4, 5  # channel 32 + 8 + 4 + 2 + 1: j 1, tile 3, rr 1, g 3
    metadata = pack_values(form, codes[..., :128], scale, offset)[0, 0, 0, 1024:].tolist()
    assert {place: byte for place, byte in enumerate(metadata) if byte} == {3 * 16 + 4 + 2 + 1: 4 * 16 + 5} and len(metadata) == 128


def test_bytes_of_ternary_codes_with_metadata_of_4_bits():
    layer = make([320], KEYS["ternary"], VALUES["ternary with mean"], metadata=torch.uint8)
    history = FragmentHistory.from_packed(layer.keys, layer.values)
    # 144 channels of keys and 128 of values: 2 bits a token, a byte a group
    assert history.form.key_record_bytes + history.form.value_record_bytes == (144 + 128) * (32 // 4 + 1)
    units = 2 * 2 * 3 * (144 + 128)
    assert history.nbytes == 2 * 10 * (144 + 128) * 9 + units + 2 * 128 + history.lengths.nbytes + 2 * 2 * 4


def test_units_go_along():
    layer = make([96, 64], KEYS["ternary"], VALUES["ternary with mean"], metadata=torch.uint8)
    history = FragmentHistory.from_packed(layer.keys, layer.values)
    chosen = history.select_batch(torch.tensor([1, 0]))
    keys, (run,) = chosen.unpack()
    assert torch.equal(keys.decode(torch.float32)[1, :, :96], layer.keys.decode(torch.float32)[0, :, :96])
    assert torch.equal(run.decode(torch.float32)[1, :, :96], layer.values[0].decode(torch.float32)[0, :, :96])
    with pytest.raises(ValueError, match="units are missing and metadata has 4 bits"):
        FragmentHistory(history.form, batch=1, heads=1, capacity=32, device="cpu", matrix=layer.keys.matrix)
    layer.values[0].scale_unit[0, 0, 5] = 0
    with pytest.raises(ValueError, match="values.scale_unit has elements that are not above 0"):
        FragmentHistory.from_packed(layer.keys, layer.values)


def test_bytes_are_those_of_codes_and_metadata():
    form = Form(128, SCALED)
    assert form.key_record_bytes == 32 * 64 * 2 // 8 + 32 * 64 // 8 + 2 * 128 + 2 * 128
    assert form.value_record_bytes == 32 * 128 * 2 // 8 + 2 * 128
    history = FragmentHistory(form, batch=3, heads=2, capacity=4096, device="cpu")
    empty = history.nbytes
    layer = make([64, 64, 64])
    history.append(layer.keys, layer.values)
    assert history.nbytes - empty == 3 * 2 * 2 * (form.key_record_bytes + form.value_record_bytes)


def test_appending_at_each_row_s_own_time_is_packing_at_once():
    layer = make([128, 64])
    keys, run = layer.keys, layer.values[0]
    whole = FragmentHistory.from_packed(keys, layer.values)
    grown = FragmentHistory(whole.form, batch=2, heads=2, capacity=32, device="cpu", order=keys.order, matrix=keys.matrix)
    for start, counts in ((0, (32, 0)), (0, (0, 32)), (32, (32, 32)), (64, (32, 0)), (96, (32, 0))):
        blocks = slice(start // 32, start // 32 + 1)
        part = PackedKeys(
            keys.segments, 32, keys.codes[:, :, blocks].contiguous(), keys.scale[:, :, blocks].contiguous(),
            keys.offset[:, :, blocks].contiguous(), order=keys.order, matrix=keys.matrix,
        )  # fmt: skip
        values = PackedValues(
            torch.tensor(counts, dtype=torch.int32), 3, "centred", "per_channel", 32, 128, run.codes[:, :, blocks].contiguous(),
            run.scale[:, :, blocks].contiguous(),
        )  # fmt: skip
        grown.reserve(longest := start + 32)
        grown.append(part, (values,), held=[longest, longest])
    assert grown.lengths.tolist() == [128, 64] and grown.max_length == 128 == grown.capacity
    for row, records in enumerate((4, 2)):
        assert torch.equal(grown.keys[row, :, :records], whole.keys[row, :, :records])
        assert torch.equal(grown.values[row, :, :records], whole.values[row, :, :records])
    assert torch.equal(grown.key_scale_max, whole.key_scale_max) and torch.equal(grown.value_scale_max, whole.value_scale_max)
    chosen = grown.select_batch(torch.tensor([1, 1, 0]))
    assert torch.equal(chosen.keys[2, :, :4], whole.keys[0, :, :4]) and chosen.lengths.tolist() == [64, 64, 128]
    assert torch.equal(chosen.order, keys.order[[1, 1, 0]]) and chosen.matrix is keys.matrix


def test_all_layers_share_one_matrix_in_fragments():
    layer = make([96])
    form = Form.of(layer.keys, layer.values)
    histories = [FragmentHistory(form, batch=batch, heads=1, capacity=32, device="cpu", matrix=layer.keys.matrix) for batch in (1, 3)]
    assert histories[0].matrix_fragments is histories[1].matrix_fragments
    assert histories[0].nbytes == FragmentHistory(form, batch=1, heads=1, capacity=32, device="cpu", matrix=torch.eye(128)).nbytes


def test_an_entry_of_the_matrix_lies_where_the_product_of_a_warp_wants_it():
    matrix = torch.zeros(128, 128)
    matrix[16 + 8 + 4 + 1, 32 + 8 + 3] = 2.0  # input 29: k 1, kh 1, t 2, e 1; output 43: step 2, rr 1, g 3
    halves = matrix_fragments(Form(128, SCALED), matrix).view(torch.float16)
    # 8 inputs of 16, then lanes of 8 halves: kh, rr, e
    assert halves.nonzero().item() == ((2 * 8 + 1) * 32 + 4 * 3 + 2) * 8 + 4 + 2 + 1


def test_the_portable_history_selects_sequences_and_keeps_the_matrix():
    # As many sequences as the matrix has rows.
    layer = random_layer(torch.Generator().manual_seed(0), torch.float16, [32] * 64, [1] * 64)
    chosen = PackedHistory(layer.keys, layer.values).select_batch(torch.tensor([5, 0]))
    assert chosen.keys.matrix is layer.keys.matrix and torch.equal(chosen.keys.order, layer.keys.order[[5, 0]])


def test_scale_bounds_ignore_what_lies_beyond_the_lengths():
    layer = make([40, 96])
    layer.keys.scale[0, :, 2:] = 1e4
    history = FragmentHistory.from_packed(layer.keys, layer.values)
    assert history.key_scale_max.isfinite().all() and (history.key_scale_max[0] < 100).all()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"protected": [32], "group_size": 64, "values": ("per_token", 4, "minimum"), "metadata": torch.float8_e4m3fn}, "float8"),
        ({"metadata": torch.float8_e4m3fn}, "float8"),
        ({"width": 32, "keys": (Segment(32, 2, "minimum"),)}, "32 channels"),
    ],
)
def test_forms_that_the_kernels_do_not_read_are_refused(form, message):
    layer = make([96], **form)
    with pytest.raises(UnsupportedForm, match=message):
        FragmentHistory.from_packed(layer.keys, layer.values)


@pytest.mark.parametrize("values", ["ternary", "unscaled", "per token", "min-max", "signs"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_protected_tokens_come_out_as_they_went_in(values, group_size):
    layer = make([500, 130, 64], values=VALUES[values], protected=[137, 130, 0], group_size=group_size)
    history = FragmentHistory.from_packed(layer.keys, layer.values)
    keys, runs = history.unpack()
    lengths, counts = (500, 130, 64), (137, 130, 0)
    assert [run.lengths.tolist() for run in runs] == [list(counts), [363, 0, 64]] and history.protected.held == list(counts)
    for row in range(3):
        own_keys = (part.decode(torch.float32)[row, :, : lengths[row]] for part in (keys, layer.keys))
        assert torch.equal(*own_keys)
        for found, given in zip(runs, layer.values, strict=True):
            count = int(given.lengths[row])
            assert torch.equal(found.tokens[row, :count], given.tokens[row, :count])
            assert torch.equal(found.decode(torch.float32)[row, :, :count], given.decode(torch.float32)[row, :, :count])
    assert history.select_batch(torch.tensor([2, 0])).unpack()[1][0].tokens[1, :137].tolist() == layer.values[0].tokens[0, :137].tolist()


def test_a_bit_for_each_token_says_which_are_protected():
    layer = make([70], protected=[0])
    layer.values[0].lengths[0], layer.values[1].lengths[0] = 3, 67
    layer.values[0].tokens[0, :3] = torch.tensor([0, 33, 69])
    layer.values[1].tokens[0, :67] = torch.tensor([token for token in range(70) if token not in (0, 33, 69)])
    protected = FragmentHistory.from_packed(layer.keys, layer.values).protected
    assert protected.marks.tolist() == [[1, 2, 32]] and protected.before.tolist() == [[0, 1, 2]]


def cut(layer, start, stop, counts, values):
    """Keys of some blocks, and runs that hold what `values` says, `counts` tokens of each sequence in all."""
    keys, blocks = layer.keys, slice(start // 32, stop // 32)
    parts = {name: getattr(keys, name)[:, :, blocks].contiguous() for name in ("codes", "scale", "offset")}
    assert sum(run.lengths for run in values).tolist() == counts
    return dataclasses.replace(keys, **parts), values


def others_from(run, start, counts, first):
    """`counts` entries of a run in blocks from the one at entry `first` on, which belong to tokens from `start` on."""
    blocks = slice(first // 32, first // 32 + max(counts) // 32)
    parts = {name: getattr(run, name)[:, :, blocks].contiguous() for name in ("codes", "scale")}
    tokens = (start + torch.arange(max(counts), dtype=torch.int32)).expand(len(counts), -1).contiguous()
    return dataclasses.replace(run, lengths=torch.tensor(counts, dtype=torch.int32), tokens=tokens, **parts)


def test_later_tokens_go_to_the_others_and_sequences_begin_in_turn():
    layer = make([128, 128], protected=[32, 32])
    first, later = layer.values
    form = Form.of(layer.keys, layer.values)
    assert form.is_protected and not form.protected.is_protected
    grown = FragmentHistory(form, batch=2, heads=2, capacity=128, device="cpu", order=layer.keys.order, matrix=layer.keys.matrix)
    none = torch.zeros(2, dtype=torch.int32)
    whole = FragmentHistory.from_packed(layer.keys, layer.values)
    for row in range(2):  # each with its prompt, the other getting nothing
        own = torch.eye(2, dtype=torch.int32)[row]
        runs = (dataclasses.replace(first, lengths=32 * own), dataclasses.replace(later, lengths=96 * own))
        grown.append(*cut(layer, 0, 128, (128 * own).tolist(), runs[:: 1 - 2 * row]), held=[128, 128 * row])
    for name in ("values", "marks", "before", "lengths"):
        assert torch.equal(getattr(grown.protected, name), getattr(whole.protected, name))
    assert torch.equal(grown.values[:, :, :3], whole.values[:, :, :3]) and torch.equal(grown.lengths, none + 128)
    version, held = grown.version, grown.nbytes
    grown.reserve(192)
    assert grown.version == version + 1 and grown.protected.before[:, 4:].eq(32).all() and grown.protected.marks[:, 4:].eq(0).all()
    grown.append(*cut(layer, 64, 128, [64, 64], (others_from(later, 128, [64, 64], 0),)))
    assert grown.lengths.tolist() == [192, 192] and grown.protected.held == [32, 32] and grown.version == version + 1
    _, runs = grown.unpack()
    assert torch.equal(runs[1].tokens[:, 96:160], torch.arange(128, 192, dtype=torch.int32).expand(2, -1))
    assert torch.equal(runs[1].decode(torch.float32)[:, :, 96:160], later.decode(torch.float32)[:, :, :64])
    assert torch.equal(runs[0].tokens[:, :32], first.tokens[:, :32])
    # Two blocks of keys and values in each of two heads of two sequences, a mark and a count for each block.
    assert grown.nbytes - held == 2 * 2 * 2 * (form.key_record_bytes + form.value_record_bytes) + 2 * 2 * 8


def test_a_prompt_whose_tokens_are_all_protected_needs_to_be_told_the_form():
    layer = make([64], protected=[64])
    with pytest.raises(UnsupportedForm, match="of what form the other run will be"):
        FragmentHistory.from_packed(layer.keys, layer.values[:1])
    history = FragmentHistory.from_packed(layer.keys, layer.values[:1], form=Form.of(layer.keys, layer.values))
    assert history.protected.marks.tolist() == [[-1, -1]] and history.protected.values.shape[2] == 2


def test_protected_tokens_of_another_form_or_out_of_order_are_refused():
    layer = make([96], protected=[32])
    chosen, others = layer.values
    with pytest.raises(UnsupportedForm, match="protected tokens in none of the forms"):
        Form.of(layer.keys, (others, others))
    chosen.tokens[0, :32] = chosen.tokens[0, :32].flip(0)
    with pytest.raises(ValueError, match="not in ascending order"):
        FragmentHistory.from_packed(layer.keys, layer.values)
    chosen.tokens[0, :32] = torch.arange(70, 102)
    with pytest.raises(ValueError, match="beyond the 96"):
        FragmentHistory.from_packed(layer.keys, layer.values)
    history = FragmentHistory.from_packed(layer.keys, layer.values[1:], form=Form.of(layer.keys, layer.values))
    with pytest.raises(ValueError, match="appended tokens have form"):
        history.append(layer.keys, make([96], values=VALUES["signs"]).values)


def test_a_full_history_and_another_form_are_refused():
    layer = make([96])
    history = FragmentHistory.from_packed(layer.keys, layer.values)
    with pytest.raises(ValueError, match="call reserve first"):
        history.append(layer.keys, layer.values)
    other = make([96], KEYS["few wide"])
    with pytest.raises(ValueError, match="appended tokens have form"):
        history.append(other.keys, other.values)
    with pytest.raises(ValueError, match="keys have 96 channels and queries 64"):
        FragmentHistory(Form(64, (Segment(96, 2, "minimum"),)), batch=1, heads=1, capacity=32, device="cpu")


def test_attention_needs_a_cuda_device():
    layer = make([96])
    history = FragmentHistory.from_packed(layer.keys, layer.values)
    with pytest.raises(ValueError, match="residual is on cpu"):
        attend_cuda.attend(torch.zeros(1, 2, 1, 128, dtype=torch.float16), history, layer.residual, 1.0)


def test_splits_fill_the_device():
    for tiles, records in itertools.product((1, 4, 32, 36, 128, 500), (0, 1, 64, 1024, 4096)):
        assert 1 <= attend_cuda.choose_splits(tiles, records, 8, 132) <= max(1, -(-records // 8))
    assert attend_cuda.choose_splits(4, 4096, 8, 132) == 33
    assert attend_cuda.choose_splits(128, 1024, 8, 132) == 1


@pytest.mark.parametrize("limit", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("is_protected", [False, True])
def test_plans_fit_into_shared_memory_and_give_every_warp_enough(limit, is_protected, monkeypatch):
    device = types.SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=limit)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    for group_size, tiles, room in itertools.product((32, 64, 128), (1, 4, 32, 128), (128, 4096, 8192, 32768, 131072)):
        form = Form(128, SCALED, group_size, is_protected=is_protected)
        plan = attend_cuda._choose.__wrapped__(form, tiles, room, device)
        assert attend_cuda._shared_bytes(form, plan.chunks, plan.warps) <= limit
        assert plan.splits == 1 or (1 + is_protected) * plan.warps * (plan.splits - 1) < room // group_size
    assert not is_protected or attend_cuda._choose.__wrapped__(Form(128, SCALED, is_protected=True), 4, 4096, device).splits == 16


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    real_import = builtins.__import__

    def fail(name, *arguments, **options):
        if name.startswith("cuda"):
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    nvrtc._bindings.cache_clear()
    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(nvrtc.KernelError, match=r"vidkv-eval\[cuda\]"):
        nvrtc.compile_kernels("", {}, (9, 0))


class FakeCompiler:
    """Stands in for NVRTC: counts compilations, and refuses a source that says so."""

    def __init__(self):
        self.compiled = []

    def nvrtcVersion(self):
        return 0, 13, 0

    def nvrtcCreateProgram(self, source, *_):
        return 0, source

    def nvrtcCompileProgram(self, program, _, options):
        self.compiled.append((program, tuple(options)))
        return (int(b"error" in program),)

    def nvrtcGetProgramLogSize(self, program):
        return 0, 8

    def nvrtcGetProgramLog(self, program, log):
        return (0,)

    def nvrtcGetCUBINSize(self, program):
        return 0, 4

    def nvrtcGetCUBIN(self, program, code):
        return (0,)

    def nvrtcDestroyProgram(self, program):
        return (0,)


def test_a_kernel_is_compiled_once_for_each_source_constants_and_device(monkeypatch, tmp_path):
    fake = FakeCompiler()
    monkeypatch.setattr(nvrtc, "_bindings", lambda name: fake)
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path))
    calls = [("a", {"X": 1}, (9, 0)), ("a", {"X": 1}, (9, 0)), ("b", {"X": 1}, (9, 0)), ("a", {"X": 2}, (9, 0)), ("a", {"X": 1}, (8, 0))]
    for call in calls:
        assert len(nvrtc.compile_kernels(*call)) == 4
    assert len(fake.compiled) == 4 == len(list(tmp_path.iterdir()))
    assert b"--gpu-architecture=sm_80" in fake.compiled[-1][1]


def test_a_source_that_does_not_compile_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "_bindings", lambda name: FakeCompiler())
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path / "new"))
    with pytest.raises(nvrtc.KernelError, match="NVRTC refuses"):
        nvrtc.compile_kernels("error", {}, (9, 0))
    assert not (tmp_path / "new").exists()

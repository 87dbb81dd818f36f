"""Grouping, packing and each quantizer, against second implementations, properties and values worked out by hand."""

import pytest
import torch

from vidkv_eval.quant.affine import Affine
from vidkv_eval.quant.centred import Centred
from vidkv_eval.quant.fitted import Fitted
from vidkv_eval.quant.grouping import group, ungroup
from vidkv_eval.quant.growing import GrowingStates
from vidkv_eval.quant.hadamard import Hadamard
from vidkv_eval.quant.identity import Identity
from vidkv_eval.quant.metadata import MetadataWriter
from vidkv_eval.quant.quantile import Quantile
from vidkv_eval.quant.segment import Segment
from vidkv_eval.quant.sign import Sign
from vidkv_eval.quant.spectral import Spectral
from vidkv_eval.quant.split_channels import SplitChannels
from vidkv_eval.quant.ternary import Ternary
from vidkv_kernels.layouts import LAYOUTS
from vidkv_kernels.packing import CODES_PER_BYTE, pack, unpack

PER_CHANNEL, PER_TOKEN = "per_channel", "per_token"
SIGN_ZERO = Sign("zero_scale", PER_CHANNEL, 4)
SIGN_MEAN = Sign("mean_plus_minus", PER_CHANNEL, 4)


def one_group(*values):
    """One group of consecutive tokens in one channel, [1, 1, T, 1]."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)


def read_back(quantizer, states):
    return quantizer.dequantize(quantizer.quantize(states), torch.float32)


def complex_spectral(states, group_size, decode):
    """The released layout: full complex transform over channels, real and imaginary series coded in groups of tokens."""
    spectrum = torch.view_as_real(torch.fft.fft(states, dim=-1))
    batch, heads, length, channels, _ = spectrum.shape
    groups = spectrum.reshape(batch, heads, length // group_size, group_size, channels, 2)
    decoded = decode(groups, dim=3).reshape(spectrum.shape).contiguous()
    return torch.fft.ifft(torch.view_as_complex(decoded), dim=-1).real


def zero_scale(groups, dim):
    return (groups >= 0) * groups.abs().mean(dim, keepdim=True)


def plus_minus(groups, dim):
    return torch.where(groups >= 0, 1.0, -1.0) * groups.abs().mean(dim, keepdim=True)


def mean_plus_minus(groups, dim):
    mean = groups.mean(dim, keepdim=True)
    return mean + plus_minus(groups - mean, dim)


# Equivalence


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("decode", [zero_scale, plus_minus, mean_plus_minus], ids=lambda decode: decode.__name__)
def test_real_spectral_layout_reads_back_what_the_full_complex_transform_does(channels, decode):
    states = torch.randn(2, 3, 8, channels, generator=torch.Generator().manual_seed(channels))
    expected = complex_spectral(states, 4, decode)
    found = read_back(Spectral(Sign(decode.__name__, PER_CHANNEL, 4)), states)
    assert (found - expected).norm() < 1e-3 * expected.norm()  # metadata is rounded to float16


def test_spectral_stores_one_code_per_channel():
    quantized = Spectral(Sign("plus_minus", PER_CHANNEL, 32)).quantize(torch.randn(1, 1, 64, 64))
    assert quantized.nbytes == 64 * 64 / 8 + 2 * 64 * 2


def test_spectral_around_identity_gives_the_states_back():
    for channels in (1, 2, 5, 6):
        states = torch.randn(1, 2, 3, channels)
        torch.testing.assert_close(read_back(Spectral(Identity()), states), states)


def test_split_quantizes_chosen_channels_as_if_they_were_alone():
    states = torch.randn(2, 3, 8, 6)
    states[0, :, :, [1, 4]] *= 10
    states[1, :, :, [0, 5]] *= 10
    wide, normal = Affine(2, PER_CHANNEL, 4), SIGN_MEAN
    found = read_back(SplitChannels(wide, normal, fraction=1 / 3), states)
    for item, channels in ((0, [1, 4]), (1, [0, 5])):
        others = [channel for channel in range(6) if channel not in channels]
        one = states[item : item + 1]
        assert torch.equal(found[item : item + 1][..., channels], read_back(wide, one[..., channels]))
        assert torch.equal(found[item : item + 1][..., others], read_back(normal, one[..., others]))


def test_split_without_wide_or_without_normal_channels_is_the_other_quantizer():
    states = torch.randn(1, 2, 8, 6)
    wide, normal = Affine(2, PER_CHANNEL, 4), SIGN_MEAN
    assert torch.equal(read_back(SplitChannels(wide, normal, fraction=0), states), read_back(normal, states))
    assert torch.equal(read_back(SplitChannels(wide, None, fraction=1), states), read_back(wide, states))


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_a_whole_segment_is_one_min_max_group_for_each_channel(nbits):
    states = torch.randn(2, 3, 24, 5)
    assert torch.equal(read_back(Segment(nbits), states), read_back(Affine(nbits, PER_CHANNEL, 24), states))


def test_quantile_0_is_1_bit_between_minimum_and_maximum():
    states = torch.randint(-99, 99, (2, 3, 64, 8)).float()  # metadata in float16 is exact
    assert torch.equal(read_back(Quantile(0, PER_CHANNEL, 32), states), read_back(Affine(1, PER_CHANNEL, 32), states))


@pytest.mark.parametrize("tau", [0.05, 0.2, 0.25, 0.4])
def test_levels_are_the_quantiles_of_torch(tau):
    groups = torch.randn(1, 2, 3, 4, 32)
    write = MetadataWriter("float16", None)
    Quantile(tau, PER_CHANNEL, 32).encode(groups, write)
    for name, share in (("low", tau), ("high", 1 - tau)):
        assert torch.equal(write.tensors[name], groups.quantile(share, dim=-1).half())


def fit_in_words(values, levels, emphasis, rounds):
    """Levels of least weighted squared error for one group, one element at a time, metadata unrounded."""
    mean = sum(values) / len(values)
    deviation = (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5
    weights = [max(abs(x - mean) / deviation, 0.05) ** emphasis for x in values]
    low, high = min(values), max(values)
    middle, scale, half = (low + high) / 2, (high - low) / (levels - 1), (levels - 1) / 2
    for _ in range(rounds):
        steps = [min(max(round((x - middle) / scale + half), 0), levels - 1) - half for x in values]
        total = sum(weights)
        mean_x = sum(w * x for w, x in zip(weights, values, strict=True)) / total
        mean_s = sum(w * s for w, s in zip(weights, steps, strict=True)) / total
        above = sum(w * (s - mean_s) * (x - mean_x) for w, s, x in zip(weights, steps, values, strict=True))
        scale = above / sum(w * (s - mean_s) ** 2 for w, s in zip(weights, steps, strict=True))
        middle = mean_x - scale * mean_s
    steps = [min(max(round((x - middle) / scale + half), 0), levels - 1) - half for x in values]
    middle = sum(w * (x - scale * s) for w, x, s in zip(weights, values, steps, strict=True)) / sum(weights)
    return [middle + scale * (min(max(round((x - middle) / scale + half), 0), levels - 1) - half) for x in values]


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
@pytest.mark.parametrize("emphasis", [0, 0.5, 1.0])
def test_fitted_reads_back_what_a_fit_in_plain_words_does(levels, emphasis):
    states = torch.randn(1, 1, 32, 8, generator=torch.Generator().manual_seed(levels))
    found = read_back(Fitted(levels, emphasis, PER_CHANNEL, 32), states)
    for channel in range(8):
        expected = torch.tensor(fit_in_words(states[0, 0, :, channel].tolist(), levels, emphasis, 4))
        # Metadata are rounded to float16, which can move an element that lies between two levels.
        assert ((found[0, 0, :, channel] - expected).abs() > 4e-3).sum() <= 1


def test_hadamard_is_the_product_with_the_matrix():
    matrix = torch.ones(1, 1)
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    states = torch.randn(2, 3, 8, 16)
    stored = Hadamard(Identity()).quantize(states).parts["inner"].tensors["states"]
    torch.testing.assert_close(stored, states @ matrix / 4)
    torch.testing.assert_close(read_back(Hadamard(Identity()), states), states)
    with pytest.raises(ValueError, match="12 channels; allowed: powers of two"):
        Hadamard(Identity()).quantize(torch.zeros(1, 1, 1, 12))


# Properties


@pytest.mark.parametrize("granularity", [PER_CHANNEL, PER_TOKEN])
def test_ungroup_inverts_group(granularity):
    states = torch.randn(2, 3, 12, 8)
    groups = group(states, granularity, 4)
    assert groups.shape == (2, 3, 3, 8, 4)
    assert torch.equal(ungroup(groups, granularity), states)


def test_groups_follow_their_granularity():
    states = torch.arange(32).view(1, 1, 4, 8)  # token t, channel c: 8 t + c
    assert group(states, PER_CHANNEL, 4)[0, 0, 0, 1].tolist() == [1, 9, 17, 25]
    assert group(states, PER_TOKEN, 4)[0, 0, 0, 1].tolist() == [4, 5, 6, 7]


def test_states_that_do_not_fill_groups_are_refused():
    with pytest.raises(ValueError, match="10 channels .* groups of 4"):
        group(torch.zeros(1, 1, 4, 10), PER_TOKEN, 4)
    with pytest.raises(ValueError, match="6 tokens .* blocks of 4"):
        group(torch.zeros(1, 1, 6, 8), PER_CHANNEL, 4)


@pytest.mark.parametrize("code_count", CODES_PER_BYTE)
@pytest.mark.parametrize("count", [1, 5, 8, 63])
def test_unpack_inverts_pack_and_fills_bytes(code_count, count):
    codes = torch.randint(code_count, (2, 3, count), dtype=torch.uint8)
    packed = pack(codes, code_count)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == -(-count // CODES_PER_BYTE[code_count])
    assert torch.equal(unpack(packed, code_count, count), codes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("code_count", CODES_PER_BYTE)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 32)])
def test_every_layout_inverts_itself_block_by_block(layout, code_count, size):
    codes = torch.randint(code_count, (2, 3, 4, *size), dtype=torch.uint8)
    packed = LAYOUTS[layout].pack(codes, code_count)
    assert (packed.dtype, packed.shape[:3]) == (torch.uint8, codes.shape[:3])
    assert torch.equal(LAYOUTS[layout].unpack(packed, code_count, *size), codes)
    assert torch.equal(LAYOUTS[layout].unpack(packed[1:, :, 2:3], code_count, *size), codes[1:, :, 2:3])


@pytest.mark.parametrize(("layout", "nbytes"), [("capacity", 8 * 103), ("fields", 8 * 128), ("planes", 8 * 128)])
def test_ternary_layouts_read_back_the_same_from_other_bytes(layout, nbytes):
    states = torch.randn(1, 2, 128, 16)
    stored = Ternary(0.7, False, PER_CHANNEL, 32, layout).quantize(states)
    assert stored.nbytes == nbytes
    expected = read_back(Ternary(0.7, False, PER_CHANNEL, 32), states)
    assert torch.equal(read_back(Ternary(0.7, False, PER_CHANNEL, 32, layout), states), expected)


def test_float8_metadata_take_half_the_bytes_and_one_unit_for_each_head():
    states = torch.randn(2, 3, 64, 16)
    half, eighth = (Affine(2, PER_CHANNEL, 32, metadata=metadata).quantize(states).nbytes for metadata in ("float16", "float8"))
    assert half - eighth == 2 * 3 * (2 * 16 * 2 - 2 * 2)


@pytest.mark.parametrize("granularity", [PER_CHANNEL, PER_TOKEN])
def test_float8_metadata_are_within_a_sixteenth_of_float16_metadata(granularity):
    states = torch.randn(2, 3, 64, 64) * torch.logspace(-1.5, 1.5, 64)
    wide, narrow = (MetadataWriter(metadata, None) for metadata in ("float16", "float8"))
    values = group(states, granularity, 32).amax(-1)
    torch.testing.assert_close(narrow("scale", values), wide("scale", values), rtol=1 / 16 + 2**-10, atol=0)


def test_codes_are_chosen_for_the_float8_metadata_that_reading_will_find():
    states = torch.randn(1, 1, 32, 64) * 3
    quantizer = Affine(2, PER_CHANNEL, 32, metadata="float8")
    stored = quantizer.quantize(states)
    scale, minimum = (stored.tensors[name].float().view(64, 1) * stored.static[f"{name}_unit"].item() / 64 for name in ("scale", "minimum"))
    levels = minimum + scale * torch.arange(4)  # [channel, level]
    nearest = (states.view(32, 64, 1) - levels).abs().argmin(-1)
    assert torch.equal(quantizer.dequantize(stored, torch.float32).view(32, 64), levels.gather(1, nearest.T).T)


def test_float8_metadata_keep_the_unit_of_the_first_tokens_and_refuse_seven_times_it():
    quantizer = Sign("plus_minus", PER_CHANNEL, 4, metadata="float8")
    first = quantizer.quantize(torch.full((1, 1, 4, 2), 0.5))
    later = quantizer.quantize(torch.full((1, 1, 4, 2), 3.5), like=first)
    assert first.static["scale_unit"].tolist() == [[0.5]]
    both = GrowingStates(first)
    both.append(later)
    assert quantizer.dequantize(both.states, torch.float32)[0, 0, :, 0].tolist() == [0.5] * 4 + [3.5] * 4
    with pytest.raises(OverflowError, match="a scale of 8 times the largest of the first tokens; float8 metadata holds at most 7 times"):
        quantizer.quantize(torch.full((1, 1, 4, 2), 4.0), like=first)


def test_float8_metadata_of_a_head_of_zeros_have_the_unit_1():
    quantizer = Sign("plus_minus", PER_CHANNEL, 4, metadata="float8")
    first = quantizer.quantize(torch.zeros(1, 1, 4, 2))
    assert first.static["scale_unit"].tolist() == [[1.0]]
    assert (quantizer.dequantize(first, torch.float32) == 0).all()


def test_fitted_levels_have_less_error_than_minimum_and_maximum():
    states = torch.randn(1, 2, 256, 16)
    for levels, nbits in ((4, 2), (16, 4)):
        fitted, spread = Fitted(levels, 0, PER_CHANNEL, 32), Affine(nbits, PER_CHANNEL, 32)
        assert (read_back(fitted, states) - states).norm() < 0.98 * (read_back(spread, states) - states).norm()


def test_emphasis_reads_the_extreme_element_of_a_group_back_better():
    states = torch.randn(1, 1, 32, 64)
    states[:, :, 7] *= 4
    errors = [(read_back(Fitted(3, emphasis, PER_CHANNEL, 32), states) - states)[:, :, 7].norm() for emphasis in (0, 0.5, 1.0)]
    assert errors[0] > errors[1] > errors[2]


def test_a_constant_far_from_zero_costs_neither_centred_nor_uint4_quantizers_accuracy():
    states = torch.randn(1, 2, 128, 16)
    bias = torch.zeros(16)
    bias[3], bias[11] = 700, -300
    for quantizer in (Fitted(3, 1.0, PER_CHANNEL, 32, metadata="uint4"), Centred(Affine(2, PER_CHANNEL, 32, metadata="float8"))):
        plain = (read_back(quantizer, states) - states).norm()
        assert (read_back(quantizer, states + bias) - states - bias).norm() < 1.05 * plain
    uncentred = Affine(2, PER_CHANNEL, 32, metadata="float8")
    errors = [read_back(uncentred, states + offset) - states - offset for offset in (0, bias)]
    assert errors[1][..., [3, 11]].norm() > 2 * errors[0][..., [3, 11]].norm()


def test_uint4_metadata_take_half_a_byte_and_keep_the_steps_of_the_first_tokens():
    quantizer = Fitted(3, 0, PER_CHANNEL, 32, metadata="uint4")
    first = quantizer.quantize(torch.randn(2, 3, 64, 16))
    assert {name: tuple(tensor.shape) for name, tensor in first.tensors.items() if name != "codes"} == {
        "scale": (2, 3, 2, 8),
        "middle": (2, 3, 2, 8),
    }
    assert set(first.static) == {"scale_step", "middle_centre", "middle_step"}
    later = quantizer.quantize(torch.randn(2, 3, 32, 16) * 50, like=first)
    assert all(torch.equal(first.static[name], later.static[name]) for name in first.static)


def test_uint4_metadata_clip_what_later_tokens_need_beyond_the_first():
    quantizer = Sign("plus_minus", PER_CHANNEL, 2, metadata="uint4")
    first = quantizer.quantize(one_group(1.0, -1.0, 2.0, -2.0))
    later = quantizer.quantize(one_group(1.0, -1.0, 30.0, -30.0), like=first)
    largest = 15 * first.static["scale_step"].float().item()
    assert quantizer.dequantize(later, torch.float32).flatten()[2:].tolist() == [largest, -largest]
    assert largest == pytest.approx(2, rel=1e-3)


def test_a_channel_constant_in_the_first_tokens_follows_later_ones_in_uint4_metadata():
    quantizer = Fitted(4, 0, PER_CHANNEL, 32, metadata="uint4")
    first, second = torch.randn(1, 1, 64, 4), torch.randn(1, 1, 32, 4) / 128
    first[..., 2] = 5
    second[..., 2] += 5
    later = quantizer.quantize(second, like=quantizer.quantize(first))
    error = (quantizer.dequantize(later, torch.float32) - second)[..., 2]
    assert error.norm() < 0.5 * (second[..., 2] - 5).norm()


def test_channels_are_chosen_for_each_head_if_asked():
    states = torch.randn(2, 2, 8, 4)
    for item, head, channel in ((0, 0, 3), (0, 1, 1), (1, 0, 0), (1, 1, 2)):
        states[item, head, :, channel] *= 20
    for select in ("range", "variance", "outlier"):
        quantizer = SplitChannels(Affine(2, PER_CHANNEL, 4), SIGN_MEAN, fraction=0.25, select=select, per_head=True)
        assert quantizer.quantize(states).static["wide_channels"].tolist() == [[[3], [1]], [[0], [2]]]
        found = read_back(quantizer, states)
        for head in range(2):
            assert torch.equal(found[:, head : head + 1], read_back(quantizer, states[:, head : head + 1]))


def test_affine_keeps_values_that_lie_on_its_levels():
    states = one_group(-1.0, 0.5, 2.0, 3.5)
    assert torch.equal(read_back(Affine(2, PER_CHANNEL, 4), states), states)


def test_affine_error_is_at_most_half_a_step_beyond_float16_rounding():
    states = torch.randn(1, 2, 64, 8) * 5 + 3
    for nbits in (2, 4, 8):
        groups = group(states, PER_CHANNEL, 32)
        step = (groups.amax(-1) - groups.amin(-1)) / (2**nbits - 1)
        error = group((read_back(Affine(nbits, PER_CHANNEL, 32), states) - states).abs(), PER_CHANNEL, 32).amax(-1)
        assert (error <= step / 2 + groups.abs().amax(-1) * 2**-9).all()


def test_every_element_reads_back_as_the_nearer_quantile():
    states = torch.randn(1, 2, 64, 8)
    found = group(read_back(Quantile(0.2, PER_CHANNEL, 32), states), PER_CHANNEL, 32)
    exact = group(states, PER_CHANNEL, 32)
    low, high = found.amin(-1, keepdim=True), found.amax(-1, keepdim=True)
    assert ((found - exact).abs() <= torch.minimum((exact - low).abs(), (exact - high).abs()) + 1e-6).all()


def test_segments_of_any_length_cost_the_same_metadata_and_later_tokens_none():
    quantizer = Segment(1, 0.5)
    for tokens in (1, 7, 64):
        stored = quantizer.quantize(torch.randn(2, 3, tokens, 20))
        assert stored.nbytes == 2 * 3 * (tokens * 3 + 20 * 2 * 2)  # 20 codes in 3 bytes; minimum and scale of each channel
    later = quantizer.quantize(torch.randn(2, 3, 5, 20), like=stored)
    growing = GrowingStates(stored)
    growing.append(later)
    assert growing.states.nbytes == stored.nbytes + 2 * 3 * 5 * 3


def test_range_too_narrow_for_float16_reads_back_as_the_minimum():
    states = one_group(1.0, 1.0 + 2**-23, 1.0, 1.0)
    assert torch.equal(read_back(Affine(8, PER_CHANNEL, 4), states), torch.ones_like(states))
    assert torch.equal(read_back(Affine(2, PER_CHANNEL, 4), one_group(0, 1e-9, 0, 0)), torch.zeros(1, 1, 4, 1))


def test_constant_groups_get_codes_that_fit_their_bits():
    write = MetadataWriter("float16", None)
    codes = Affine(2, PER_CHANNEL, 4).encode(torch.full((1, 1, 1, 2, 4), 0.1), write)
    assert (write.tensors["scale"] == 0).all()
    assert (codes == 0).all()


def test_states_too_large_for_metadata_are_refused():
    with pytest.raises(OverflowError, match="float16 metadata holds at most 65504"):
        Affine(2, PER_CHANNEL, 4).quantize(one_group(1e6, 0, 0, 0))


def test_equal_widths_choose_the_first_channels():
    states = torch.zeros(1, 1, 4, 6)
    for select in ("range", "variance", "outlier"):
        quantized = SplitChannels(Affine(2, PER_CHANNEL, 4), SIGN_ZERO, fraction=0.5, select=select).quantize(states)
        assert quantized.static["wide_channels"].tolist() == [[0, 1, 2]]


def test_appended_tokens_keep_the_channels_chosen_first():
    quantizer = SplitChannels(Affine(2, PER_CHANNEL, 4), SIGN_MEAN, fraction=0.5)
    first, second = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    first[..., 2:] *= 10
    second[..., :2] *= 10
    stored = quantizer.quantize(first)
    both = GrowingStates(stored)
    both.append(quantizer.quantize(second, like=stored))
    assert both.states.static["wide_channels"].tolist() == [[2, 3]]
    with pytest.raises(ValueError, match="like="):
        both.append(quantizer.quantize(second))
    assert both.states.length == 8


def test_channel_indices_are_counted():
    quantizer = SplitChannels(Identity(), Identity(), fraction=0.5)
    assert quantizer.quantize(torch.zeros(2, 1, 1, 128)).nbytes == 2 * 128 * 4 + 2 * 64
    assert quantizer.quantize(torch.zeros(1, 1, 1, 300)).nbytes == 300 * 4 + 150 * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Affine(3, PER_CHANNEL, 32), "Affine.nbits is 3; allowed: 1, 2, 4, 8"),
        (lambda: Affine(2, "per_head", 32), "Affine.granularity is 'per_head'; allowed: per_channel, per_token"),
        (lambda: Affine(2, PER_CHANNEL, 0), "Affine.group_size is 0; allowed: integers above 0"),
        (lambda: Sign("plus", PER_CHANNEL, 32), "Sign.levels is 'plus'; allowed: zero_scale, plus_minus, mean_plus_minus"),
        (lambda: Ternary(-0.1, True, PER_CHANNEL, 32), "Ternary.threshold is -0.1; allowed: numbers from 0"),
        (lambda: Ternary(0.7, "yes", PER_CHANNEL, 32), "Ternary.scaled is 'yes'; allowed: true, false"),
        (lambda: SplitChannels(SIGN_ZERO, SIGN_ZERO, 1.5), "SplitChannels.fraction is 1.5; allowed: numbers from 0 to 1"),
        (lambda: SplitChannels(SIGN_ZERO, None, 0.5), "SplitChannels.normal is None; allowed: a quantizer"),
        (lambda: SplitChannels(SIGN_ZERO, SIGN_ZERO, 0.5, per_head=1), "SplitChannels.per_head is 1; allowed: true, false"),
        (lambda: SplitChannels(SIGN_ZERO, SIGN_ZERO, 0.5, "width"), "SplitChannels.select is 'width'; allowed: range, variance, outlier"),
        (lambda: Quantile(0.5, PER_CHANNEL, 32), "Quantile.tau is 0.5; allowed: numbers from 0 to below 0.5"),
        (lambda: Segment(3), "Segment.nbits is 3; allowed: 1, 2, 4, 8"),
        (lambda: Segment(1, 0), "Segment.shrink is 0; allowed: numbers above 0 to 1"),
        (lambda: Spectral("sign"), "Spectral.inner is 'sign'; allowed: a quantizer"),
        (lambda: Centred(2), "Centred.inner is 2; allowed: a quantizer"),
        (lambda: Hadamard(None), "Hadamard.inner is None; allowed: a quantizer"),
        (lambda: Fitted(5, 0, PER_CHANNEL, 32), "Fitted.levels is 5; allowed: 2, 3, 4, 16"),
        (lambda: Fitted(3, -1, PER_CHANNEL, 32), "Fitted.emphasis is -1; allowed: numbers from 0"),
        (
            lambda: Fitted(3, 0, PER_TOKEN, 32, metadata="uint4"),
            "Fitted.metadata is 'uint4'; allowed: float16, float8 (uint4 goes with per_channel, not with per_token)",
        ),
    ],
)
def test_impossible_settings_name_the_field_and_what_is_allowed(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


# Values worked out by hand


def test_affine_by_hand():
    quantized = Affine(2, PER_CHANNEL, 8).quantize(one_group(-1, 2, 0, 0.5, 1.5, -0.5, 1, -1))
    assert quantized.tensors["minimum"].item() == -1
    assert quantized.tensors["scale"].item() == 1
    # steps above the minimum: 0, 3, 1, 1.5, 2.5, 0.5, 2, 0; halves go to the even code
    assert unpack(quantized.tensors["codes"], 4, 8).flatten().tolist() == [0, 3, 1, 2, 2, 0, 2, 0]
    assert quantized.tensors["codes"].flatten().tolist() == [0 + 3 * 4 + 1 * 16 + 2 * 64, 2 + 0 * 4 + 2 * 16 + 0 * 64]


def test_fitted_by_hand():
    # From 0 and 10: scale 5, steps -1, -1, 0, 0, 0, 1. Least squares: the line through the means of the three levels' elements,
    # with weights 2, 3, 1: steps -1 -> 1, 0 -> 5, 1 -> 10. Means: step -1/6, x 27/6; scale (8 + 4.5) / (17/6) = 75/17,
    # middle 27/6 + scale/6 = 89.0/17. The same steps are nearest again.
    scale, middle = 75 / 17, 89 / 17
    found = read_back(Fitted(3, 0, PER_CHANNEL, 6), one_group(0, 2, 4, 5, 6, 10)).flatten()
    expected = torch.tensor([middle - scale] * 2 + [middle] * 3 + [middle + scale])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_centred_by_hand():
    # means 2 and 100; sizes of the differences 1 and 4
    states = torch.tensor([[1.0, 104], [3, 96], [1, 104], [3, 96]]).view(1, 1, 4, 2)
    assert read_back(Centred(Sign("plus_minus", PER_CHANNEL, 4)), states).flatten().tolist() == states.flatten().tolist()


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("capacity", [0 + 1 * 3 + 2 * 9 + 2 * 27 + 1 * 81, 2]),
        ("fields", [0 + 1 * 4 + 2 * 16 + 2 * 64, 1 + 2 * 4]),
        ("planes", [0b010010, 0b101100]),
    ],
)
def test_ternary_layouts_by_hand(layout, expected):
    codes = torch.tensor([[0, 1], [2, 2], [1, 2]], dtype=torch.uint8).view(1, 1, 1, 3, 2)
    assert LAYOUTS[layout].pack(codes, 3).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("levels", "expected"),
    [("zero_scale", [2, 0, 2, 2]), ("plus_minus", [2, -2, 2, 2]), ("mean_plus_minus", [3, -1, -1, 3])],
)
def test_sign_by_hand(levels, expected):
    # mean of |x| is 2; mean of x is 1, mean of |x - 1| is 2; exactly zero counts as positive
    states = one_group(3, -2, 0, 3)
    assert read_back(Sign(levels, PER_CHANNEL, 4), states).flatten().tolist() == expected


def test_quantile_by_hand():
    # sorted -4 -2 0 1 6; a quarter of the way lies -2, three quarters 1, and -0.5 in the middle of these; 0 is nearer to 1
    states = one_group(6, 0, -2, 1, -4)
    assert read_back(Quantile(0.25, PER_CHANNEL, 5), states).flatten().tolist() == [1, 1, -2, 1, -2]
    # an eighth of the way lies half-way from -4 to -2, and from 6 to 1; the middle of -3 and 3.5 is 0.25
    assert read_back(Quantile(0.125, PER_CHANNEL, 5), states).flatten().tolist() == [3.5, -3, -3, 3.5, -3]


def test_segment_by_hand():
    states = one_group(-4, 8, 1, 3, -1)
    # half the range is [-2, 4], its middle 1, which goes to the even code 0
    assert read_back(Segment(1, 0.5), states).flatten().tolist() == [-2, 4, -2, 4, -2]
    # at 2 bits levels -4, 0, 4, 8 of the whole range
    assert read_back(Segment(2), states).flatten().tolist() == [-4, 8, 0, 4, 0]
    # shrinking is towards zero: a constant channel is read back smaller
    assert (read_back(Segment(1, 0.5), torch.full((1, 1, 4, 1), 6.0)) == 3).all()


def test_ternary_by_hand():
    # mean of |x| is 2, threshold 0.5 * 2 = 1: not above it means zero; least-squares scale is (3 + 4) / 2
    states = one_group(3, -4, 1, 0)
    assert read_back(Ternary(0.5, True, PER_CHANNEL, 4), states).flatten().tolist() == [3.5, -3.5, 0, 0]
    assert read_back(Ternary(0.5, False, PER_CHANNEL, 4), states).flatten().tolist() == [1, -1, 0, 0]


def test_unscaled_ternary_stores_five_codes_a_byte_and_nothing_else():
    quantized = Ternary(0.7, False, PER_CHANNEL, 32).quantize(torch.randn(1, 2, 64, 10))
    assert list(quantized.tensors) == ["codes"]
    assert quantized.nbytes == 2 * 2 * 64  # 320 codes a block


@pytest.mark.parametrize(
    ("quantizer", "value", "expected"),
    [
        (Sign("zero_scale", PER_CHANNEL, 32), 3.0, 3.0),
        (Ternary(0.5, False, PER_CHANNEL, 32), 3.0, 1.0),
        (Affine(2, PER_CHANNEL, 32), 3.0, 3.0),
        (Sign("zero_scale", PER_CHANNEL, 32), 0.0, 0.0),
        (Ternary(0.5, False, PER_CHANNEL, 32), 0.0, 0.0),
        (Affine(2, PER_CHANNEL, 32), 0.0, 0.0),
    ],
)
def test_constant_groups_read_back_as_in_the_released_code(quantizer, value, expected):
    assert (read_back(quantizer, torch.full((1, 1, 32, 2), value)) == expected).all()


@pytest.mark.parametrize(
    ("key_bits", "wide"), [(1.0, 0), (1.1, 12), (1.2, 25), (1.25, 32), (1.3, 38), (1.5, 64), (1.66, 84), (1.75, 96), (1.9, 115), (2.0, 128)]
)
def test_number_of_wide_channels_is_that_of_the_released_code(key_bits, wide):
    quantizer = SplitChannels(Affine(2, PER_CHANNEL, 1), SIGN_ZERO, fraction=key_bits - 1)
    assert quantizer.choose(torch.randn(1, 1, 4, 128)).shape == (1, wide)


def test_each_selection_finds_its_channel():
    states = torch.tensor([[-1.0, 1, -1, 1], [3.0, 0, 0, 0], [2.0, 2, 2, 2]]).T.view(1, 1, 4, 3)
    # ranges 2, 3, 0; variances 1, 1.6875, 0; mean of |x| is 15 / 12, values above 1.5 times that: 0, 1, 4
    choices = {"range": 1, "variance": 1, "outlier": 2}
    for select, channel in choices.items():
        quantizer = SplitChannels(Identity(), Identity(), fraction=0.34, select=select, outlier_factor=1.5)
        assert quantizer.quantize(states).static["wide_channels"].tolist() == [[channel]]

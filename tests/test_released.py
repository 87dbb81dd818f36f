"""Quantizers of the released code: bytes and small facts measured on that code. Its golden vectors: test_goldens.py."""


import pytest
import torch

from vidkv_eval.cache import QuantizedCache
from vidkv_eval.quant.released import ReleasedAffine, ReleasedKeys, ReleasedSign, ReleasedTernary
from vidkv_eval.recipe import load_recipe

PER_CHANNEL, PER_TOKEN = "per_channel", "per_token"
RAMP = [-15.5 + position for position in range(32)]


def one_group(values):
    return torch.tensor(values, dtype=torch.float16).view(1, 1, -1, 1)


def read_back(quantizer, states):
    return quantizer.dequantize(quantizer.quantize(states), states.dtype)


@pytest.mark.parametrize(
    ("name", "key_bits", "value_bits"),
    [
        ("vidkv_k150_v158_released", 3.503, 3.0),
        ("vidkv_k125_v158_released", 3.753, 3.0),
        ("vidkv_k175_v158_released", 3.253, 3.0),
        ("vidkv_k150_v200_released", 3.503, 3.0),
        ("vidkv_k100_v100_released", 4.003, 2.0),
        ("vidkv_k200_v200_released", 3.0, 3.0),
        ("kivi_k2_v2_released", 3.0, 3.0),
    ],
)
def test_stored_bits_are_those_measured_on_the_released_code(name, key_bits, value_bits):
    cache, tokens = QuantizedCache(load_recipe(name), 1), 6272
    # One random block repeated is quick to make, and bytes do not depend on what is stored.
    states = torch.randn(1, 4, 32, 128).half().repeat(1, 1, tokens // 32, 1)
    cache.update(states, states, 0)
    footprint = cache.footprint()
    assert round(footprint.key_bits, 3) == key_bits
    assert round(footprint.value_bits, 3) == value_bits


@pytest.mark.parametrize(
    ("quantizer", "values", "expected"),
    [
        (ReleasedSign(PER_CHANNEL, 32), [3.0] * 32, [3.0] * 32),
        (ReleasedTernary(PER_CHANNEL, 32), [3.0] * 32, [1.0] * 32),
        (ReleasedAffine(2, PER_CHANNEL, 32), [3.0] * 32, [3.0] * 32),
        (ReleasedSign(PER_CHANNEL, 32), [-0.0] * 32, [0.0] * 32),
        (ReleasedTernary(PER_CHANNEL, 32), [0.0] * 32, [0.0] * 32),
        (ReleasedAffine(2, PER_CHANNEL, 32), [0.0] * 32, [0.0] * 32),
        (ReleasedSign(PER_CHANNEL, 32), RAMP, [0.0] * 16 + [8.0] * 16),
        (ReleasedTernary(PER_CHANNEL, 32), RAMP, [-1.0] * 12 + [0.0] * 8 + [1.0] * 12),
        (ReleasedAffine(2, PER_CHANNEL, 32), RAMP, [-15.5] * 6 + [-5.1640625] * 10 + [5.171875] * 10 + [15.5] * 6),
    ],
)
def test_one_group_reads_back_as_in_the_released_code(quantizer, values, expected):
    assert read_back(quantizer, one_group(values)).flatten().tolist() == expected


def test_metadata_that_is_never_read_is_stored():
    ternary = ReleasedTernary(PER_CHANNEL, 32).quantize(one_group(RAMP)).tensors
    assert (ternary["scale"].item(), ternary["minimum"].item()) == (8, -1)
    assert ReleasedSign(PER_CHANNEL, 32).quantize(one_group(RAMP)).tensors["minimum"].item() == 0


def test_codes_fill_bytes_lowest_bits_first():
    # The released code packs into 32-bit words in the same order, so its words are these bytes, least significant first.
    facts = {ReleasedSign: [-65536], ReleasedTernary: [1426063360, -1431655851]}
    for make, words in facts.items():
        packed = make(PER_CHANNEL, 32).quantize(one_group(RAMP)).tensors["codes"].flatten()
        assert packed.view(torch.int32).tolist() == words
    packed = ReleasedAffine(2, PER_CHANNEL, 32).quantize(one_group(RAMP)).tensors["codes"].flatten()
    assert packed.view(torch.int32).tolist() == [1431654400, -349526]


@pytest.mark.parametrize(
    ("nbits", "wide"),
    [(1.0, 0), (1.001, 32), (1.1, 12), (1.2, 25), (1.25, 32), (1.3, 38), (1.4, 51), (1.5, 64), (1.66, 84), (1.75, 96), (2.0, 128)],
)
def test_number_of_wide_channels_is_that_of_the_released_code(nbits, wide):
    static = ReleasedKeys(nbits, 32).quantize(torch.randn(1, 1, 32, 128)).static
    assert static["wide_channels"].shape == (1, wide)
    assert sorted([*static["wide_channels"][0].tolist(), *static["normal_channels"][0].tolist()]) == list(range(128))


@pytest.mark.parametrize("nbits", [1.0, 1.5, 2.0])
def test_one_block_reads_back_as_the_first_of_two(nbits):
    quantizer, states = ReleasedKeys(nbits, 32), torch.randn(1, 2, 64, 16).half()
    two = quantizer.quantize(states)
    one = quantizer.quantize(states[:, :, :32], like=two)
    assert torch.equal(quantizer.dequantize(one, torch.float16), quantizer.dequantize(two, torch.float16)[:, :, :32])


def test_channels_are_chosen_for_the_whole_batch():
    states = torch.randn(2, 1, 32, 4)
    states[0, ..., 1] *= 50
    states[1, ..., 3] *= 50
    assert ReleasedKeys(1.5, 32).quantize(states).static["wide_channels"].tolist() == [[1, 3], [1, 3]]


def test_a_block_per_token_is_one_token():
    quantizer, states = ReleasedAffine(2, PER_TOKEN, 32), torch.randn(1, 2, 5, 64).half()
    quantized = quantizer.quantize(states)
    assert quantizer.block == 1
    assert quantized.nbytes == 2 * 5 * (64 // 4 + 2 * 2 * 2)
    assert torch.equal(read_back(quantizer, states[:, :, 1:4]), read_back(quantizer, states)[:, :, 1:4])
    with pytest.raises(ValueError, match="48 channels .* groups of 32"):
        quantizer.quantize(states[..., :48])


def test_float32_states_are_rounded_first():
    states = torch.randn(1, 2, 64, 128)
    for quantizer in (ReleasedKeys(1.5, 32), ReleasedTernary(PER_CHANNEL, 32), ReleasedAffine(2, PER_TOKEN, 32)):
        assert torch.equal(read_back(quantizer, states), read_back(quantizer, states.half()).float())


@pytest.mark.parametrize(("quantizer", "size"), [(ReleasedAffine(2, PER_CHANNEL, 32), 1e5), (ReleasedKeys(1.5, 32), 6e4)])
def test_numbers_beyond_half_precision_are_refused(quantizer, size):
    with pytest.raises(OverflowError, match="at most 65504"):
        quantizer.quantize(torch.full((1, 1, 32, 64), size))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReleasedAffine(1, PER_CHANNEL, 32), "ReleasedAffine.nbits is 1; allowed: 2, 4, 8"),
        (lambda: ReleasedSign("per_head", 32), "ReleasedSign.granularity is 'per_head'; allowed: per_channel, per_token"),
        (lambda: ReleasedTernary(PER_CHANNEL, 0), "ReleasedTernary.group_size is 0; allowed: integers above 0"),
        (lambda: ReleasedKeys(2.5, 32), "ReleasedKeys.nbits is 2.5; allowed: numbers from 1 to 2"),
        (lambda: ReleasedKeys(1.5, 0), "ReleasedKeys.group_size is 0; allowed: integers above 0"),
    ],
)
def test_impossible_settings_name_the_field_and_what_is_allowed(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)

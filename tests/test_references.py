"""References of the operations, against values worked out by hand, attention over dequantized states, and the quantizers."""

import math
from dataclasses import replace

import pytest
import tiny
import torch

from vidkv_eval.fused import NotPackable, pack_keys, pack_values, read_keys
from vidkv_eval.quant.affine import Affine
from vidkv_eval.quant.fitted import Fitted
from vidkv_eval.quant.sign import Sign
from vidkv_eval.quant.spectral import Spectral
from vidkv_eval.quant.split_channels import SplitChannels
from vidkv_eval.quant.split_tokens import SplitTokens
from vidkv_eval.quant.ternary import Ternary
from vidkv_eval.recipe import load_recipe
from vidkv_kernels.attend import _history_scores, attend_reference
from vidkv_kernels.choose_channels import choose_channels_reference
from vidkv_kernels.packed import FullPrecision, PackedKeys, PackedLayer, PackedValues, Segment, pack_words, unpack_words
from vidkv_kernels.quantize_keys import key_matrix, make_keys, quantize_keys_reference, real_fourier
from vidkv_kernels.quantize_values import make_values, quantize_values_reference
from vidkv_kernels.random_layer import random_layer
from vidkv_kernels.span import Span

CPU = torch.device("cpu")
PER_CHANNEL, PER_TOKEN = "per_channel", "per_token"
# What kernels do not read: full precision, float16 arithmetic, quantiles, whole segments.
UNPACKABLE = ["calibquant_k1_v1", "calibquant_k2_v2", "fp16", "quantile_k1_v1_inferred"]
UNPACKABLE += [name for name in tiny.QUANTIZER_RECIPES if name.endswith("released")]
PACKABLE = [name for name in tiny.QUANTIZER_RECIPES if name not in UNPACKABLE]


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def make_states(*shape, seed=0):
    """States with channels of different size and mean, as keys have."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(shape[-1], generator=generator) * 4 + 0.25
    return size * (torch.randn(shape, generator=generator) + 0.5)


def attend_densely(query, keys, values, scaling):
    """Attention by the formula, in float64, head by head."""
    per_head = query.shape[1] // keys.shape[1]
    out = torch.empty(query.shape, dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            scores = keys[b, h // per_head].double() @ query[b, h, 0].double() * scaling
            weights = scores.exp() / scores.exp().sum()
            out[b, h, 0] = weights @ values[b, h // per_head].double()
    return out


def layer_of(keys, values, residual_keys, residual_values):
    lengths = torch.full((residual_keys.shape[0],), residual_keys.shape[2], dtype=torch.int32)
    return PackedLayer(keys, values, FullPrecision(residual_keys, residual_values, lengths))


# Values worked out by hand


def test_words_by_hand():
    codes = torch.zeros(32, 2, dtype=torch.uint8)
    codes[0, 0], codes[1, 0], codes[31, 1] = 1, 1, 1
    assert pack_words(codes, 1).tolist() == [[0b11, -(2**31)]]
    codes[0, 0], codes[17, 0], codes[15, 1] = 3, 2, 3
    # first halves of both channels, then second halves; token 31 is the last field of a second half
    assert pack_words(codes, 2).tolist() == [[3 + (1 << 2), 3 * 2**30 - 2**32, 2 << 2, 1 << 30]]


@pytest.mark.parametrize("nbits", [1, 2])
def test_unpack_words_inverts_pack_words(nbits):
    codes = torch.randint(1 << nbits, (2, 3, 96, 7), dtype=torch.uint8)
    assert torch.equal(unpack_words(pack_words(codes, nbits), nbits), codes)


def test_what_key_codes_mean_by_hand():
    codes = torch.tensor([3, 1, 1, 1]).expand(1, 1, 32, 4)
    words = torch.cat([pack_words(codes[..., :1], 2), pack_words(codes[..., 1:], 1)], dim=-1)
    scale = torch.tensor([2.0, 4.0, 8.0, 16.0]).half().view(1, 1, 1, 4)
    offset = torch.tensor([-1.0, 10.0]).half().view(1, 1, 1, 2)
    segments = (Segment(1, 2, "minimum"), Segment(1, 1, "mean"), Segment(1, 1, "none"), Segment(1, 1, "centred"))
    with pytest.raises(ValueError, match="centred kinds last"):
        PackedKeys(segments, 32, words, scale, offset)
    in_order = (Segment(1, 2, "minimum"), Segment(1, 1, "minimum"), Segment(1, 1, "none"), Segment(1, 1, "centred"))
    # 3 * 2 - 1, 1 * 4 + 10, 1 * 8, (1 - 1/2) * 16
    assert PackedKeys(in_order, 32, words, scale, offset).decode(torch.float32)[0, 0, 7].tolist() == [5, 14, 8, 8]
    mean = (Segment(1, 2, "minimum"), Segment(3, 1, "mean"))
    offset = torch.tensor([-1.0, 10.0, 20.0, 30.0]).half().view(1, 1, 1, 4)
    # (1 - 1/2) * 4 + 10, ...
    assert PackedKeys(mean, 32, words, scale, offset).decode(torch.float32)[0, 0, 7].tolist() == [5, 12, 24, 38]


def test_what_value_codes_mean_by_hand():
    codes = torch.tensor([0, 1, 2]).repeat(32)[:32].view(1, 1, 32, 1).expand(-1, -1, -1, 2)
    scale = torch.tensor([[1.0, 0.5]]).half().view(1, 1, 1, 2)
    values = PackedValues(int32(32), 3, "centred", PER_CHANNEL, 32, 2, pack_words(codes, 2), scale)
    assert values.decode(torch.float32)[0, 0, :3].tolist() == [[-1, -0.5], [0, 0], [1, 0.5]]
    unscaled = PackedValues(int32(32), 3, "centred", PER_CHANNEL, 32, 2, pack_words(codes, 2))
    assert unscaled.decode(torch.float32)[0, 0, :3].tolist() == [[-1, -1], [0, 0], [1, 1]]


def test_float8_metadata_is_multiplied_by_its_unit():
    scale = torch.full((1, 1, 1, 2), 1.5).to(torch.float8_e4m3fn)
    unit = torch.tensor([[[2.0, 0.25]]]).half()
    codes = pack_words(torch.full((1, 1, 32, 2), 2), 2)
    keys = PackedKeys((Segment(2, 2, "none"),), 32, codes, scale, scale_unit=unit)
    assert keys.decode(torch.float32)[0, 0, 0].tolist() == [6, 0.75]


def test_metadata_of_4_bits_by_hand():
    # A byte holds the codes of two channels, the first one lower: scales 2 * 0.5 and 15 * 0.25, offsets 10 + (0 - 7) * 2 and (9 - 7) / 2.
    codes = torch.tensor([3, 1]).expand(1, 1, 32, 2)
    scale, offset = (torch.tensor([number], dtype=torch.uint8).view(1, 1, 1, 1) for number in (2 + 15 * 16, 0 + 9 * 16))
    scale_unit, offset_unit, center = (torch.tensor([[pair]]).half() for pair in ([0.5, 0.25], [2.0, 0.5], [10.0, 0.0]))
    metadata = {"scale": scale, "offset": offset, "scale_unit": scale_unit, "offset_unit": offset_unit, "offset_center": center}
    expected = [3 * 1 - 4, 1 * 3.75 + 1]
    keys = PackedKeys((Segment(2, 2, "minimum"),), 32, pack_words(codes, 2), **metadata)
    assert keys.decode(torch.float32)[0, 0, 7].tolist() == expected
    values = PackedValues(int32(32), 4, "minimum", PER_CHANNEL, 32, 2, pack_words(codes, 2), **metadata)
    assert values.decode(torch.float32)[0, 0, 7].tolist() == expected
    with pytest.raises(ValueError, match="keys.offset_center is None"):
        replace(keys, offset_center=None)
    with pytest.raises(ValueError, match=r"keys.scale has shape \[1, 1, 1, 2\]; allowed: \[1, 1, 1, 1\]"):
        replace(keys, scale=torch.zeros(1, 1, 1, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="metadata of 4 bits per_token"):
        replace(values, granularity=PER_TOKEN, group_size=1, scale=scale.expand(1, 1, 32, 1).contiguous())


def test_ternary_key_codes_mean_minus_one_to_one_by_hand():
    segments = (Segment(1, 2, "mean"), Segment(1, 2, "mean", is_ternary=True), Segment(1, 2, "centred"))
    scale, offset = torch.tensor([2.0, 4.0, 8.0]).half().view(1, 1, 1, 3), torch.tensor([1.0, 5.0]).half().view(1, 1, 1, 2)
    keys = PackedKeys(segments, 32, pack_words(torch.tensor([3, 2, 0]).expand(1, 1, 32, 3), 2), scale, offset)
    # (3 - 3/2) * 2 + 1, (2 - 1) * 4 + 5, (0 - 3/2) * 8
    assert keys.decode(torch.float32)[0, 0, 0].tolist() == [4, 9, -12]


def test_attention_by_hand():
    # Scores 0 and log 3 give weights 1/4 and 3/4.
    keys = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]).view(1, 1, 2, 2)
    values = torch.tensor([[4.0, 0.0], [0.0, 8.0]]).view(1, 1, 2, 2)
    layer = layer_of(None, (), keys, values)
    out = attend_reference(torch.tensor([1.0, 5.0]).view(1, 1, 1, 2), layer, 1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 6.0]))


def test_a_sequence_without_tokens_gets_zeros():
    layer = random_layer(torch.Generator().manual_seed(0), torch.float32, [0], [0])
    assert (attend_reference(torch.randn(1, 2, 1, 64), layer, 1.0) == 0).all()


def test_channels_by_hand():
    states = torch.tensor([[0.0, 5.0, 1.0, 9.0], [1.0, 0.0, 1.0, 0.0]]).view(1, 1, 2, 4)
    order = choose_channels_reference(states, Span.of(CPU, [0], [2], [0]), 2)
    assert order.tolist() == [[1, 3, 0, 2]]


def test_the_real_fourier_matrix_by_hand():
    root = math.sqrt(0.5)
    expected = [[0.5, root, 0.5, 0], [0.5, 0, -0.5, -root], [0.5, -root, 0.5, 0], [0.5, 0, -0.5, root]]
    torch.testing.assert_close(real_fourier(4, CPU), torch.tensor(expected))


def test_a_query_is_reordered_then_mapped_by_hand():
    words = pack_words(torch.tensor([[1, 2]]).expand(1, 1, 32, 2), 2)
    segments, scale = (Segment(2, 2, "none"),), torch.ones(1, 1, 1, 2).half()
    order, matrix = torch.tensor([[[1, 0]]], dtype=torch.uint8), torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    keys = PackedKeys(segments, 32, words, scale, order=order, matrix=matrix)
    # The query (5, 7) in order is (7, 5), mapped (7, 29), and scores 7 * 1 + 29 * 2; the key itself is (6, 5).
    assert _history_scores(torch.tensor([5.0, 7.0]).view(1, 1, 1, 2), keys)[0, 0, 0, 0] == 65
    assert read_keys(keys, 1, torch.float32).tolist() == [[[[6, 5]]]]


@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_the_real_fourier_matrix_is_orthogonal(channels):
    matrix = real_fourier(channels, CPU)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels), atol=1e-6, rtol=0)


# Attention over what the quantizers store


def quantize_values(quantizer, values):
    """Quantize values; where some tokens of the prompt are protected, every fourth is."""
    if not isinstance(quantizer, SplitTokens):
        return quantizer.quantize(values)
    tokens = torch.arange(0, values.shape[2], 4).expand(values.shape[0], -1)
    return quantizer.quantize(values, like=quantizer.choice(tokens, values.shape[3]))


@pytest.mark.parametrize("name", UNPACKABLE)
def test_recipes_that_kernels_do_not_read_are_refused(name):
    recipe = load_recipe(name)
    states = make_states(1, 1, 64, 64).half()
    with pytest.raises(NotPackable):
        pack_keys(recipe.key, recipe.key.quantize(states))
        pack_values(recipe.value, recipe.value.quantize(states))


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("width", [64, 128])
def test_attention_over_packed_states_is_attention_over_dequantized_ones(name, width):
    recipe = load_recipe(name)
    keys, values = make_states(2, 2, 128, width), make_states(2, 2, 128, width, seed=1)
    stored_keys, stored_values = recipe.key.quantize(keys), quantize_values(recipe.value, values)
    residual_keys, residual_values = make_states(2, 2, 5, width, seed=2), make_states(2, 2, 5, width, seed=3)
    query = torch.randn(2, 6, 1, width)
    layer = layer_of(pack_keys(recipe.key, stored_keys), pack_values(recipe.value, stored_values), residual_keys, residual_values)
    dense_keys = torch.cat([recipe.key.dequantize(stored_keys, torch.float32), residual_keys], dim=2)
    dense_values = torch.cat([recipe.value.dequantize(stored_values, torch.float32), residual_values], dim=2)
    expected = attend_densely(query, dense_keys, dense_values, 0.02)
    found = attend_reference(query, layer, 0.02)
    assert (found - expected).abs().max() < 1e-5 * dense_values.abs().max()


FITTED = {"emphasis": 1.0, "granularity": PER_CHANNEL, "group_size": 32}


@pytest.mark.parametrize(
    ("quantizer", "segments"),
    [
        (Fitted(16, **FITTED), (Segment(64, 2, "mean"), Segment(64, 2, "centred"))),
        (Fitted(16, **FITTED, metadata="uint4"), (Segment(64, 2, "mean"), Segment(64, 2, "centred"))),
        (Fitted(3, **FITTED), (Segment(64, 2, "mean", True),)),
        (Fitted(2, **FITTED, metadata="uint4"), (Segment(64, 1, "mean"),)),
        (SplitChannels(Fitted(4, **FITTED), Spectral(Fitted(2, **FITTED)), 0.3), (Segment(19, 2, "mean"), Segment(45, 1, "mean"))),
        (
            SplitChannels(Affine(2, PER_CHANNEL, 32, metadata="uint4"), Sign("mean_plus_minus", PER_CHANNEL, 32, metadata="uint4"), 0.3),
            (Segment(19, 2, "minimum"), Segment(45, 1, "mean")),
        ),
        (
            SplitChannels(Fitted(16, **FITTED), Fitted(3, **FITTED), 0.2, per_head=True),
            (Segment(12, 2, "mean"), Segment(52, 2, "mean", True), Segment(12, 2, "centred")),
        ),
    ],
    ids=str,
)
def test_keys_are_read_back_as_their_quantizer_reads_them(quantizer, segments):
    stored = quantizer.quantize(make_states(2, 2, 64, 64))
    keys = pack_keys(quantizer, stored)
    assert keys.segments == segments
    expected = quantizer.dequantize(stored, torch.float32)
    torch.testing.assert_close(read_keys(keys, 64, torch.float32), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_all_layers_of_a_recipe_share_one_matrix():
    recipe = load_recipe("ours_k182_v158")
    first, second = (pack_keys(recipe.key, recipe.key.quantize(make_states(1, 2, 32, 64, seed=seed))) for seed in (0, 1))
    assert first.matrix is second.matrix and first.matrix.shape == (64, 70)
    assert first.order.shape == (1, 2, 64) and not torch.equal(first.order, second.order)


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (SplitChannels(Fitted(16, **FITTED), Spectral(Fitted(2, **FITTED)), 0.5), "kernels do not read these kinds of offsets together"),
        (SplitChannels(Fitted(16, **FITTED, metadata="uint4"), Fitted(3, **FITTED), 0.5), "metadata of one kind, here uint4"),
        (Fitted(3, **FITTED, metadata="float8"), "kernels read float16 and uint4 metadata"),
        (Affine(4, PER_CHANNEL, 32), "kernels read Affine with 1 or 2 bits"),
        (Affine(2, PER_TOKEN, 32), "kernels read groups of one size"),
        (Affine(2, PER_CHANNEL, 16), "32, 64 or 128 tokens of a channel"),
        (SplitChannels(Affine(2, PER_CHANNEL, 64), Sign("mean_plus_minus", PER_CHANNEL, 32), 0.5), "groups of one size"),
        (SplitChannels(Sign("plus_minus", PER_CHANNEL, 32), Sign("plus_minus", PER_CHANNEL, 32), 0.5), "wide channels are stored by"),
        (Ternary(0.7, True, PER_CHANNEL, 32), "kernels read Affine with 1 or 2 bits"),
    ],
)
def test_keys_that_kernels_do_not_read_are_refused(quantizer, message):
    with pytest.raises(NotPackable, match=message):
        pack_keys(quantizer, quantizer.quantize(make_states(1, 1, 64, 64)))


def test_values_of_16_levels_are_refused():
    quantizer = Fitted(16, **FITTED)
    with pytest.raises(NotPackable, match=r"Fitted with 2, 3 or 4 levels \(16 for keys\)"):
        pack_values(quantizer, quantizer.quantize(make_states(1, 1, 64, 64)))


def test_protected_tokens_are_read_in_their_own_places():
    states = make_states(1, 2, 96, 64)
    protected = torch.arange(1, 65, 2)
    others = torch.tensor([token for token in range(96) if token not in protected.tolist()])
    runs = []
    values = torch.empty_like(states)
    for quantizer, tokens in ((Affine(2, PER_CHANNEL, 32), protected), (Ternary(0.7, True, PER_CHANNEL, 32), others)):
        stored = quantizer.quantize(states[:, :, tokens])
        values[:, :, tokens] = quantizer.dequantize(stored, torch.float32)
        (run,) = pack_values(quantizer, stored)
        runs.append(PackedValues(**{**vars(run), "tokens": tokens.int().view(1, -1)}))
    key = Affine(2, PER_CHANNEL, 32)
    stored_keys = key.quantize(make_states(1, 2, 96, 64, seed=1))
    residual = make_states(1, 2, 1, 64, seed=2)
    query = torch.randn(1, 2, 1, 64)
    expected = attend_densely(
        query, torch.cat([key.dequantize(stored_keys, torch.float32), residual], dim=2), torch.cat([values, residual], dim=2), 0.05
    )
    found = attend_reference(query, layer_of(pack_keys(key, stored_keys), tuple(runs), residual, residual), 0.05)
    assert (found - expected).abs().max() < 1e-4


def test_a_center_taken_from_all_keys_changes_nothing_if_the_prefix_keeps_it():
    layer = random_layer(torch.Generator().manual_seed(0), torch.float32, [64], [5], center=2.0)
    query = torch.randn(1, 2, 1, 64)
    keys, residual = layer.keys, layer.residual
    dense = torch.empty_like(keys.decode(torch.float32))
    dense[..., keys.order[0, 0].long()] = keys.decode(torch.float32) @ keys.matrix.T
    dense += keys.center.unsqueeze(2)
    expected = attend_densely(
        query,
        torch.cat([dense[:, :, :64], residual.keys[:, :, :5]], dim=2),
        torch.cat([layer.values[0].decode(torch.float32)[:, :, :64], residual.values[:, :, :5]], dim=2),
        0.05,
    )
    assert (attend_reference(query, layer, 0.05) - expected).abs().max() < 1e-5


# Quantizing in the kernels' way and in the quantizers'

KEY_FORMS = {
    "scaled": (SplitChannels(Affine(2, PER_CHANNEL, 32), Spectral(Sign("mean_plus_minus", PER_CHANNEL, 32)), 0.5), True),
    "published": (SplitChannels(Affine(2, PER_CHANNEL, 32), Spectral(Sign("zero_scale", PER_CHANNEL, 32)), 0.5), True),
    "few wide": (SplitChannels(Affine(2, PER_CHANNEL, 32), Sign("plus_minus", PER_CHANNEL, 32), 0.1), False),
    "one level zero": (SplitChannels(Affine(2, PER_CHANNEL, 32), Sign("zero_scale", PER_CHANNEL, 32), 0.25), False),
    "KIVI": (Affine(2, PER_CHANNEL, 32), False),
    "KIVI, 1 bit": (Affine(1, PER_CHANNEL, 64), False),
}
VALUE_FORMS = {
    "ternary": (Ternary(0.7, True, PER_CHANNEL, 32), {"levels": 3, "offset_kind": "centred"}),
    "ternary, unscaled": (Ternary(0.7, False, PER_TOKEN, 32), {"levels": 3, "offset_kind": "centred", "is_scaled": False}),
    "2 bits": (Affine(2, PER_CHANNEL, 64), {"levels": 4, "offset_kind": "minimum"}),
    "2 bits per token": (Affine(2, PER_TOKEN, 32), {"levels": 4, "offset_kind": "minimum"}),
    "1 bit per token": (Affine(1, PER_TOKEN, 32), {"levels": 2, "offset_kind": "minimum"}),
    "signs": (Sign("mean_plus_minus", PER_CHANNEL, 128), {"levels": 2, "offset_kind": "mean"}),
    "signs, one level zero": (Sign("zero_scale", PER_CHANNEL, 32), {"levels": 2, "offset_kind": "none"}),
}


def assert_packed_alike(found, expected):
    """Codes and metadata are equal, but for ties that sums in another order break: fewer than 1 code in 10,000."""
    differing = (found.unpack() != expected.unpack()).float().mean()
    assert differing < 1e-4
    for name in ("scale", "offset"):
        left, right = getattr(found, name), getattr(expected, name)
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left.float(), right.float(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("quantizer", "is_spectral"), KEY_FORMS.values(), ids=KEY_FORMS)
@pytest.mark.parametrize("width", [64, 128])
def test_quantized_keys_are_those_of_the_quantizer(quantizer, is_spectral, width):
    states = make_states(2, 2, 256, width).half()
    states[1] = states[1].flip(-1)
    expected = pack_keys(quantizer, quantizer.quantize(states))
    span = Span.of(CPU, [0, 0], [256, 256], [0, 0])
    order = choose_channels_reference(states, span, expected.wide_channels)
    transform = real_fourier(width - expected.wide_channels, CPU) if is_spectral else None
    keys = make_keys(2, 2, 256, expected.segments, expected.group_size, CPU)
    found = quantize_keys_reference(states, span, order, transform, keys)
    assert_packed_alike(found, expected)
    if expected.order is not None:
        assert torch.equal(expected.order, order.to(torch.uint8).unsqueeze(1))
    if expected.matrix is not None:
        assert torch.equal(expected.matrix, key_matrix(width, transform))


@pytest.mark.parametrize(("quantizer", "form"), VALUE_FORMS.values(), ids=VALUE_FORMS)
def test_quantized_values_are_those_of_the_quantizer(quantizer, form):
    states = make_states(2, 2, 256, 64).half()
    (expected,) = pack_values(quantizer, quantizer.quantize(states))
    values = make_values(2, 2, 256, 64, CPU, granularity=quantizer.granularity, group_size=quantizer.group_size, **form)
    found = quantize_values_reference(states, Span.of(CPU, [0, 0], [256, 256], [0, 0]), 0.7, values)
    assert_packed_alike(found, expected)


def test_padding_before_a_sequence_is_not_read():
    states = make_states(1, 2, 96, 64).half()
    padded = torch.cat([torch.full((1, 2, 7, 64), float("nan")).half(), states], dim=2)
    form = {"levels": 3, "offset_kind": "centred"}
    found, expected = (make_values(1, 2, 96, 64, CPU, **form) for _ in range(2))
    quantize_values_reference(padded, Span.of(CPU, [7], [96], [0]), 0.7, found)
    quantize_values_reference(states, Span.of(CPU, [0], [96], [0]), 0.7, expected)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


def test_buffers_that_an_operation_does_not_make_are_refused():
    states, span = torch.zeros(1, 1, 32, 64), Span.of(CPU, [0], [32], [0])
    order = torch.arange(64, dtype=torch.int32).view(1, 64)
    with pytest.raises(ValueError, match="values of 3 levels have offset_kind 'minimum'"):
        quantize_values_reference(states, span, 0.7, make_values(1, 1, 32, 64, CPU, levels=3, offset_kind="minimum"))
    keys = make_keys(1, 1, 32, (Segment(64, 2, "centred"),), 32, CPU)
    with pytest.raises(ValueError, match="allowed: 2 bits with minimum"):
        quantize_keys_reference(states, span, order, None, keys)
    keys = make_keys(1, 1, 32, (Segment(32, 2, "minimum"), Segment(32, 1, "mean")), 32, CPU)
    with pytest.raises(ValueError, match=r"transform has shape \[64, 64\]"):
        quantize_keys_reference(states, span, order, torch.eye(64), keys)
    with pytest.raises(ValueError, match="wide_channels is 65"):
        choose_channels_reference(states, span, 65)

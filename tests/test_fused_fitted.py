"""Fitted levels straight into records, in plain torch, against the quantizers of recipes; the recipe itself is in test_fused_quantize."""

import dataclasses

import pytest
import torch
from direct_checks import check_recipe_reads_back, make_states

from vidkv_eval.fused_fitted import FittedQuantizer, record_quantizer
from vidkv_eval.fused_quantize import raise_faults
from vidkv_eval.quant.affine import Affine
from vidkv_eval.quant.fitted import Fitted
from vidkv_eval.quant.spectral import Spectral
from vidkv_eval.quant.split_channels import SplitChannels
from vidkv_eval.recipe import Recipe, load_recipe
from vidkv_kernels.fragment_history import FragmentHistory

CPU = torch.device("cpu")
OURS = "ours_k182_v158"


def fitted(levels: int, **others) -> Fitted:
    return Fitted(**{"levels": levels, "emphasis": 1.0, "granularity": "per_channel", "group_size": 32, "metadata": "uint4", **others})


def recipe_of(key, value) -> Recipe:
    return Recipe("r", "r", "", key, value)


@pytest.mark.parametrize(
    "key",
    [
        fitted(3),
        fitted(2),
        SplitChannels(fitted(4), fitted(3), 0.25),
        SplitChannels(fitted(16), fitted(4), 0.3, per_head=True),
        SplitChannels(fitted(3), Spectral(fitted(2)), 0.2),
        SplitChannels(fitted(16), fitted(3), 1.0),
    ],
    ids=["ternary", "1 bit", "one order for all heads", "4 bits", "spectrum of an even number", "only wide channels"],
)
def test_what_is_held_is_what_the_quantizers_store(key):
    check_recipe_reads_back(recipe_of(key, fitted(4)), CPU, torch.bfloat16, 64)


@pytest.mark.parametrize("emphasis", [0, 0.5])
def test_other_weights_and_groups(emphasis):
    both = {"emphasis": emphasis, "group_size": 64}
    check_recipe_reads_back(recipe_of(fitted(3, **both), fitted(2, **both)), CPU, torch.float16, 128, cuts=((0, 128), (128, 256)))


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of(fitted(3), Affine(2, "per_channel", 32)),
        recipe_of(fitted(3, emphasis=0.5), fitted(3)),
        recipe_of(fitted(3, metadata="float16"), fitted(3, metadata="float16")),
        recipe_of(SplitChannels(Affine(2, "per_channel", 32, metadata="uint4"), fitted(3), 0.5), fitted(3)),
        load_recipe("kivi_k2_v2"),
    ],
    ids=["values of another kind", "two sorts of weights", "float16 metadata", "wide channels of another kind", "kivi"],
)
def test_other_recipes_are_not_covered(recipe):
    assert FittedQuantizer.of(recipe, 64) is None


def test_sequences_may_begin_at_different_times_and_bring_different_numbers_of_tokens():
    quantizer = record_quantizer(load_recipe(OURS), 64)
    keys, values = make_states(CPU, torch.float16, 64, batch=3, tokens=256)
    together = quantizer.quantize(None, keys[:, :, :96], values[:, :, :96], counts=[96, 0, 32])
    # What lies beyond the counts is not looked at.
    keys[2, :, 160:] = float("nan")
    later = slice(96, 192)
    quantizer.quantize(together, keys[:, :, later], values[:, :, later], counts=[32, 96, 64])
    raise_faults(together)
    assert together.lengths.tolist() == together.held == [128, 96, 96]
    for row, spans in enumerate((((0, 96), (96, 128)), ((96, 192),), ((0, 32), (96, 160)))):
        alone = None
        for start, stop in spans:
            alone = quantizer.quantize(alone, keys[row : row + 1, :, start:stop], values[row : row + 1, :, start:stop])
        records = alone.held[0] // 32
        for name in ("keys", "values"):
            assert torch.equal(getattr(together, name)[row, :, :records], getattr(alone, name)[0, :, :records]), (row, name)
        assert torch.equal(together.order[row], alone.order[0])
        for one, other in zip(together.units, alone.units, strict=True):
            assert torch.equal(one[row], other[0])


@pytest.mark.parametrize("side", ["key", "value"])
def test_what_cannot_be_stored_is_said_when_asked_for(side):
    states = dict(zip(("key", "value"), make_states(CPU, torch.float32, 64, tokens=96), strict=True))
    quantizer = record_quantizer(load_recipe(OURS), 64)
    for value, error, message in (
        (float("inf"), FloatingPointError, "they hold NaN or infinity"),
        (1e30, OverflowError, "metadata beyond 65504"),
    ):
        bad = {name: tensor.clone() for name, tensor in states.items()}
        bad[side][1, 2, 3, 5] = value
        history = quantizer.quantize(None, *bad.values())
        with pytest.raises(error, match=message) as raised:
            raise_faults(history)
        assert raised.value.args[1] == side
    history = quantizer.quantize(None, *states.values())
    quantizer.quantize(history, *bad.values())
    raise_faults(history)  # later tokens are clipped to the units of the first
    bad[side][1, 2, 3, 5] = float("nan")
    quantizer.quantize(history, *bad.values())
    with pytest.raises(FloatingPointError) as raised:
        raise_faults(history)
    assert raised.value.args[1] == side


def test_codes_are_appended_to_histories_with_metadata_of_4_bits_only_and_in_whole_groups():
    quantizer = record_quantizer(load_recipe(OURS), 64)
    keys, values = make_states(CPU, torch.float16, 64, tokens=64)
    history = quantizer.quantize(None, keys, values)
    channels = history.form.channels

    def codes(count: int, tokens: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.zeros(2, 3, rows, count, dtype=torch.uint8) for rows in (tokens, tokens // 32))

    with pytest.raises(ValueError, match=r"values, codes has shape \[2, 3, 32, 63\]; allowed: \[2, 3, 32, 64\]"):
        history.append_codes(codes(channels), codes(63))
    with pytest.raises(ValueError, match="96 tokens do not fit into 64; call reserve first"):
        history.append_codes(codes(channels), codes(64))
    plain = record_quantizer(load_recipe("kivi_k2_v2"), 64).quantize(None, keys, values)
    with pytest.raises(ValueError, match="metadata has 16 bits"):
        plain.append_codes(codes(64), codes(64))
    assert history.held == [64, 64]


def test_a_recipe_is_known_by_its_quantizers():
    recipe = load_recipe(OURS)
    assert FittedQuantizer.of(recipe, 128) is FittedQuantizer.of(dataclasses.replace(recipe, name="other"), 128)


def test_channels_without_an_offset_of_their_own_get_none(monkeypatch):
    given = []
    monkeypatch.setattr(FragmentHistory, "append_codes", lambda _, keys, values, **others: given.append((keys, values)))
    history = record_quantizer(load_recipe(OURS), 64).quantize(None, *make_states(CPU, torch.float16, 64, tokens=64))
    ((_, metadata), _) = given[0]
    stored = history.form.stored_offsets
    assert stored == 64 and metadata.shape[-1] == 70
    assert (metadata[..., stored:] & 15 == 0).all() and (metadata[..., :stored] & 15 != 0).any()
    assert (metadata[..., stored:] >> 4 != 0).any()

"""States quantized straight into records, in plain torch, against the quantizers of recipes."""

import pytest
import torch
from direct_checks import RECIPES, check_reads_back, make_states
from test_references import PACKABLE, UNPACKABLE

from vidkv_eval.fused_fitted import FittedQuantizer
from vidkv_eval.fused_quantize import DirectQuantizer, raise_faults
from vidkv_eval.quant.affine import Affine
from vidkv_eval.quant.sign import Sign
from vidkv_eval.quant.spectral import Spectral
from vidkv_eval.quant.split_channels import SplitChannels
from vidkv_eval.recipe import Recipe, load_recipe

CPU = torch.device("cpu")
SCALED = "vidkv_k150_v158_scaled"


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_held_is_what_the_quantizers_of_the_recipe_store(name, width):
    check_reads_back(name, CPU, torch.bfloat16, width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_states_of_other_dtypes_are_taken(dtype):
    check_reads_back(SCALED, CPU, dtype, 64)


@pytest.mark.parametrize("name", PACKABLE)
def test_every_recipe_that_kernels_read_is_covered_by_one_of_the_two(name):
    recipe = load_recipe(name)
    assert (DirectQuantizer.of(recipe, 128) is None) == name.startswith("ours") == (FittedQuantizer.of(recipe, 128) is not None)


@pytest.mark.parametrize("name", UNPACKABLE)
def test_recipes_that_kernels_do_not_read_are_not_covered(name):
    recipe = load_recipe(name)
    assert not isinstance(recipe, Recipe) or DirectQuantizer.of(recipe, 128) is None


def test_heads_that_the_kernels_do_not_read_are_not_covered():
    assert DirectQuantizer.of(load_recipe(SCALED), 32) is None


def test_channels_chosen_for_each_head_are_not_covered():
    wide, normal = Affine(2, "per_channel", 32), Sign("mean_plus_minus", "per_channel", 32)
    for per_head in (False, True):
        recipe = Recipe("r", "r", "", SplitChannels(wide, normal, 0.5, per_head=per_head), Affine(2, "per_channel", 32))
        assert (DirectQuantizer.of(recipe, 64) is None) == per_head


def test_the_threshold_and_the_spectrum_are_those_of_the_recipe():
    quantizer = DirectQuantizer.of(load_recipe(SCALED), 128)
    assert (quantizer.threshold, quantizer.is_spectral) == (0.7, True)
    plain = DirectQuantizer.of(load_recipe("vidkv_k150_v158_nofft_scaled"), 128)
    assert not plain.is_spectral and plain.split is not None


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_all_channels_may_be_of_one_kind(fraction):
    wide, normal = Affine(2, "per_channel", 32), Spectral(Sign("plus_minus", "per_channel", 32))
    recipe = Recipe("r", "r", "", SplitChannels(wide, normal, fraction), Affine(1, "per_channel", 32))
    keys, values = make_states(CPU, torch.float16, 64, tokens=64)
    history = DirectQuantizer.of(recipe, 64).quantize(None, keys, values)
    assert history.form.wide_channels == 64 * fraction and (history.matrix is None) == (fraction == 1)
    assert torch.equal(history.order, torch.arange(64).to(torch.uint8).expand(2, 1, 64))


def test_tokens_that_fill_no_group_are_refused_and_room_is_made():
    quantizer = DirectQuantizer.of(load_recipe(SCALED), 64)
    keys, values = make_states(CPU, torch.float16, 64, tokens=96)
    with pytest.raises(ValueError, match=r"\[65, 65\] tokens cannot be cut into groups of 32"):
        quantizer.quantize(None, keys[:, :, :65], values[:, :, :65])
    history = quantizer.quantize(None, keys[:, :, :32], values[:, :, :32], capacity=100)
    assert (history.capacity, history.max_length) == (128, 32)
    for _ in range(2):
        assert quantizer.quantize(history, keys, values) is history
    assert (history.capacity, history.max_length) == (224, 224)
    assert history.lengths.tolist() == [224, 224]


@pytest.mark.parametrize(
    ("side", "value", "error", "message"),
    [
        ("key", float("nan"), FloatingPointError, "they hold NaN or infinity"),
        ("key", 1e30, OverflowError, "metadata beyond 65504"),
        ("value", float("inf"), FloatingPointError, "they hold NaN or infinity"),
        ("value", 1e30, OverflowError, "metadata beyond 65504"),
    ],
)
def test_what_cannot_be_stored_is_said_when_asked_for(side, value, error, message):
    states = dict(zip(("key", "value"), make_states(CPU, torch.bfloat16, 64, tokens=64), strict=True))
    states[side][1, 2, 33, 5] = value
    quantizer = DirectQuantizer.of(load_recipe(SCALED), 64)
    history = quantizer.quantize(None, *states.values())
    with pytest.raises(error, match=message) as raised:
        raise_faults(history)
    assert raised.value.args[1] == side

"""How `DirectQuantizer` is held to the quantizers of a recipe; the same on a CPU and on a GPU."""

import torch

from vidkv_eval.fused import pack_keys, pack_values, read_keys, read_values
from vidkv_eval.fused_fitted import record_quantizer
from vidkv_eval.fused_quantize import raise_faults
from vidkv_eval.recipe import load_recipe
from vidkv_kernels.fragment_history import FragmentHistory

RECIPES = [
    "kivi_k2_v2", "kivi_k1_v1", "vidkv_k150_v158_scaled", "vidkv_k150_v158_published", "vidkv_k110_v158_scaled",
    "vidkv_k150_v158_tokenvalue_scaled", "vidkv_k200_v200", "vidkv_k150_v200_variance_scaled", "ours_k182_v158",
]  # fmt: skip
CUTS = ((0, 576), (576, 608), (608, 864))


def make_states(device, dtype, width, batch=2, heads=3, tokens=CUTS[-1][1]):
    """Keys and values, heads beside each other in a token as a model makes them; some channels of keys are wide, some biased."""
    generator = torch.Generator(device).manual_seed(0)
    keys, values = torch.randn(2, batch, tokens, heads, width, generator=generator, device=device).transpose(2, 3)
    channel = torch.arange(width, device=device)
    return (keys * (1 + channel % 16) + torch.where(channel % 50 == 7, 40.0, 0.0)).to(dtype), values.to(dtype)


def check_reads_back(name, device, dtype, width):
    check_recipe_reads_back(load_recipe(name), device, dtype, width)


def check_recipe_reads_back(recipe, device, dtype, width, cuts=CUTS):
    """Quantize a prompt and later tokens both ways and compare what is held and what is read back, but for ties."""
    keys, values = make_states(device, dtype, width)
    quantizer = record_quantizer(recipe, width)
    found = expected = None
    first = (None, None)
    for start, stop in cuts:
        new = keys[:, :, start:stop], values[:, :, start:stop]
        found = quantizer.quantize(found, *new)
        stored = recipe.key.quantize(new[0], like=first[0]), recipe.value.quantize(new[1], like=first[1])
        packed = pack_keys(recipe.key, stored[0]), pack_values(recipe.value, stored[1], start)
        if expected is None:
            first, expected = stored, FragmentHistory.from_packed(*packed, capacity=cuts[-1][1])
        else:
            expected.append(*packed)
    raise_faults(found)
    assert found.form == expected.form and torch.equal(found.lengths, expected.lengths)
    assert found.nbytes == expected.nbytes and found.value_nbytes == expected.value_nbytes
    if expected.units:
        for left, right in zip(found.units, expected.units, strict=True):
            torch.testing.assert_close(left, right, rtol=2**-9, atol=0)
    for part in ("order", "matrix"):
        assert (getattr(found, part) is None) == (getattr(expected, part) is None)
        assert getattr(found, part) is None or torch.equal(getattr(found, part), getattr(expected, part))
    (found_keys, found_values), (expected_keys, expected_values) = found.unpack(), expected.unpack()
    for left, right in ((found_keys, expected_keys), (*found_values, *expected_values)):
        assert (left.unpack() != right.unpack()).float().mean() < 1e-4
        for metadata in ("scale", "offset"):
            if getattr(right, metadata) is not None and getattr(right, metadata).dtype == torch.uint8:
                # Codes of 4 bits, two a byte. What is fitted differs where an element lay at the border of two codes on the way: states
                # off by one rounding step change 2 of 20,736.
                assert (getattr(left, metadata) != getattr(right, metadata)).float().mean() < 5e-4
            elif getattr(right, metadata) is not None:
                torch.testing.assert_close(getattr(left, metadata), getattr(right, metadata), rtol=2**-10, atol=1e-5)
    length = cuts[-1][1]
    for left, right in (
        (read_keys(found_keys, length, torch.float32), read_keys(expected_keys, length, torch.float32)),
        (read_values(found_values, length, torch.float32), read_values(expected_values, length, torch.float32)),
    ):
        assert (left - right).abs().mean() < 1e-3 * right.abs().mean()

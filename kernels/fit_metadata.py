"""Scales and middles that levels fitted to channels of states need, before they are rounded: from them follow units of 4-bit metadata."""

from __future__ import annotations

import torch

from vidkv_kernels.fit import fit, middle_for, scale_codes
from vidkv_kernels.op import Op
from vidkv_kernels.packed import GROUP_SIZES, check, check_packed


def fit_metadata_reference(
    states: torch.Tensor,
    levels: torch.Tensor,
    emphasis: float,
    group_size: int,
    scale_unit: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return what the groups of each channel need, by the rules of `fit`.

    Args:
        states: float32 [B, H, T, C], T a multiple of the group size.
        levels: int32 [C], number of levels of each channel, from 2 on.
        emphasis: power of the weights, 0 or more.
        group_size: tokens of a group, S: 32, 64 or 128.
        scale_unit: float16 [B, H, C], above 0: unit of scales in 4 bits; None: not chosen yet.
        dtype: to compute in.
    Returns:
        [B, H, T / S, C]: the fitted scales or, given their unit, the best middles for scales as stored. `dtype`.
    Raises:
        ValueError: a tensor of another shape or dtype, or tokens that fill no groups.
    """
    check_fit(states, levels, group_size)
    batch, heads, _, channels = states.shape
    groups, half = states.to(dtype).unflatten(2, (-1, group_size)), (levels.to(dtype) - 1) / 2
    scale, middle, weights = fit(groups, half, emphasis, 3)
    if scale_unit is None:
        return scale.squeeze(3)
    check_packed("scale_unit", scale_unit, (batch, heads, channels), torch.float16, states.device)
    unit = scale_unit.to(dtype)[:, :, None, None]
    scale = unit * scale_codes(scale, unit)
    return middle_for(groups, half, scale, middle, weights, 3).squeeze(3)


def check_fit(states: torch.Tensor, levels: torch.Tensor, group_size: int) -> None:
    """Raise a ValueError unless states can be fitted so."""
    check("states", states, (None,) * 4, torch.float32, states.device)
    check_packed("levels", levels, (states.shape[3],), torch.int32, states.device)
    if group_size not in GROUP_SIZES or states.shape[2] % group_size:
        raise ValueError(f"states have {states.shape[2]} tokens, groups {group_size}; allowed: whole groups of {GROUP_SIZES}")


def cases(device: torch.device) -> dict[str, tuple]:
    """Return awkward inputs of `fit_metadata`."""
    made = {name: call for name, call in calls(device).items() if call[0].numel()}
    return {name: (*call, None if units is None else units[:, :, 0].contiguous()) for name, (*call, units) in made.items()}


def calls(device: torch.device) -> dict[str, tuple]:
    """Return awkward arguments, units [B, H, 3, C] or None the last of them, by what is awkward."""
    few, many = [3] * 20 + [16] * 12, [2, 3, 4, 16] * 24
    made = {
        "one group": (1, 1, 32, few, 1.0, 32, False),
        "one group, units known": (1, 1, 32, few, 1.0, 32, True),
        "all numbers of levels, channels not a power of two": (2, 3, 96, many, 1.0, 32, True),
        "all elements alike": (1, 2, 64, many, 0.0, 32, False),
        "all elements alike, units known": (1, 2, 64, many, 0.0, 32, True),
        "emphasis that is no whole number": (1, 2, 64, many, 1.5, 32, True),
        "groups of 64": (1, 2, 128, few, 1.0, 64, True),
        "groups of 128": (2, 1, 128, few, 1.0, 128, True),
        "no tokens": (1, 2, 0, few, 1.0, 32, True),
        "one channel": (1, 1, 64, [3], 1.0, 32, True),
    }
    return {name: _call(device, *arguments) for name, arguments in made.items()}


def _call(
    device: torch.device, batch: int, heads: int, tokens: int, levels: list[int], emphasis: float, group_size: int, has_units: bool
) -> tuple:
    generator = torch.Generator(device).manual_seed(0)
    channels = len(levels)
    # Heads beside each other in a token, as a model makes them; a constant channel, a wide one and one far from zero.
    states = torch.randn(batch, tokens, heads, channels, generator=generator, device=device).transpose(1, 2)
    for channel, (size, place) in enumerate(((0.0, 2.5), (50.0, 0.0), (1.0, 40.0))):
        if channel < channels - 1:
            states[..., channel] = size * states[..., channel] + place
    units = None
    if has_units:
        unit = torch.rand(batch, heads, 2, channels, generator=generator, device=device) / 8 + 0.02
        center = torch.randn(batch, heads, 1, channels, generator=generator, device=device) / 4
        units = torch.cat([unit, center], dim=2).half()
    return states, torch.tensor(levels, dtype=torch.int32, device=device), emphasis, group_size, units


OP = Op("fit_metadata", fit_metadata_reference, cases, is_exact=False)

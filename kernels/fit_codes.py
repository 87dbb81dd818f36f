"""Codes of states, and metadata in 4 bits, by the rules of `fit`: what is stored of channels whose units are known."""

from __future__ import annotations

import torch

from vidkv_kernels.fit import codes_for, fit, middle_for, scale_codes
from vidkv_kernels.fit_metadata import calls, check_fit
from vidkv_kernels.op import Op
from vidkv_kernels.packed import CENTER_CODE, METADATA_CODES, check_packed


def fit_codes_reference(
    states: torch.Tensor, levels: torch.Tensor, emphasis: float, group_size: int, units: torch.Tensor, faults: torch.Tensor, bit: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code the groups of each channel.

    Args:
        states, levels, emphasis, group_size: as in `fit_metadata`.
        units: float16 [B, H, 3, C]: unit of scales and unit of middles, above 0, and center of middles.
        faults: int32 [1]; gets the bits of `bit` besides its own if a state is not finite. Codes mean nothing then.
    Returns:
        Codes 0 .. levels - 1, uint8 [B, H, T, C], and metadata, uint8 [B, H, T / S, C]: the code of the scale in the upper half, that
        of the middle in the lower one; and `faults`.
    Raises:
        ValueError: a tensor of another shape or dtype, or tokens that fill no groups.
    """
    check_codes(states, levels, group_size, units, faults)
    faults |= bit * (~states.isfinite()).any()
    groups, half = states.unflatten(2, (-1, group_size)), (levels.float() - 1) / 2
    scale, middle, weights = fit(groups, half, emphasis, 3)
    scale_unit, middle_unit, center = units.float().unsqueeze(2).unsqueeze(2).unbind(4)
    scale_code = scale_codes(scale, scale_unit)
    scale = scale_unit * scale_code
    origin = center - CENTER_CODE * middle_unit
    middle = middle_for(groups, half, scale, middle, weights, 3)
    middle_code = ((middle - origin) / middle_unit).round().clamp(0, METADATA_CODES - 1)
    codes = codes_for(groups, half, scale, origin + middle_unit * middle_code).to(torch.uint8)
    metadata = (16 * scale_code + middle_code).to(torch.uint8).squeeze(3)
    return codes.flatten(2, 3).contiguous(), metadata.contiguous(), faults


def check_codes(states: torch.Tensor, levels: torch.Tensor, group_size: int, units: torch.Tensor, faults: torch.Tensor) -> None:
    """Raise a ValueError unless states can be coded so."""
    check_fit(states, levels, group_size)
    batch, heads, _, channels = states.shape
    check_packed("units", units, (batch, heads, 3, channels), torch.float16, states.device)
    check_packed("faults", faults, (1,), torch.int32, states.device)


def cases(device: torch.device) -> dict[str, tuple]:
    """Return awkward inputs of `fit_codes`; none of their elements lies at the border of two codes."""
    known = {name: call for name, call in calls(device).items() if call[-1] is not None}
    return {name: (*call, torch.full((1,), 8, dtype=torch.int32, device=device), 4) for name, call in known.items()}


OP = Op("fit_codes", fit_codes_reference, cases, is_exact=True)

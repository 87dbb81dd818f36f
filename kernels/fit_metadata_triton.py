"""`fit_metadata` in Triton."""

from __future__ import annotations

import torch

from vidkv_kernels import fit_triton
from vidkv_kernels.fit_metadata import check_fit
from vidkv_kernels.packed import check_packed


def fit_metadata(
    states: torch.Tensor, levels: torch.Tensor, emphasis: float, group_size: int, scale_unit: torch.Tensor | None
) -> torch.Tensor:
    """See `fit_metadata_reference`."""
    check_fit(states, levels, group_size)
    batch, heads, tokens, channels = states.shape
    found = torch.empty(batch, heads, tokens // group_size, channels, device=states.device)
    units: tuple[torch.Tensor, ...] = ()
    if scale_unit is not None:
        check_packed("scale_unit", scale_unit, (batch, heads, channels), torch.float16, states.device)
        units = (scale_unit,)
    stage = fit_triton.MIDDLE if units else fit_triton.SCALE
    fit_triton.launch(states, levels, emphasis, group_size, units, found, found, stage)
    return found

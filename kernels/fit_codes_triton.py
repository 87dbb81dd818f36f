"""`fit_codes` in Triton."""

from __future__ import annotations

import torch

from vidkv_kernels import fit_triton
from vidkv_kernels.fit_codes import check_codes


def fit_codes(
    states: torch.Tensor, levels: torch.Tensor, emphasis: float, group_size: int, units: torch.Tensor, faults: torch.Tensor, bit: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `fit_codes_reference`."""
    check_codes(states, levels, group_size, units, faults)
    batch, heads, tokens, channels = states.shape
    codes = torch.empty(batch, heads, tokens, channels, dtype=torch.uint8, device=states.device)
    metadata = torch.empty(batch, heads, tokens // group_size, channels, dtype=torch.uint8, device=states.device)
    fit_triton.launch(states, levels, emphasis, group_size, units.unbind(2), metadata, codes, fit_triton.CODES, faults, bit)
    return codes, metadata, faults

"""How a group of numbers becomes codes, in plain torch: codes 0 .. levels - 1 and float16 metadata for each group.

min-max:  offset = min, scale = (max - min) / (levels - 1), code = (x - offset) / scale, rounded half to even.
sign:     code 1 from 0 on; with m the mean of x for the kind mean, else 0, and s the mean of |x - m|:
          kinds mean and centred have levels m - s and m + s, so scale = 2 s; kind none has levels 0 and s, so scale = s.
ternary:  code 1 + sign(x), or 1 where |x| is at most threshold * mean of |x|; scale = mean of |x| where the code is not 1.

Metadata is rounded first and codes are chosen for what was rounded. Beyond float16 it becomes infinite.
"""

from __future__ import annotations

import torch


def encode_minmax(groups: torch.Tensor, levels: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, and scale and offset without dimension `dim`, of float32 groups that lie along `dim`."""
    low, high = groups.amin(dim), groups.amax(dim)
    scale, offset = ((high - low) / (levels - 1)).half(), low.half()
    # A constant group has scale 0: all its codes mean the offset.
    divisor = torch.where(scale > 0, scale, 1).float().unsqueeze(dim)
    codes = ((groups - offset.float().unsqueeze(dim)) / divisor).round().clamp(0, levels - 1)
    return codes.to(torch.uint8), scale, offset


def encode_sign(groups: torch.Tensor, kind: str, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes, scale and, for the kind mean, offset, of float32 groups that lie along `dim`."""
    offset = groups.mean(dim).half() if kind == "mean" else None
    if offset is not None:
        groups = groups - offset.float().unsqueeze(dim)
    scale = groups.abs().mean(dim).half() * (1 if kind == "none" else 2)
    return (groups >= 0).to(torch.uint8), scale, offset


def encode_ternary(groups: torch.Tensor, threshold: float, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scale of float32 groups that lie along `dim`."""
    sizes = groups.abs()
    is_non_zero = sizes > threshold * sizes.mean(dim, keepdim=True)
    scale = (sizes * is_non_zero).sum(dim) / is_non_zero.sum(dim).clamp(min=1)
    return (1 + torch.sign(groups) * is_non_zero).to(torch.uint8), scale.half()

"""Equally spaced levels fitted to a group by weighted least squares, in plain torch.

The level of code c is middle + scale * (c - half), half = (levels - 1) / 2. An element weighs (its distance from the mean of the
group, in standard deviations, at least SMALLEST_WEIGHT) ** emphasis. The fit starts with levels from minimum to maximum; then codes and
levels are improved by turns, as in Lloyd's method.

Metadata in 4 bits is counted as in `packed`, codes rounded half to even. What is stored is coarser than what was fitted, so each choice is
made for what has been rounded before it: the middle for the scale as stored, codes for both.

`half` is a number, or a tensor that groups broadcast with; groups are float32 and lie along `dim`, in which metadata have size 1.
"""

from __future__ import annotations

import torch

from vidkv_kernels.packed import METADATA_CODES

# More changes nothing that could be measured.
ROUNDS = 4
SMALLEST_WEIGHT = 0.05

Half = float | torch.Tensor


def fit(groups: torch.Tensor, half: Half, emphasis: float, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the fitted scale, not negative, the middle that goes with it, and the weights of elements, whose sum is 1."""
    weights = _weigh(groups, emphasis, dim)
    weights /= weights.sum(dim, keepdim=True)
    low, high = groups.aminmax(dim=dim, keepdim=True)
    middle, scale = (low + high) / 2, (high - low) / (2 * half)
    mean = (weights * groups).sum(dim, keepdim=True)
    for _ in range(ROUNDS):
        steps = _nearest(groups, middle, scale, half)
        mean_steps = (weights * steps).sum(dim, keepdim=True)
        spread = weights * (steps - mean_steps)
        # Zero only in a constant group, whose steps are all alike.
        size = (spread * steps).sum(dim, keepdim=True)
        scale = (spread * (groups - mean)).sum(dim, keepdim=True) / torch.where(size > 0, size, 1)
        middle = mean - scale * mean_steps
    return scale.clamp(min=0), middle, weights


def scale_codes(scale: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return the codes of 4 bits, as floats, of scales counted in `unit`."""
    return (scale / unit).round().clamp(max=METADATA_CODES - 1)


def middle_for(
    groups: torch.Tensor, half: Half, scale: torch.Tensor, middle: torch.Tensor, weights: torch.Tensor, dim: int
) -> torch.Tensor:
    """Return the best middle for a scale as stored; `middle` and `weights` as fitted."""
    steps = _nearest(groups, middle, scale, half)
    return (weights * (groups - scale * steps)).sum(dim, keepdim=True)


def codes_for(groups: torch.Tensor, half: Half, scale: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """Return the codes of the nearest levels, as floats, for metadata as stored."""
    return _nearest(groups, middle, scale, half) + half


def _weigh(groups: torch.Tensor, emphasis: float, dim: int) -> torch.Tensor:
    distances = (groups - groups.mean(dim, keepdim=True)).abs()
    typical = distances.square().mean(dim, keepdim=True).sqrt()
    return (distances / torch.where(typical > 0, typical, 1)).clamp(min=SMALLEST_WEIGHT) ** emphasis


def _nearest(groups: torch.Tensor, middle: torch.Tensor, scale: torch.Tensor, half: Half) -> torch.Tensor:
    """Return the distance of the nearest level from the middle, in scales."""
    # A scale of zero makes every level the middle, so any divisor will do.
    codes = ((groups - middle) / torch.where(scale > 0, scale, 1) + half).round_()
    codes = codes.clamp_(0, 2 * half) if isinstance(half, float) else torch.minimum(codes.clamp_(min=0), 2 * half)
    return codes - half

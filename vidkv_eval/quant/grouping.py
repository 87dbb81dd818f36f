"""Cutting states into groups of elements that share a scale, and putting them together again.

Grouped states are [B, H, G, M, S]: G blocks of S tokens, M groups in a block, S elements in a group.
Both granularities have M = C, so a block holds C * S codes.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Granularity = Literal["per_channel", "per_token"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


def group(states: torch.Tensor, granularity: Granularity, group_size: int) -> torch.Tensor:
    """Cut states into groups.

    Args:
        states: [B, H, T, C].
        granularity: per_channel: a group is S consecutive tokens of one channel;
            per_token: S consecutive channels of one token.
        group_size: S.
    Returns:
        [B, H, G, M, S], a view where possible.
    Raises:
        ValueError: T or, for per_token, C is not a multiple of S.
    """
    batch, heads, length, channels = states.shape
    if length % group_size:
        raise ValueError(f"{length} tokens cannot be cut into blocks of {group_size}; give a multiple of group_size")
    if granularity == "per_token":
        if channels % group_size:
            raise ValueError(
                f"{channels} channels cannot be cut into groups of {group_size}; per_token needs a group_size that divides the channels"
            )
        return states.reshape(batch, heads, length // group_size, channels, group_size)
    return states.reshape(batch, heads, length // group_size, group_size, channels).transpose(-1, -2)


def ungroup(groups: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Put groups [B, H, G, M, S] together again to states [B, H, T, C]; the inverse of `group`."""
    batch, heads, blocks, channels, group_size = groups.shape
    if granularity == "per_channel":
        groups = groups.transpose(-1, -2)
    return groups.reshape(batch, heads, blocks * group_size, channels)

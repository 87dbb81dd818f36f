"""Attention scores of coarsely quantized tokens, brought closer together before the softmax.

Keys of one bit make some scores far too large. CalibQuant (arXiv:2502.14882v2) maps the scores of its quantized block linearly
from [min, max] to [min, max - 3] in each head and step, and takes the softmax over them and the exact scores of other tokens.

A cache knows which tokens these are and an attention function knows the scores: the cache puts a note on the keys that it
returns, and the function, which is given the same tensor, reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

GROUPED = "grouped_sdpa"
"""Name of the attention function that reads notes; it is defined in `attention`."""


@dataclass(frozen=True)
class ScoreDrop:
    """Where scores of a sequence are brought closer together, and how far.

    Attributes:
        positions: of the tokens among all keys, int64 [N].
        drop: how much lower the largest score of these tokens becomes.
    """

    positions: torch.Tensor
    drop: float


def drop_scores(scores: torch.Tensor, drop: float) -> torch.Tensor:
    """Map scores [..., N], scaled as the softmax takes them, from [min, max] to [min, max - drop] along the last dimension.

    Where max - min is less than `drop`, all become the minimum: the order of two scores is never reversed. In the authors'
    code it is.
    """
    if not drop:
        return scores
    low, high = (bound.unsqueeze(-1) for bound in scores.aminmax(dim=-1))
    spread = high - low
    share = ((spread - drop) / torch.where(spread > 0, spread, 1)).clamp_(min=0)
    return low + (scores - low) * share


def put_note(key: torch.Tensor, drops: Mapping[int, ScoreDrop]) -> None:
    """Tell the attention function that is given the tensor `key`, [B, H, T, D], what to do with sequences of the batch."""
    key.score_drops = dict(drops)


def read_note(key: torch.Tensor) -> dict[int, ScoreDrop]:
    """Return what `put_note` put on `key`, by sequence; nothing if it never did."""
    return getattr(key, "score_drops", {})

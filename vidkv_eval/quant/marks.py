"""What a recipe may need to know about the tokens of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenMarks:
    """Marks on the tokens of one prompt without padding; None where nothing is known.

    Attributes:
        visual: True for tokens that stand for images or video, bool [T].
        saliency: how much a visual token matters for the text of the prompt, float32 [T]; without meaning for other tokens.
        listed: positions of the tokens to select, int64 [N], ascending; they replace what a recipe would choose.
    """

    visual: torch.Tensor | None = None
    saliency: torch.Tensor | None = None
    listed: torch.Tensor | None = None

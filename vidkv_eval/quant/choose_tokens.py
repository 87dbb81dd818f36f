"""Which tokens of a prompt get a quantizer of their own.

Every choice counts in steps, because the tokens of each kind are quantized in groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from vidkv_eval.quant.base import impossible
from vidkv_eval.quant.marks import TokenMarks

RELEASED_STEP = 32
Rule = Literal["top", "released"]


class TokenChooser(ABC):
    """A rule that chooses tokens of a prompt. Implementations are frozen dataclasses."""

    @abstractmethod
    def choose(self, marks: TokenMarks, count: int, step: int) -> torch.Tensor:
        """Choose among the first `count` tokens.

        Args:
            marks: what is known about the prompt.
            count: how many tokens of the prompt are quantized; later ones cannot be chosen.
            step: the number chosen is a multiple of it.
        Returns:
            Ascending positions, int64 [N].
        Raises:
            LookupError: the marks lack what the rule needs.
        """

    @abstractmethod
    def mean_bits(self, chosen: float, other: float) -> float:
        """Return nominal bits as papers count them, given those of chosen and of other tokens."""


@dataclass(frozen=True)
class Salient(TokenChooser):
    """The visual tokens that matter most for the text of the prompt.

    Source: arXiv:2503.16257, semantic token protection (STP).

    Attributes:
        fraction: share of the visual tokens, 0 to 1.
        rule: top: the most salient, their number rounded to the nearest multiple of the step;
            released: as in the authors' code (commit 0e55c39): at least 32, in multiples of 32 rounded down, then the last
            32 by position are let go, so that 64 chosen leave 32. That code adds 14, the length of its system prompt, to
            positions counted from the first visual token; here positions are those of the prompt, whatever its layout.
    """

    fraction: float
    rule: Rule = "top"

    def __post_init__(self) -> None:
        _check_fraction(self, self.fraction)
        if self.rule not in get_args(Rule):
            raise impossible(self, "rule", self.rule, ", ".join(get_args(Rule)))

    def choose(self, marks: TokenMarks, count: int, step: int) -> torch.Tensor:
        visual = _visual_positions(marks)
        if not len(visual):
            return visual
        if marks.saliency is None:
            raise LookupError("the saliency of its visual tokens")
        salience = marks.saliency[visual]
        if self.rule == "released":
            wanted = max(RELEASED_STEP, int(len(visual) * self.fraction) // RELEASED_STEP * RELEASED_STEP)
            chosen = _first_by(salience, visual, wanted)[:-RELEASED_STEP]
            chosen = chosen[chosen < count]
            return chosen[: len(chosen) // step * step]
        reachable = visual < count
        wanted = _multiple(len(visual) * self.fraction, step, int(reachable.sum()))
        return _first_by(salience[reachable], visual[reachable], wanted)

    def mean_bits(self, chosen: float, other: float) -> float:
        return self.fraction * chosen + (1 - self.fraction) * other


@dataclass(frozen=True)
class RandomVisual(TokenChooser):
    """Visual tokens drawn at random: the ablation of `Salient`.

    Source: arXiv:2503.16257, random token protection (RTP).

    Attributes:
        fraction: share of the visual tokens, 0 to 1; their number is rounded to the nearest multiple of the step.
        seed: prompts with equally many visual tokens get the same draw.
    """

    fraction: float
    seed: int

    def __post_init__(self) -> None:
        _check_fraction(self, self.fraction)
        if type(self.seed) is not int or self.seed < 0:
            raise impossible(self, "seed", self.seed, "integers from 0")

    def choose(self, marks: TokenMarks, count: int, step: int) -> torch.Tensor:
        visual = _visual_positions(marks)
        # Drawn on the CPU, so that every device draws the same.
        order = torch.rand(len(visual), generator=torch.Generator().manual_seed(self.seed)).to(visual.device)
        reachable = visual < count
        wanted = _multiple(len(visual) * self.fraction, step, int(reachable.sum()))
        return _first_by(order[reachable], visual[reachable], wanted)

    def mean_bits(self, chosen: float, other: float) -> float:
        return self.fraction * chosen + (1 - self.fraction) * other


@dataclass(frozen=True)
class AllVisual(TokenChooser):
    """Every visual token, in whole steps: what does not fill one, at the end, is left out."""

    def choose(self, marks: TokenMarks, count: int, step: int) -> torch.Tensor:
        visual = _visual_positions(marks)
        visual = visual[visual < count]
        return visual[: len(visual) // step * step]

    def mean_bits(self, chosen: float, other: float) -> float:
        return chosen


@dataclass(frozen=True)
class First(TokenChooser):
    """The first tokens of the prompt, on which much attention rests whatever they say (attention sinks, arXiv:2309.17453).

    Attributes:
        tokens: how many; a shorter prompt gives whole steps of what it has.
    """

    tokens: int

    def __post_init__(self) -> None:
        if type(self.tokens) is not int or self.tokens < 1:
            raise impossible(self, "tokens", self.tokens, "integers above 0")

    def choose(self, marks: TokenMarks, count: int, step: int) -> torch.Tensor:
        return torch.arange(min(self.tokens, count) // step * step)

    def mean_bits(self, chosen: float, other: float) -> float:
        return other


def _visual_positions(marks: TokenMarks) -> torch.Tensor:
    if marks.visual is None:
        raise LookupError("which of its tokens are visual")
    return marks.visual.nonzero().squeeze(-1)


def _first_by(order: torch.Tensor, positions: torch.Tensor, wanted: int) -> torch.Tensor:
    """Return the `wanted` positions of largest order, ascending; among equals the earlier."""
    return positions[order.sort(descending=True, stable=True).indices[:wanted]].sort().values


def _multiple(wanted: float, step: int, most: int) -> int:
    """Return the multiple of `step` nearest to `wanted`, but none above `most`."""
    return min(int(wanted / step + 0.5), most // step) * step


def _check_fraction(owner: TokenChooser, fraction: object) -> None:
    if type(fraction) not in (int, float) or not 0 <= fraction <= 1:
        raise impossible(owner, "fraction", fraction, "numbers from 0 to 1")

"""Some tokens of the prompt to one quantizer, all others to another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer, impossible
from vidkv_eval.quant.choose_tokens import TokenChooser
from vidkv_eval.quant.marks import TokenMarks


@dataclass(frozen=True)
class SplitTokens(Quantizer):
    """Mixed precision by token.

    The tokens of each kind are gathered in ascending order, and groups are cut from the gathered lists. Tokens after the
    prompt are never chosen. Source: arXiv:2503.16257, token protection.

    Attributes:
        chosen: quantizer of the chosen tokens.
        other: quantizer of all others.
        choose: which tokens are chosen.
    """

    chosen: Quantizer
    other: Quantizer
    choose: TokenChooser

    def __post_init__(self) -> None:
        for name in ("chosen", "other"):
            if not isinstance(getattr(self, name), Quantizer):
                raise impossible(self, name, getattr(self, name), "a quantizer")
        if not isinstance(self.choose, TokenChooser):
            raise impossible(self, "choose", self.choose, "a rule of vidkv_eval.quant.choose_tokens")

    @property
    def block(self) -> int:
        return math.lcm(self.chosen.block, self.other.block)

    @property
    def nominal_bits(self) -> float:
        return self.choose.mean_bits(self.chosen.nominal_bits, self.other.nominal_bits)

    @property
    def is_scaled(self) -> bool:
        return self.chosen.is_scaled and self.other.is_scaled

    @property
    def is_batch_independent(self) -> bool:
        return self.chosen.is_batch_independent and self.other.is_batch_independent

    def choose_tokens(self, marks: TokenMarks | None, count: int) -> torch.Tensor:
        """Return the ascending positions, int64 [N], of the tokens to choose among the first `count` of a prompt.

        Raises:
            ValueError: the marks lack what the rule needs, or list positions that do not fit.
        """
        marks = marks or TokenMarks()
        if marks.listed is None:
            try:
                return self.choose.choose(marks, count, self.block)
            except LookupError as error:
                raise ValueError(
                    f"{type(self.choose).__name__} needs to know {error.args[0]}: make the cache with QuantizedCache.for_model, which "
                    "watches the model, or call its describe_prompt (with vidkv roundtrip: protected=FILE.npy)"
                ) from error
        listed = marks.listed
        ascending = bool((listed[1:] > listed[:-1]).all())
        if listed.ndim != 1 or len(listed) % self.block or not ascending or (len(listed) and not 0 <= listed[0] <= listed[-1] < count):
            raise ValueError(
                f"{len(listed)} listed tokens do not fit; allowed: a multiple of {self.block} different positions below {count}, "
                "the tokens of the prompt that are quantized, in ascending order"
            )
        return listed

    def choice(self, tokens: torch.Tensor, channels: int) -> QuantizedStates:
        """Return the empty stored form that makes `quantize(states, like=...)` choose `tokens`, int64 [B, N]."""
        dtype = torch.int16 if not tokens.numel() or tokens.max() < 2**15 else torch.int32
        return QuantizedStates(0, channels, static={"tokens": tokens.to(dtype)})

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        """Quantize states; see the base class.

        Args:
            states: [B, H, T, C].
            like: a `choice`, or the stored form that these tokens follow. Without it no token is chosen.
        """
        if like is None:
            like = self.choice(torch.empty(states.shape[0], 0, dtype=torch.int64, device=states.device), states.shape[-1])
        tokens = like.static["tokens"]
        parts, other = {}, states
        if not like.length and tokens.shape[1]:
            chosen, rest = split_positions(tokens, states.shape[2])
            parts["chosen"] = self.chosen.quantize(_take(states, chosen))
            other = _take(states, rest)
        if other.shape[2]:
            parts["other"] = self.other.quantize(other, like.parts.get("other"))
        return QuantizedStates(states.shape[2], states.shape[3], static={"tokens": tokens}, parts=parts)

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        if "chosen" not in quantized.parts:
            return self.other.dequantize(quantized.parts["other"], dtype)
        parts = [self.chosen.dequantize(quantized.parts["chosen"], dtype)]
        if "other" in quantized.parts:
            parts.append(self.other.dequantize(quantized.parts["other"], dtype))
        gathered = torch.cat(parts, dim=2)
        order = torch.cat(split_positions(quantized.static["tokens"], quantized.length), dim=1)
        return torch.empty_like(gathered).scatter_(2, order[:, None, :, None].expand(gathered.shape), gathered)


def split_positions(tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return chosen tokens and the others, ascending: [B, N] to int64 [B, N] and [B, T - N]."""
    tokens = tokens.long()
    is_other = torch.ones(tokens.shape[0], length, dtype=torch.uint8, device=tokens.device).scatter_(1, tokens, 0)
    others = is_other.sort(dim=1, descending=True, stable=True).indices[:, : length - tokens.shape[1]]
    return tokens, others


def _take(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return states.gather(2, positions[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))

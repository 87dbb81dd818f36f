"""What quantizers have in common that write straight into the records that attention kernels read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from vidkv_kernels.fragment_history import FragmentHistory
from vidkv_kernels.fragments import Form


class RecordQuantizer(ABC):
    """Quantizes keys and values into a `FragmentHistory`; see `fused_quantize` for how it is used.

    Attributes:
        form: of the history.
    """

    form: Form

    def quantize(
        self,
        history: FragmentHistory | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        capacity: int = 0,
        *,
        counts: Sequence[int] | None = None,
    ) -> FragmentHistory:
        """Append tokens; nothing waits for the device.

        Args:
            history: what this quantizer made of the tokens before, changed in place; None for the first tokens. What a sequence has
                once, such as the order of its channels, is chosen over its first tokens.
            keys, values: [B, H, T, D]; float16, bfloat16 or float32.
            capacity: tokens to have room for afterwards, at least those held.
            counts: how many of the tokens to take of each sequence, multiples of the group size; None: all.
        Returns:
            `history`, or the one that was made.
        Raises:
            ValueError: numbers of tokens that are no multiples, or states of another shape, dtype or device than the history takes.
        """
        batch, _, tokens, _ = keys.shape
        counts = [tokens] * batch if counts is None else list(counts)
        if any(count % self.form.group_size for count in counts):
            raise ValueError(f"{counts} tokens cannot be cut into groups of {self.form.group_size}; give multiples")
        held = counts if history is None else [old + new for old, new in zip(history.held, counts, strict=True)]
        if history is None:
            history = self._make(keys, max(*held, capacity))
        else:
            history.reserve(max(*held, capacity))
        numbers = None if set(counts) == {tokens} else torch.tensor(counts, dtype=torch.int32).to(keys.device, non_blocking=True)
        self._append(history, keys, values, counts, numbers, held)
        return history

    @abstractmethod
    def _make(self, keys: torch.Tensor, capacity: int) -> FragmentHistory:
        """Make an empty history for keys like these."""

    @abstractmethod
    def _append(
        self,
        history: FragmentHistory,
        keys: torch.Tensor,
        values: torch.Tensor,
        counts: list[int],
        numbers: torch.Tensor | None,
        held: list[int],
    ) -> None:
        """Append tokens, for which there is room.

        Args:
            numbers: the counts on the device, int32 [B]; None: all tokens.
            held: tokens of each sequence afterwards.
        """

"""Which tokens of a batch to quantize, and where in the buffers they go: numbers on the device, so that nothing waits for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidkv_kernels.packed import check


@dataclass(frozen=True)
class Span:
    """For each sequence, consecutive tokens of the states and the place of the first one in the buffers.

    Attributes:
        begin: int32 [B], first token in the states; what stands before it, such as padding, is never read.
        count: int32 [B], a multiple of the group size, or 0; other numbers are rounded down.
        start: int32 [B], entries held already; a multiple of the group size.
    """

    begin: torch.Tensor
    count: torch.Tensor
    start: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("begin", "count", "start"):
            check(f"span.{name}", getattr(self, name), tuple(self.begin.shape[:1]), torch.int32, self.begin.device)

    @classmethod
    def of(cls, device: torch.device, begin: list[int], count: list[int], start: list[int]) -> Span:
        """Make a span of plain numbers."""
        return cls(*(torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (begin, count, start)))

    def rows(self) -> list[tuple[int, int, int]]:
        """Return begin, count and start of each sequence as plain numbers; waits for the device."""
        return list(zip(self.begin.tolist(), self.count.tolist(), self.start.tolist(), strict=True))


def check_states(name: str, states: torch.Tensor, span: Span, like: torch.Tensor, width: int) -> None:
    """Raise a ValueError unless states [B, H, T, D] and the span fit packed buffers of which `like` is one."""
    batch, heads = like.shape[:2]
    check(name, states, (batch, heads, None, width), (torch.float16, torch.bfloat16, torch.float32), like.device)
    check("span.begin", span.begin, (batch,), torch.int32, like.device)

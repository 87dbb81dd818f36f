"""Order key channels: the widest ones first. The width of a channel is its largest minus its smallest value over heads and tokens.

Both the wide channels and the others stand in ascending order. Of equal widths the first channels are wider.
Source: arXiv:2503.16257, section on mixed-precision keys.
"""

from __future__ import annotations

import torch

from vidkv_kernels.op import Op
from vidkv_kernels.packed import check
from vidkv_kernels.span import Span


def choose_channels_reference(states: torch.Tensor, span: Span, wide_channels: int) -> torch.Tensor:
    """Choose for each sequence by itself, over the tokens of a span.

    Args:
        states: [B, H, T, D].
        span: tokens to look at; `start` is not used.
        wide_channels: number of wide channels.
    Returns:
        int32 [B, D], a permutation of the channels. Without tokens it is the identity.
    """
    check_choice(states, span, wide_channels)
    order = torch.arange(states.shape[3], device=states.device).repeat(states.shape[0], 1)
    for row, (begin, count, _) in enumerate(span.rows()):
        if count:
            tokens = states[row, :, begin : begin + count].float()
            width = tokens.amax(dim=(0, 1)) - tokens.amin(dim=(0, 1))
            chosen = width.sort(descending=True, stable=True).indices
            order[row] = torch.cat([part.sort().values for part in (chosen[:wide_channels], chosen[wide_channels:])])
    return order.int()


def check_choice(states: torch.Tensor, span: Span, wide_channels: int) -> None:
    """Raise a ValueError unless `choose_channels` takes these arguments."""
    check("states", states, (len(span.begin), None, None, None), (torch.float16, torch.bfloat16, torch.float32), states.device)
    check("span.begin", span.begin, (states.shape[0],), torch.int32, states.device)
    if not 0 <= wide_channels <= states.shape[3]:
        raise ValueError(f"wide_channels is {wide_channels}; allowed: 0 to {states.shape[3]}, the channels")


def cases(device: torch.device) -> dict[str, tuple]:
    """Return awkward inputs of `choose_channels`."""
    generator = torch.Generator(device).manual_seed(0)

    def states(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def span(begin: list[int], count: list[int]) -> Span:
        return Span.of(device, begin, count, [0] * len(begin))

    padded = states(2, 2, 300, 64)
    padded[1, :, :200] = 100 * torch.arange(64, device=device)
    return {
        "half of the channels": (states(1, 2, 96, 64), span([0], [96]), 32),
        "padding that is wider than any token": (padded, span([0, 200], [300, 100]), 16),
        "equal widths": (torch.zeros(1, 1, 32, 64, device=device), span([0], [32]), 5),
        "one token": (states(1, 1, 1, 128, dtype=torch.bfloat16), span([0], [1]), 64),
        "no token in one sequence": (states(2, 1, 40, 128).transpose(1, 2).contiguous().transpose(1, 2), span([0, 3], [0, 37]), 12),
        "no wide channel": (states(1, 1, 32, 64), span([0], [32]), 0),
        "only wide channels": (states(1, 1, 32, 64, dtype=torch.float32), span([0], [32]), 64),
    }


OP = Op("choose_channels", choose_channels_reference, cases, is_exact=True)

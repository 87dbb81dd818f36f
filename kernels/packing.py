"""Packing of small integers into bytes: a byte holds as many digits as fit, lowest digit first.

2 levels: 8 codes a byte; 3 levels: 5 (1.6 bits a code); 4 levels: 4; 16 levels: 2; 256 levels: 1.
"""

from __future__ import annotations

import torch

CODES_PER_BYTE = {2: 8, 3: 5, 4: 4, 16: 2, 256: 1}


def pack(codes: torch.Tensor, code_count: int) -> torch.Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8 [..., N], values in 0 .. code_count - 1.
        code_count: number of different codes, a key of `CODES_PER_BYTE`.
    Returns:
        uint8 [..., ceil(N / codes per byte)]; the last byte is padded with zeros.
    """
    per_byte = CODES_PER_BYTE[code_count]
    padding = -codes.shape[-1] % per_byte
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    digits = codes.unflatten(-1, (-1, per_byte))
    packed = digits[..., 0].clone()
    for position in range(1, per_byte):
        packed += digits[..., position] * code_count**position
    return packed


def unpack(packed: torch.Tensor, code_count: int, count: int) -> torch.Tensor:
    """Unpack the first `count` codes of each row; the inverse of `pack`.

    Args:
        packed: uint8 [..., bytes].
        code_count: number of different codes, a key of `CODES_PER_BYTE`.
        count: N, number of codes in a row.
    Returns:
        uint8 [..., N].
    """
    per_byte = CODES_PER_BYTE[code_count]
    place_values = code_count ** torch.arange(per_byte, device=packed.device)
    digits_of_byte = (torch.arange(code_count**per_byte, device=packed.device)[:, None] // place_values % code_count).to(torch.uint8)
    # One look-up a byte is several times faster on a CPU than shifts or divisions, and serves three levels as well.
    digits = digits_of_byte.index_select(0, packed.flatten().int())
    return digits.view(*packed.shape[:-1], -1)[..., :count]

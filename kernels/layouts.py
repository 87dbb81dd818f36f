"""Layouts: where the codes of a block lie in its bytes. Quantizers choose codes; a layout only says how they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from vidkv_kernels.packing import pack, unpack


class Layout(ABC):
    """A way to store blocks of codes, each block in whole bytes of its own."""

    @abstractmethod
    def pack(self, codes: torch.Tensor, code_count: int) -> torch.Tensor:
        """Pack codes.

        Args:
            codes: uint8 [B, H, G, M, S], values in 0 .. code_count - 1: G blocks of M groups of S codes.
            code_count: number of different codes: 2, 3, 4, 16 or 256.
        Returns:
            uint8 [B, H, G, bytes of a block].
        """

    @abstractmethod
    def unpack(self, packed: torch.Tensor, code_count: int, groups: int, group_size: int) -> torch.Tensor:
        """Unpack to uint8 [B, H, G, M, S] for M = `groups` and S = `group_size`; the inverse of `pack`."""


class Capacity(Layout):
    """As many codes a byte as fit: 8 of 1 bit, 5 ternary ones (1.6 bits each), 4 of 2 bits; group after group."""

    def pack(self, codes: torch.Tensor, code_count: int) -> torch.Tensor:
        return pack(codes.flatten(3), code_count)

    def unpack(self, packed: torch.Tensor, code_count: int, groups: int, group_size: int) -> torch.Tensor:
        return unpack(packed, code_count, groups * group_size).unflatten(-1, (groups, group_size))


class Fields(Layout):
    """Every code in a field of 1, 2, 4 or 8 bits, so that shifts and masks find it: ternary codes take 2 bits; group after group."""

    def pack(self, codes: torch.Tensor, code_count: int) -> torch.Tensor:
        return pack(codes.flatten(3), _fields(code_count))

    def unpack(self, packed: torch.Tensor, code_count: int, groups: int, group_size: int) -> torch.Tensor:
        return unpack(packed, _fields(code_count), groups * group_size).unflatten(-1, (groups, group_size))


class Planes(Layout):
    """The lowest bits of all codes of the block, 8 a byte, then their next bits, and so on: ternary codes take 2 planes."""

    def pack(self, codes: torch.Tensor, code_count: int) -> torch.Tensor:
        flat = codes.flatten(3)
        return torch.cat([pack(flat >> bit & 1, 2) for bit in range(_bits(code_count))], dim=-1)

    def unpack(self, packed: torch.Tensor, code_count: int, groups: int, group_size: int) -> torch.Tensor:
        planes = packed.unflatten(-1, (_bits(code_count), -1)).unbind(-2)
        codes = sum(unpack(plane, 2, groups * group_size) << bit for bit, plane in enumerate(planes))
        return codes.unflatten(-1, (groups, group_size))


LAYOUTS: dict[str, Layout] = {"capacity": Capacity(), "fields": Fields(), "planes": Planes()}


def _bits(code_count: int) -> int:
    return (code_count - 1).bit_length()


def _fields(code_count: int) -> int:
    """Return the number of codes that a field for `code_count` codes could hold."""
    width = 1
    while width < _bits(code_count):
        width *= 2
    return 2**width

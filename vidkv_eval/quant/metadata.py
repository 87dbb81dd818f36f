"""How scales and minima of groups are stored: as float16, or as float8 in a float16 unit for each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

from vidkv_eval.quant.base import QuantizedStates

Metadata = Literal["float16", "float8"]
METADATA: tuple[str, ...] = get_args(Metadata)

# 1 unit is stored as 64. Float8 (e4m3) reaches from 2**-9 to 448, with 3 bits of mantissa from 2**-6 on: so there is room
# for 7 units, and sizes down to 2**-12 units keep a relative error of at most 1/16.
UNIT = 64.0
LARGEST = torch.finfo(torch.float8_e4m3fn).max


class MetadataWriter:
    """Rounds the metadata of one tensor of states to what is stored, and collects what is stored.

    The unit of each sequence and head is the largest size of the first tokens, kept for those appended later, so that
    stored bytes never change.

    Args:
        dtype: float16 or float8 (e4m3).
        static: units chosen for the first tokens; None if these are the first.

    Attributes:
        tensors: stored metadata by name, [B, H, G, M] in its dtype.
        static: float16 units [B, H] by "<name>_unit"; empty for float16.
    """

    def __init__(self, dtype: str, static: Mapping[str, torch.Tensor] | None):
        self.dtype = dtype
        self.tensors: dict[str, torch.Tensor] = {}
        self.static: dict[str, torch.Tensor] = dict(static or {})

    def __call__(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Store values [B, H, G, M] and return what reading them gives, float32 [B, H, G, M, 1].

        Raises:
            OverflowError: a value is too large for the dtype.
        """
        if self.dtype == "float16":
            self.tensors[name] = _to_half(values)
            return _read(self.tensors[name], None)
        if f"{name}_unit" not in self.static:
            self.static[f"{name}_unit"] = _choose_unit(values)
        unit = self.static[f"{name}_unit"]
        scaled = values * (UNIT / unit.float())[..., None, None]
        if (scaled.abs() > LARGEST).any():
            raise OverflowError(
                f"appended groups need a {name} of {(scaled.abs().max() / UNIT).item():g} times the largest of the first tokens; "
                f"float8 metadata holds at most {LARGEST / UNIT:g} times that; use metadata: float16"
            )
        self.tensors[name] = scaled.to(torch.float8_e4m3fn)
        return _read(self.tensors[name], unit)


def read_metadata(quantized: QuantizedStates) -> dict[str, torch.Tensor]:
    """Return all metadata by name, float32 [B, H, G, M, 1]."""
    return {name: _read(stored, quantized.static.get(f"{name}_unit")) for name, stored in quantized.tensors.items() if name != "codes"}


def _read(stored: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
    values = stored.float().unsqueeze(-1)
    return values if unit is None else values * (unit.float() / UNIT)[..., None, None, None]


def _choose_unit(values: torch.Tensor) -> torch.Tensor:
    """Return the largest size of each head, float16 [B, H]; 1 where that is zero."""
    unit = _to_half(values.abs().amax(dim=(2, 3)))
    return torch.where(unit > 0, unit, 1)


def _to_half(values: torch.Tensor) -> torch.Tensor:
    stored = values.half()
    if torch.isinf(stored).any():
        largest = torch.finfo(torch.float16).max
        raise OverflowError(f"a group needs metadata of size {values.abs().max().item():g}; float16 metadata holds at most {largest:g}")
    return stored

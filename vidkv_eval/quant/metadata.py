"""How scales and offsets of groups are stored: as float16, or in 8 or 4 bits relative to what the first tokens need.

float8: e4m3, in a unit for each head; too small a unit is an error.
uint4: step * code for scales and centre + step * (code - 7) for offsets, code 0 .. 15, with step and centre for each channel;
what lies outside is clipped.

Units, steps and centres are float16, chosen over the first tokens and kept for those appended later, so that stored bytes never
change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch

from vidkv_eval.quant.base import QuantizedStates
from vidkv_kernels.packing import pack, unpack

Metadata = Literal["float16", "float8", "uint4"]
METADATA: tuple[str, ...] = get_args(Metadata)

# 1 unit is stored as 64. Float8 (e4m3) reaches from 2**-9 to 448, with 3 bits of mantissa from 2**-6 on: so there is room
# for 7 units, and sizes down to 2**-12 units keep a relative error of at most 1/16.
UNIT = 64.0
LARGEST = torch.finfo(torch.float8_e4m3fn).max

CODES = 16
CENTRE_CODE = 7
# No step is finer than this share of the head's coarsest: a channel that happens to be constant in the first tokens can still
# follow later ones, and what a narrow channel loses is nothing beside the wide ones.
FINEST = 1 / 64


class MetadataWriter:
    """Rounds the metadata of one tensor of states to what is stored, and collects what is stored.

    Args:
        dtype: one of METADATA.
        static: `static` of the first tokens; None if these are the first.

    Attributes:
        tensors: stored metadata by name: float16 or float8 [B, H, G, M]; for uint4, uint8 [B, H, G, M / 2].
        static: float16, by name: "<name>_unit" [B, H] for float8; "<name>_step" and, unless it is a scale, "<name>_centre"
            [B, H, M] for uint4.
    """

    def __init__(self, dtype: Metadata, static: Mapping[str, torch.Tensor] | None):
        self.dtype = dtype
        self.tensors: dict[str, torch.Tensor] = {}
        self.static: dict[str, torch.Tensor] = dict(static or {})
        self._is_first = static is None

    def __call__(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Store values [B, H, G, M], not negative if the name is "scale", and return what reading them gives, float32 [B, H, G, M, 1].

        Raises:
            OverflowError: a value is too large for the dtype.
        """
        if self.dtype == "float16":
            self.tensors[name] = to_half(values)
        elif self.dtype == "float8":
            self.tensors[name] = self._to_float8(name, values)
        else:
            self.tensors[name] = self._to_uint4(name, values)
        return _read(name, self.tensors[name], self.static, self.dtype, values.shape[-1])

    def _to_float8(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if self._is_first:
            unit = to_half(values.abs().amax(dim=(2, 3)))
            self.static[f"{name}_unit"] = torch.where(unit > 0, unit, 1)
        scaled = values * (UNIT / self.static[f"{name}_unit"].float())[..., None, None]
        if (scaled.abs() > LARGEST).any():
            raise OverflowError(
                f"appended groups need a {name} of {(scaled.abs().max() / UNIT).item():g} times the largest of the first tokens; "
                f"float8 metadata holds at most {LARGEST / UNIT:g} times that; use metadata: float16"
            )
        return scaled.to(torch.float8_e4m3fn)

    def _to_uint4(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if self._is_first:
            step, centre = choose_units(name, values)
            step = to_half(step)
            self.static[f"{name}_step"] = torch.where(step > 0, step, 1)
            if centre is not None:
                self.static[f"{name}_centre"] = to_half(centre)
        origin, step = _origin_and_step(name, self.static)
        return pack(((values - origin) / step).round_().clamp_(0, CODES - 1).to(torch.uint8), CODES)


def choose_units(name: str, values: torch.Tensor, runs: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return step and centre that uint4 metadata of these values needs, float32 [B, H, M]; scales have no centre.

    Args:
        values: [B, H, G, M], of the first tokens.
        runs: numbers of channels of quantizers whose values lie side by side; None: all are of one.
    """
    low, high = values.aminmax(dim=2)
    step = high / (CODES - 1) if name == "scale" else (high - low) / (2 * CENTRE_CODE)
    parts = step.split(list(runs or step.shape[-1:]), dim=-1)
    coarsest = torch.cat([part.amax(dim=-1, keepdim=True).expand_as(part) for part in parts], dim=-1)
    return torch.maximum(step, FINEST * coarsest), None if name == "scale" else (low + high) / 2


def read_metadata(quantized: QuantizedStates, dtype: Metadata) -> dict[str, torch.Tensor]:
    """Return all metadata by name, float32 [B, H, G, M, 1]."""
    return {
        name: _read(name, stored, quantized.static, dtype, quantized.channels)
        for name, stored in quantized.tensors.items()
        if name != "codes"
    }


def _read(name: str, stored: torch.Tensor, static: Mapping[str, torch.Tensor], dtype: Metadata, groups: int) -> torch.Tensor:
    if dtype == "float16":
        values = stored.float()
    elif dtype == "float8":
        values = stored.float() * (static[f"{name}_unit"].float() / UNIT)[..., None, None]
    else:
        origin, step = _origin_and_step(name, static)
        values = origin + step * unpack(stored, CODES, groups)
    return values.unsqueeze(-1)


def _origin_and_step(name: str, static: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | float, torch.Tensor]:
    """Return what code 0 stands for and the step, float32 [B, H, 1, M]."""
    step = static[f"{name}_step"].float().unsqueeze(2)
    if name == "scale":
        return 0.0, step
    return static[f"{name}_centre"].float().unsqueeze(2) - CENTRE_CODE * step, step


def to_half(values: torch.Tensor) -> torch.Tensor:
    """Round metadata to float16.

    Raises:
        OverflowError: a value is too large for it.
    """
    stored = values.half()
    if torch.isinf(stored).any():
        largest = torch.finfo(torch.float16).max
        raise OverflowError(f"a group needs metadata of size {values.abs().max().item():g}; float16 metadata holds at most {largest:g}")
    return stored

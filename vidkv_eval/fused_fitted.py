"""States quantized straight into the records that attention kernels read, for recipes of fitted levels with metadata of 4 bits.

The same interface and the same promise as `fused_quantize`, for the quantizer `Fitted`. The first tokens of a sequence choose its wide
channels and the units of its metadata.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vidkv_eval.fused import KeyPiece, NotPackable, channel_order, columns_of, key_pieces, packed_form, query_matrix
from vidkv_eval.fused_quantize import DirectQuantizer
from vidkv_eval.quant.base import Quantizer
from vidkv_eval.quant.fitted import Fitted
from vidkv_eval.quant.metadata import choose_units
from vidkv_eval.quant.spectral import spectrum_of
from vidkv_eval.quant.split_channels import SplitChannels
from vidkv_eval.recipe import Recipe
from vidkv_eval.record_quantizer import RecordQuantizer
from vidkv_kernels.fit_codes import OP as FIT_CODES
from vidkv_kernels.fit_metadata import OP as FIT_METADATA
from vidkv_kernels.fragment_history import KEY_METADATA, KEY_STATES, VALUE_METADATA, VALUE_STATES, FragmentHistory
from vidkv_kernels.fragments import STEP, Form, UnsupportedForm, lay_value_units, read_value_units
from vidkv_kernels.packed import STORED_KINDS


@dataclass(frozen=True)
class _Series:
    """Channels that one quantizer codes, in the order in which they are fitted.

    Attributes:
        first, count: which channels.
        levels: of their codes.
    """

    first: int
    count: int
    levels: int


class FittedQuantizer(RecordQuantizer):
    """Quantizes keys and values of a recipe into a `FragmentHistory`; made by `of`.

    Keys are fitted as [wide channels, others or the spectrum of these], "sources" below. A source of 16 levels is stored as two channels
    of 4, see `fused.pack_keys`.
    """

    def __init__(self, recipe_key: Quantizer, recipe_value: Fitted, form: Form, pieces: list[KeyPiece], transformed: int):
        self.form = form
        self._split = recipe_key if isinstance(recipe_key, SplitChannels) else None
        self._transformed = transformed
        self._emphasis = recipe_value.emphasis
        self._columns = columns_of(pieces)
        runs = {piece.first: _Series(piece.first, piece.segment.channels, piece.owner.levels) for piece in pieces}
        self._key_series = tuple(runs[first] for first in sorted(runs))
        self._value_series = (_Series(0, form.width, recipe_value.levels),)
        # For each stored channel: its source, what its digit counts, and whether it has the offset of the source.
        self._stored = tuple(
            (piece.first + channel, max(piece.place, 1), piece.segment.offset in STORED_KINDS)
            for piece in pieces
            for channel in range(piece.segment.channels)
        )

    @classmethod
    def of(cls, recipe: Recipe, width: int) -> FittedQuantizer | None:
        """Return the quantizer of a recipe for heads of so many channels, or None if it is not of this kind."""
        return cls._of(recipe.key, recipe.value, width)

    @classmethod
    @functools.cache
    def _of(cls, key: Quantizer, value: Quantizer, width: int) -> FittedQuantizer | None:
        if not isinstance(value, Fitted):
            return None
        try:
            form = Form.of(*packed_form(key, value, width))
            pieces, transformed = key_pieces(key, key.quantize(torch.zeros(1, 1, key.block, width)))
        except (NotPackable, UnsupportedForm):
            return None
        owners = [piece.owner for piece in pieces]
        if form.metadata_bits != 4 or form.granularity != "per_channel" or not all(isinstance(owner, Fitted) for owner in owners):
            return None
        if any(owner.emphasis != value.emphasis for owner in owners):
            return None
        return cls(key, value, form, pieces, transformed)

    def _append(
        self,
        history: FragmentHistory,
        keys: torch.Tensor,
        values: torch.Tensor,
        counts: list[int],
        numbers: torch.Tensor | None,
        held: list[int],
    ) -> None:
        batch, _, tokens, _ = keys.shape
        if numbers is not None:
            is_taken = (torch.arange(tokens, device=keys.device) < numbers[:, None])[:, None, :, None]
            keys, values = torch.where(is_taken, keys, 0), torch.where(is_taken, values, 0)
        begun: dict[int, list[int]] = {}
        for row, (before, count) in enumerate(zip(history.held, counts, strict=True)):
            if count and not before:
                begun.setdefault(count, []).append(row)
        # All at once, as a rule, which is faster.
        starts = [(slice(None) if len(rows) == batch else rows, count) for count, rows in begun.items()]
        if self._split:
            for rows, count in starts:
                history.order[rows] = channel_order(self._split.choose(keys[rows][:, :, :count]), keys.shape[3])
        sources, values = self._order(keys, history.order), values.float()
        for rows, count in starts:
            self._begin(history, rows, sources[rows][:, :, :count], values[rows][:, :, :count])
        history.append_codes(self._code_keys(history, sources), self._code_values(history, values), count=numbers, held=held)

    def _make(self, keys: torch.Tensor, capacity: int) -> FragmentHistory:
        batch, heads, _, width = keys.shape
        device = keys.device
        order = None
        if self._split:
            order = torch.zeros(batch, heads if self._split.per_head else 1, width, dtype=torch.uint8, device=device)
        matrix = query_matrix(width, self._transformed, self._columns, device)
        # Units of sequences that hold nothing must not be 0, since the kernel divides by them.
        units = tuple(
            torch.ones(batch, heads, 3, columns, dtype=torch.float16, device=device)
            for columns in (STEP * self.form.key_steps, self.form.width)
        )
        return FragmentHistory(
            self.form, batch=batch, heads=heads, capacity=capacity, device=device, order=order, matrix=matrix, units=units
        )  # fmt: skip

    def _begin(self, history: FragmentHistory, rows: slice | list[int], sources: torch.Tensor, values: torch.Tensor) -> None:
        """Choose units of sequences over their first tokens."""
        key_units, value_units = self._choose_units(sources, self._key_series), self._choose_units(values, self._value_series)
        table, stored = _table(self._stored, self.form.width, sources.device), self.form.stored_offsets
        units = torch.zeros_like(history.units[0][rows])
        units[:, :, 0, : self.form.channels] = (key_units[:, :, 0, table.sources].float() * (1 << table.shifts)).half()
        units[:, :, 1:, :stored] = key_units[:, :, 1:, table.sources[:stored]]
        history.units[0][rows] = units
        history.units[1][rows] = lay_value_units(value_units)
        for bit, chosen in ((KEY_METADATA, units), (VALUE_METADATA, value_units)):
            history.faults |= bit * chosen.isinf().any()

    def _choose_units(self, states: torch.Tensor, series: tuple[_Series, ...]) -> torch.Tensor:
        """Return the units of channels, float16 [B, H, 3, C]: unit of scales, unit and center of middles; infinite where beyond that."""
        levels, runs, size = _levels(series, states.device), [run.count for run in series], self.form.group_size
        step, _ = choose_units("scale", FIT_METADATA(states, levels, self._emphasis, size, None), runs)
        scale_unit = _positive(step.half())
        step, center = choose_units("middle", FIT_METADATA(states, levels, self._emphasis, size, scale_unit), runs)
        return torch.stack([scale_unit, _positive(step.half()), center.half()], dim=2)

    def _code_keys(self, history: FragmentHistory, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = _table(self._stored, self.form.width, sources.device)
        units = history.units[0][:, :, table.unit_rows, table.unit_columns]
        codes, metadata = self._code(history, sources, self._key_series, units, KEY_STATES)
        return codes[..., table.sources] >> table.shifts & 3, metadata[..., table.sources] & table.masks

    def _code_values(self, history: FragmentHistory, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._code(history, values, self._value_series, read_value_units(history.units[1]).contiguous(), VALUE_STATES)

    def _code(
        self, history: FragmentHistory, states: torch.Tensor, series: tuple[_Series, ...], units: torch.Tensor, bit: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        levels = _levels(series, states.device)
        return FIT_CODES(states, levels, self._emphasis, self.form.group_size, units, history.faults, bit)[:2]

    def _order(self, keys: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """Return the sources of keys, float32 [B, H, T, D]."""
        states = keys.float()
        if order is not None:
            states = states.gather(-1, order.long().unsqueeze(2).expand(states.shape))
        first = keys.shape[3] - self._transformed
        if not self._transformed:
            return states.contiguous()
        return torch.cat([states[..., :first], *spectrum_of(states[..., first:])], dim=-1)


@dataclass(frozen=True)
class _Table:
    """Between sources and stored channels of keys, on a device.

    Attributes:
        sources: of each stored channel.
        shifts: of each stored channel, by how many bits its digit is shifted in the code of the source.
        masks: of each stored channel, which bits of the source's metadata it has.
        unit_rows, unit_columns: [3, D], where the units of each source are.
    """

    sources: torch.Tensor
    shifts: torch.Tensor
    masks: torch.Tensor
    unit_rows: torch.Tensor
    unit_columns: torch.Tensor


@functools.cache
def _table(stored: tuple[tuple[int, int, bool], ...], width: int, device: torch.device) -> _Table:
    rows, columns = torch.arange(3)[:, None].expand(3, width), torch.zeros(3, width, dtype=torch.long)
    for channel, (source, place, has_offset) in enumerate(stored):
        if place == 1:
            columns[0, source] = channel
        if has_offset:
            columns[1:, source] = channel
    sources = torch.tensor([source for source, _, _ in stored])
    shifts = torch.tensor([place.bit_length() - 1 for _, place, _ in stored], dtype=torch.uint8)
    masks = torch.tensor([0xFF if has_offset else 0xF0 for _, _, has_offset in stored], dtype=torch.uint8)
    return _Table(*(part.to(device) for part in (sources, shifts, masks, rows, columns)))


@functools.cache
def _levels(runs: tuple[_Series, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([run.levels for run in runs for _ in range(run.count)], dtype=torch.int32, device=device)


def _positive(units: torch.Tensor) -> torch.Tensor:
    """A unit is never 0, since numbers are counted in it."""
    return torch.where(units > 0, units, 1)


def record_quantizer(recipe: Recipe, width: int) -> RecordQuantizer | None:
    """Return what quantizes a recipe straight into records, for heads of so many channels; None: its quantizers and `fused` do."""
    return DirectQuantizer.of(recipe, width) or FittedQuantizer.of(recipe, width)

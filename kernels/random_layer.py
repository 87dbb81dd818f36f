"""Random packed layers, for tests and for timing."""

from __future__ import annotations

from dataclasses import replace

import torch

from vidkv_kernels.packed import (
    METADATA_CODES,
    STORED_KINDS,
    FullPrecision,
    PackedKeys,
    PackedLayer,
    PackedValues,
    Segment,
    pack_key_words,
    pack_words,
)
from vidkv_kernels.packing import pack


def random_layer(
    generator: torch.Generator,
    dtype: torch.dtype,
    history: list[int],
    residual: list[int],
    *,
    heads: int = 1,
    width: int = 64,
    segments: tuple[Segment, ...] | None = (Segment(32, 2, "minimum"), Segment(32, 1, "mean")),
    group_size: int = 32,
    values: tuple[str, int, str] = ("per_channel", 3, "centred"),
    protected: list[int] | None = None,
    prefix: list[int] | None = None,
    metadata: torch.dtype = torch.float16,
    maps: tuple[str, ...] | None = None,
    center: float = 0.0,
    room: int = 0,
) -> PackedLayer:
    """Make a layer on the device of `generator`; beyond its lengths floats are NaN and tokens point nowhere.

    Args:
        dtype: of tokens in full precision.
        history, residual, prefix: their lengths, for each sequence.
        segments: of keys, None for no history; as many times as needed to fill `width`, unless that does not divide.
        values: granularity, levels and kind of offset; unscaled: centred, without a scale; bytes: centred, 5 codes a byte.
        protected: number of protected tokens of each sequence, chosen at random, in 2 bits.
        metadata: float16, float8_e4m3fn, or uint8 for codes of 4 bits.
        maps: between query and keys, order and matrix or one of them; None: both, or none if all key channels are min-max.
        center: size of what was subtracted from keys; 0: nothing.
        room: tokens that the buffers hold, at least; rounded up to groups.
    """
    maker = _Maker(generator, len(history), heads, width, group_size, metadata)
    residual_states, prefix_states = (None if part is None else maker.full_precision(part, dtype) for part in (residual, prefix))
    if segments is None:
        return PackedLayer(None, (), residual_states, prefix_states)
    keys = maker.keys(history, max(*history, room), segments, maps, center)
    if protected is None:
        return PackedLayer(keys, (maker.values(history, max(*history, room), *values),), residual_states, prefix_states)
    orders = [torch.randperm(length, generator=generator, device=generator.device) for length in history]
    runs = []
    for form, chosen in (
        (("per_channel", 4, "minimum"), [order[:count].sort().values for order, count in zip(orders, protected, strict=True)]),
        (values, [order[count:].sort().values for order, count in zip(orders, protected, strict=True)]),
    ):
        lengths = [len(tokens) for tokens in chosen]
        runs.append(maker.values(lengths, max(lengths), *form, chosen))
    return PackedLayer(keys, tuple(runs), residual_states, prefix_states)


class _Maker:
    def __init__(self, generator: torch.Generator, batch: int, heads: int, width: int, group_size: int, metadata: torch.dtype):
        self.generator, self.batch, self.heads, self.width = generator, batch, heads, width
        self.group_size, self.metadata = group_size, metadata

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch, self.heads, *shape, generator=self.generator, device=self.generator.device)

    def lengths(self, lengths: list[int]) -> torch.Tensor:
        return torch.tensor(lengths, dtype=torch.int32, device=self.generator.device)

    def codes(self, levels: int, *shape: int) -> torch.Tensor:
        shape = (self.batch, self.heads, *shape)
        return torch.randint(levels, shape, generator=self.generator, device=self.generator.device, dtype=torch.uint8)

    def full_precision(self, lengths: list[int], dtype: torch.dtype) -> FullPrecision:
        room = max(*lengths, 1) + 3
        # Heads beside each other in a token, as a model makes them: strides of their own.
        shape = (2, self.batch, room, self.heads, self.width)
        states = torch.randn(shape, generator=self.generator, device=self.generator.device).to(dtype).transpose(2, 3)
        keys, values = (_nan_beyond(part, lengths) for part in states)
        return FullPrecision(keys, values, self.lengths(lengths))

    def keys(
        self, history: list[int], room: int, segments: tuple[Segment, ...], maps: tuple[str, ...] | None, center: float
    ) -> PackedKeys:
        fill = self.width // sum(segment.channels for segment in segments)
        segments = tuple(replace(s, channels=s.channels * max(fill, 1)) for s in segments)
        groups, channels = self._groups(room), sum(segment.channels for segment in segments)
        codes = torch.cat([self.codes(s.levels, groups * self.group_size, s.channels) for s in segments], dim=-1)
        held = [-(-length // self.group_size) for length in history]
        stored = sum(segment.channels for segment in segments if segment.offset in STORED_KINDS)
        scale, scale_unit = self._metadata(self.normal(groups, channels).abs() + 0.1, held)
        offset, offset_unit = self._metadata(self.normal(groups, stored) * 2, held) if stored else (None, None)
        offset_center = self._center(offset_unit, 2)
        if maps is None:
            is_minmax = channels == self.width and all(segment.offset == "minimum" for segment in segments)
            maps = () if is_minmax else ("order", "matrix")
        order = self.normal(self.width).argsort(dim=-1).to(torch.uint8) if "order" in maps else None
        matrix = None
        if "matrix" in maps:
            square = torch.randn(channels, channels, generator=self.generator, device=self.generator.device)
            matrix = torch.linalg.qr(square)[0][: self.width].contiguous()
        constant = self.normal(self.width) * center if center else None
        return PackedKeys(
            segments, self.group_size, pack_key_words(segments, codes), scale, offset, scale_unit, offset_unit, offset_center,
            order, matrix, constant,
        )  # fmt: skip

    def values(
        self, lengths: list[int], room: int, granularity: str, levels: int, kind: str, tokens: list[torch.Tensor] | None = None
    ) -> PackedValues:
        groups = self._groups(room)
        entries = groups * self.group_size
        codes = self.codes(levels, entries, self.width)
        packed = pack(codes, 3) if kind == "bytes" else pack_words(codes, 1 if levels == 2 else 2)
        shape, held = (groups, self.width), [-(-length // self.group_size) for length in lengths]
        group_size = self.group_size
        if granularity == "per_token":
            group_size = 32
            shape, held = (entries, self.width // group_size), lengths
        scale, scale_unit = (None, None) if kind == "unscaled" else self._metadata(self.normal(*shape).abs() + 0.1, held)
        offset_kind = "centred" if kind in ("unscaled", "bytes") else kind
        offset, offset_unit = self._metadata(self.normal(*shape), held) if offset_kind in STORED_KINDS else (None, None)
        index = None
        if tokens is not None:
            index = torch.full((self.batch, entries), 2**31 - 1, dtype=torch.int32, device=self.generator.device)
            for row, chosen in zip(index, tokens, strict=True):
                row[: len(chosen)] = chosen
        return PackedValues(
            self.lengths(lengths), levels, offset_kind, granularity, group_size, self.width, packed,
            scale, offset, scale_unit, offset_unit, self._center(offset_unit, 1), index,
        )  # fmt: skip

    def _groups(self, room: int) -> int:
        return -(-max(room, 1) // self.group_size)

    def _center(self, unit: torch.Tensor | None, size: float) -> torch.Tensor | None:
        if unit is None or self.metadata != torch.uint8:
            return None
        return (torch.randn(unit.shape, generator=self.generator, device=self.generator.device) * size).half()

    def _metadata(self, states: torch.Tensor, held: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.metadata == torch.float16:
            return _nan_beyond(states.half(), held), None
        if self.metadata == torch.uint8:
            packed = pack(self.codes(METADATA_CODES, *states.shape[2:]), METADATA_CODES)
            for row, length in zip(packed, held, strict=True):
                row[:, length:] = 255
            return packed, ((self.normal(states.shape[-1]).abs() + 0.1) / 8).half()
        unit = (torch.rand(1, self.heads, states.shape[-1], generator=self.generator, device=self.generator.device) + 0.5).half() / 16
        return _nan_beyond(states / unit.unsqueeze(2).float(), held).to(self.metadata), unit


def _nan_beyond(states: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    for row, length in zip(states, lengths, strict=True):
        row[:, length:] = float("nan")
    return states

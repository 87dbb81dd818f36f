"""Packed tokens of some sequences of a batch as packed tokens of the whole batch, the other sequences getting none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vidkv_kernels.packed import PackedKeys, PackedValues

GROWING = ("codes", "scale", "offset")
"""Tensors whose third dimension is that of tokens or groups."""
UNITS = ("scale_unit", "offset_unit", "offset_center")
OF_SEQUENCES = ("order", "center", *UNITS)
"""Tensors of keys that a sequence has once. Values have `UNITS`."""
FORM = ("levels", "offset_kind", "granularity", "group_size", "width")


@dataclass(frozen=True)
class PackedRows:
    """Packed tokens of the sequences `rows`: keys, and runs of values.

    All of these sequences have as many tokens as the buffers have room for.
    """

    rows: list[int]
    keys: PackedKeys
    values: tuple[PackedValues, ...]


def whole_batch(parts: Sequence[PackedRows], batch: int) -> tuple[PackedKeys, tuple[PackedValues, ...]]:
    """Put parts, which share no sequence, together.

    Args:
        parts: of the same form. Runs of values that some of them lack are empty there.
        batch: number of sequences of the result; those in no part get no token, and what else is theirs is zero.
    """
    if len(parts) == 1 and parts[0].rows == list(range(batch)):
        return parts[0].keys, parts[0].values
    tensors = {name: _spread([(part.rows, getattr(part.keys, name)) for part in parts], batch) for name in (*GROWING, *OF_SEQUENCES)}
    keys = replace(parts[0].keys, **tensors)
    forms = {form_of(run): run for part in parts for run in part.values}
    runs = []
    for form, example in forms.items():
        owners = [(part.rows, run) for part in parts for run in part.values if form_of(run) == form]
        tensors = {
            name: _spread([(rows, getattr(run, name)) for rows, run in owners], batch, 1 if name == "tokens" else 2)
            for name in (*GROWING, *UNITS, "tokens")
        }
        lengths = example.lengths.new_zeros(batch)
        for rows, run in owners:
            lengths[rows] = run.lengths
        runs.append(replace(example, lengths=lengths, **tensors))
    return keys, tuple(runs)


def form_of(run: PackedValues) -> tuple:
    """Return what runs of values have in common that can be one run."""
    return (*(getattr(run, name) for name in FORM), run.is_bytes, run.scale is None, run.tokens is None)


def _spread(parts: list[tuple[list[int], torch.Tensor | None]], batch: int, axis: int = 2) -> torch.Tensor | None:
    first = parts[0][1]
    if first is None:
        return None
    room = max(tensor.shape[axis] for _, tensor in parts)
    whole = first.new_zeros(batch, *first.shape[1:axis], room, *first.shape[axis + 1 :])
    for rows, tensor in parts:
        whole.narrow(axis, 0, tensor.shape[axis])[rows] = tensor
    return whole

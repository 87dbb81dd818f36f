"""Keys and values of one layer, history in the packed form of attention kernels, and the decode step that reads them so.

Quantizers decide every code, so that what is read is what `StoredStates` would read back; only bytes differ: ternary codes take
2 bits here instead of 1.6, and the order of all channels takes the place of a list of wide ones. The matrix that maps queries serves all
layers and caches of a recipe; it is not counted.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vidkv_eval.fused import NotPackable, pack_keys, pack_values, packed_form, read_keys, read_values
from vidkv_eval.fused_fitted import record_quantizer
from vidkv_eval.fused_quantize import raise_faults
from vidkv_eval.quant.base import QuantizedStates
from vidkv_eval.recipe import Recipe
from vidkv_eval.shared_lengths import SharedLengths
from vidkv_kernels import attend_cuda, nvrtc
from vidkv_kernels.attend import OP as ATTEND
from vidkv_kernels.attend import attend_reference
from vidkv_kernels.fragment_history import FragmentHistory
from vidkv_kernels.fragments import Form, UnsupportedForm
from vidkv_kernels.packed import FullPrecision, PackedKeys, PackedLayer, PackedValues
from vidkv_kernels.packed_history import SPARE, PackedHistory, select_sequences
from vidkv_kernels.packed_rows import PackedRows, whole_batch

FUSED = "fused"
"""Name of the attention function that reads a `PackedStep`; it is defined in `attention`."""

SHORTEST = 0
"""Tokens from which on a step reads packed states; below, it dequantizes. At 128 tokens, the shortest history measured, reading packed
states takes a twelfth of the time of dequantizing first (results/kernels.md)."""

States = dict[str, torch.Tensor]
"""Keys and values, [B, H, T, D], by the names key and value."""


@dataclass
class Member:
    """Sequences of a batch whose tokens are quantized at the same time, since they begin at the same position.

    Attributes:
        rows: which sequences of the batch these are, in order.
        padding: padded positions before them, which are not stored.
        choices: by the names key and value, what the quantizer takes as `like` with the tokens to come.
        history: tokens quantized.
        residual: tokens in full precision.
        due: tokens of the residual that the last step left to be quantized.
    """

    rows: list[int]
    padding: int = 0
    choices: dict[str, QuantizedStates | None] = field(default_factory=lambda: {"key": None, "value": None})
    history: int = 0
    residual: int = 0
    due: int = 0

    @property
    def length(self) -> int:
        return self.history + self.residual


class FusedStates:
    """Packed history followed by the residual in full precision, for the sequences of a batch.

    Args:
        recipe: whose quantizers `why_not_fused` has nothing against.
        members: all sequences of the batch, nothing stored yet.
        choose: given a member with its first tokens, how many of them are quantized, and their values, [B, H, T, D]: what the quantizer
            of values takes as `like` with them.
        keep_newest: see `QuantizedCache`.
        like: keys to come, [B, H, T, D], for shape, dtype and device; values are alike.
        storage_dtype: dtype of the residual.
        lengths: shared with other layers of the same model.

    Attributes:
        tokens: positions held, padding included.
        version: changes whenever what a captured step has been reading lies elsewhere.
    """

    def __init__(
        self,
        recipe: Recipe,
        members: list[Member],
        choose: Callable[[Member, int, torch.Tensor], QuantizedStates | None],
        keep_newest: int,
        like: torch.Tensor,
        storage_dtype: torch.dtype,
        lengths: SharedLengths,
    ):
        self.recipe = recipe
        self.members = members
        self.keep_newest = keep_newest
        self._choose = choose
        self.dtype = like.dtype
        self.device = like.device
        self.tokens = 0
        self.version = 0
        self._lengths = lengths
        self._has_fragments = reads_fragments(recipe, like)
        self._direct = record_quantizer(recipe, like.shape[3]) if self._has_fragments else None
        self._is_checked = True  # whether all that was quantized is known to have been finite
        self._history: FragmentHistory | PackedHistory | None = None
        batch, self._heads, _, self._channels = like.shape
        shape = (batch, self._heads, recipe.residual_length + keep_newest, self._channels)
        self._buffers = {name: torch.empty(shape, dtype=storage_dtype, device=like.device) for name in ("key", "value")}
        self._names_tokens = len(members) > 1
        self._unwritten: States | None = None  # the newest token, counted in the residual but not yet in its buffers
        self._attention: dict[tuple[int, float], attend_cuda.Attend] = {}

    @property
    def batch(self) -> int:
        return self._buffers["key"].shape[0]

    @property
    def residual_length(self) -> int:
        """Tokens that every sequence holds in full precision."""
        return min(member.residual for member in self.members)

    @property
    def length(self) -> int:
        """Tokens that every sequence holds."""
        return min(member.length for member in self.members)

    @property
    def elements(self) -> int:
        """Number of elements that the stored keys stand for, and as many values."""
        return sum(len(member.rows) * member.length for member in self.members) * self._heads * self._channels

    def nbytes(self) -> dict[str, int]:
        """Bytes of the stored tensors of keys and of values; spare room in buffers is not counted."""
        stored = {}
        for name, buffer in self._buffers.items():
            residual = sum(len(member.rows) * member.residual for member in self.members)
            choices = [choice for member in self.members if (choice := member.choices[name])]
            stored[name] = residual * self._heads * self._channels * buffer.element_size() + sum(choice.nbytes for choice in choices)
        if self._history:
            stored["value"] += self._history.value_nbytes
            stored["key"] += self._history.nbytes - self._history.value_nbytes
        return stored

    # Tokens in

    def _count_leaving(self, waiting: int, is_first: bool) -> int:
        """Return how many of so many tokens in full precision are quantized, oldest first."""
        free = max(0, waiting - self.keep_newest)
        if is_first:
            # The prompt leaves less than a block in the residual.
            return free - free % self.recipe.block
        return 0 if free < self.recipe.residual_length else free - free % self.recipe.residual_length

    def append(self, new: States) -> None:
        """Store new tokens; those for which there is no room in full precision are quantized.

        Raises:
            ArithmeticError: tokens cannot be quantized; its arguments are the reason and the name of the states.
        """
        self._write()
        self._lengths.changes += 1
        added = new["key"].shape[2]
        waiting, leaving = [], []
        for member in self.members:
            # Nothing is stored of positions that are padding.
            skipped = min(max(0, member.padding - self.tokens), added)
            states = {name: _take(new[name], member.rows)[:, :, skipped:].to(buffer.dtype) for name, buffer in self._buffers.items()}
            if member.residual:
                states = {name: torch.cat([self._residual(member, name), tensor], dim=2) for name, tensor in states.items()}
            is_first = not member.length
            count = self._count_leaving(states["key"].shape[2], is_first)
            if is_first and states["key"].shape[2]:
                member.choices["value"] = self._choose(member, count, states["value"])
            waiting.append((member, {name: tensor[:, :, count:] for name, tensor in states.items()}))
            if count:
                leaving.append((member, {name: tensor[:, :, :count] for name, tensor in states.items()}))
        self._quantize(leaving)
        for member, states in waiting:
            member.residual = states["key"].shape[2]
            for name, tensor in states.items():
                _put(self._buffers[name][:, :, : member.residual], member.rows, tensor)
        self.tokens += added

    def step(self, new: States) -> PackedStep:
        """Store one new token of each sequence and return what attention reads in this step: all that is stored.

        Tokens that leave full precision do so when `settle` is called, because attention has yet to see them.
        """
        self._write()
        self._count_step()
        self._unwritten = new
        return PackedStep(self, new)

    def settle(self) -> None:
        """Quantize what the last step left to be quantized; its attention must be done.

        Raises:
            ArithmeticError: as `append`, also for what was quantized before this call.
        """
        self._write()
        if not self._is_checked:
            raise_faults(self._history)
            self._is_checked = True
        if not any(member.due for member in self.members):
            return
        self._lengths.changes += 1
        leaving = []
        for member in self.members:
            if member.due:
                states = {name: self._residual(member, name) for name in self._buffers}
                leaving.append((member, {name: tensor[:, :, : member.due] for name, tensor in states.items()}))
        self._quantize(leaving)
        for member, _ in leaving:
            rest = member.residual - member.due
            for name in self._buffers:
                kept = self._residual(member, name)[:, :, member.due :].clone()
                _put(self._buffers[name][:, :, :rest], member.rows, kept)
            member.residual, member.due = rest, 0

    def crop_residual(self, tokens: int) -> None:
        """Forget the newest `tokens` tokens, which must be in the residual."""
        self._write()
        self._lengths.changes += 1
        for member in self.members:
            member.residual -= tokens
        self.tokens -= tokens

    def select_batch(self, indices: list[int]) -> None:
        """Keep the sequences `indices`, in that order."""
        self._write()
        places = torch.tensor(indices, dtype=torch.int64, device=self.device)
        self._buffers = {name: buffer[places] for name, buffer in self._buffers.items()}
        if self._history:
            self._history = self._history.select_batch(places)
        members = []
        for member in self.members:
            kept = [(new, member.rows.index(old)) for new, old in enumerate(indices) if old in member.rows]
            if kept:
                positions = torch.tensor([position for _, position in kept], dtype=torch.int64, device=self.device)
                member.choices = {name: choice and choice.select_batch(positions) for name, choice in member.choices.items()}
                member.rows = [new for new, _ in kept]
                members.append(member)
        self.members = members
        self._forget_attention()

    # Tokens out

    def read(self, new: States) -> States:
        """Return what is read back, followed by the tokens `new` as they are; zeros where a sequence is padded."""
        self._write()
        added = new["key"].shape[2]
        packed = self._history.unpack() if self._history else None
        seen = {}
        for name, tensor in new.items():
            parts = []
            for member in self.members:
                history = [self._read_history(name, packed, member)] if member.history else []
                fresh = _take(tensor, member.rows)[:, :, min(max(0, member.padding - self.tokens), added) :]
                parts.append(torch.cat([*history, self._residual(member, name).to(self.dtype), fresh], dim=2))
            if len(parts) == 1 and parts[0].shape[2] == self.tokens + added:
                seen[name] = parts[0]
                continue
            seen[name] = tensor.new_zeros(*tensor.shape[:2], self.tokens + added, tensor.shape[3])
            for member, part in zip(self.members, parts, strict=True):
                _put(seen[name][:, :, seen[name].shape[2] - part.shape[2] :], member.rows, part)
        return seen

    def _read_history(self, name: str, packed: tuple, member: Member) -> torch.Tensor:
        keys, values = packed
        if len(self.members) > 1:
            rows = torch.tensor(member.rows, device=self.device)
            keys, values = select_sequences(keys, rows), tuple(select_sequences(run, rows) for run in values)
        return read_keys(keys, member.history, self.dtype) if name == "key" else read_values(values, member.history, self.dtype)

    # Steps that a captured graph repeats

    def prepare_repeat(self) -> tuple[int, int] | None:
        """Get ready for a repetition of the last step's launches with another token, all of whose memory is still in place.

        Returns:
            What the repetition depends on, to be compared with what it was when the launches were captured; None if this step must not
            be a repetition: other launches would be made.
        """
        self.settle()
        if not self._has_fragments or self._buffers["key"].dtype != self.dtype or not self.length:
            return None
        self._lengths.on(self.device, self._residual_lengths())
        return id(self), self.version

    def count_repeat(self) -> None:
        """Count the token that a repetition stores."""
        self._count_step()

    def uncount_step(self) -> None:
        """Take back the last step, whose launches were never made; nothing was due before it."""
        self._lengths.changes += 1
        self._unwritten = None
        self.tokens -= 1
        for member in self.members:
            member.residual, member.due = member.residual - 1, 0

    def attend(self, query: torch.Tensor, scaling: float, new: States) -> torch.Tensor:
        """Attend to all that is stored, of which `new` is the newest token; see `PackedStep.attend`."""
        is_exact = self._buffers["key"].dtype == self.dtype
        if self._has_fragments and is_exact:
            lengths = self._lengths.on(self.device, tuple(length - 1 for length in self._residual_lengths()))
            key = (query.shape[1], scaling)
            if key not in self._attention:
                residual = FullPrecision(self._buffers["key"], self._buffers["value"], lengths)
                self._attention[key] = attend_cuda.Attend(self._history, residual, *key)
            out = self._attention[key](query, (new["key"], new["value"]))
            self._unwritten = None  # the kernel wrote it
            return out
        residual = self.residual(new)
        if self._has_fragments:
            return attend_cuda.attend(query, self._history, residual, scaling)
        layer = PackedLayer(*self._history.unpack(), residual) if self._history else PackedLayer(None, (), residual)
        if query.is_cuda:
            return ATTEND(query, layer, scaling)
        # Kernels compute in float32 what would be rounded at each step of plain torch.
        return attend_reference(query, layer, scaling, torch.promote_types(query.dtype, torch.float32)).to(query.dtype)

    @property
    def history(self) -> FragmentHistory | PackedHistory | None:
        """What is packed; None if nothing is."""
        return self._history

    def residual(self, new: States | None = None) -> FullPrecision:
        """Return the tokens in full precision, in the dtype of the states.

        Args:
            new: the newest token of them as it came, before it was rounded to the dtype of storage.
        """
        self._write()
        seen = {name: buffer.to(self.dtype) for name, buffer in self._buffers.items()}
        if new is not None and self._buffers["key"].dtype != self.dtype:
            for name, buffer in seen.items():
                self._put_newest(buffer, new[name])
        return FullPrecision(seen["key"], seen["value"], self._lengths.on(self.device, self._residual_lengths()))

    # Parts of the above

    def _count_step(self) -> None:
        self._lengths.changes += 1
        for member in self.members:
            member.residual += 1
            member.due = self._count_leaving(member.residual, is_first=False)
        self.tokens += 1

    def _residual(self, member: Member, name: str) -> torch.Tensor:
        return _take(self._buffers[name], member.rows)[:, :, : member.residual]

    def _residual_lengths(self) -> tuple[int, ...]:
        if len(self.members) == 1:
            return (self.members[0].residual,) * self.batch
        return tuple(self._by_row("residual"))

    def _by_row(self, name: str) -> list[int]:
        """Return a number of tokens of members, for each sequence of the batch."""
        numbers = [0] * self.batch
        for member in self.members:
            for row in member.rows:
                numbers[row] = getattr(member, name)
        return numbers

    def _write(self) -> None:
        """Write the newest token into the buffers, unless attention has done so."""
        new, self._unwritten = self._unwritten, None
        if new is not None:
            for name, buffer in self._buffers.items():
                self._put_newest(buffer, new[name])

    def _put_newest(self, buffer: torch.Tensor, token: torch.Tensor) -> None:
        for member in self.members:
            _put(buffer[:, :, member.residual - 1 : member.residual], member.rows, _take(token, member.rows))

    def _quantize(self, leaving: list[tuple[Member, States]]) -> None:
        """Quantize the oldest tokens of some members and count them as history."""
        if not leaving:
            return
        capacity = 0 if self._history is None or not self._has_fragments else self._history.capacity
        begun = [row for member, _ in leaving if not member.history for row in member.rows]
        # Tokens of a prompt may be chosen to be protected, which is for the quantizers to do.
        is_direct = self._direct is not None and not (begun and self.recipe.chooses_tokens)
        if not is_direct:
            packed = self._pack(leaving)
        for member, states in leaving:
            member.history += states["key"].shape[2]
        held = self._by_row("history")
        if self._has_fragments and max(held) > capacity:
            # At first the residual of an answer finds room, so that a captured step stays right beyond the first time it is full.
            capacity = max(held) + (max(held) // SPARE if capacity else self.recipe.residual_length)
            self._forget_attention()
        if is_direct:
            counts = [0] * self.batch
            for member, states in leaving:
                for row in member.rows:
                    counts[row] = states["key"].shape[2]
            states = self._whole_batch(leaving)
            self._history = self._direct.quantize(self._history, states["key"], states["value"], capacity, counts=counts)
            self._is_checked = False
        elif self._history is None:
            if self._has_fragments:
                form = Form.of(*packed_form(self.recipe.key, self.recipe.value, self._channels))
                self._history = FragmentHistory.like(*packed, capacity, form)
                self._history.append(*packed, held)
            else:
                self._history = PackedHistory(*packed)
        elif self._has_fragments:
            version = self._history.version
            self._history.reserve(capacity)
            self._history.append(*packed, held, begun)
            if self._history.version != version:
                self._forget_attention()
        else:
            self._history.append(*packed)

    def _pack(self, leaving: list[tuple[Member, States]]) -> tuple[PackedKeys, tuple[PackedValues, ...]]:
        """Let the quantizers of the recipe quantize tokens, and pack what they store."""
        parts = []
        for member, states in leaving:
            quantized = {}
            for name, tensor in states.items():
                try:
                    if not torch.isfinite(tensor).all():
                        raise FloatingPointError(
                            f"they hold NaN or infinity in {tensor.dtype}; check the dtypes of the model and of storage"
                        )
                    quantized[name] = getattr(self.recipe, name).quantize(tensor, like=member.choices[name])
                except ArithmeticError as error:
                    raise type(error)(str(error), name) from error
            keys = pack_keys(self.recipe.key, quantized["key"])
            values = pack_values(self.recipe.value, quantized["value"], member.history, names_tokens=self._names_tokens)
            parts.append(PackedRows(member.rows, keys, values))
            if not member.history:
                member.choices = {name: _choices_of(stored) for name, stored in quantized.items()}
        return whole_batch(parts, self.batch)

    def _whole_batch(self, parts: list[tuple[Member, States]]) -> States:
        """Return states of some members as states of the whole batch, with as many tokens as the most of them have."""
        if len(self.members) == 1:
            return parts[0][1]
        tokens = max(states["key"].shape[2] for _, states in parts)
        whole = {}
        for name, buffer in self._buffers.items():
            whole[name] = torch.zeros(self.batch, self._heads, tokens, self._channels, dtype=buffer.dtype, device=self.device)
            for member, states in parts:
                _put(whole[name][:, :, : states[name].shape[2]], member.rows, states[name])
        return whole

    def _forget_attention(self) -> None:
        self._lengths.changes += 1
        self._attention = {}
        self.version += 1


@dataclass(frozen=True)
class PackedStep:
    """What a decode step attends to. It stands where attention functions expect keys; those that do not know it fail on it.

    Good until the next call of the cache.

    Attributes:
        states: all that is stored, the current token included.
        new: the current token as it came.
    """

    states: FusedStates
    new: States

    def attend(self, query: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """Attend with one new token of each sequence, no stored token being hidden; [B, HQ, 1, D] to [B, HQ, 1, D].

        Args:
            scaling: factor of the scores; None: 1 / sqrt(D).
        """
        return self.states.attend(query.contiguous(), query.shape[3] ** -0.5 if scaling is None else scaling, self.new)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return dequantized keys and values, each [B, H, T, D], for attention that kernels do not do; zeros where padded."""
        seen = self.states.read({name: states[:, :, :0] for name, states in self.new.items()})
        for name, tensor in seen.items():
            tensor[:, :, -1:] = self.new[name]
        return seen["key"], seen["value"]

    def hides_padding_only(self, mask: torch.Tensor) -> bool:
        """Whether a mask, [B, 1, 1, T] boolean, hides nothing that is stored. Waits for the device, once for each mask."""
        paddings = tuple((row, member.padding) for member in self.states.members for row in member.rows)
        if getattr(mask, "_hides_only", None) != paddings:
            if mask.dtype != torch.bool or mask.shape[1:] != (1, 1, self.states.tokens):
                return False
            padding = torch.tensor([padding for _, padding in sorted(paddings)], device=mask.device)
            visible = torch.arange(mask.shape[3], device=mask.device) >= padding[:, None]
            if not torch.equal(mask[:, 0, 0].expand_as(visible), visible):
                return False
            mask._hides_only = paddings  # the same mask serves all layers
        return True


def why_not_fused(recipe: Recipe, key_states: torch.Tensor, value_states: torch.Tensor) -> str | None:
    """Return why kernels cannot read what this recipe makes of such states, [B, H, T, D]; None if they can."""
    if recipe.prefill != "exact" or recipe.flush != "append":
        return f"prefill is {recipe.prefill} and flush is {recipe.flush}; kernels go with exact and append"
    if key_states.shape != value_states.shape:
        return f"keys have shape {list(key_states.shape)} and values {list(value_states.shape)}; kernels read equal ones"
    try:
        packed_form(recipe.key, recipe.value, key_states.shape[3])
    except NotPackable as error:
        return str(error)
    return None


def reads_fragments(recipe: Recipe, like: torch.Tensor) -> bool:
    """Whether history of this recipe is best kept for the CUDA C++ kernels: on a device they support, in a form they read."""
    if not like.is_cuda or like.dtype not in attend_cuda.DTYPES:
        return False
    if torch.cuda.get_device_capability(like.device) < attend_cuda.OLDEST_CAPABILITY:
        return False
    try:
        Form.of(*packed_form(recipe.key, recipe.value, like.shape[3]))
    except UnsupportedForm:
        return False
    return nvrtc.is_available()


@functools.cache
def say_once(recipe: str, reason: str) -> None:
    """Log a warning that a recipe runs without kernels; once in a process for each recipe and reason.

    Not by `warnings`, which lmms-eval silences.
    """
    logging.getLogger(__name__).warning("%s: attention reads dequantized states instead of packed ones, because %s", recipe, reason)


def _take(states: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Return the sequences `rows` of states, as they are if these are all."""
    return states if len(rows) == states.shape[0] and rows == list(range(len(rows))) else states[rows]


def _put(target: torch.Tensor, rows: list[int], states: torch.Tensor) -> None:
    """Write states into the sequences `rows` of `target`."""
    if len(rows) == target.shape[0] and rows == list(range(len(rows))):
        target.copy_(states)
    else:
        target[rows] = states.to(target.dtype)


def _choices_of(stored: QuantizedStates) -> QuantizedStates:
    """Return the choices behind a stored form, without its tokens: enough for `quantize(states, like=...)`."""
    parts = {name: _choices_of(part) for name, part in stored.parts.items()}
    return QuantizedStates(stored.length, stored.channels, static=stored.static, parts=parts)

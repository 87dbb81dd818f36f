"""Keys and values of one layer, history in the packed form of attention kernels, and the decode step that reads them so.

Quantizers decide every code, so that what is read is what `StoredStates` would read back; only bytes differ: ternary codes take
2 bits here instead of 1.6, and the order of all channels takes the place of a list of wide ones. The matrix that maps queries serves all
layers and caches of a recipe; it is not counted.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

from vidkv_eval.fused import NotPackable, pack_keys, pack_values, packed_form, read_keys, read_values
from vidkv_eval.quant.base import QuantizedStates
from vidkv_eval.quant.growing import SPARE
from vidkv_eval.recipe import Recipe
from vidkv_kernels import attend_cuda, nvrtc
from vidkv_kernels.attend import OP as ATTEND
from vidkv_kernels.attend import attend_reference
from vidkv_kernels.fragment_history import FragmentHistory
from vidkv_kernels.fragments import Form, UnsupportedForm
from vidkv_kernels.packed import FullPrecision, PackedLayer
from vidkv_kernels.packed_history import PackedHistory

FUSED = "fused"
"""Name of the attention function that reads a `PackedStep`; it is defined in `attention`."""

SHORTEST = 0
"""Tokens from which on a step reads packed states; below, it dequantizes. The kernel alone is faster than full precision from 2,048 tokens
on, the shortest length measured (results/kernels.md); dequantizing first is slower at every length measured."""


class FusedStates:
    """Packed history followed by the residual in full precision, for sequences of which the same tokens are quantized.

    Args:
        recipe: whose quantizers `why_not_fused` has nothing against.
        room: most tokens that the residual will hold.
        like: keys to come, for shape, dtype and device; values are alike.
        storage_dtype: dtype of the residual.
        choice: passed to the quantizer of values as `like` with the first tokens.
    """

    def __init__(self, recipe: Recipe, room: int, like: torch.Tensor, storage_dtype: torch.dtype, choice: QuantizedStates | None = None):
        self.recipe = recipe
        self.dtype = like.dtype
        self._has_fragments = reads_fragments(recipe, like)
        self._choices: dict[str, QuantizedStates | None] = {"key": None, "value": choice}
        self._history: FragmentHistory | PackedHistory | None = None
        batch, heads, _, channels = like.shape
        self._buffers = {name: torch.empty(batch, heads, room, channels, dtype=storage_dtype, device=like.device) for name in self._choices}
        self.residual_length = 0
        self._due = 0

    @property
    def history_length(self) -> int:
        return self._history.max_length if self._history else 0

    @property
    def length(self) -> int:
        return self.history_length + self.residual_length

    @property
    def residual(self) -> dict[str, torch.Tensor]:
        """Newest tokens, [B, H, T, D] in the storage dtype, views of buffers that are written in place."""
        return {name: buffer[:, :, : self.residual_length] for name, buffer in self._buffers.items()}

    @property
    def elements(self) -> int:
        """Number of elements that the stored keys stand for, and as many values."""
        batch, heads, _, channels = self._buffers["key"].shape
        return batch * heads * self.length * channels

    def nbytes(self) -> dict[str, int]:
        """Bytes of the stored tensors of keys and of values; spare room in buffers is not counted."""
        stored = {name: self.residual[name].nbytes + (choice.nbytes if choice else 0) for name, choice in self._choices.items()}
        if self._history:
            stored["value"] += self._history.value_nbytes
            stored["key"] += self._history.nbytes - self._history.value_nbytes
        return stored

    def read(self, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what is read back, followed by the tokens `new` as they are, [B, H, T, D] by name."""
        history = {name: [] for name in new}
        if self._history:
            keys, values = self._history.unpack()
            history["key"] = [read_keys(keys, self.history_length, self.dtype)]
            history["value"] = [read_values(values, self.history_length, self.dtype)]
        return {name: torch.cat([*history[name], self.residual[name].to(self.dtype), new[name]], dim=2) for name in new}

    def append(self, new: dict[str, torch.Tensor], quantize: int) -> None:
        """Store new tokens, [B, H, T, D] by name; `quantize` of residual and new ones leave full precision, oldest first.

        Raises:
            ArithmeticError: the tokens to quantize cannot be; its arguments are the reason and their name.
        """
        states = {name: torch.cat([self.residual[name], new[name].to(self.residual[name].dtype)], dim=2) for name in new}
        self._quantize({name: tensor[:, :, :quantize] for name, tensor in states.items()}, quantize)
        self.residual_length = states["key"].shape[2] - quantize
        for name, tensor in states.items():
            self._buffers[name][:, :, : self.residual_length] = tensor[:, :, quantize:]

    def step(self, new: dict[str, torch.Tensor], quantize: int) -> PackedStep:
        """Store one new token and return what attention reads in this step: packed history, residual, and the new token exactly.

        Tokens that leave full precision do so when `settle` is called, because attention has yet to see them.

        Args:
            new: [B, H, 1, D] by name, in the dtype of the states.
            quantize: as in `append`.
        """
        place = slice(self.residual_length, self.residual_length + 1)
        seen = {}
        for name, buffer in self._buffers.items():
            buffer[:, :, place] = new[name]
            seen[name] = buffer
            if buffer.dtype != self.dtype:
                # From the next step on the token is read as it was rounded; in this one it is exact.
                seen[name] = buffer.to(self.dtype)
                seen[name][:, :, place] = new[name]
        self.residual_length += 1
        self._due = quantize
        lengths = torch.full((new["key"].shape[0],), self.residual_length, dtype=torch.int32, device=new["key"].device)
        return PackedStep(self._history, self.history_length, FullPrecision(seen["key"], seen["value"], lengths), self.residual_length)

    def settle(self) -> None:
        """Quantize what the last step left to be quantized; its attention must be done."""
        if self._due:
            due, self._due = self._due, 0
            self.append({name: buffer[:, :, :0] for name, buffer in self._buffers.items()}, due)

    def _quantize(self, states: dict[str, torch.Tensor], tokens: int) -> None:
        if not tokens:
            return
        start = self.history_length
        quantized = {}
        for name, tensor in states.items():
            try:
                if not torch.isfinite(tensor).all():
                    raise FloatingPointError(
                        f"they hold NaN or infinity in {tensor.dtype}; check the dtypes of the model and of storage"
                    )
                quantized[name] = getattr(self.recipe, name).quantize(tensor, like=self._choices[name])
            except ArithmeticError as error:
                raise type(error)(str(error), name) from error
        keys = pack_keys(self.recipe.key, quantized["key"])
        values = pack_values(self.recipe.value, quantized["value"], start)
        if self._history is None:
            self._history = FragmentHistory.from_packed(keys, values) if self._has_fragments else PackedHistory(keys, values)
            self._choices = {name: _choices_of(stored) for name, stored in quantized.items()}
            return
        if self._has_fragments and start + tokens > self._history.capacity:
            self._history.reserve(start + tokens + (start + tokens) // SPARE)
        self._history.append(keys, values)

    def crop_residual(self, tokens: int) -> None:
        """Forget the newest `tokens` tokens, which must be in the residual."""
        self.residual_length -= tokens

    def select_batch(self, indices: torch.Tensor) -> None:
        """Keep the batch items `indices`, in that order."""
        indices = indices.to(self._buffers["key"].device)
        self._buffers = {name: buffer[indices] for name, buffer in self._buffers.items()}
        self._choices = {name: choice and choice.select_batch(indices) for name, choice in self._choices.items()}
        if self._history:
            self._history = self._history.select_batch(indices)


@dataclass(frozen=True)
class PackedStep:
    """What a decode step attends to. It stands where attention functions expect keys; those that do not know it fail on it.

    Attributes:
        history: packed, or None if there is none.
        history_length: tokens of it.
        residual: newest tokens, the current one included; good until the next call of the cache.
        residual_length: tokens of it.
    """

    history: FragmentHistory | PackedHistory | None
    history_length: int
    residual: FullPrecision
    residual_length: int

    def attend(self, query: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """Attend with one new token of each sequence, no token being hidden; [B, HQ, 1, D] to [B, HQ, 1, D].

        Args:
            scaling: factor of the scores; None: 1 / sqrt(D).
        """
        query = query.contiguous()
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        if isinstance(self.history, FragmentHistory):
            return attend_cuda.attend(query, self.history, self.residual, scaling)
        layer = PackedLayer(*self.history.unpack(), self.residual) if self.history else PackedLayer(None, (), self.residual)
        if query.is_cuda:
            return ATTEND(query, layer, scaling)
        # Kernels compute in float32 what would be rounded at each step of plain torch.
        return attend_reference(query, layer, scaling, torch.promote_types(query.dtype, torch.float32)).to(query.dtype)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return dequantized keys and values, each [B, H, T, D], for attention that kernels do not do."""
        key, value = (states[:, :, : self.residual_length] for states in (self.residual.keys, self.residual.values))
        if self.history is None:
            return key, value
        keys, values = self.history.unpack()
        key = torch.cat([read_keys(keys, self.history_length, key.dtype), key], dim=2)
        return key, torch.cat([read_values(values, self.history_length, value.dtype), value], dim=2)


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


def _choices_of(stored: QuantizedStates) -> QuantizedStates:
    """Return the choices behind a stored form, without its tokens: enough for `quantize(states, like=...)`."""
    parts = {name: _choices_of(part) for name, part in stored.parts.items()}
    return QuantizedStates(stored.length, stored.channels, static=stored.static, parts=parts)

"""A key/value cache for Transformers that stores history in quantized form.

It decides when to quantize and what attention sees; quantizers decide how. Usable on its own:

    cache = QuantizedCache.for_model(model, load_recipe("kivi_k2_v2"))
    model.generate(**inputs, past_key_values=cache)

For inference only: stored states carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from vidkv_eval.quant.base import QuantizedStates, Quantizer
from vidkv_eval.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_LAYERS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Footprint:
    """Stored bytes of a cache and the number of elements they stand for.

    Bytes are those of every stored tensor: codes, scales, minima, channel indices and the full-precision residual.
    """

    key_bytes: int = 0
    value_bytes: int = 0
    key_elements: int = 0
    value_elements: int = 0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.key_bytes + other.key_bytes,
            self.value_bytes + other.value_bytes,
            self.key_elements + other.key_elements,
            self.value_elements + other.value_elements,
        )

    @property
    def key_bits(self) -> float:
        """Effective bits per element of keys; nan for an empty cache."""
        return _bits(self.key_bytes, self.key_elements)

    @property
    def value_bits(self) -> float:
        """Effective bits per element of values; nan for an empty cache."""
        return _bits(self.value_bytes, self.value_elements)

    @property
    def effective_bits(self) -> float:
        """Effective bits per element of keys and values together; nan for an empty cache."""
        return _bits(self.key_bytes + self.value_bytes, self.key_elements + self.value_elements)


def _bits(stored_bytes: int, elements: int) -> float:
    return 8 * stored_bytes / elements if elements else float("nan")


class StoredStates:
    """Keys or values of one layer: quantized history followed by the residual in full precision.

    Attributes:
        quantized: stored form of the history, None while there is none.
        residual: newest tokens, [B, H, T, D] in the storage dtype, a view of a buffer that is written in place.
    """

    def __init__(self, quantizer: Quantizer, residual_length: int, like: torch.Tensor, storage_dtype: torch.dtype, keep_dense: bool):
        self.quantizer = quantizer
        self.dtype = like.dtype
        self.quantized: QuantizedStates | None = None
        batch, heads, _, channels = like.shape
        self._residual_buffer = torch.empty(batch, heads, residual_length, channels, dtype=storage_dtype, device=like.device)
        self.residual = self._residual_buffer[:, :, :0]
        self._dense: torch.Tensor | None = like.new_empty(batch, heads, 0, channels) if keep_dense else None
        self._dense_length = 0

    @property
    def history_length(self) -> int:
        return self.quantized.length if self.quantized else 0

    @property
    def length(self) -> int:
        return self.history_length + self.residual.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors; neither spare room in buffers nor the dense working copy is counted."""
        return (self.quantized.nbytes if self.quantized else 0) + self.residual.nbytes

    @property
    def elements(self) -> int:
        """Number of elements that the stored tensors stand for."""
        batch, heads, _, channels = self.residual.shape
        return batch * heads * self.length * channels

    def read(self, new: torch.Tensor) -> torch.Tensor:
        """Return what is read back, followed by the tokens `new` as they are, [B, H, T, D].

        With a dense working copy this is a view of it, good until the next call.
        """
        if self._dense is None:
            stored = [self.quantizer.dequantize(self.quantized, self.dtype)] if self.quantized else []
            return torch.cat([*stored, self.residual.to(self.dtype), new], dim=2)
        return self._read_dense(new)

    def _read_dense(self, new: torch.Tensor) -> torch.Tensor:
        past, total = self.length, self.length + new.shape[2]
        if total > self._dense.shape[2]:
            batch, heads, _, channels = self._dense.shape
            grown = self._dense.new_empty(batch, heads, total + max(128, total // 4), channels)
            grown[:, :, : self._dense_length] = self._dense[:, :, : self._dense_length]
            self._dense = grown
        # Tokens seen as they were when new are replaced by what is stored only now: until here attention may have been using them.
        if self._dense_length < self.history_length:
            fresh = self.quantized.select_tokens(self._dense_length, self.history_length)
            self._dense[:, :, self._dense_length : self.history_length] = self.quantizer.dequantize(fresh, self.dtype)
            self._dense_length = self.history_length
        if self._dense_length < past:
            self._dense[:, :, self._dense_length : past] = self.residual[:, :, self._dense_length - self.history_length :]
        self._dense[:, :, past:total] = new
        self._dense_length = past
        return self._dense[:, :, :total]

    def share_dense(self, buffer: torch.Tensor) -> None:
        """Keep the dense working copy in `buffer` [B, H, room, D] from now on; what it holds so far is moved there."""
        buffer[:, :, : self._dense_length] = self._dense[:, :, : self._dense_length]
        self._dense = buffer

    def append(self, new: torch.Tensor, quantize: int, requantize: bool) -> None:
        """Store new tokens.

        Args:
            new: [B, H, T, D].
            quantize: how many tokens of residual and new ones leave full precision, oldest first.
            requantize: read the history back and quantize it again with them, instead of appending to it.
        Raises:
            ArithmeticError: the tokens to quantize hold NaN or infinity, or need metadata beyond its dtype.
        """
        start = self.residual.shape[2]
        stop = start + new.shape[2]
        if not quantize:
            self._residual_buffer[:, :, start:stop] = new
            self.residual = self._residual_buffer[:, :, :stop]
            return
        states = torch.cat([self.residual, new.to(self.residual.dtype)], dim=2)
        self._quantize(states[:, :, :quantize], requantize)
        self._residual_buffer[:, :, : stop - quantize] = states[:, :, quantize:]
        self.residual = self._residual_buffer[:, :, : stop - quantize]

    def _quantize(self, states: torch.Tensor, requantize: bool) -> None:
        if not torch.isfinite(states).all():
            raise FloatingPointError(f"they hold NaN or infinity in {states.dtype}; check the dtypes of the model and of storage")
        self._dense_length = min(self._dense_length, self.history_length)
        if self.quantized is None:
            self.quantized = self.quantizer.quantize(states)
        elif requantize:
            history = self.quantizer.dequantize(self.quantized, self.dtype)
            self.quantized = self.quantizer.quantize(torch.cat([history, states.to(self.dtype)], dim=2))
            self._dense_length = 0
        else:
            self.quantized = self.quantized.append(self.quantizer.quantize(states, like=self.quantized))

    def crop_residual(self, tokens: int) -> None:
        """Forget the newest `tokens` tokens, which must be in the residual."""
        self.residual = self.residual[:, :, : self.residual.shape[2] - tokens]
        self._dense_length = min(self._dense_length, self.length)

    def select_batch(self, indices: torch.Tensor) -> None:
        """Keep the batch items `indices`, in that order."""
        residual_length = self.residual.shape[2]
        self._residual_buffer = self._residual_buffer[indices]
        self.residual = self._residual_buffer[:, :, :residual_length]
        if self.quantized:
            self.quantized = self.quantized.select_batch(indices)
        if self._dense is not None:
            self._dense = self._dense[indices]


class QuantizedLayer(CacheLayerMixin):
    """Keys and values of one attention layer."""

    is_sliding = False

    def __init__(self, recipe: Recipe, index: int, storage_dtype: torch.dtype | None, keep_dense: bool):
        super().__init__()
        self.recipe = recipe
        self.index = index
        self.storage_dtype = storage_dtype
        self.keep_dense = keep_dense
        self.stored: dict[str, StoredStates] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for name, quantizer, states in (("key", self.recipe.key, key_states), ("value", self.recipe.value, value_states)):
            dtype = self.storage_dtype or states.dtype
            self.stored[name] = StoredStates(quantizer, self.recipe.residual_length, states, dtype, self.keep_dense)
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens and return what attention sees: what is stored so far, then the new tokens exactly.

        Tokens that are quantized by this call are seen quantized from the next call on; with `prefill: quantized` those of
        the first call are seen as they were stored.

        Args:
            key_states: [B, H, T, D], new tokens.
            value_states: [B, H, T, D].
        Returns:
            Keys and values, each [B, H, stored + T, D]; with a dense working copy, views that are good until the next call.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(f"{key_states.shape[0]} sequences for a cache that holds {self.batch_size}; use a new cache")
        is_first = self.get_seq_length() == 0
        new_states = {"key": key_states.detach(), "value": value_states.detach()}
        seen = new_states if is_first else {name: self.stored[name].read(states) for name, states in new_states.items()}
        leaving = self._count_leaving(key_states.shape[2], is_first)
        for name, states in new_states.items():
            self._append(name, states, leaving[name])
        if is_first and self.recipe.prefill == "quantized":
            seen = {name: self.stored[name].read(states[:, :, :0]) for name, states in new_states.items()}
        return seen["key"], seen["value"]

    def _count_leaving(self, new_tokens: int, is_first: bool) -> dict[str, int]:
        """Return how many of the residual's and the new tokens leave full precision, for keys and for values."""
        waiting = {name: stored.residual.shape[2] + new_tokens for name, stored in self.stored.items()}
        if is_first:
            # The prompt leaves less than a block in the residual.
            blocks = dict.fromkeys(waiting, self.recipe.block)
            if self.recipe.flush == "requantize":
                # Values fill their own blocks, as in the released code: no value of the prompt is left if a block is one token.
                blocks["value"] = self.recipe.value.block
            return {name: count - count % blocks[name] for name, count in waiting.items()}
        # Afterwards the residual of keys, never the shorter one, is quantized whenever it is full, and that of values with it,
        # so that what is stored does not depend on how later tokens were divided over calls.
        rest = waiting["key"] % self.recipe.residual_length
        return {name: 0 if waiting["key"] < self.recipe.residual_length else count - rest for name, count in waiting.items()}

    def _append(self, name: str, states: torch.Tensor, quantize: int) -> None:
        try:
            self.stored[name].append(states, quantize, requantize=self.recipe.flush == "requantize")
        except ArithmeticError as error:
            raise ValueError(f"layer {self.index}, {name} states cannot be quantized: {error}") from error

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.stored["key"].length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of what attention will see with `query_length` new tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def footprint(self) -> Footprint:
        """Count what this layer stores."""
        if not self.is_initialized:
            return Footprint()
        key, value = self.stored["key"], self.stored["value"]
        return Footprint(key.nbytes, value.nbytes, key.elements, value.elements)

    def reset(self) -> None:
        """Forget everything."""
        self.stored = {}
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, as long as they are not yet quantized.

        Args:
            tokens_to_remove: zero or negative, as everywhere in Transformers: -3 forgets three tokens.
        Raises:
            ValueError: positive, or more tokens than the residual holds.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, found {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        residual = min(stored.residual.shape[2] for stored in self.stored.values())
        if -tokens_to_remove > residual:
            raise ValueError(
                f"crop of {-tokens_to_remove} tokens, but only the newest {residual} are still in full precision and can be removed; "
                "start again with a new cache, or use a recipe with a longer residual_length"
            )
        for stored in self.stored.values():
            stored.crop_residual(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give each beam the cache of the beam it continues."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch item `repeats` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch items `indices` (integers or a mask), in that order."""
        if not self.is_initialized:
            return
        indices = indices.to(self.device)
        for stored in self.stored.values():
            stored.select_batch(indices)
        self.batch_size = self.stored["key"].residual.shape[0]


class QuantizedCache(Cache):
    """A cache for `generate(past_key_values=...)`; one object serves one call, and its further turns.

    Args:
        recipe: what happens to keys and values.
        num_layers: number of attention layers of the model.
        storage_dtype: dtype in which full-precision states are stored (residual, identity recipe); None: that of the states.
            From the step after they came, states are read back rounded to it.
        keep_dense: keep a dequantized working copy, so that a decode step need not dequantize the history again. It is
            never counted as stored and never written back; generated text is the same.
    """

    def __init__(self, recipe: Recipe, num_layers: int, *, storage_dtype: torch.dtype | None = None, keep_dense: bool = False):
        if not isinstance(recipe, Recipe):
            raise ValueError(f"{recipe.name} is a recipe of another library's cache; make it with vidkv_eval.library_cache.make_cache")
        super().__init__(layers=[QuantizedLayer(recipe, index, storage_dtype, keep_dense) for index in range(num_layers)])
        self.recipe = recipe

    @classmethod
    def for_model(cls, model: PreTrainedModel, recipe: Recipe, **options: Any) -> QuantizedCache:
        """Make a cache with a layer for each layer of the model's text decoder.

        Raises:
            ValueError: the model has layers that are not attention layers.
        """
        return cls(recipe, count_attention_layers(model), **options)

    def footprint(self) -> Footprint:
        """Count what is stored in all layers."""
        return sum((layer.footprint() for layer in self.layers), Footprint())


def count_attention_layers(model: PreTrainedModel) -> int:
    """Return the number of layers of a model's text decoder.

    Raises:
        ValueError: the model has layers that are not attention layers.
    """
    config = model.config.get_text_config(decoder=True)
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_LAYERS))
    if strange:
        found, allowed = ", ".join(strange), ", ".join(ATTENTION_LAYERS)
        raise ValueError(f"{type(model).__name__} has layers of type {found}; QuantizedCache serves {allowed}")
    return config.num_hidden_layers


class RowLayer(CacheLayerMixin):
    """One layer of several caches of one sequence each, which a model sees as a batch."""

    is_sliding = False

    def __init__(self, rows: list[QuantizedLayer], is_running: list[bool]):
        super().__init__()
        self.rows = rows
        self.is_running = is_running
        self._dense: dict[str, torch.Tensor] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens and return what attention sees, as `QuantizedLayer.update` for each row.

        Args:
            key_states: [R, H, T, D] for R rows; [1, H, T, D] the first time: the prompt that all rows have in common.
            value_states: as `key_states`.
        Returns:
            Keys and values, views that are good until the next call: [R, H, stored + T, D], or the prompt as it came.
            Rows that were stopped hold nothing of meaning.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            for row in self.rows:
                row.update(key_states, value_states)
            return key_states, value_states
        total = self.get_seq_length() + key_states.shape[2]
        self._make_room(total, key_states)
        for index, row in enumerate(self.rows):
            if self.is_running[index]:
                row.update(key_states[index : index + 1], value_states[index : index + 1])
        return self._dense["key"][:, :, :total], self._dense["value"][:, :, :total]

    def _make_room(self, total: int, like: torch.Tensor) -> None:
        """Let the dense working copies of all rows lie in one tensor, so that a batch of them is a view."""
        if self._dense and total <= self._dense["key"].shape[2]:
            return
        for name in ("key", "value"):
            # Zeros, because a stopped row is attended to although nobody reads the result.
            self._dense[name] = like.new_zeros(len(self.rows), like.shape[1], total + max(128, total // 4), like.shape[3])
            for index, row in enumerate(self.rows):
                row.stored[name].share_dense(self._dense[name][index : index + 1])

    def get_seq_length(self) -> int:
        """Return the number of tokens held by the rows that still run."""
        return max(row.get_seq_length() for row in self.rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of what attention will see with `query_length` new tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


class RowCache(Cache):
    """Several caches that answer one prompt side by side, as the rows of a batch.

    The model reads its weights once for all rows, which is most of the time of a decode step.

    Args:
        rows: empty caches of models alike, with `keep_dense` and `prefill: exact`.
    """

    def __init__(self, rows: list[QuantizedCache]):
        for cache in rows:
            if cache.recipe.prefill != "exact" or not all(layer.keep_dense for layer in cache.layers):
                raise ValueError(f"{cache.recipe.name}: caches can only run side by side with prefill: exact and keep_dense: true")
        self._is_running = [True] * len(rows)
        layers = zip(*(cache.layers for cache in rows), strict=True)
        super().__init__(layers=[RowLayer(list(same_depth), self._is_running) for same_depth in layers])

    def __len__(self) -> int:
        return len(self._is_running)

    def is_running(self, row: int) -> bool:
        """Whether this row still stores what comes."""
        return self._is_running[row]

    def stop(self, row: int) -> None:
        """Store nothing more in this row; its sequence has ended."""
        self._is_running[row] = False

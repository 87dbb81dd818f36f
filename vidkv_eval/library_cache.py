"""Transformers' own quantized cache as a recipe: the library's layers as shipped, with their stored bytes counted.

The library decides when to quantize: the whole prompt after prefill, then the whole history again, read back, each time
`residual_length` tokens have come. What it computes is left as it is. Settled here: what attention sees in the pass over a
prompt is exact and bytes are counted, as for every recipe, and what the library answers wrongly is refused.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    HQQQuantizedLayer,
    QuantoQuantizedLayer,
)

from vidkv_eval.cache import CacheOptions, Footprint, QuantizedCache, count_attention_layers
from vidkv_eval.fused_states import FUSED, say_once
from vidkv_eval.prompt import Prompt, watch
from vidkv_eval.quant.base import QuantizedStates, impossible
from vidkv_eval.recipe import BaseRecipe, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}
PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
BITS = {"quanto": (2, 4), "hqq": (1, 2, 4, 8)}
AXES = {"quanto": (0, -1), "hqq": (0, 1)}


@dataclass(frozen=True)
class LibraryRecipe(BaseRecipe):
    """Settings of Transformers' quantized cache.

    Attributes:
        name: file name of the recipe.
        label: name in tables.
        source: where the setting comes from.
        backend: quanto (min-max codes) or hqq (min-max codes whose zero point is then optimized); both code keys and values alike.
        nbits: bits per code.
        axis: how groups are cut. 0 in quanto and 1 in hqq, which its documentation recommends: `group_size` consecutive
            channels of a token (of several tokens or heads if there are fewer channels). -1 in quanto: that many tokens of a
            channel. 0 in hqq, its default: elements that lie far apart, from several tokens, heads and sequences.
        group_size: elements that share a scale and a zero point.
        residual_length: number of tokens at which the residual is quantized.
    """

    name: str
    label: str
    source: str
    backend: str
    nbits: int
    axis: int
    group_size: int = 64
    residual_length: int = 128

    def __post_init__(self) -> None:
        if self.backend not in LAYERS:
            raise impossible(self, "backend", self.backend, ", ".join(LAYERS))
        for field, allowed in (("nbits", BITS[self.backend]), ("axis", AXES[self.backend])):
            if type(getattr(self, field)) is not int or getattr(self, field) not in allowed:
                raise impossible(self, field, getattr(self, field), ", ".join(map(str, allowed)))
        for field in ("group_size", "residual_length"):
            if type(getattr(self, field)) is not int or getattr(self, field) < 1:
                raise impossible(self, field, getattr(self, field), "integers above 0")

    @property
    def key_bits(self) -> float:
        return float(self.nbits)

    @property
    def value_bits(self) -> float:
        return float(self.nbits)

    @property
    def prefill(self) -> str:
        return "exact"

    @property
    def variant(self) -> str:
        return ""


class LibraryStates:
    """Keys or values of one layer, as the library's layer holds them.

    Args:
        layer: the library's layer.
        name: key or value.
        dtype: of what is read.
    """

    def __init__(self, layer: CacheLayerMixin, name: str, dtype: torch.dtype):
        self._layer = layer
        self._name = name
        self._dtype = dtype
        self._dense: torch.Tensor | None = None

    @property
    def quantized(self) -> Any:
        """The library's stored form of all tokens but the residual."""
        return getattr(self._layer, f"_quantized_{self._name}s")

    @property
    def residual(self) -> torch.Tensor:
        """Newest tokens, [B, H, T, D], or [0] when there are none."""
        return getattr(self._layer, f"{self._name}s")

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and residual."""
        return sum(tensor.nbytes for tensor in _tensors(self.quantized)) + self.residual.nbytes

    @property
    def elements(self) -> int:
        """Number of elements that the stored tensors stand for."""
        return self._quantized_elements + self.residual.numel()

    @property
    def is_packed_whole(self) -> bool:
        """Whether bytes hold a code for every quantized element; quanto fills up the last byte."""
        codes, *_ = _tensors(self.quantized)
        held = codes.numel() * (8 // self._layer.nbits)
        return held == self._quantized_elements if isinstance(self.quantized, tuple) else held >= self._quantized_elements

    @property
    def _quantized_elements(self) -> int:
        return (self.quantized[1]["shape"] if isinstance(self.quantized, tuple) else self.quantized.shape).numel()

    def read(self, new: torch.Tensor) -> torch.Tensor:
        """Return what is read back, followed by the tokens `new` as they are, [B, H, T, D]."""
        residual = [self.residual.to(self._dtype)] if self.residual.numel() else []
        return torch.cat([self._layer._dequantize(self.quantized).to(self._dtype), *residual, new], dim=2)

    def share_dense(self, buffer: torch.Tensor) -> None:
        """Write what attention sees into `buffer` [B, H, room, D] from now on, which makes several caches a batch."""
        self._dense = buffer

    def show(self, seen: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Return what attention sees, [B, H, T, D]: what the library returned, with its newest tokens `new` not rounded."""
        stored = seen[:, :, : seen.shape[2] - new.shape[2]]
        if self._dense is None:
            return torch.cat([stored.to(self._dtype), new], dim=2)
        shown = self._dense[:, :, : seen.shape[2]]
        shown[:, :, : stored.shape[2]] = stored
        shown[:, :, stored.shape[2] :] = new
        return shown


def _tensors(stored: Any) -> Iterator[torch.Tensor]:
    """Find the plain tensors in a stored form of quanto (nested tensor subclasses) or hqq (codes and a dictionary)."""
    if hasattr(stored, "__tensor_flatten__"):
        for name in stored.__tensor_flatten__()[0]:
            yield from _tensors(getattr(stored, name))
    elif isinstance(stored, torch.Tensor):
        yield stored
    elif isinstance(stored, tuple):
        for part in stored:
            yield from _tensors(part)
    elif isinstance(stored, dict):
        for part in stored.values():
            yield from _tensors(part)


class LibraryLayer(CacheLayerMixin):
    """Keys and values of one attention layer in a layer of the library."""

    is_sliding = False

    def __init__(self, recipe: LibraryRecipe, index: int, storage_dtype: torch.dtype | None):
        super().__init__()
        self.recipe = recipe
        self.index = index
        self.storage_dtype = storage_dtype
        self.stored: dict[str, LibraryStates] = {}
        self.layer = self._make_layer()

    def _make_layer(self) -> CacheLayerMixin:
        recipe = self.recipe
        return LAYERS[recipe.backend](recipe.nbits, recipe.axis, recipe.axis, recipe.group_size, recipe.residual_length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.stored = {name: LibraryStates(self.layer, name, key_states.dtype) for name in ("key", "value")}
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens and return what attention sees: what is stored so far, then the new tokens exactly.

        Args:
            key_states: [B, H, T, D], new tokens.
            value_states: [B, H, T, D].
        Returns:
            Keys and values, each [B, H, stored + T, D].
        Raises:
            ValueError: the library cannot store these states.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(f"{key_states.shape[0]} sequences for a cache that holds {self.batch_size}; use a new cache")
        new = {"key": key_states.detach(), "value": value_states.detach()}
        kept = {name: states.to(self.storage_dtype or states.dtype) for name, states in new.items()}
        for name, states in kept.items():
            if not torch.isfinite(states).all():
                raise ValueError(f"layer {self.index}, {name} states cannot be quantized: they hold NaN or infinity in {states.dtype}")
        try:
            seen = self.layer.update(kept["key"], kept["value"])
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(self._explain(key_states)) from error
        # hqq packs rows of groups that do not fill bytes into codes of another number, which would show in the next step only.
        if not all(stored.is_packed_whole for stored in self.stored.values()):
            raise ValueError(self._explain(key_states))
        shown = [self.stored[name].show(read, new[name]) for name, read in zip(("key", "value"), seen, strict=True)]
        return shown[0], shown[1]

    def _explain(self, states: torch.Tensor) -> str:
        """Say what the library could not do with its history and new tokens `states`; its own error names a tensor size."""
        batch, heads, _, channels = states.shape
        shape = f"{batch} sequences x {heads} heads x {self.get_seq_length()} tokens x {channels} channels"
        needed = f" whose number is a multiple of {8 // self.recipe.nbits}, as it packs them" if self.recipe.backend == "hqq" else ""
        package, group_size, axis = PACKAGES[self.recipe.backend], self.recipe.group_size, self.recipe.axis
        return f"layer {self.index}: {package} cannot cut {shape} into groups of {group_size} along axis {axis}{needed}"

    def read(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what attention would see with these new tokens, [B, H, T, D], without storing them."""
        return self.stored["key"].read(key_states), self.stored["value"].read(value_states)

    def quantized(self, name: str) -> list[QuantizedStates]:
        """Return no stored form of a quantizer of ours: there is none."""
        return []

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.layer.get_seq_length()

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
        self.layer, self.stored = self._make_layer(), {}
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give each beam the cache of the beam it continues."""
        self.layer.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: the library shortens the residual but not the length that it reports, so that positions would be wrong."""
        raise ValueError(f"{self.recipe.name}: tokens cannot be removed from the library's quantized cache; start again with a new cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: the library repeats the residual and not the history."""
        self.batch_select_indices(torch.empty(0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuse: the library selects from the residual and not from the history."""
        raise ValueError(f"{self.recipe.name}: sequences of the library's quantized cache cannot be selected or repeated")


class LibraryCache(Cache):
    """A cache for `generate(past_key_values=...)` in which the library quantizes.

    Args:
        recipe: settings of the library.
        num_layers: number of attention layers of the model.
        storage_dtype: dtype in which the library is given states, and so that of its metadata and residual; None: that of the
            states. What it returns is in the dtype of the states again.
        keep_dense: taken as every cache takes it, and without effect: the library reads all history back in every step.
    Raises:
        RecipeError: the package that quantizes is not installed.
    """

    chooses_visual_tokens = False

    def __init__(
        self, recipe: LibraryRecipe, num_layers: int, *, storage_dtype: torch.dtype | None = None, keep_dense: bool = False
    ):
        _require_package(recipe)
        super().__init__(layers=[LibraryLayer(recipe, index, storage_dtype) for index in range(num_layers)])
        self.recipe = recipe
        self.options = CacheOptions(storage_dtype, keep_dense)

    @classmethod
    def for_model(cls, model: PreTrainedModel, recipe: LibraryRecipe, **options: Any) -> LibraryCache:
        """Make a cache with a layer for each layer of the model's text decoder.

        Raises:
            ValueError: the model has layers that are not attention layers.
            RecipeError: the package that quantizes is not installed.
        """
        if model.config.get_text_config(decoder=True)._attn_implementation == FUSED:
            say_once(recipe.name, "the library returns them so")
        cache = cls(recipe, count_attention_layers(model), **options)
        watch(model)
        return cache

    def describe_prompt(self, prompt: Prompt) -> None:
        """Refuse padding, which the library would store and count, and with some axes mix into the groups of real tokens."""
        if any(prompt.padding):
            raise ValueError(f"{self.recipe.name}: the library's cache stores padding like tokens; use batch_size=1")

    def footprint(self) -> Footprint:
        """Count what is stored in all layers."""
        return sum((layer.footprint() for layer in self.layers), Footprint())


def cache_class(recipe: BaseRecipe) -> type[QuantizedCache] | type[LibraryCache]:
    """Return the kind of cache that a recipe is for."""
    return LibraryCache if isinstance(recipe, LibraryRecipe) else QuantizedCache


def make_cache(model: PreTrainedModel, recipe: BaseRecipe, **options: Any) -> QuantizedCache | LibraryCache:
    """Make an empty cache of any recipe for a model, by `for_model` of its kind; options as there."""
    return cache_class(recipe).for_model(model, recipe, **options)


def _require_package(recipe: LibraryRecipe) -> None:
    package = PACKAGES[recipe.backend]
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise RecipeError(f'recipe {recipe.name} needs {package}, which is not installed: pip install "vidkv-eval[rivals]"') from error
    if recipe.backend == "quanto":
        _spare_compiler()


def _spare_compiler() -> None:
    """Unpack codes of quanto on a CPU in plain torch; it would build a C++ extension for that, which needs a compiler."""
    from optimum.quanto.library.extensions import get_extension

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])

    get_extension("quanto_cpp")._lib = types.SimpleNamespace(unpack=unpack)

"""What the adapters of all model families share."""

import contextlib
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig

from vidkv_eval.attention import OURS
from vidkv_eval.cache import QuantizedCache
from vidkv_eval.inject import injected
from vidkv_eval.library_cache import LibraryCache, make_cache
from vidkv_eval.recipe import BaseRecipe, load_recipe


class VidKVAdapter:
    """Mixed into a chat adapter of lmms-eval; the loop that asks the model stays the adapter's own.

    With a recipe every `generate` of the loop gets a fresh cache of that recipe. Without one the caller injects caches.
    """

    is_simple = False
    model_type: str
    _recipe: BaseRecipe | None = None
    _cache_options: dict = {}
    _prepared: dict[Hashable, Any] | None = None

    def use_recipe(self, recipe: str | None, storage_dtype: str | None, keep_dense: bool) -> None:
        """Answer with this recipe from now on (None: with the cache of whoever injects one)."""
        self._recipe = None if recipe is None else load_recipe(recipe)
        self._cache_options = {"storage_dtype": storage_dtype, "keep_dense": keep_dense}

    def make_cache(
        self, recipe: BaseRecipe, *, storage_dtype: str | None = None, keep_dense: bool = False
    ) -> QuantizedCache | LibraryCache:
        """Build an empty cache for this model. Options as in `library_cache.make_cache`, the dtype by its name."""
        dtype = None if storage_dtype is None else named_dtype(storage_dtype)
        return make_cache(self.model, recipe, storage_dtype=dtype, keep_dense=keep_dense)

    def generate_until(self, requests: Sequence) -> list:
        """Run the adapter's own loop over the requests."""
        loop = with_names(super().generate_until.__func__, tqdm=_progress_of(len(requests)), **self._loop_names())
        if self._recipe is None:
            return loop(self, requests)
        with injected(self.model, lambda: self.make_cache(self._recipe, **self._cache_options)):
            return loop(self, requests)

    def clean(self) -> None:
        """Keep the model; lmms-eval would delete it after each evaluation."""

    @contextlib.contextmanager
    def one_sample(self) -> Iterator[None]:
        """Within the block each video is read and prepared once, however often it is asked about."""
        self._prepared = {}
        try:
            yield
        finally:
            self._prepared = None

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return `compute()`, remembered under `key` until the end of `one_sample`."""
        if self._prepared is None:
            return compute()
        if key not in self._prepared:
            self._prepared[key] = compute()
        return self._prepared[key]

    def _loop_names(self) -> dict[str, Any]:
        """Names that the loop of this family shall find replaced."""
        return {}

    def _refuse_other_family(self, pretrained: str, revision: str) -> None:
        found = AutoConfig.from_pretrained(pretrained, revision=revision).model_type
        if found != self.model_type:
            raise ValueError(f"{pretrained} holds a model of type {found}; {type(self).__name__} needs {self.model_type}")


class OnceProcessor:
    """A processor whose result for one sample is computed once.

    Inputs are told apart by their text, by the path of a video, and by the identity of frames (which `once` keeps alive).
    """

    def __init__(self, processor: Callable, once: Callable):
        self._processor = processor
        self._once = once

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, text: str | list[str], videos: list | None = None, **options: Any) -> Any:
        key = ("inputs", str(text), tuple(video if isinstance(video, str) else id(video) for video in videos or ()))
        return self._once(key, lambda: self._processor(text=text, videos=videos, **options))


class Settled:
    """A Transformers class whose `from_pretrained` has some arguments settled, whatever the caller says."""

    def __init__(self, cls: type, **settled: Any):
        self._cls = cls
        self._settled = settled

    def from_pretrained(self, *args: Any, torch_dtype: Any = None, **options: Any) -> Any:
        """Call the class; `torch_dtype` is the old name of `dtype` and only a default."""
        if torch_dtype is not None:
            options["dtype"] = torch_dtype
        return self._cls.from_pretrained(*args, **{**options, **self._settled})


def with_names(function: types.FunctionType, **names: Any) -> types.FunctionType:
    """Return the same function, finding other objects under some of the global names it uses.

    This is how stock code runs with, say, another progress bar, while the module it comes from stays as it is.

    Raises:
        NameError: the function's module has no such name, so that replacing it would have no effect.
    """
    unknown = names.keys() - function.__globals__.keys()
    if unknown:
        raise NameError(f"{function.__module__} has no {', '.join(sorted(unknown))}; this lmms-eval is not the pinned version")
    twin = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def stock_attention(name: str | None) -> dict[str, str]:
    """Return the argument that makes a stock adapter load with this attention, or with the one that ours start from."""
    if name is None:
        return {}
    return {"attn_implementation": "sdpa" if name in OURS else name}


def named_dtype(name: str) -> torch.dtype:
    """Return the floating dtype of torch that has this name.

    Raises:
        ValueError: there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name!r} is no floating dtype; use float16, bfloat16 or float32")
    return dtype


def _progress_of(requests: int) -> Callable[..., tqdm]:
    """A bar for several requests; whoever asks one at a time has a bar of their own."""
    return lambda *args, disable=False, **options: tqdm(*args, disable=disable or requests == 1, **options)

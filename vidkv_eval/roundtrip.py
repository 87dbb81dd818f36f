"""What a recipe makes of given keys and values: the way to check a recipe on one's own tensors, without a model."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidkv_eval.cache import Footprint
from vidkv_eval.library_cache import cache_class
from vidkv_eval.prompt import Prompt
from vidkv_eval.quant.base import QuantizedStates
from vidkv_eval.quant.marks import TokenMarks
from vidkv_eval.recipe import BaseRecipe, Recipe, load_recipe

SETTINGS = {
    "recipe": "NAME, or the path of a yaml file",
    "states": "FILE.npz with arrays key and value [B, H, T, D]",
    "out": "FILE.npz to write",
    "prompt_tokens": "tokens of the first call; default all",
    "group_size": "of every quantizer of the recipe; default as in the recipe",
    "residual_length": "default as in the recipe",
    "protected": "FILE.npy with ascending positions [N] of the tokens that the recipe treats apart; needed if it chooses tokens of its own",
}
REQUIRED = ("recipe", "states", "out")


class RoundtripError(ValueError):
    """A setting or an array that does not fit; the message says what is allowed."""


@dataclass(frozen=True)
class Roundtrip:
    """What attention would read next, and what is stored for it.

    Attributes:
        key: [B, H, T, D] in the dtype of the keys given.
        value: as `key`.
        wide_channels: ascending indices of the wide key channels, int64 [B, wide], or [B, H, wide] if each head has its own; None
            if the recipe chooses none.
        footprint: bytes stored and elements they stand for.
    """

    key: torch.Tensor
    value: torch.Tensor
    wide_channels: torch.Tensor | None
    footprint: Footprint


def roundtrip(
    recipe: BaseRecipe, key: torch.Tensor, value: torch.Tensor, prompt_tokens: int | None = None, marks: TokenMarks | None = None
) -> Roundtrip:
    """Feed keys and values [B, H, T, D] through a cache: a prompt, then one token a call.

    Args:
        recipe: what happens to them.
        key: keys as attention would see them.
        value: values.
        prompt_tokens: number of tokens of the first call, from 1; None means all.
        marks: what is known about the tokens of each prompt, for recipes that choose tokens.
    Raises:
        ValueError: the states cannot be quantized, or the marks do not fit.
        RecipeError: a package that the recipe needs is not installed.
    """
    total = key.shape[2]
    prompt = total if prompt_tokens is None else prompt_tokens
    cache = cache_class(recipe)(recipe, 1)
    cache.describe_prompt(Prompt((0,), marks and (marks,)))
    for start, stop in zip([0, *range(prompt, total)], range(prompt, total + 1), strict=True):
        cache.update(key[:, :, start:stop], value[:, :, start:stop], 0)
    read = cache.layers[0].read(key[:, :, :0], value[:, :, :0])
    return Roundtrip(*read, _wide_channels(cache.layers[0].quantized("key")), cache.footprint())


def run_roundtrip(settings: Mapping[str, str]) -> str:
    """Read states, quantize them, write what is read back, and return the report as text.

    The file written has `key` and `value`, float32 [B, H, T, D], and `wide_channels`, int64 [wide], or [B, wide] for
    several sequences, if the recipe chooses channels ([H, wide] or [B, H, wide] if for each head). The residual is stored, and
    counted in effective bits, in the dtype of the states: give float16 to see what a float16 model would store.

    Args:
        settings: by the names of `SETTINGS`; numbers as text.
    Raises:
        RoundtripError: a setting or an array does not fit.
        RecipeError: the recipe does not exist or cannot be built, or needs a package that is not installed.
    """
    _check_names(settings)
    recipe = _with_settings(load_recipe(settings["recipe"]), settings)
    states = read_states(Path(settings["states"]))
    total = states["key"].shape[2]
    prompt = _whole_number(settings, "prompt_tokens") or total
    if prompt > total:
        raise RoundtripError(f"prompt_tokens={prompt}, but there are {total} tokens; allowed: 1 to {total}")
    marks = _protected(recipe, settings)
    try:
        result = roundtrip(recipe, states["key"], states["value"], prompt, marks)
    except ValueError as error:
        raise RoundtripError(f"{recipe.name} on {settings['states']}: {error}") from error
    arrays = {"key": result.key.float().numpy(), "value": result.value.float().numpy()}
    if result.wide_channels is not None:
        channels = result.wide_channels.numpy()
        arrays["wide_channels"] = channels[0] if len(channels) == 1 else channels
    try:
        with open(settings["out"], "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise RoundtripError(f"out={settings['out']} cannot be written: {error.strerror}") from error
    return _report(recipe, states, result, prompt)


def read_states(path: Path) -> dict[str, torch.Tensor]:
    """Read `key` and `value`, [B, H, T, D], of an npz file, in their dtype; float64 becomes float32.

    Raises:
        RoundtripError: no such file, no such array, or one that does not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("key", "value") if name in file.files}
            found = ", ".join(file.files) or "nothing"
    except FileNotFoundError as error:
        raise RoundtripError(f"states={path}: no such file") from error
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise RoundtripError(f"states={path} is not an npz file with arrays of numbers key and value [B, H, T, D]") from error
    for name in ("key", "value"):
        if name not in arrays:
            raise RoundtripError(f"{path} has no array {name!r}; it holds {found}, needed: key and value [B, H, T, D]")
        array = arrays[name]
        if array.ndim != 4 or not array.size:
            raise RoundtripError(f"{name} in {path} has shape {list(array.shape)}; allowed: [B, H, T, D] with at least one of each")
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise RoundtripError(f"{name} in {path} is {array.dtype}; allowed: float16, float32, float64")
    if arrays["key"].shape[:3] != arrays["value"].shape[:3]:
        shapes = " and ".join(str(list(array.shape)) for array in arrays.values())
        raise RoundtripError(f"key and value in {path} have shapes {shapes}; allowed: the same B, H and T")
    states = {name: torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) for name, array in arrays.items()}
    return {name: tensor.float() if tensor.dtype == torch.float64 else tensor for name, tensor in states.items()}


def _check_names(settings: Mapping[str, str]) -> None:
    usage = "; ".join(f"{name}: {meaning}" for name, meaning in SETTINGS.items())
    for name in settings:
        if name not in SETTINGS:
            raise RoundtripError(f"unknown setting {name!r}; allowed: {usage}")
    missing = [name for name in REQUIRED if not settings.get(name)]
    if missing:
        raise RoundtripError(f"missing {', '.join(f'{name}=...' for name in missing)}; allowed: {usage}")


def _whole_number(settings: Mapping[str, str], name: str) -> int | None:
    text = settings.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise RoundtripError(f"{name}={text} does not fit; allowed: a whole number from 1")
    return int(text)


def _protected(recipe: BaseRecipe, settings: Mapping[str, str]) -> TokenMarks | None:
    path = settings.get("protected")
    if path is None:
        return None
    if not recipe.chooses_tokens:
        raise RoundtripError(f"protected={path}, but {recipe.name} treats all tokens alike; leave it out, or take another recipe")
    try:
        positions = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise RoundtripError(f"protected={path}: no such file") from error
    except (OSError, ValueError, EOFError) as error:
        raise RoundtripError(f"protected={path} is not an npy file with an array of positions") from error
    if not isinstance(positions, np.ndarray) or positions.ndim != 1 or positions.dtype.kind not in "iu":
        raise RoundtripError(f"protected={path} does not hold one array of integers [N]; allowed: positions of tokens, in ascending order")
    return TokenMarks(listed=torch.from_numpy(positions.astype(np.int64)))


def _with_settings(recipe: BaseRecipe, settings: Mapping[str, str]) -> BaseRecipe:
    """Return the recipe with another group size and residual length, where given."""
    config = recipe.to_config()
    group_size, residual_length = (_whole_number(settings, name) for name in ("group_size", "residual_length"))
    if group_size:
        config = _with_group_size(config, group_size)
    if residual_length:
        config["residual_length"] = residual_length
    return Recipe.from_config(config)


def _with_group_size(config: Any, group_size: int) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {name: group_size if name == "group_size" else _with_group_size(value, group_size) for name, value in config.items()}


def _wide_channels(quantized: list[QuantizedStates]) -> torch.Tensor | None:
    """Return the wide channels of all sequences, [B, wide]; None if the recipe chooses none."""
    found = [next(_find(part, "wide_channels"), None) for part in quantized]
    return torch.cat(found).long() if found and found[0] is not None else None


def _find(quantized: QuantizedStates, name: str) -> Iterator[torch.Tensor]:
    if name in quantized.static:
        yield quantized.static[name]
    for part in quantized.parts.values():
        yield from _find(part, name)


def _report(recipe: BaseRecipe, states: Mapping[str, torch.Tensor], result: Roundtrip, prompt: int) -> str:
    batch, heads, total, _ = result.key.shape
    dtypes = " and ".join(str(states[name].dtype).removeprefix("torch.") for name in ("key", "value"))
    lines = [
        f"recipe          {recipe.name}: {recipe.label}",
        f"states          {batch} sequence(s), {heads} head(s), {prompt} + {total - prompt} tokens, {dtypes}",
        f"relative error  key {_error(states['key'], result.key):.6f}, value {_error(states['value'], result.value):.6f}",
        f"nominal bits    key {recipe.key_bits:.2f}, value {recipe.value_bits:.2f}",
        f"effective bits  key {result.footprint.key_bits:.3f}, value {result.footprint.value_bits:.3f}, "
        f"together {result.footprint.effective_bits:.3f}",
    ]
    return "\n".join(lines)


def _error(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Return norm of the difference / norm of the exact states; 0 if both are zero."""
    difference = (found.double() - exact.double()).norm().item()
    return difference / exact.double().norm().item() if difference else 0.0

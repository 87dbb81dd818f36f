"""Recipes: which quantizer for keys, which for values, and when. Read from configs/recipe, without Hydra."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vidkv_eval.quant.base import Quantizer, impossible
from vidkv_eval.quant.choose_tokens import TokenChooser
from vidkv_eval.quant.split_tokens import SplitTokens

RECIPE_FOLDER = Path(__file__).resolve().parents[1] / "configs" / "recipe"
PACKAGE = "vidkv_eval."


class RecipeError(ValueError):
    """A recipe that does not exist or cannot be built; the message says what is allowed."""


class BaseRecipe(ABC):
    """What every kind of recipe has.

    Implementations are frozen dataclasses with the fields or properties `name`, `label`, `source`, `variant` and `prefill`, as
    `Recipe` describes them.
    """

    @property
    def chooses_tokens(self) -> bool:
        """Whether some tokens of the prompt have quantizers of their own."""
        return False

    @property
    @abstractmethod
    def key_bits(self) -> float:
        """Nominal bits of keys."""

    @property
    @abstractmethod
    def value_bits(self) -> float:
        """Nominal bits of values."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseRecipe:
        """Build a recipe from nested plain mappings that name classes in `_target_`; one that names none is of this class.

        Raises:
            RecipeError: a field is unknown, missing or has an impossible value.
        """
        recipe = _build({"_target_": f"{cls.__module__}.{cls.__qualname__}", **config}, "recipe")
        if not isinstance(recipe, BaseRecipe):
            raise RecipeError(f"recipe: _target_ is {config['_target_']!r}; allowed: {cls.__module__}.{cls.__qualname__}")
        return recipe

    def to_config(self) -> dict[str, Any]:
        """Return the recipe as nested plain mappings, defaults written out: what `from_config` reads."""
        return _to_config(self)


@dataclasses.dataclass(frozen=True)
class Recipe(BaseRecipe):
    """What happens to keys and values in a `QuantizedCache`.

    Attributes:
        name: file name of the recipe.
        label: name in tables.
        source: where the setting comes from.
        key: quantizer of keys (after rotary embedding).
        value: quantizer of values.
        residual_length: number of newest tokens at which the residual is quantized; a multiple of both quantizers' blocks.
        prefill: what attention sees while the prompt is processed: exact states, or quantized ones.
        flush: what a full residual does: append (history is never touched), or requantize (history is read back and
            quantized again together with the residual).
        variant: "" where no readings differ, published (the paper's text), released (the authors' code), scaled (repaired).
        score_drop: how much the largest attention score of the chosen tokens of the keys is lowered; see `score_drop.drop_scores`.
    """

    name: str
    label: str
    source: str
    key: Quantizer
    value: Quantizer
    residual_length: int = 128
    prefill: str = "exact"
    flush: str = "append"
    variant: str = ""
    score_drop: float = 0.0

    def __post_init__(self) -> None:
        for field, allowed in (
            ("prefill", ("exact", "quantized")),
            ("flush", ("append", "requantize")),
            ("variant", ("", "published", "released", "scaled")),
        ):
            if getattr(self, field) not in allowed:
                raise impossible(self, field, getattr(self, field), ", ".join(repr(word) for word in allowed))
        for field in ("key", "value"):
            if not isinstance(getattr(self, field), Quantizer):
                raise impossible(self, field, getattr(self, field), "a quantizer")
        if type(self.residual_length) is not int or self.residual_length < 1 or self.residual_length % self.block:
            raise impossible(self, "residual_length", self.residual_length, f"multiples of {self.block}, the tokens quantized together")
        if type(self.score_drop) not in (int, float) or not 0 <= self.score_drop < math.inf:
            raise impossible(self, "score_drop", self.score_drop, "numbers from 0")
        if self.score_drop and (self.prefill != "exact" or not isinstance(self.key, SplitTokens)):
            raise impossible(self, "score_drop", self.score_drop, "0, unless keys choose tokens (SplitTokens) and prefill is 'exact'")

    @property
    def block(self) -> int:
        """Number of tokens that keys and values can both quantize together."""
        return math.lcm(self.key.block, self.value.block)

    @property
    def chooses_tokens(self) -> bool:
        return isinstance(self.key, SplitTokens) or isinstance(self.value, SplitTokens)

    @property
    def key_bits(self) -> float:
        return self.key.nominal_bits

    @property
    def value_bits(self) -> float:
        return self.value.nominal_bits


def recipe_names() -> list[str]:
    """Return the names of all recipe files, sorted."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str | Path) -> BaseRecipe:
    """Read a recipe by its name in configs/recipe, or by the path of a yaml file.

    Raises:
        RecipeError: no such recipe, or the file describes an impossible one.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPE_FOLDER / f"{name_or_path}.yaml"
        if str(name_or_path) not in recipe_names():
            raise RecipeError(f"no recipe {str(name_or_path)!r}{_nearest(str(name_or_path), recipe_names())}")
    if not path.is_file():
        raise RecipeError(f"no recipe file {str(path)!r}; give an existing file or one of: {', '.join(recipe_names())}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path.name} is not valid yaml: {error}") from error
    if not isinstance(config, Mapping):
        raise RecipeError(f"{path.name} holds {type(config).__name__}; allowed: a mapping of the fields of a recipe")
    recipe = Recipe.from_config(config)
    if recipe.name != path.stem:
        raise RecipeError(f"recipe.name is {recipe.name!r} in {path.name}; allowed: {path.stem!r}, the name of the file")
    return recipe


def _build(config: Any, path: str) -> Any:
    """Build what `config` describes; `path` is its place in the recipe, for messages."""
    if not isinstance(config, Mapping) or "_target_" not in config:
        return config
    target = _find_class(config["_target_"], path)
    fields = {field.name: field for field in dataclasses.fields(target)}
    given = {name: value for name, value in config.items() if name not in ("_target_", "_convert_")}
    for name in given:
        if name not in fields:
            raise RecipeError(f"{path}: unknown field {name!r}{_nearest(str(name), fields)}")
    missing = [name for name, field in fields.items() if name not in given and field.default is dataclasses.MISSING]
    if missing:
        raise RecipeError(f"{path}: missing {', '.join(missing)}; fields of {target.__name__}: {', '.join(fields)}")
    arguments = {name: _build(value, f"{path}.{name}") for name, value in given.items()}
    try:
        return target(**arguments)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error


def _find_class(target: Any, path: str) -> type:
    allowed = f"the full name of a class of this package, such as {PACKAGE}quant.affine.Affine"
    module_name, _, class_name = str(target).rpartition(".")
    if not module_name.startswith(PACKAGE):
        raise RecipeError(f"{path}: _target_ is {target!r}; allowed: {allowed}")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        if not module_name.startswith(str(error.name)):
            raise
        found = None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and issubclass(found, Quantizer | TokenChooser | BaseRecipe)):
        raise RecipeError(f"{path}: _target_ is {target!r}, which is not part of a recipe; allowed: {allowed}")
    return found


def _to_config(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: _to_config(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **fields}


def _nearest(name: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    return (f"; did you mean {near[0]!r}?" if near else "") + f" Valid: {', '.join(valid)}"

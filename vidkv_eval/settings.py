"""Settings: configs composed by Hydra, and every mistake in them explained in one message."""

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

PROJECT = Path(__file__).resolve().parents[1]
CONFIGS = PROJECT / "configs"
GROUPS = ("profile", "model", "benchmark", "recipe", "judge")
OPTIONAL_COUNTS = ("limit", "workers", "profile.workers", "profile.cache.rows")
OPTIONAL_TEXTS = ("judge.api_key", "model.revision", "profile.cache.storage_dtype", "profile.data.hf_home", "profile.data.rows")
COUNTS = (*OPTIONAL_COUNTS, "threads", "profile.threads", "model.frames", "benchmark.max_new_tokens")


class SettingsError(ValueError):
    """A mistake in the settings; the message says what was found and what is allowed."""


def options(group: str) -> list[str]:
    """Return the names one can choose in a config group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def read_option(group: str, name: str) -> dict:
    """Return the file of one option as plain values.

    Raises:
        SettingsError: there is no such option.
    """
    if name not in options(group):
        raise unknown(group, name, options(group))
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml"), resolve=False)


def unknown(kind: str, word: str, words: Sequence[str]) -> SettingsError:
    """Return the error for a name that does not exist: nearest name first, then all of them."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
    guess = f" Did you mean {near[0]}?" if near else ""
    return SettingsError(f"unknown {kind} '{word}'.{guess}\nvalid: {', '.join(words)}")


def compose(arguments: Sequence[str]) -> dict:
    """Compose one run from `key=value` arguments.

    Args:
        arguments: choices of config groups and settings, as Hydra writes them, without sweeps.
    Returns:
        All settings as plain values; paths are absolute.
    Raises:
        SettingsError: an unknown option or key, or a value of the wrong type.
    """
    with configs():
        overrides = parse(arguments)
        for override in overrides:
            check_choice(override)
            if override.is_sweep_override():
                raise SettingsError(f"{override.input_line} names several values; use `vidkv run -m` for that")
        chosen = [override.input_line for override in overrides if override.key_or_group in GROUPS]
        with as_settings_error():
            defaults = hydra_compose("run", chosen)
        settings = [override for override in overrides if override.key_or_group not in GROUPS]
        for override in settings:
            check_key(override, flatten(OmegaConf.to_container(defaults, resolve=False)))
        with as_settings_error():
            composed = hydra_compose("run", list(arguments)) if settings else defaults
            resolved = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        check_types(flatten(OmegaConf.to_container(defaults, resolve=True)), flatten(resolved))
        check_fused(resolved)
    return with_absolute_paths(resolved)


def expand(arguments: Sequence[str]) -> list[list[str]]:
    """Expand sweeps (`a,b`, `choice()`, `range()`, `glob()`) into one list of arguments per run."""
    with configs():
        axes = []
        for override in parse(arguments):
            if override.is_sweep_override() and not override.is_discrete_sweep():
                raise SettingsError(f"{override.input_line}: an interval has no list of values; use range() or a comma list")
            check_choice(override)
            axes.append(values_of(override))
    return [list(combination) for combination in itertools.product(*axes)]


def values_of(override: Override) -> list[str]:
    """Return one argument per value of an override."""
    if not override.is_sweep_override():
        return [override.input_line]
    key = override.get_key_element()
    values = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not values:
        raise SettingsError(f"{override.input_line} matches nothing; valid: {', '.join(options(override.key_or_group))}")
    return values


@contextmanager
def configs() -> Iterator[None]:
    """Have Hydra read configs/ inside the block."""
    if not (CONFIGS / "run.yaml").exists():
        raise SettingsError(f"no configs found at {CONFIGS}; install from a checkout with `pip install -e .`")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


@contextmanager
def as_settings_error() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into one short message."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(str(error).split("\n")[0].strip()) from error


def parse(arguments: Sequence[str]) -> list[Override]:
    """Parse arguments with Hydra's own grammar."""
    for argument in arguments:
        if "=" not in argument and not argument.startswith("~"):
            raise SettingsError(f"'{argument}' is not a setting; write key=value, for example recipe=fp16")
    with as_settings_error():
        return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides(list(arguments))


def check_choice(override: Override) -> None:
    """Refuse an option that a config group does not have, and leaving a group or key out."""
    group = override.key_or_group
    if override.is_delete():
        raise SettingsError(f"{override.input_line}: nothing can be left out; write {group}=... instead")
    if group in GROUPS:
        chosen = override.sweep_string_iterator() if override.is_sweep_override() else [str(override.value())]
        for name in chosen:
            if name not in options(group):
                raise unknown(group, name, options(group))


def check_key(override: Override, known: dict) -> None:
    """Refuse a key that no config has; `+key=value` is Hydra's word for a new one."""
    key = override.key_or_group
    if not override.is_add() and not override.is_force_add() and key not in known:
        raise unknown("key", key, [*GROUPS, "suite", *known])


def check_types(defaults: dict, given: dict) -> None:
    """Refuse values of another type than their default has; where the default is null, text is allowed."""
    for key, value in given.items():
        if key in defaults and not fits(key, value, defaults[key]):
            raise SettingsError(f"{key}={value} does not fit; allowed: {allowed(key, defaults[key])}")


def check_fused(settings: dict) -> None:
    """Refuse settings that keep dequantized states beside attention that is to read packed ones."""
    cache = settings["profile"]["cache"]
    if settings["model"]["attn_implementation"] == "fused" and (cache["rows"] is not None or cache["keep_dense"]):
        raise SettingsError(
            f"model.attn_implementation=fused with profile.cache.rows={cache['rows']} and keep_dense={cache['keep_dense']}; "
            "it goes with profile.cache.rows=null profile.cache.keep_dense=false, because both need dequantized states"
        )


def fits(key: str, value: object, default: object) -> bool:
    """Say whether a value can stand where its default stands."""
    if key in COUNTS:
        return is_whole(value) and value >= 1 or value is None and key in OPTIONAL_COUNTS
    if isinstance(default, float):
        return is_whole(value) or isinstance(value, float)
    if default is None or key in OPTIONAL_TEXTS:
        return value is None or isinstance(value, str)
    return isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)


def is_whole(value: object) -> bool:
    """Say whether a value is a whole number (True and False are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def allowed(key: str, default: object) -> str:
    """Say in words what a key takes."""
    if key in COUNTS:
        return "a whole number from 1" + (", or null" if key in OPTIONAL_COUNTS else "")
    if isinstance(default, bool):
        return "true or false"
    names = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return f"{names[type(default)]}, for example {default}" if type(default) in names else "text, or null"


def flatten(settings: dict, prefix: str = "") -> dict:
    """Return settings with dotted keys; inner mappings are listed beside their members."""
    flat = {}
    for key, value in settings.items():
        flat[prefix + str(key)] = value
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
    return flat


def with_absolute_paths(settings: dict) -> dict:
    """Return settings in which paths are absolute: from the project, or from the current folder where they exist there."""
    settings["paths"] = {name: str(PROJECT / path) for name, path in settings["paths"].items()}
    data = settings["profile"]["data"]
    settings["profile"]["data"] = {name: path and str(PROJECT / Path(path).expanduser()) for name, path in data.items()}
    settings["model"]["pretrained"] = checkpoint(settings["model"])
    return settings


def checkpoint(model: dict) -> str:
    """Return the folder of a checkpoint, or its hub name where no such folder exists.

    Raises:
        SettingsError: neither a folder nor in the form of a hub name.
    """
    pretrained = Path(model["pretrained"]).expanduser()
    for folder in (pretrained, PROJECT / pretrained):
        if (folder / "config.json").exists():
            return str(folder.resolve())
    if pretrained.is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model["pretrained"]):
        raise SettingsError(
            f"model {model['name']}: no checkpoint at {model['pretrained']} (config.json is missing); "
            "set model.pretrained to a checkpoint folder or a hub name (owner/name)"
        )
    return model["pretrained"]

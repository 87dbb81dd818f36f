"""Cell: identity and address of one model x benchmark x recipe."""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

PRESENTATION = {
    "model": ("name", "label", "paper_name", "device"),
    "benchmark": ("name", "label", "clips", "metrics"),
    "recipe": ("name", "label", "source", "variant", "_convert_"),
}
READ_BY_TRANSFORMERS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
WEIGHTS = (".safetensors", ".bin")
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Cell:
    """One model x benchmark x recipe with all settings that can change its numbers.

    Attributes:
        model: settings of the model; `pretrained` is a hub name or a folder.
        benchmark: settings of the benchmark.
        recipe: settings of the recipe, as in its file.
        judge: name, version and model of the judge (and how to reach it).
        data: where rows and clips lie on this machine.
        cache: options of the cache, as `QuantizedCache` takes them.
        limit: number of samples from the start, None for all.
        fingerprints: of the local files behind the settings: checkpoint, rows, clips.
    """

    model: dict
    benchmark: dict
    recipe: dict
    judge: dict
    data: dict
    cache: dict
    limit: int | None = None
    fingerprints: dict = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """Hash of everything that can change the numbers of this cell."""
        judge = {key: self.judge.get(key) for key in ("name", "version", "model")}
        return digest(self._settings | {"judge": judge, "limit": self.limit})

    @cached_property
    def answers_id(self) -> str:
        """Hash of everything that can change an answer: neither the judge nor the number of samples can."""
        return digest(self._settings)

    @cached_property
    def group_id(self) -> str:
        """Hash of all that cells must share to be answered together: everything but recipe and judge."""
        return digest(without(self._settings, ("recipe",)) | {"limit": self.limit})

    @property
    def group(self) -> tuple[str, str]:
        """Model and benchmark: cells that share frames and prefill."""
        return self.model["name"], self.benchmark["name"]

    @property
    def recipe_name(self) -> str:
        """Name of the recipe."""
        return self.recipe["name"]

    @property
    def address(self) -> str:
        """Folder of the cell inside a store."""
        return "/".join((*self.group, f"{self.recipe_name}-{self.id[:8]}"))

    @property
    def _settings(self) -> dict:
        settings = {part: without(getattr(self, part), names) for part, names in PRESENTATION.items()}
        if "model" in self.fingerprints:
            settings["model"] = without(settings["model"], ("pretrained", "revision"))
        settings["benchmark"]["metrics"] = sorted(metric["name"] for metric in self.benchmark["metrics"])
        return settings | {"cache": self.cache, "fingerprints": self.fingerprints}

    def to_config(self) -> dict:
        """Return all fields as plain values, for `from_config`."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict) -> "Cell":
        """Make the cell that `to_config` described."""
        return cls(**config)


def without(settings: dict, names: tuple[str, ...]) -> dict:
    """Return the settings that are not named."""
    return {key: value for key, value in settings.items() if key not in names}


def digest(settings: dict) -> str:
    """Return a hash of plain settings that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def fingerprint_checkpoint(folder: Path) -> str:
    """Return a hash that tells checkpoints apart without reading gigabytes.

    Files that Transformers reads beside the weights are hashed whole; of a weight file the size, the
    safetensors header, the first and the last megabyte count.
    """
    entries = []
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHTS:
            entries.append((path.name, path.stat().st_size, fingerprint_weights(path)))
        elif path.name in READ_BY_TRANSFORMERS:
            entries.append((path.name, path.stat().st_size, fingerprint_file(path)))
    return digest({"files": entries})


def fingerprint_weights(path: Path) -> str:
    """Return a hash of the header and of both ends of a weight file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(MEGABYTE)
        hashed = hashlib.sha256(start)
        if path.suffix == ".safetensors" and size >= 8:
            file.seek(8)
            hashed.update(file.read(struct.unpack("<Q", start[:8])[0]))
        file.seek(max(0, size - MEGABYTE))
        hashed.update(file.read())
    return hashed.hexdigest()


def fingerprint_file(path: Path) -> str:
    """Return a hash of a whole file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint_clips(folder: Path) -> str:
    """Return a hash of names and sizes of the clips in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest({"clips": [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]})

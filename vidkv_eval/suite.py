"""Suite: the cells, rows and columns of one printed table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vidkv_eval.cell import Cell, fingerprint_checkpoint, fingerprint_clips, fingerprint_file
from vidkv_eval.settings import SettingsError, compose, expand, read_option


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        label: what the paper prints in the row.
        recipe: name of the recipe that measures it.
        key_bits: nominal bits of the keys, as the paper counts them.
        value_bits: nominal bits of the values.
        published: key of the row in published.csv, None where the paper has no such row.
    """

    label: str
    recipe: str
    key_bits: float
    value_bits: float
    published: str | None = None


@dataclass(frozen=True)
class Section:
    """Rows under one heading; `profiles` names the profiles that have it, None means all."""

    label: str | None
    rows: tuple[Row, ...]
    profiles: list[str] | None = None


@dataclass(frozen=True)
class Column:
    """One metric of one benchmark.

    Attributes:
        benchmark: name of the benchmark.
        metric: name of the metric in lmms-eval.
        label: heading.
        published: metric of published.csv that it is compared with.
        shown: False for a number that only the csv holds.
    """

    benchmark: str
    metric: str
    label: str
    published: str
    shown: bool = True


@dataclass(frozen=True)
class Suite:
    """A table as data.

    Attributes:
        name: name of its file.
        title: first sentence of the caption.
        baseline: recipe that differences are taken to.
        sections: rows.
        columns: metrics.
        settings: arguments that belong to the suite, such as `limit=2`.
        published: table of published.csv that it reproduces, None for none.
        record: whether its tables are kept in the results folder.
    """

    name: str
    title: str
    baseline: str
    sections: tuple[Section, ...]
    columns: tuple[Column, ...]
    settings: tuple[str, ...] = ()
    published: str | None = None
    record: bool = True

    def sections_of(self, profile: str) -> list[Section]:
        """Return the sections that a profile has."""
        return [section for section in self.sections if section.profiles is None or profile in section.profiles]

    @property
    def benchmarks(self) -> list[str]:
        """Benchmarks of the columns, each once."""
        return list(dict.fromkeys(column.benchmark for column in self.columns))


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        cells: all cells.
        settings: the composed settings that hold for the whole run (profile, judge, paths, workers, ...).
        models: composed settings of the models by name.
        metrics: for each benchmark its metrics by name, with unit and scale.
        suite: the table they belong to, None for cells of the command line.
    """

    cells: tuple[Cell, ...]
    settings: dict
    models: dict[str, dict]
    metrics: dict[str, dict[str, dict]]
    suite: Suite | None = None

    @property
    def profile(self) -> str:
        """Name of the profile."""
        return self.settings["profile"]["name"]

    @property
    def runs(self) -> Path:
        """Folder of the store of this machine."""
        return Path(self.settings["paths"]["runs"]) / self.profile

    @property
    def results(self) -> Path:
        """Folder of the committed record."""
        return Path(self.settings["paths"]["results"]) / self.profile

    def cell(self, model: str, benchmark: str, recipe: str) -> Cell:
        """Return one cell by name."""
        return next(cell for cell in self.cells if (*cell.group, cell.recipe_name) == (model, benchmark, recipe))


def load_suite(name: str) -> Suite:
    """Read a suite from configs/suite.

    Raises:
        SettingsError: there is no such suite.
    """
    config = read_option("suite", name)
    sections = tuple(
        Section(section.get("label"), tuple(Row(**row) for row in section["rows"]), section.get("profiles"))
        for section in config.pop("sections")
    )
    columns = tuple(Column(**column) for column in config.pop("columns"))
    settings = tuple(config.pop("settings", ()))
    return Suite(sections=sections, columns=columns, settings=settings, **config)


def plan_suite(name: str, arguments: Sequence[str] = ()) -> Plan:
    """Compose all cells of a suite.

    Args:
        name: name of the suite.
        arguments: settings for all of its cells; `model=a,b` chooses among the models of the profile.
    Raises:
        SettingsError: a mistake in the settings, or a setting that a suite fixes.
    """
    suite = load_suite(name)
    for argument in arguments:
        if argument.lstrip("+~").startswith(("recipe", "benchmark=")):
            raise SettingsError(f"suite {name} says itself which recipes and benchmarks it measures; leave out {argument}")
    chosen = [argument for argument in arguments if argument.startswith("model=")]
    shared = [*suite.settings, *(argument for argument in arguments if argument not in chosen)]
    if chosen:
        models = [model for (model,) in expand(chosen[-1:])]
    else:
        models = [f"model={model}" for model in compose(shared)["profile"]["models"]]
    return compose_suite(suite, models, shared)


def compose_suite(suite: Suite, models: list[str], shared: list[str]) -> Plan:
    """Compose the cells of a suite for some models."""
    if len(models) > 1 and any(argument.startswith("model.") for argument in shared):
        raise SettingsError(f"suite {suite.name} has several models; say with model=... which one the setting is for")
    composed, cells = [], []
    for model in models:
        for benchmark in suite.benchmarks:
            settings = compose([model, f"benchmark={benchmark}", *shared])
            composed.append(settings)
            prints = fingerprints(settings)
            for section in suite.sections_of(settings["profile"]["name"]):
                cells += [make_cell(settings | {"recipe": read_option("recipe", row.recipe)}, prints) for row in section.rows]
    return make_plan(composed, cells, suite)


def plan_cells(arguments: Sequence[str], *, sweep: bool = False) -> Plan:
    """Compose the cells that arguments name.

    Args:
        arguments: choices and settings.
        sweep: whether `a,b`, `range()` and `glob()` stand for several cells.
    Raises:
        SettingsError: a mistake in the settings.
    """
    composed = [compose(run) for run in (expand(arguments) if sweep else [list(arguments)])]
    runs = {(settings["profile"]["name"], settings["judge"]["name"], settings["paths"]["runs"]) for settings in composed}
    if len(runs) > 1:
        raise SettingsError("one run has one profile, one judge and one folder; sweep over models, benchmarks, recipes and their settings")
    cells = {cell.address: cell for cell in (make_cell(settings, fingerprints(settings)) for settings in composed)}
    return make_plan(composed, list(cells.values()), None)


def make_plan(composed: list[dict], cells: list[Cell], suite: Suite | None) -> Plan:
    """Collect composed settings and their cells."""
    models = {settings["model"]["name"]: settings["model"] for settings in composed}
    metrics = {
        settings["benchmark"]["name"]: {metric["name"]: metric for metric in settings["benchmark"]["metrics"]} for settings in composed
    }
    return Plan(tuple(cells), composed[0], models, metrics, suite)


def make_cell(settings: dict, prints: dict) -> Cell:
    """Make the cell of composed settings."""
    recipe = {key: value for key, value in settings["recipe"].items() if key != "_convert_"}
    return Cell(
        model=settings["model"],
        benchmark=settings["benchmark"],
        recipe=recipe,
        judge=settings["judge"],
        data=settings["profile"]["data"],
        cache=settings["profile"]["cache"],
        limit=settings["limit"],
        fingerprints=prints,
    )


def fingerprints(settings: dict) -> dict:
    """Return hashes of the local files behind settings; what comes from the hub has none.

    Raises:
        SettingsError: the rows or the clips of a local benchmark are missing.
    """
    prints = {}
    folder = Path(settings["model"]["pretrained"])
    if folder.is_absolute():
        prints["model"] = fingerprint_checkpoint(folder)
    data, benchmark = settings["profile"]["data"], settings["benchmark"]
    if data["rows"] is not None:
        rows, clips = rows_file(data, benchmark), Path(data["hf_home"]) / benchmark["clips"]
        for path in (rows, clips):
            if not path.exists():
                raise SettingsError(f"benchmark {benchmark['name']}: {path} is missing; see profile.data in configs/profile")
        prints |= {"rows": fingerprint_file(rows), "clips": fingerprint_clips(clips)}
    return prints


def rows_file(data: dict, benchmark: dict) -> Path:
    """Return the file with the local rows of a benchmark."""
    return Path(data["rows"]) / f"{benchmark['task']}.jsonl"


def expected_samples(cell: Cell) -> int | None:
    """Return how many samples a cell has, None where only the hub knows."""
    if cell.data["rows"] is None:
        return cell.limit
    rows = sum(1 for line in rows_file(cell.data, cell.benchmark).read_text(encoding="utf-8").splitlines() if line.strip())
    return rows if cell.limit is None else min(rows, cell.limit)

"""Cells to a table: every number with its interval, its difference to the baseline, or the reason why it is missing."""

from dataclasses import dataclass

from vidkv_eval.cell import Cell
from vidkv_eval.report.published import Published, published_table
from vidkv_eval.report.statistics import INTERVALS, paired_interval
from vidkv_eval.settings import PROJECT
from vidkv_eval.store import ResultStore
from vidkv_eval.suite import Column, Plan, Row, expected_samples


@dataclass(frozen=True)
class Number:
    """A measured mean.

    Attributes:
        score, low, high: mean and 95 % interval, in the unit of the column.
        delta, delta_low, delta_high: paired difference to the baseline; None in the baseline's own row or without it.
        samples: number of samples.
    """

    score: float
    low: float
    high: float
    delta: float | None
    delta_low: float | None
    delta_high: float | None
    samples: int


@dataclass(frozen=True)
class Entry:
    """One place of a table.

    Attributes:
        column: where it stands.
        number: what was measured, None where nothing was.
        missing: why nothing was measured.
        effective_bits: stored bits per element of this cell, None where nothing was measured.
        published: what the paper prints there, None where it prints nothing or the profile is not comparable.
    """

    column: Column
    number: Number | None
    missing: str
    effective_bits: float | None
    published: Published | None


@dataclass(frozen=True)
class Line:
    """One row of a model: `effective_bits` is over all its cells."""

    section: str | None
    row: Row
    entries: tuple[Entry, ...]
    effective_bits: float | None


@dataclass(frozen=True)
class Table:
    """A table and what its caption needs.

    Attributes:
        plan: what was to be measured.
        blocks: rows by name of the model.
        facts: what its numbers were measured with, label by label; several values where cells differ.
        done: cells behind it.
    """

    plan: Plan
    blocks: dict[str, list[Line]]
    facts: dict[str, list[str]]
    done: list[Cell]

    @property
    def notes(self) -> dict[str, str]:
        """Notes on published numbers with their source, by row label."""
        entries = [(line.row.label, entry.published) for lines in self.blocks.values() for line in lines for entry in line.entries]
        return {label: f"{published.note} ({published.source})" for label, published in entries if published and published.note}


def build_table(plan: Plan, store: ResultStore) -> Table:
    """Collect the numbers of a suite from a store.

    Args:
        plan: cells of a suite.
        store: where they lie.
    """
    comparable = plan.settings["profile"]["published"] and plan.suite.published is not None
    printed = published_table(plan.suite.published) if comparable else {}
    blocks = {
        model: [
            make_line(plan, store, model, section.label, row, printed)
            for section in plan.suite.sections_of(plan.profile)
            for row in section.rows
        ]
        for model in plan.models
    }
    done = [cell for cell in plan.cells if store.is_done(cell)]
    return Table(plan, blocks, measured_with([store.scores(cell) for cell in done]), done)


def make_line(plan: Plan, store: ResultStore, model: str, section: str | None, row: Row, printed: dict) -> Line:
    """Collect one row of one model."""
    entries, counted = [], {"bytes": 0, "elements": 0}
    for column in plan.suite.columns:
        cell = plan.cell(model, column.benchmark, row.recipe)
        published = printed.get((plan.models[model]["paper_name"], row.published, column.published))
        if not store.is_done(cell):
            entries.append(Entry(column, None, why_missing(cell, store), None, published))
            continue
        scores = store.scores(cell)
        baseline = plan.cell(model, column.benchmark, plan.suite.baseline)
        reference = store.scores(baseline) if row.recipe != plan.suite.baseline and store.is_done(baseline) else None
        number = make_number(plan.metrics[column.benchmark][column.metric], scores, reference)
        entries.append(Entry(column, number, "", scores["effective_bits"], published))
        for unit in counted:
            counted[unit] += scores["footprint"][f"key_{unit}"] + scores["footprint"][f"value_{unit}"]
    effective_bits = 8 * counted["bytes"] / counted["elements"] if counted["elements"] else None
    return Line(section, row, tuple(entries), effective_bits)


def make_number(metric: dict, scores: dict, reference: dict | None) -> Number:
    """Compute a mean, its interval and its paired difference to the baseline.

    Args:
        metric: settings of the metric: name, scale, interval.
        scores: of the cell.
        reference: scores of the baseline on the same samples, None in its own row or where it is missing.
    """
    name, scale = metric["name"], metric["scale"]
    values = scores["per_sample"][name]
    low, high = INTERVALS[metric["interval"]](values)
    delta = delta_low = delta_high = None
    if reference is not None:
        delta = scale * (scores["metrics"][name] - reference["metrics"][name])
        delta_low, delta_high = (scale * bound for bound in paired_interval(values, in_order(reference, name, scores["sample_ids"])))
    return Number(scale * scores["metrics"][name], scale * low, scale * high, delta, delta_low, delta_high, len(values))


def in_order(scores: dict, metric: str, sample_ids: list[int]) -> list[float]:
    """Return the values of a metric for the given samples."""
    values = dict(zip(scores["sample_ids"], scores["per_sample"][metric], strict=True))
    return [values[sample] for sample in sample_ids]


def why_missing(cell: Cell, store: ResultStore) -> str:
    """Say in words why a cell has no score."""
    state = store.state(cell)
    if state.kind == "failed":
        return f"failed: {state.reason}".replace(f"{PROJECT}/", "")
    if state.kind == "partial":
        samples = expected_samples(cell)
        return f"not finished: {state.answered} of {samples} samples" if samples else f"not finished: {state.answered} samples"
    return "not run"


def measured_with(scores: list[dict]) -> dict[str, list[str]]:
    """Collect what the scores were measured with; each label lists the different values in order of appearance."""
    facts: dict[str, dict[str, None]] = {label: {} for label in ("judge", "versions", "hardware", "commit", "measured")}
    for score in scores:
        environment = score["environment"]
        facts["judge"][judge_name(score["judge"])] = None
        versions = {"python": environment["python"]} | environment["packages"]
        facts["versions"][", ".join(f"{name} {version}" for name, version in versions.items() if version)] = None
        facts["hardware"][hardware_name(environment)] = None
        facts["commit"][commit_name(environment)] = None
    days = sorted({score["finished"][:10] for score in scores})
    facts["measured"] = dict.fromkeys([days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"] if days else [])
    return {label: list(values) for label, values in facts.items()}


def judge_name(judge: dict) -> str:
    """Name a judge with version and model."""
    version = f" version {judge['version']}" if judge["version"] else ""
    model = f", model {judge['model']}" if judge["model"] else ""
    return judge["name"] + version + model


def hardware_name(environment: dict) -> str:
    """Name processor or GPU and number of threads."""
    processor = f"{environment['cpu']}, {environment['threads']} thread(s) a process"
    return f"{environment['gpu']}; {processor}" if environment["gpu"] else processor


def commit_name(environment: dict) -> str:
    """Name the commit and say whether files differed from it."""
    if not environment["commit"]:
        return "unknown (not measured in a git checkout)"
    return environment["commit"][:12] + (" with uncommitted changes" if environment["dirty"] else "")

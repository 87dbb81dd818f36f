"""Where the cells of a plan stand, and how long the rest will take."""

from collections import Counter
from collections.abc import Sequence

from vidkv_eval.cell import Cell
from vidkv_eval.report.table import why_missing
from vidkv_eval.store import ResultStore
from vidkv_eval.suite import Plan, expected_samples


def describe_plan(plan: Plan, store: ResultStore) -> str:
    """List the cells of a plan with their state, and estimate the time that is left."""
    lines = [f"{cell.address}  {describe_cell(cell, store)}" for cell in plan.cells]
    counts = Counter(store.state(cell).kind for cell in plan.cells)
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in ("done", "partial", "failed", "missing"))
    return "\n".join([*lines, f"profile {plan.profile}: {len(plan.cells)} cells: {summary}", describe_time(plan, store)])


def describe_cell(cell: Cell, store: ResultStore) -> str:
    """Say where one cell stands."""
    state = store.state(cell)
    samples = state.answered if state.kind == "done" else expected_samples(cell)
    progress = f"{state.answered} of {samples if samples is not None else 'unknown'} samples"
    if state.kind == "failed":
        return f"{why_missing(cell, store)} ({progress})"
    return state.kind if state.kind == "missing" else f"{state.kind} ({progress})"


def describe_time(plan: Plan, store: ResultStore) -> str:
    """Estimate the time of the missing answers from the answers that the same model gave to the same benchmark."""
    missing = [cell for cell in plan.cells if not store.is_done(cell)]
    if not missing:
        return "nothing left to do"
    seconds, unknown = 0.0, set()
    for cell in missing:
        samples, pace = expected_samples(cell), mean_seconds(plan.cells, cell.group, store)
        if samples is None or pace is None:
            unknown.add(" on ".join(cell.group))
        else:
            seconds += pace * max(0, samples - len(store.answers(cell)))
    if unknown:
        return f"estimated time: unknown, nothing measured yet of {', '.join(sorted(unknown))}"
    workers = min(plan.settings["workers"] or 1, len({cell.group_id for cell in missing}))
    return f"estimated time: {duration(seconds / workers)} with {workers} worker(s), without loading and scoring"


def mean_seconds(cells: Sequence[Cell], group: tuple[str, str], store: ResultStore) -> float | None:
    """Return the mean time of an answer of one model to one benchmark, None before the first."""
    paces = [store.seconds_per_sample(cell) for cell in cells if cell.group == group]
    known = [pace for pace in paces if pace is not None]
    return sum(known) / len(known) if known else None


def duration(seconds: float) -> str:
    """Write a duration for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"

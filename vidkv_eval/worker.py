"""Worker: the process that answers and scores the cells of one group.

`python -m vidkv_eval.worker JOB.json` reports on its standard output, one JSON object a line; everything that libraries
print goes to standard error. It ends when its standard input closes, which happens when the run that started it dies.
"""

import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vidkv_eval.cell import Cell
from vidkv_eval.environment import describe_environment
from vidkv_eval.store import ResultStore

COUNTED = ("key_bytes", "value_bytes", "key_elements", "value_elements")


class Measurement:
    """The cells of one group on their way from missing to done.

    Attributes:
        failed: whether any cell failed.
    """

    def __init__(self, job: dict, report: Callable[[dict], None]):
        """Read a job.

        Args:
            job: what `Run.job` wrote.
            report: takes one event, a dictionary of plain values.
        """
        self.job, self.report = job, report
        self.store = ResultStore(Path(job["store"]), project=Path(job["project"]))
        self.cells = [Cell.from_config(config) for config in job["cells"]]
        self.failed = False

    def measure(self, open_session: Callable[..., Any], make_recipe: Callable[[dict], Any]) -> None:
        """Answer what is missing, then score.

        A failure is recorded in its cell and reported; the other cells go on.

        Args:
            open_session: makes a `Session` from model, benchmark, data, device, judge and limit.
            make_recipe: makes a `Recipe` from its settings.
        """
        with self.store.writing(self.job["group"]):
            try:
                first = self.cells[0]
                recipes = {key_of(cell): make_recipe(cell.recipe | {"name": key_of(cell)}) for cell in self.cells}
                session = open_session(
                    first.model, first.benchmark, first.data, device=self.job["device"], judge=judge_of(os.environ), limit=first.limit
                )
                samples = list(session.samples)
            except BaseException as error:
                self.fail(self.cells, error)
                return
            self.answer(session, samples, recipes)
            self.score(session, samples, recipes)

    def answer(self, session: Any, samples: Sequence, recipes: dict) -> None:
        """Let the recipes of each sample answer together, so that they share frames and prefill."""
        answered = {cell.address: self.store.answers(cell).keys() for cell in self.cells}
        unanswered = sum(sample.id not in answered[cell.address] for cell in self.cells for sample in samples)
        self.report({"event": "ready", "samples": len(samples), "unanswered": unanswered})
        for sample in samples:
            pending = {key_of(cell): cell for cell in self.cells if sample.id not in answered[cell.address]}
            while pending:
                try:
                    for answer in session.answer(sample.id, [recipes[name] for name in pending], self.cells[0].cache):
                        cell = pending[answer.recipe]
                        self.store.append(cell, record_of(sample, answer))
                        del pending[answer.recipe]
                        self.report({"event": "answer", "cell": cell.address, "sample": sample.id})
                    if pending:
                        raise RuntimeError(f"no answer to sample {sample.id} from {', '.join(pending)}")
                except BaseException as error:
                    # Recipes answer in turn: the first without an answer is the one that failed.
                    self.fail([pending.pop(next(iter(pending)))], error)
                    pending = {name: cell for name, cell in pending.items() if cell in self.cells}

    def score(self, session: Any, samples: Sequence, recipes: dict) -> None:
        """Score the cells whose answers are complete."""
        for cell in list(self.cells):
            try:
                self.store.finish(cell, self.scores(cell, session, samples, recipes[key_of(cell)]))
            except BaseException as error:
                self.fail([cell], error)
            else:
                self.report({"event": "done", "cell": cell.address})

    def scores(self, cell: Cell, session: Any, samples: Sequence, recipe: Any) -> dict:
        """Score one cell and collect what is recorded with its numbers."""
        answers = self.store.answers(cell)
        records = [answers[sample.id] for sample in samples]
        started = time.perf_counter()
        scores = session.score([record["text"] for record in records])
        for metric, values in scores.per_sample.items():
            if len(values) != len(records):
                raise RuntimeError(f"{metric} has {len(values)} values for {len(records)} samples")
        counted = {name: sum(record[name] for record in records) for name in COUNTED}
        return {
            "samples": len(records),
            "metrics": scores.metrics,
            "effective_bits": bits(counted, "key", "value"),
            "key_effective_bits": bits(counted, "key"),
            "value_effective_bits": bits(counted, "value"),
            "key_bits": recipe.key_bits,
            "value_bits": recipe.value_bits,
            "footprint": counted,
            "prompt_tokens": sum(record["prompt_tokens"] for record in records),
            "output_tokens": sum(record["output_tokens"] for record in records),
            "answer_seconds": round(sum(record["seconds"] for record in records), 3),
            "score_seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "judge": {key: cell.judge[key] for key in ("name", "version", "model")},
            "environment": describe_environment(Path(self.job["project"]), device=self.job["device"], threads=self.job["threads"]),
            "sample_ids": [sample.id for sample in samples],
            "per_sample": scores.per_sample,
            "reviews": scores.reviews,
        }

    def fail(self, cells: Sequence[Cell], error: BaseException) -> None:
        """Record why cells could not be finished; an interruption is no failure and goes on."""
        if isinstance(error, KeyboardInterrupt):
            raise error
        self.failed = True
        reason = str(error).strip() or type(error).__name__
        text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        for cell in list(cells):
            self.store.fail(cell, reason, text)
            self.cells.remove(cell)
            self.report({"event": "failed", "cell": cell.address, "reason": reason})


def key_of(cell: Cell) -> str:
    """Return the name of a cell among the cells of its group; two of them may be settings of one recipe."""
    return cell.address.rpartition("/")[2]


def judge_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return how to reach the judge; the key travels in the environment and never in a file."""
    return {"url": environment["OPENAI_API_URL"], "model": environment["MODEL_VERSION"], "api_key": environment["OPENAI_API_KEY"]}


def record_of(sample: Any, answer: Any) -> dict:
    """Return the line of one answer in samples.jsonl."""
    return {
        "sample": sample.id,
        "video": os.path.basename(sample.video),
        "question": sample.question,
        "target": sample.target,
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "seconds": round(answer.seconds, 4),
        **{name: getattr(answer, name) for name in COUNTED},
    }


def bits(counted: dict, *parts: str) -> float:
    """Return stored bits per element of keys, of values, or of both."""
    stored = sum(counted[f"{part}_bytes"] for part in parts)
    return 8 * stored / sum(counted[f"{part}_elements"] for part in parts)


def claim_output() -> Callable[[dict], None]:
    """Keep standard output for events: from now on what others print there goes to standard error."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def report(event: dict) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    return report


def end_with_parent() -> None:
    """End this process when its standard input closes."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(open_session: Callable[..., Any] | None = None, make_recipe: Callable[[dict], Any] | None = None) -> int:
    """Measure the group that the file in the first argument describes.

    Args:
        open_session: what opens sessions, None for lmms-eval.
        make_recipe: what makes recipes, None for `Recipe.from_config`.
    Returns:
        0, or 1 where a cell failed.
    """
    report = claim_output()
    end_with_parent()
    if open_session is None:
        # These load torch and lmms-eval, which print: only after standard output was claimed.
        from vidkv_eval.harness import Session
        from vidkv_eval.recipe import Recipe

        open_session, make_recipe = Session, Recipe.from_config
    measurement = Measurement(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), report)
    measurement.measure(open_session, make_recipe)
    return int(measurement.failed)


if __name__ == "__main__":
    sys.exit(main())

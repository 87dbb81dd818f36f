"""Scoring of recorded answers by lmms-eval. To be imported after `torchvision_cpu.install()`."""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import Task
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from vidkv_eval.harness.results import JudgeFailed, Scores


class RecordedAnswers(lmms):
    """A model that says again what was recorded."""

    is_simple = False

    def __init__(self, texts: Sequence[str]):
        super().__init__()
        self._texts = texts

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the recorded answer to each request."""
        return [self._texts[request.doc_id] for request in requests]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: answers to several rounds are not recorded."""
        raise NotImplementedError("only tasks of one round can be scored from recorded answers")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: likelihoods are not recorded."""
        raise NotImplementedError("only tasks of type generate_until can be scored from recorded answers")

    def clean(self) -> None:
        """Do nothing: there is no model, and collecting garbage to free one takes a second."""


def score(task: Task, texts: Sequence[str], *, scratch: Path) -> Scores:
    """Let lmms-eval process and aggregate the answers to the first samples of a task.

    Raises:
        JudgeFailed: the judge gave no verdict on a sample, or one that the task cannot read.
    """
    results = simple_evaluate(
        model=RecordedAnswers(texts),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=len(texts),
        bootstrap_iters=0,
        cli_args=argparse.Namespace(output_path=str(scratch), process_with_media=True, reasoning_tags=None),
    )
    name = task.config.task
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    if [sample["doc_id"] for sample in samples] != list(range(len(texts))):
        raise RuntimeError(f"{len(texts)} answers were given to task {name}, and lmms-eval scored {len(samples)}")
    metrics = [entry["metric"] for entry in task.config.metric_list]
    for sample in samples:
        for metric in metrics:
            _demand_verdict(name, sample["doc_id"], sample[metric])
    return Scores(
        metrics={metric: _aggregate(results["results"][name], metric) for metric in metrics},
        per_sample={metric: [_value(metric, sample[metric]) for sample in samples] for metric in metrics},
        reviews=[next((_review(sample[metric]) for metric in metrics if _review(sample[metric]) is not None), "") for sample in samples],
    )


def _aggregate(results: dict, metric: str) -> float:
    """The value of a metric; its key also names the filter of the answers."""
    (key,) = [key for key in results if key.partition(",")[0] == metric]
    return float(results[key])


def _review(entry: object) -> str | None:
    return entry.get("review") if isinstance(entry, dict) else None


def _value(metric: str, entry: object) -> float:
    """The value of one sample, as the task's aggregate counts it: scores are cut to integers, and only "yes" is right."""
    if isinstance(entry, bool | int | float):
        return float(entry)
    if isinstance(entry, dict) and "acc" in entry:
        return float(entry["acc"] == "yes")
    if isinstance(entry, dict) and "score" in entry:
        return float(entry["score"])
    raise NotImplementedError(f"metric {metric} gives {entry!r} for a sample; `_value` in scoring.py must learn to read it")


def _demand_verdict(task: str, sample: int, entry: object) -> None:
    """Raise unless the review of a sample, if the task asks for one, is what the task can read."""
    review = _review(entry)
    if review is None:
        return
    try:
        verdict = ast.literal_eval(review)
    except (SyntaxError, ValueError):
        verdict = None
    is_readable = isinstance(verdict, dict) and isinstance(verdict.get("score"), int | float) and 0 <= verdict["score"] <= 5
    if "acc" in entry:
        is_readable = is_readable and verdict.get("pred") in ("yes", "no")
    if not is_readable:
        raise JudgeFailed(
            f"the judge gave no readable verdict on sample {sample} of {task}: {review!r}; check that it answers, then score again"
        )

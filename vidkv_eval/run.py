"""Run: have the missing cells of a plan measured, one process per (model, benchmark), and say what failed."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from vidkv_eval.cell import Cell
from vidkv_eval.environment import gpu_names
from vidkv_eval.judge import judge_environment
from vidkv_eval.settings import PROJECT
from vidkv_eval.store import ResultStore
from vidkv_eval.suite import Plan, expected_samples

WORKER = (sys.executable, "-m", "vidkv_eval.worker")
SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class Group:
    """Cells that are answered together.

    Attributes:
        name: model, benchmark and first digits of what else they share.
        cells: the missing ones.
        samples: samples of each, None where only the worker will know.
        unanswered: answers that are missing, as far as known.
    """

    name: str
    cells: tuple[Cell, ...]
    samples: int | None
    unanswered: int


@dataclass
class Worker:
    """A running process and the group it measures."""

    group: Group
    process: subprocess.Popen
    log: Path
    slot: int
    unfinished: dict[str, Cell] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        measured: addresses of the cells that became done.
        failed: reason by address.
        logs: logs of groups in which something failed.
    """

    measured: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    logs: list[Path] = field(default_factory=list)


def measure(plan: Plan, worker: Sequence[str] = WORKER) -> Outcome:
    """Measure the cells of a plan that are not done.

    Args:
        plan: cells and settings.
        worker: command that measures the group described by the file named after it.
    Raises:
        JudgeUnavailable: no judge answers; no process was started.
    """
    store = open_runs(plan)
    groups = missing_groups(plan.cells, store)
    if not groups:
        return Outcome()
    with judge_environment(plan.settings["judge"]) as judged:
        for group in groups:
            for cell in group.cells:
                store.begin(cell)
        return Run(plan, store, worker, judged).measure(groups)


def open_runs(plan: Plan) -> ResultStore:
    """Open the store of this machine."""
    return ResultStore(plan.runs, project=PROJECT)


def missing_groups(cells: Sequence[Cell], store: ResultStore) -> list[Group]:
    """Collect cells that are not done into groups, in the order of the plan."""
    members: dict[str, list[Cell]] = {}
    for cell in cells:
        if not store.is_done(cell):
            members.setdefault("-".join((*cell.group, cell.group_id[:8])), []).append(cell)
    groups = []
    for name, missing in members.items():
        samples = expected_samples(missing[0])
        unanswered = sum(max(0, samples - len(store.answers(cell))) for cell in missing) if samples is not None else 0
        groups.append(Group(name, tuple(missing), samples, unanswered))
    return groups


class Run:
    """The processes of one run and what they report."""

    def __init__(self, plan: Plan, store: ResultStore, command: Sequence[str], judged: dict[str, str]):
        self.settings, self.store, self.command, self.judged = plan.settings, store, command, judged
        self.logs = plan.runs / "logs"
        self.device, self.gpus = find_device(plan.settings["device"])
        self.slots = plan.settings["workers"] or max(1, len(self.gpus))
        self.outcome = Outcome()
        self.events: queue.Queue[tuple[Worker, dict | None]] = queue.Queue()

    def measure(self, groups: list[Group]) -> Outcome:
        """Measure groups, some at a time, until none is left."""
        self.logs.mkdir(parents=True, exist_ok=True)
        waiting, free, running = list(groups), list(range(self.slots)), []
        progress = Progress(sum(group.unanswered for group in groups), sum(len(group.cells) for group in groups))
        try:
            while waiting or running:
                while waiting and free:
                    running.append(self.start(waiting.pop(0), free.pop(0)))
                worker, event = self.events.get()
                if event is None:
                    running.remove(worker)
                    free.append(worker.slot)
                    self.end(worker, progress)
                else:
                    self.note(worker, event, progress)
        finally:
            for worker in running:
                worker.process.kill()
                worker.process.wait()
            progress.close()
        return self.outcome

    def start(self, group: Group, slot: int) -> Worker:
        """Start the process of a group; it ends by itself when this process does, because its input closes."""
        job = self.logs / f"{group.name}.job.json"
        log = self.logs / f"{group.name}.log"
        job.write_text(json.dumps(self.job(group), indent=1), encoding="utf-8")
        with log.open("w") as errors:
            process = subprocess.Popen(
                [*self.command, str(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | self.environment(slot),
                text=True,
                start_new_session=True,
            )
        worker = Worker(group, process, log, slot, {cell.address: cell for cell in group.cells})
        threading.Thread(target=self.listen, args=(worker,), daemon=True).start()
        return worker

    def listen(self, worker: Worker) -> None:
        """Pass on what a worker reports, and None when it has ended."""
        for line in worker.process.stdout:
            self.events.put((worker, json.loads(line)))
        worker.process.wait()
        self.events.put((worker, None))

    def job(self, group: Group) -> dict:
        """Describe the work of a group as plain values."""
        return {
            "store": str(self.store.root),
            "project": str(PROJECT),
            "group": group.name,
            "device": self.device,
            "threads": self.settings["threads"],
            "cells": [cell.to_config() for cell in group.cells],
        }

    def environment(self, slot: int) -> dict[str, str]:
        """Return the variables of a worker, which libraries read when they are imported."""
        threads = str(self.settings["threads"])
        variables = self.judged | self.settings["profile"]["environment"] | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return variables

    def note(self, worker: Worker, event: dict, progress: "Progress") -> None:
        """Take in one report of a worker."""
        if event["event"] == "ready":
            progress.expect(event["unanswered"] - worker.group.unanswered)
        elif event["event"] == "answer":
            progress.answered()
        elif event["event"] == "done":
            worker.unfinished.pop(event["cell"])
            self.outcome.measured.append(event["cell"])
            progress.finished()
        elif event["event"] == "failed":
            worker.unfinished.pop(event["cell"])
            self.fail(worker, event["cell"], event["reason"], progress)

    def end(self, worker: Worker, progress: "Progress") -> None:
        """Mark the cells that a process left unfinished."""
        code = worker.process.returncode
        reason = f"the worker was killed by signal {-code}" if code < 0 else f"the worker ended early with exit code {code}"
        for address, cell in list(worker.unfinished.items()):
            self.store.fail(cell, f"{reason}; see {worker.log}")
            self.fail(worker, address, reason, progress)

    def fail(self, worker: Worker, address: str, reason: str, progress: "Progress") -> None:
        """Remember a failure."""
        self.outcome.failed[address] = reason
        if worker.log not in self.outcome.logs:
            self.outcome.logs.append(worker.log)
        progress.say(f"failed: {address}: {reason}")


def find_device(wanted: str) -> tuple[str, list[str]]:
    """Return the device of the workers and the GPUs that they share out.

    Args:
        wanted: cpu, cuda, or auto for cuda where there is a GPU.
    """
    if wanted == "cpu":
        return "cpu", []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [gpu for gpu in visible.split(",") if gpu] if visible is not None else [str(index) for index in range(len(gpu_names()))]
    if wanted == "auto" and not gpus:
        return "cpu", []
    return ("cuda:0" if wanted in ("auto", "cuda") else wanted), gpus


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, answers: int, cells: int):
        self.cells, self.cells_done = cells, 0
        self.interactive = sys.stderr.isatty()
        self.started = self.said = time.monotonic()
        self.count, self.total = 0, answers
        self.bar = tqdm(total=answers, unit="answer", disable=not self.interactive, desc=f"0/{cells} cells")

    def expect(self, more: int) -> None:
        """Take in how many answers more there will be than was thought."""
        self.total += more
        self.bar.total = self.total
        self.bar.refresh()

    def answered(self) -> None:
        """Count an answer."""
        self.count += 1
        self.bar.update()
        self.tell()

    def finished(self) -> None:
        """Count a cell."""
        self.cells_done += 1
        self.bar.set_description(f"{self.cells_done}/{self.cells} cells")
        self.tell()

    def tell(self) -> None:
        """Print a line where there is no bar and the last one is old."""
        now = time.monotonic()
        if not self.interactive and now - self.said >= SECONDS_BETWEEN_LINES:
            self.said = now
            elapsed = now - self.started
            meter = tqdm.format_meter(self.count, self.total, elapsed, ncols=100, ascii=True, unit="answer")
            print(f"{self.cells_done}/{self.cells} cells: {meter}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()

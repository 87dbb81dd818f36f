"""ResultStore: the only reader and writer of measured cells.

Layout: `<root>/cells/<model>/<benchmark>/<recipe>-<id8>/` with

- `cell.json`      the settings of the cell,
- `samples.jsonl`  one line an answer, appended the moment it exists,
- `scores.json`    metrics, footprint, environment; its presence means done,
- `failed.json`    why the last attempt stopped; the cell counts as missing.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vidkv_eval.cell import Cell


class StoreError(RuntimeError):
    """A result would be overwritten, or a file of the store cannot be read."""


@dataclass(frozen=True)
class CellState:
    """Where a cell stands.

    Attributes:
        kind: "done", "failed", "partial" or "missing".
        answered: samples with an answer.
        reason: why the last attempt failed, empty otherwise.
    """

    kind: str
    answered: int
    reason: str = ""


class ResultStore:
    """Cells below one folder."""

    def __init__(self, root: Path, project: Path | None = None):
        """Open a store; folders appear with the first cell.

        Args:
            root: folder of the store.
            project: paths below this folder are recorded relative to it.
        """
        self.root = Path(root)
        self.project = project

    def path(self, cell: Cell) -> Path:
        """Return the folder of a cell."""
        return self.root / "cells" / cell.address

    def is_done(self, cell: Cell) -> bool:
        """Say whether a cell is answered and scored."""
        return (self.path(cell) / "scores.json").exists()

    def state(self, cell: Cell) -> CellState:
        """Return where a cell stands."""
        answered = len(self.answers(cell))
        if self.is_done(cell):
            return CellState("done", answered)
        failure = self.path(cell) / "failed.json"
        if failure.exists():
            return CellState("failed", answered, read_json(failure)["reason"])
        return CellState("partial" if answered else "missing", answered)

    def begin(self, cell: Cell) -> None:
        """Make a cell ready for answers: settings written, an earlier failure forgotten.

        Answers of a cell that differs only in judge or number of samples are taken over.
        """
        self._refuse_done(cell)
        folder = self.path(cell)
        folder.mkdir(parents=True, exist_ok=True)
        described = folder / "cell.json"
        if described.exists() and read_json(described)["id"] != cell.id:
            raise StoreError(f"{folder} belongs to another cell with the same first digits of its id; move it away")
        write_json(described, {"id": cell.id, "answers_id": cell.answers_id} | self._portable(cell.to_config()))
        (folder / "failed.json").unlink(missing_ok=True)
        if not (folder / "samples.jsonl").exists():
            self._take_over_answers(cell)

    def answers(self, cell: Cell) -> dict[int, dict]:
        """Return the answers of a cell by sample; a line that a kill tore off is left out."""
        path = self.path(cell) / "samples.jsonl"
        return {record["sample"]: record for record in read_lines(path)} if path.exists() else {}

    def append(self, cell: Cell, record: dict) -> None:
        """Append one answer and hand it to the system before returning.

        Args:
            cell: the cell, begun.
            record: plain values with the key `sample`.
        """
        self._refuse_done(cell)
        with (self.path(cell) / "samples.jsonl").open("a+b") as file:
            drop_torn_line(file)
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def finish(self, cell: Cell, scores: dict) -> None:
        """Write the scores of a cell, which makes it done."""
        self._refuse_done(cell)
        write_json(self.path(cell) / "scores.json", scores)
        (self.path(cell) / "failed.json").unlink(missing_ok=True)

    def fail(self, cell: Cell, reason: str, traceback: str = "") -> None:
        """Record why a cell could not be finished; its answers stay."""
        self._refuse_done(cell)
        self.path(cell).mkdir(parents=True, exist_ok=True)
        write_json(self.path(cell) / "failed.json", {"reason": reason, "traceback": traceback})

    def scores(self, cell: Cell) -> dict:
        """Return the scores of a done cell."""
        return read_json(self.path(cell) / "scores.json")

    def seconds_per_sample(self, cell: Cell) -> float | None:
        """Return the mean time of the answers of a cell, None where there is none."""
        seconds = [record["seconds"] for record in self.answers(cell).values()]
        return sum(seconds) / len(seconds) if seconds else None

    def copy_done(self, cells: list[Cell], target: "ResultStore") -> None:
        """Copy done cells into another store, in place of what was copied there before.

        So the cells beside a table are those it was made from, with their hardware and versions.
        """
        for cell in cells:
            if not target.is_done(cell) or target.scores(cell) != self.scores(cell):
                folder = target.path(cell)
                shutil.rmtree(folder, ignore_errors=True)
                unfinished = folder.with_name(folder.name + ".part")
                shutil.rmtree(unfinished, ignore_errors=True)
                shutil.copytree(self.path(cell), unfinished)
                unfinished.rename(folder)

    def forget(self, address: str) -> None:
        """Remove a cell from the store by its address."""
        shutil.rmtree(self.root / "cells" / address, ignore_errors=True)

    @contextmanager
    def writing(self, group: str) -> Iterator[None]:
        """Be the only process that writes the cells of a group.

        Raises:
            StoreError: another process is writing them.
        """
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / group).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"another run is writing {group} in {self.root}; wait for it, or set another paths.runs") from None
            yield

    def _refuse_done(self, cell: Cell) -> None:
        if self.is_done(cell):
            raise StoreError(f"{self.path(cell)} is done and is never overwritten; move the folder away to measure it again")

    def _take_over_answers(self, cell: Cell) -> None:
        for described in sorted(self.path(cell).parent.glob(f"{cell.recipe_name}-*/cell.json")):
            samples = described.with_name("samples.jsonl")
            if described.parent != self.path(cell) and samples.exists() and read_json(described)["answers_id"] == cell.answers_id:
                for record in read_lines(samples):
                    if cell.limit is None or record["sample"] < cell.limit:
                        self.append(cell, record)
                return

    def _portable(self, value: object) -> object:
        if isinstance(value, dict):
            return {key: self._portable(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._portable(item) for item in value]
        if isinstance(value, str) and self.project is not None and value.startswith(f"{self.project}/"):
            return Path(value).relative_to(self.project).as_posix()
        return value


def read_json(path: Path) -> dict:
    """Return the content of a JSON file of the store."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StoreError(f"{path} is not valid JSON ({error}); move its folder away") from error


def read_lines(path: Path) -> Iterator[dict]:
    """Yield the complete lines of a JSON lines file; what stands after the last line end was torn by a kill."""
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise StoreError(f"{path}, line {number} is not valid JSON ({error}); remove that line") from error


def drop_torn_line(file) -> None:
    """Cut an open file after its last line end and stand at its end."""
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its name and rename it into place."""
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)

"""The numbers that the paper prints, from published.csv."""

import csv
from dataclasses import dataclass
from pathlib import Path

PUBLISHED = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class Published:
    """One printed number.

    Attributes:
        score: as printed.
        note: what is doubtful about it, empty where nothing is.
        source: paper version and table.
    """

    score: float
    note: str
    source: str


def published_table(table: str, path: Path = PUBLISHED) -> dict[tuple[str, str, str], Published]:
    """Read the printed numbers of one table.

    Args:
        table: name in the column `table`.
        path: the file.
    Returns:
        Numbers by (model, row, "benchmark/metric"), with the names of the file; rows without a name of their own are left out.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (entry["model"], entry["row"], f"{entry['benchmark']}/{entry['metric']}"): Published(
                float(entry["score"]), entry["note"], entry["source"]
            )
            for entry in csv.DictReader(file)
            if entry["table"] == table and entry["row"]
        }

"""Put the abridged Table 1 of the mini profile into README.md, from the recorded csv.

    python scripts/update_readme.py [--check]

With --check nothing is written, and the exit code is 1 if README.md and the record differ.
"""

import csv
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- table1: made by scripts/update_readme.py -->", "<!-- end of table1 -->"
SHOWN = {"video_dc": "gpt_eval_score", "movie_chat": "gpt_eval_acc"}


def abridged(rows: list[dict[str, str]]) -> str:
    """One line a recipe: both models, value and 95 % interval, without the differences."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    numbers = {(row["recipe"], row["model"], row["benchmark"]): row for row in rows if SHOWN[row["benchmark"]] == row["metric"]}
    heading = ["row", "recipe"]
    for model in models:
        heading += [f"{model}: effective bits", "VideoDC (0 to 5)", "MovieChat (%)"]
    lines = [heading, ["---"] * len(heading)]
    for recipe, label in dict.fromkeys((row["recipe"], row["row"]) for row in rows):
        cells = [label, f"`{recipe}`"]
        for model in models:
            video, movie = (numbers[recipe, model, benchmark] for benchmark in SHOWN)
            cells += [both_bits(video, movie), value(video, 2), value(movie, 0)]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def both_bits(video: dict[str, str], movie: dict[str, str]) -> str:
    """Effective bits of the two suites; answers of different length leave residuals of different weight."""
    return f"{float(video['effective_bits']):.2f}, {float(movie['effective_bits']):.2f}"


def value(row: dict[str, str], digits: int) -> str:
    score, low, high = (f"{float(row[name]):.{digits}f}" for name in ("score", "ci_low", "ci_high"))
    return f"{score} [{low}, {high}]"


def main() -> int:
    with (PROJECT / "results" / "mini" / "tables" / "table1.csv").open(encoding="utf-8") as file:
        table = abridged(list(csv.DictReader(file)))
    readme = PROJECT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    updated = f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
    if "--check" in sys.argv:
        return int(updated != text)
    readme.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Do training seeds agree? A table of the recipe scores in several training.json files.

    python scripts/compare_seeds.py results/mini/training results/mini/seeds.md

The files are called MODEL_seedN.json; scripts/train_mini.py writes them as training.json beside the weights.
"""

import json
import sys
from pathlib import Path

TASKS = ("description", "question")


def main() -> None:
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*_seed*.json"))}
    columns = [(name, task) for name in reports for task in TASKS]
    lines = [
        "# Recipes on models from different training seeds",
        "",
        "Share of facts right, 0 to 100, with 1.96 standard errors, on unseen scenes straight after training (frames that imitate H.264,",
        "stock `generate`, batch of 64). The shipped checkpoints are those of seed 0, chosen before the scores were known. Read along",
        "the rows: what differs between seeds is a property of one model, not of a recipe.",
        "",
        "| recipe | " + " | ".join(f"{name.replace('_seed', ', seed ')}: {task}" for name, task in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    recipes = next(iter(reports.values()))["scores"]
    for recipe in recipes:
        cells = [reports[name]["scores"][recipe] for name, _ in columns]
        values = [f"{cell[task]:.1f} ± {cell[task + '_ci95']:.1f}" for cell, (_, task) in zip(cells, columns, strict=True)]
        lines.append(f"| {recipe} | {' | '.join(values)} |")
    lines.append("")
    for name, report in reports.items():
        versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
        work = f"{report['steps']} steps of {report['settings']['batch']} clips in {report['seconds']:.0f} s"
        lines.append(f"- {name}: {work}, two models at a time on one {report['hardware']}; {versions}; {report['scores_note']}")
    lines.append("- Made by `python scripts/compare_seeds.py results/mini/training results/mini/seeds.md`")
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Render the clips of the mini data sets and write their rows.

    python scripts/make_mini_data.py OUTPUT_FOLDER [--clips 48]

The committed data are in vidkv_eval/mini/assets; the same command gives the same rows, and the same clips with the same
PyAV and torch versions.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from vidkv_eval.mini.datasets import CLIPS, SUITES, write_suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips of each suite")
    arguments = parser.parse_args()
    for suite in tqdm(SUITES, unit="suite"):
        write_suite(suite, arguments.output, arguments.clips)


if __name__ == "__main__":
    main()

"""Write a checkpoint with the true sizes of a 7B model and random weights.

    python scripts/make_random_checkpoint.py llava_onevision_7b OUTPUT_FOLDER
    vidkv run profile=mini model=llava_onevision_7b model.pretrained=OUTPUT_FOLDER device=cuda limit=1

It shows that the real model will load, fit and run on a machine; its answers mean nothing. 16 GB; seconds on a GPU.
"""

import argparse
import time
from pathlib import Path

import torch

from vidkv_eval import torchvision_cpu

torchvision_cpu.install()  # before anything imports transformers

from vidkv_eval.mini.full_size import FAMILIES, write_checkpoint  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=FAMILIES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the true model, for machines without a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    started = time.perf_counter()
    count = write_checkpoint(arguments.model, arguments.output, device=arguments.device, layers=arguments.layers, seed=arguments.seed)
    print(f"{arguments.output}: {count} parameters, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()

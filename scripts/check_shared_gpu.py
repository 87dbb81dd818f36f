"""Does the attention kernel give the same result each time while several processes share a GPU?

    python scripts/check_shared_gpu.py [--processes 12] [--seconds 10]

Each process launches attention over the same packed layer again and again, and counts, on the device, launches whose result is not the
bits of its first one. Beside it, as a control: a process of plain matrix products each. Prints a line for each process; the exit status is
1 if a launch of attention differed. Nothing should: kernels/NOTES.md has the error that this found.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable

import torch

from vidkv_kernels import attend_cuda
from vidkv_kernels.fragment_history import FragmentHistory
from vidkv_kernels.packed import Segment
from vidkv_kernels.random_layer import random_layer

QUERY_HEADS, HEADS, WIDTH, HISTORY, RESIDUAL = 14, 2, 128, 1120, 60
SEGMENTS = (Segment(64, 2, "minimum"), Segment(64, 1, "mean"))  # as VidKV 1.5 scaled stores keys
AT_ONCE, SYNCHRONIZED_EVERY = 200, 10
STEPS_OF_PRODUCTS = 5


def make_attention(generator: torch.Generator) -> Callable[[], torch.Tensor]:
    layer = random_layer(generator, torch.float16, [HISTORY], [RESIDUAL], heads=HEADS, width=WIDTH, segments=SEGMENTS)
    query = torch.randn(1, QUERY_HEADS, 1, WIDTH, generator=generator, device="cuda").half()
    attention = attend_cuda.Attend(FragmentHistory.from_packed(layer.keys, layer.values), layer.residual, QUERY_HEADS, WIDTH**-0.5)
    return lambda: attention(query)


def make_products(generator: torch.Generator) -> Callable[[], torch.Tensor]:
    width = QUERY_HEADS * WIDTH
    weights = [torch.randn(width, width, generator=generator, device="cuda").half() * width**-0.5 for _ in range(STEPS_OF_PRODUCTS)]
    states = torch.randn(1, width, generator=generator, device="cuda").half()

    def multiply() -> torch.Tensor:
        result = states
        for weight in weights:
            result = result @ weight
        return result

    return multiply


WORKS = {"attention": make_attention, "matrix products": make_products}


@torch.no_grad()
def repeat(name: str, seconds: float, found: multiprocessing.Queue) -> None:
    """Repeat a work for some seconds; report its name, how often it was done, differed, and was not finite."""
    call = WORKS[name](torch.Generator("cuda").manual_seed(0))
    first = call().clone()
    different, not_finite = torch.zeros(2, dtype=torch.int64, device="cuda")
    until, done = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        for _ in range(AT_ONCE):
            result = call()
            different += (result != first).any()
            not_finite += (~result.isfinite()).any()
        done += AT_ONCE
        if done % (AT_ONCE * SYNCHRONIZED_EVERY) == 0:
            torch.cuda.synchronize()
    found.put((name, done, int(different), int(not_finite)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is visible to torch")
    context = multiprocessing.get_context("spawn")
    differing = 0
    for name in WORKS:
        found = context.Queue()
        processes = [context.Process(target=repeat, args=(name, arguments.seconds, found)) for _ in range(arguments.processes)]
        for process in processes:
            process.start()
        for _ in processes:
            what, done, different, not_finite = found.get()
            print(f"{what}: {done} times, {different} different, {not_finite} not finite", flush=True)
            differing += different if name == "attention" else 0
        for process in processes:
            process.join()
    if differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

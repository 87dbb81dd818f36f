"""How long it takes to quantize the prompt of a 7B model on this CPU, and how much memory that needs beside what is stored.

    python scripts/bench_quantize.py [OUTPUT.md]

One prompt cache of LLaVA-OneVision 7B: 28 layers, 4 key/value heads, 6,304 tokens, width 128, bfloat16 keys and values. Each
recipe runs in a process of its own: 64 tokens of a layer to warm up, then all layers, three times. Extra memory is the peak of the process
above what it held before the first layer plus what the cache stores; the largest tensor is the largest one made on the way, of
all results of torch operations in one layer.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vidkv_eval import torchvision_cpu

torchvision_cpu.install()  # before anything imports transformers

from vidkv_eval.cache import QuantizedCache  # noqa: E402
from vidkv_eval.environment import describe_environment  # noqa: E402
from vidkv_eval.prompt import Prompt  # noqa: E402
from vidkv_eval.quant.marks import TokenMarks  # noqa: E402
from vidkv_eval.recipe import load_recipe  # noqa: E402

PROJECT = Path(__file__).resolve().parents[1]
LAYERS, HEADS, TOKENS, WIDTH = 28, 4, 6304, 128
RUNS = 3
RECIPES = (
    "fp16",
    "kivi_k2_v2",
    "vidkv_k200_v200",
    "vidkv_k150_v158_published",
    "vidkv_k150_v158_scaled",
    "vidkv_k150_v166_scaled",
    "vidkv_k150_v158_released",
    "ours_k182_v158",
)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returned; views count as what they show."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result


def make_cache(name: str) -> QuantizedCache:
    cache = QuantizedCache(load_recipe(name), LAYERS)
    visual = torch.zeros(TOKENS, dtype=torch.bool)
    visual[14:-17] = True
    cache.describe_prompt(Prompt((0,), (TokenMarks(visual, torch.rand(TOKENS, generator=torch.Generator().manual_seed(0))),)))
    return cache


def measure(name: str) -> dict[str, float]:
    """Measure a recipe in this process."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, HEADS, TOKENS, WIDTH, generator=generator).bfloat16() for _ in range(2))
    make_cache(name).update(key[:, :, :64], value[:, :, :64], 0)
    before = psutil.Process().memory_info().rss
    seconds = []
    for _ in range(RUNS):
        cache = make_cache(name)
        started = time.perf_counter()
        for layer in range(LAYERS):
            cache.update(key, value, layer)
        seconds.append(time.perf_counter() - started)
        stored = sum(cache.footprint().__dict__[f"{side}_bytes"] for side in ("key", "value"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with LargestTensor() as largest:
        make_cache(name).update(key, value, 0)
    return {
        "seconds": statistics.median(seconds),
        "slowest": max(seconds),
        "stored": stored,
        "extra": max(0, peak - before - stored),
        "largest": largest.nbytes,
        "bits": cache.footprint().effective_bits,
    }


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    layer_bytes = 2 * HEADS * TOKENS * WIDTH * 4
    lines = [
        "# Quantizing one 7B prompt on a CPU",
        "",
        " ".join(__doc__.split("\n\n")[-1].split()),
        "",
        f"Keys and values of one layer in float32 are {layer_bytes / 1e6:.1f} MB; the full-precision cache is "
        f"{LAYERS * layer_bytes / 2e6:.0f} MB in bfloat16.",
        "",
        "| recipe | seconds, median of 3 (slowest) | stored, MB | effective bits | extra memory at the peak, MB | largest tensor, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in RECIPES:
        found = json.loads(subprocess.run([sys.executable, __file__, "--measure", name], check=True, capture_output=True, text=True).stdout)
        lines.append(
            f"| `{name}` | {found['seconds']:.2f} ({found['slowest']:.2f}) | {found['stored'] / 1e6:.1f} | {found['bits']:.3f} "
            f"| {found['extra'] / 1e6:.0f} | {found['largest'] / 1e6:.1f} |"
        )
        print(lines[-1], file=sys.stderr)
    environment = describe_environment(PROJECT, device="cpu", threads=torch.get_num_threads())
    lines += [
        "",
        f"- Hardware: {environment['cpu']}, {psutil.cpu_count()} cores, {torch.get_num_threads()} threads",
        f"- Versions: torch {torch.__version__}",
        f"- Measured: {datetime.now(UTC).date()}; made by `python scripts/bench_quantize.py results/quantize.md`",
    ]
    print("\n".join(lines))
    if output:
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main()

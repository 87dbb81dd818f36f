"""Time whole decode steps of a 7B model on this GPU: `python scripts/bench_decode.py results` writes decode.csv and decode.md there.

The text decoder of LLaVA-OneVision 7B (Qwen2-7B: 28 layers, 28 query and 4 key/value heads, width 128) with random weights in
bfloat16, stock Transformers code in eager mode, one new token for each sequence of the batch. Caches are filled with random
normal keys and values, not by a prefill. Full precision writes new tokens into a preallocated buffer and attends with SDPA, once
with the flash kernel and once with whatever PyTorch chooses; recipes run with attention `fused` and are compared with the faster of
both. The same seeded states for every provider.

`--memory 80` adds, at 32K tokens, the largest batch of each provider whose weights, cache and a tenth of reserve fit into 80 GB.
Peak memory is what PyTorch allocated during the timed steps.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from vidkv_eval.attention import use_attention
from vidkv_eval.cache import QuantizedCache
from vidkv_eval.mini.full_size import QWEN2_7B
from vidkv_eval.recipe import load_recipe

# cuDNN, which PyTorch may prefer, plans anew for each length that it has not seen, as every step of a growing cache is.
FULL = {
    "full precision, flash SDPA": [SDPBackend.FLASH_ATTENTION],
    "full precision, PyTorch's choice": [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
    ],  # fmt: skip
}
RECIPES = ("kivi_k2_v2", "vidkv_k150_v158_scaled", "vidkv_k150_v158_published")
SHAPES = tuple((1, tokens << 10) for tokens in (4, 8, 32, 128)) + ((8, 8192), (8, 32768))
EQUAL_MEMORY_TOKENS = 32768
WARM_UP, STEPS = 4, 16
FILLED_AT_ONCE = 4
HEADS, WIDTH = QWEN2_7B["num_key_value_heads"], 128
COLUMNS = (
    "provider", "batch", "tokens", "milliseconds", "p20", "p80", "tokens_per_second", "times_faster", "peak_gib", "cache_gib", "note",
)  # fmt: skip


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values in full precision, in buffers that are written in place."""

    is_sliding = False

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, width = key_states.shape
        self.keys, self.values = (key_states.new_empty(batch, heads, self.room, width) for _ in range(2))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens and return all, [B, H, stored + T, D], as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.length + key_states.shape[2]
        self.keys[:, :, self.length : stop], self.values[:, :, self.length : stop] = key_states, value_states
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.room


def make_model() -> Qwen2ForCausalLM:
    config = Qwen2Config(**QWEN2_7B, vocab_size=152128, max_position_embeddings=1 << 18, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0) if weight.dim() < 2 else weight.normal_(std=0.02, generator=generator)
    return model


def fill(model: Qwen2ForCausalLM, provider: str, batch: int, tokens: int) -> Cache:
    """Make a cache that holds `tokens` random tokens of `batch` sequences."""
    layers = model.config.num_hidden_layers
    if provider in FULL:
        cache = Cache(layers=[PreallocatedLayer(tokens + WARM_UP + STEPS + 1) for _ in range(layers)])
        alone, repeats = batch, 1
    else:
        cache = QuantizedCache.for_model(model, load_recipe(provider))
        # Many sequences are copies of few, which saves the memory that quantizing them all at once would take.
        alone = next(size for size in range(min(batch, FILLED_AT_ONCE), 0, -1) if batch % size == 0)
        repeats = batch // alone
    generator = torch.Generator("cuda").manual_seed(1)
    for layer in range(layers):
        states = [torch.randn(alone, HEADS, tokens, WIDTH, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        cache.update(*states, layer)
        if repeats > 1:
            cache.layers[layer].batch_repeat_interleave(repeats)
    return cache


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, provider: str, batch: int, tokens: int) -> dict:
    use_attention(model, "sdpa" if provider in FULL else "fused")
    before = torch.cuda.memory_allocated()
    cache = fill(model, provider, batch, tokens)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, 1000, (batch, 1), device="cuda")
    times = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        with sdpa_kernel(FULL[provider]) if provider in FULL else contextlib.nullcontext():
            logits = model(input_ids=ids, past_key_values=cache).logits
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    assert logits.isfinite().all(), f"{provider}: logits are not finite"
    p20, median, p80 = (statistics.quantiles(times[WARM_UP:], n=10)[index] for index in (1, 4, 7))
    return {
        "provider": provider, "batch": batch, "tokens": tokens, "milliseconds": 1e3 * median, "p20": 1e3 * p20, "p80": 1e3 * p80,
        "tokens_per_second": batch / median, "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "cache_gib": held / 2**30,
    }  # fmt: skip


def largest_batches(model: Qwen2ForCausalLM, memory: int, bytes_of_sequence: dict[str, float]) -> Iterator[tuple[str, int]]:
    weights = sum(weight.nbytes for weight in model.parameters())
    for provider, size in bytes_of_sequence.items():
        batch = int((0.9 * memory * 1e9 - weights) // size)
        if batch > 0:
            yield provider, batch - batch % FILLED_AT_ONCE if batch > FILLED_AT_ONCE else batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", type=int, nargs="*", default=[40, 80, 140], help="GB of the equal-memory rows")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is visible to torch")
    model = make_model()
    providers = [*FULL, *arguments.recipes]
    rows: list[dict] = []

    def add(provider: str, batch: int, tokens: int, note: str, base: float | None) -> float | None:
        try:
            row = measure(model, provider, batch, tokens)
        except torch.OutOfMemoryError:
            row = {"provider": provider, "batch": batch, "tokens": tokens}
            note = (note + "; " if note else "") + "does not fit"
        torch.cuda.empty_cache()
        speed = row.get("tokens_per_second")
        faster = speed / base if speed and base else None
        rows.append(row | {"note": note, "times_faster": faster})
        found = (f"{name} {row[name]:.2f}" for name in ("milliseconds", "peak_gib") if name in row)
        print(provider, batch, tokens, *found, note, flush=True)
        write(rows, arguments.folder)
        return speed

    per_token: dict[str, float] = {}
    for batch, tokens in SHAPES:
        base = None
        for provider in providers:
            speed = add(provider, batch, tokens, "", base)
            base = max(speed or 0, base or 0) if provider in FULL else base
            if tokens == EQUAL_MEMORY_TOKENS and batch == 8 and "cache_gib" in rows[-1]:
                per_token[provider] = rows[-1]["cache_gib"] * 2**30 / batch
    for memory in arguments.memory:
        base = None
        for provider, batch in largest_batches(model, memory, per_token):
            speed = add(provider, batch, EQUAL_MEMORY_TOKENS, f"largest batch in {memory} GB", base)
            base = max(speed or 0, base or 0) if provider in FULL else base


def write(rows: list[dict], folder: Path) -> None:
    """Write decode.csv and decode.md."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "decode.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    gpu = torch.cuda.get_device_properties(0)
    lines = [
        "# Decode steps of a 7B model, measured",
        "",
        f"{gpu.name}, torch {torch.__version__}, {datetime.datetime.now(datetime.UTC).date()}; {STEPS} steps after {WARM_UP}. Made by "
        f"`python {' '.join(sys.argv)}`.",
        "",
        " ".join(__doc__.split("\n\n")[1].split()),
        "",
        "`times faster`: tokens per second over the best of full precision that stands above, of the same shape or memory.",
        "",
        f"| {' | '.join(name.replace('_', ' ') for name in COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    for row in rows:
        cells = [row.get(name) for name in COLUMNS]
        lines.append(f"| {' | '.join('' if cell is None else f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
    (folder / "decode.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

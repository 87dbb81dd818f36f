"""Time whole decode steps of a 7B model on this GPU: `python scripts/bench_decode.py results` writes decode.csv, decode.md, decode.png.

The text decoder of LLaVA-OneVision 7B (Qwen2-7B: 28 layers, 28 query and 4 key/value heads, width 128) with random weights in
bfloat16, stock Transformers code, one new token for each sequence of the batch. Caches are filled with random normal keys and
values, not by a prefill; the same seeded ones for every provider. Full precision writes new tokens into a preallocated buffer and
attends with SDPA, once with the flash kernel and once with whatever PyTorch chooses; recipes run with attention `fused`.

Mode `graph`: the launches of a step are captured as a CUDA graph and repeated, as `vidkv_eval.graphs` does it for recipes. For full
precision the whole model is captured, and the captured step is repeated at the same length: no step of a growing cache could be
faster. Mode `eager`: launches are issued from Python, step by step. Recipes are compared with the fastest full precision of the same
mode and shape. The steps of a recipe include one in which the residual is full and quantized, in all layers; `milliseconds` and tokens
per second are means over all steps, percentiles are of single steps.

`--memory 80` adds, at 32K tokens, the largest batch of full precision and of two recipes whose weights, cache and a tenth of reserve
fit into 80 GB. Peak memory is what PyTorch allocated during the timed steps. `--plot-only` draws the plot again from decode.csv,
without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidkv_eval import torchvision_cpu

torchvision_cpu.install()  # before anything imports transformers

from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: E402

from vidkv_eval.attention import use_attention  # noqa: E402
from vidkv_eval.cache import QuantizedCache  # noqa: E402
from vidkv_eval.fused import packed_form  # noqa: E402
from vidkv_eval.graphs import STEPS_BEFORE  # noqa: E402
from vidkv_eval.mini.full_size import QWEN2_7B  # noqa: E402
from vidkv_eval.prompt import Prompt  # noqa: E402
from vidkv_eval.quant.marks import TokenMarks  # noqa: E402
from vidkv_eval.recipe import load_recipe  # noqa: E402
from vidkv_kernels.fragments import Form  # noqa: E402

# cuDNN, which PyTorch may prefer, plans anew for each length that it has not seen, as every step of a growing cache is.
FULL = {
    "full precision, flash SDPA": [SDPBackend.FLASH_ATTENTION],
    "full precision, PyTorch's choice": [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
    ],  # fmt: skip
}
MAIN = ("kivi_k2_v2", "vidkv_k150_v158_scaled")
RECIPES = (*MAIN, "vidkv_k150_v158_published", "vidkv_k150_v166_scaled", "ours_k182_v158")
SHAPES = tuple((1, tokens << 10) for tokens in (2, 8, 32, 128)) + ((8, 8192), (8, 32768), (28, 32768))
EAGER_SHAPES = ((1, 8192), (8, 32768))
ALL_RECIPES_AT = (8, 32768)
EQUAL_MEMORY_TOKENS = 32768
WARM_UP, STEPS = STEPS_BEFORE + 3, 128  # a residual of 128 tokens is full once
FILLED_AT_ONCE = 4
HEADS, WIDTH = QWEN2_7B["num_key_value_heads"], 128
COLUMNS = (
    "mode", "provider", "batch", "tokens", "milliseconds", "p20", "p80", "tokens_per_second", "times_faster", "peak_gib", "cache_gib",
    "formula_gib", "note",
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
        # Recipes that protect visual tokens take all but the last hundred for visual, and a fifth of them, spread evenly, for salient.
        visual = torch.arange(tokens) < tokens - 100
        marks = TokenMarks(visual, torch.arange(tokens) % 5.0)
        cache.describe_prompt(Prompt((0,) * alone, (marks,) * alone))
    generator = torch.Generator("cuda").manual_seed(1)
    for layer in range(layers):
        states = [torch.randn(alone, HEADS, tokens, WIDTH, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        cache.update(*states, layer)
        if repeats > 1:
            cache.layers[layer].batch_repeat_interleave(repeats)
    return cache


def formula_bytes(provider: str, batch: int, tokens: int) -> int | None:
    """Return what the buffers of such a cache take, worked out from the form of the recipe; None with protected tokens."""
    head = batch * HEADS * QWEN2_7B["num_hidden_layers"]
    if provider in FULL:
        return 2 * 2 * head * (tokens + WARM_UP + STEPS + 1) * WIDTH
    recipe = load_recipe(provider)
    form = Form.of(*packed_form(recipe.key, recipe.value, WIDTH))
    if form.is_protected:
        return None
    records = -(-(tokens - tokens % recipe.block + recipe.residual_length) // form.group_size)
    return head * (records * (form.key_record_bytes + form.value_record_bytes) + 2 * 2 * recipe.residual_length * WIDTH)


def make_step(model: Qwen2ForCausalLM, cache: Cache, provider: str, batch: int, mode: str) -> Callable[[], torch.Tensor]:
    """Return a function that does a decode step and returns logits."""
    ids = torch.randint(0, 1000, (batch, 1), device="cuda")
    if provider not in FULL or mode == "eager":

        def step() -> torch.Tensor:
            with sdpa_kernel(FULL[provider]) if provider in FULL else contextlib.nullcontext():
                return model(input_ids=ids, past_key_values=cache).logits

        return step
    length = cache.get_seq_length()
    positions = torch.full((1, 1), length, device="cuda")
    for captures in (False, True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph) if captures else contextlib.nullcontext(), sdpa_kernel(FULL[provider]):
            logits = model(input_ids=ids, position_ids=positions, past_key_values=cache).logits
        for layer in cache.layers:
            layer.length = length

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, mode: str, provider: str, batch: int, tokens: int) -> dict:
    use_attention(model, "sdpa" if provider in FULL else "fused", graphs=mode == "graph")
    before = torch.cuda.memory_allocated()
    cache = fill(model, provider, batch, tokens)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    step = make_step(model, cache, provider, batch, mode)
    replayed, times = getattr(model.get_decoder().forward, "replays", 0), []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        logits = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    assert logits.isfinite().all(), f"{provider}: logits are not finite"
    times = times[WARM_UP:]
    if mode == "graph" and provider not in FULL:
        replays = model.get_decoder().forward.replays - replayed
        assert replays >= STEPS - STEPS_BEFORE - 2, f"{provider}: only {replays} of {STEPS} steps were repeated as graphs"
    tenths, mean = statistics.quantiles(times, n=10), statistics.mean(times)
    formula = formula_bytes(provider, batch, tokens)
    return {
        "milliseconds": 1e3 * mean, "p20": 1e3 * tenths[1], "p80": 1e3 * tenths[7],
        "tokens_per_second": batch / mean, "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "cache_gib": held / 2**30,
        "formula_gib": None if formula is None else formula / 2**30,
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
    parser.add_argument("--memory", type=int, nargs="*", default=[80, 40, 140], help="GB of the equal-memory rows")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--plot-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.plot_only:
        plot(arguments.folder)
        return
    if not torch.cuda.is_available():
        parser.error("no GPU is visible to torch")
    model = make_model()
    rows: list[dict] = []
    best: dict[tuple, float] = {}

    def add(mode: str, provider: str, batch: int, tokens: int, note: str = "") -> dict:
        key = (mode, note) if note else (mode, batch, tokens)
        row = {"mode": mode, "provider": provider, "batch": batch, "tokens": tokens, "note": note}
        try:
            row |= measure(model, mode, provider, batch, tokens)
            if provider in FULL:
                best[key] = max(best.get(key, 0.0), row["tokens_per_second"])
            elif key in best:
                row["times_faster"] = row["tokens_per_second"] / best[key]
        except torch.OutOfMemoryError:
            row["note"] = (note + "; " if note else "") + "does not fit"
        torch.cuda.empty_cache()
        rows.append(row)
        found = (f"{name} {row[name]:.2f}" for name in ("milliseconds", "times_faster", "peak_gib") if name in row)
        print(mode, provider, batch, tokens, *found, row["note"], flush=True)
        write(rows, arguments.folder)
        return row

    bytes_of_sequence: dict[str, float] = {}
    for batch, tokens in SHAPES:
        recipes = [name for name in arguments.recipes if name in MAIN or (batch, tokens) == ALL_RECIPES_AT]
        for mode in ("graph", "eager") if (batch, tokens) in EAGER_SHAPES else ("graph",):
            # What PyTorch chooses plans anew in each eager step; one shape shows it.
            full = list(FULL) if mode == "graph" or batch > 1 else list(FULL)[:1]
            for provider in (*full, *recipes):
                row = add(mode, provider, batch, tokens)
                if (batch, tokens) == ALL_RECIPES_AT and "cache_gib" in row and provider in (*FULL, *MAIN):
                    bytes_of_sequence[provider] = row["cache_gib"] * 2**30 / batch
    for memory in arguments.memory:
        for provider, batch in largest_batches(model, memory, bytes_of_sequence):
            add("graph", provider, batch, EQUAL_MEMORY_TOKENS, f"largest batch in {memory} GB")
    plot(arguments.folder)


def write(rows: list[dict], folder: Path) -> None:
    """Write decode.csv and decode.md."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "decode.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    gpu = torch.cuda.get_device_properties(0)
    _, setting, modes, _ = __doc__.split("\n\n")
    lines = [
        "# Decode steps of a 7B model, measured",
        "",
        f"{gpu.name}, torch {torch.__version__}, {datetime.datetime.now(datetime.UTC).date()}; {STEPS} steps after {WARM_UP}. Made by "
        f"`python {' '.join(sys.argv)}`.",
        "",
        " ".join(setting.split()),
        "",
        " ".join(modes.split()),
        "",
        "`times faster`: tokens per second over the faster full precision of the same mode, and of the same shape or memory. cache gib is "
        "what PyTorch allocated for the filled cache, formula gib what its buffers take by the form of the recipe (`formula_bytes`), room "
        "for the residual included; peak gib includes weights.",
        "",
        "![Time of a step, and tokens per second in equal memory](decode.png)",
        "",
        f"| {' | '.join(name.replace('_', ' ') for name in COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    for row in rows:
        cells = [row.get(name) for name in COLUMNS]
        lines.append(f"| {' | '.join('' if cell is None else f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
    (folder / "decode.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(folder: Path) -> None:
    """Draw decode.png from decode.csv: time of a step against tokens, and tokens per second in equal memory."""
    if not importlib.util.find_spec("matplotlib"):
        print("no plot, since matplotlib is missing: pip install 'vidkv-eval[plot]', then add --plot-only")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(folder / "decode.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["mode"] == "graph" and row["milliseconds"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    colours = dict(zip(providers, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for batch, style in (("1", "-"), ("8", "--")):
        for provider in providers:
            mine = [row for row in rows if row["provider"] == provider and row["batch"] == batch and not row["note"]]
            points = sorted((int(row["tokens"]), float(row["milliseconds"])) for row in mine)
            if len(points) > 1:
                label = f"{provider}, batch {batch}"
                left.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colours[provider], label=label)
    left.set(xscale="log", xlabel="tokens of context", ylabel="milliseconds a step", ylim=(0, None), title="One decode step, CUDA graphs")
    ticks = sorted({int(row["tokens"]) for row in rows if not row["note"]})
    left.set_xticks(ticks, [f"{tick // 1024}K" for tick in ticks])
    left.minorticks_off()
    left.legend(fontsize="small")
    noted = [row for row in rows if row["note"]]
    notes = sorted({row["note"] for row in noted}, key=lambda note: int(note.split()[-2]))  # largest batch in 80 GB
    shown = [provider for provider in providers if any(row["provider"] == provider for row in noted)]
    width = 0.8 / max(1, len(shown))
    for place, provider in enumerate(shown):
        mine = {notes.index(row["note"]): float(row["tokens_per_second"]) for row in noted if row["provider"] == provider}
        left_edges = [index + (place - (len(shown) - 1) / 2) * width for index in mine]
        right.bar(left_edges, list(mine.values()), width, color=colours[provider], label=provider)
    right.set_xticks(range(len(notes)), [note.removeprefix("largest batch in ") for note in notes])
    right.set(xlabel="memory", ylabel="tokens per second", title="Largest batch that fits, 32K tokens each")
    right.legend(fontsize="small")
    figure.savefig(folder / "decode.png", dpi=120)


if __name__ == "__main__":
    main()

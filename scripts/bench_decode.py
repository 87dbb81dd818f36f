"""Time whole decode steps of a 7B model on this GPU: `python scripts/bench_decode.py results` writes decode.csv, decode.md, decode.png.

The text decoder of LLaVA-OneVision 7B (Qwen2-7B: 28 layers, 28 query and 4 key/value heads, width 128) with random weights in
bfloat16, stock Transformers code, one new token for each sequence of the batch. Caches are filled with random normal keys and
values, not by a prefill; the same seeded ones for every provider. Full precision writes new tokens into a preallocated buffer and
attends with SDPA, once with the flash kernel and once with whatever PyTorch chooses; recipes run with attention `fused`.

Mode `graph`: the launches of a step are captured as a CUDA graph and repeated, as `vidkv_eval.graphs` does it for recipes. For full
precision the whole model is captured, and the captured step is repeated at the same length: no step of a growing cache could be
faster. Mode `eager`: launches are issued from Python, step by step. Recipes are compared with the fastest full precision of the same
mode and shape. All that is timed of a shape is timed in turns, a run of steps each, for several rounds; `milliseconds` is the median of
the rounds' means, with the smallest and the largest. A run of a recipe includes one step in which the residual is full and quantized, in
all layers; percentiles are of single steps, of all rounds.

`--memory 80` adds, at 32K tokens, the largest batch of full precision and of two recipes whose weights, cache and a tenth of reserve
fit into 80 GB, one after the other. Peak memory is what PyTorch allocated during the timed steps, with what else of the shape is there
besides taken off. `--plot-only` draws the plot again from decode.csv, without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
SHAPES = tuple((1, tokens << 10) for tokens in (2, 4, 8, 32, 128)) + ((8, 8192), (8, 32768), (28, 32768))
EAGER_SHAPES = ((1, 8192), (8, 32768))
ROUNDS = {"graph": 3, "eager": 1}
ALL_RECIPES_AT = (8, 32768)
EQUAL_MEMORY_TOKENS = 32768
WARM_UP, STEPS = STEPS_BEFORE + 3, 128  # a residual of 128 tokens is full once
FILLED_AT_ONCE = 4
HEADS, WIDTH = QWEN2_7B["num_key_value_heads"], 128
COLUMNS = (
    "mode", "provider", "batch", "tokens", "milliseconds", "least", "most", "p20", "p80", "tokens_per_second", "times_faster", "peak_gib",
    "cache_gib", "formula_gib", "note",
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
    use_attention(model, "sdpa" if provider in FULL else "fused")
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


@dataclass
class Contender:
    """A provider with its cache, whose steps are timed in turns with those of others.

    Attributes:
        batch: sequences.
        held: bytes allocated for the cache.
        peak: bytes allocated at most while its steps were timed, beyond what was there before.
        forward: of the text decoder while these steps are done; it may be the one that repeats graphs.
        times: seconds of single steps, a list for each round.
    """

    model: Qwen2ForCausalLM
    mode: str
    provider: str
    cache: Cache
    batch: int
    held: int
    forward: Callable | None = None
    step: Callable[[], torch.Tensor] | None = None
    peak: int = 0
    times: list[list[float]] = field(default_factory=list)

    def run(self, steps: int) -> None:
        """Do some steps to warm up, and then so many that are timed."""
        decoder, is_full = self.model.get_decoder(), self.provider in FULL
        use_attention(self.model, "sdpa", graphs=False)
        if not is_full:
            use_attention(self.model, "fused", graphs=self.mode == "graph")
        self.forward = decoder.forward = self.forward or decoder.forward
        before, length = torch.cuda.memory_allocated(), self.cache.get_seq_length()
        torch.cuda.reset_peak_memory_stats()
        if self.step is None:
            self.step = make_step(self.model, self.cache, self.provider, self.batch, self.mode)
        times = []
        for index in range(WARM_UP + steps):
            if index == WARM_UP:
                replays = getattr(self.forward, "replays", 0)
            started = time.perf_counter()
            logits = self.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)
        assert logits.isfinite().all(), f"{self.provider}: logits are not finite"
        if is_full:
            for layer in self.cache.layers:
                layer.length = length
        if steps:
            self.times.append(times[WARM_UP:])
            if self.mode == "graph" and not is_full:
                replays = self.forward.replays - replays
                assert replays >= steps - STEPS_BEFORE - 2, f"{self.provider}: only {replays} of {steps} steps were repeated as graphs"


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

    replay.inputs = ids, positions  # the graph reads them
    return replay


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, mode: str, providers: Sequence[str], batch: int, tokens: int) -> Iterator[dict]:
    """Time providers in turns and yield a row of each; a note says if its cache finds no room beside the others."""
    contenders, full = [], None
    rows = {provider: {"mode": mode, "provider": provider, "batch": batch, "tokens": tokens} for provider in providers}
    for provider in providers:
        before = torch.cuda.memory_allocated()
        try:
            if provider in FULL and full:
                own = Contender(model, mode, provider, full.cache, batch, full.held)  # steps leave that cache as it was
            else:
                cache = fill(model, provider, batch, tokens)
                torch.cuda.synchronize()
                own = Contender(model, mode, provider, cache, batch, torch.cuda.memory_allocated() - before)
            own.run(0)
        except torch.OutOfMemoryError:
            rows[provider]["note"] = "does not fit"
            cache = own = None
            torch.cuda.empty_cache()
            continue
        full = own if provider in FULL else full
        contenders.append(own)
    weights = sum(weight.nbytes for weight in model.parameters())
    for _ in range(ROUNDS[mode]):
        for own in contenders.copy():
            try:
                own.run(STEPS)
            except torch.OutOfMemoryError:
                rows[own.provider]["note"] = "does not fit once it has grown"
                contenders.remove(own)
    for own in contenders:
        means = [statistics.mean(times) for times in own.times]
        tenths = statistics.quantiles([one for times in own.times for one in times], n=10)
        mean, formula = statistics.median(means), formula_bytes(own.provider, batch, tokens)
        rows[own.provider] |= {
            "milliseconds": 1e3 * mean, "least": 1e3 * min(means), "most": 1e3 * max(means), "p20": 1e3 * tenths[1], "p80": 1e3 * tenths[7],
            "tokens_per_second": batch / mean, "peak_gib": (weights + own.held + own.peak) / 2**30, "cache_gib": own.held / 2**30,
            "formula_gib": None if formula is None else formula / 2**30,
        }  # fmt: skip
    yield from rows.values()


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

    def add(mode: str, providers: Sequence[str], batch: int, tokens: int, note: str = "") -> None:
        key = (mode, note) if note else (mode, batch, tokens)
        for row in measure(model, mode, providers, batch, tokens):
            if note:
                row["note"] = "; ".join(part for part in (note, row.get("note")) if part)
            if "milliseconds" in row and row["provider"] in FULL:
                best[key] = max(best.get(key, 0.0), row["tokens_per_second"])
            elif "milliseconds" in row and key in best:
                row["times_faster"] = row["tokens_per_second"] / best[key]
            rows.append(row)
            found = (f"{name} {row[name]:.2f}" for name in ("milliseconds", "least", "most", "times_faster", "peak_gib") if name in row)
            print(mode, row["provider"], batch, tokens, *found, row.get("note", ""), flush=True)
        # A captured step keeps what it was captured with.
        use_attention(model, "sdpa", graphs=False)
        gc.collect()
        torch.cuda.empty_cache()
        write(rows, arguments.folder)

    bytes_of_sequence: dict[str, float] = {}
    for batch, tokens in SHAPES:
        recipes = [name for name in arguments.recipes if name in MAIN or (batch, tokens) == ALL_RECIPES_AT]
        for mode in ("graph", "eager") if (batch, tokens) in EAGER_SHAPES else ("graph",):
            # What PyTorch chooses plans anew in each eager step; one shape shows it.
            full = list(FULL) if mode == "graph" or batch > 1 else list(FULL)[:1]
            add(mode, [*full, *(recipes if mode == "graph" else [name for name in recipes if name in MAIN])], batch, tokens)
            if (batch, tokens) == ALL_RECIPES_AT:
                bytes_of_sequence |= {
                    row["provider"]: row["cache_gib"] * 2**30 / batch
                    for row in rows
                    if row["batch"] == batch and row["tokens"] == tokens and "cache_gib" in row and row["provider"] in (*FULL, *MAIN)
                }
    for memory in arguments.memory:
        note = f"largest batch in {memory} GB"
        for provider, batch in largest_batches(model, memory, bytes_of_sequence):
            add("graph", [provider], batch, EQUAL_MEMORY_TOKENS, note)
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
        f"{gpu.name}, torch {torch.__version__}, {datetime.datetime.now(datetime.UTC).date()}; runs of {STEPS} steps after {WARM_UP}, "
        f"{ROUNDS['graph']} rounds (eager: {ROUNDS['eager']}). Made by "
        f"`python {' '.join(folder.name if Path(argument) == folder else argument for argument in sys.argv)}`.",
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

"""Time the kernels on this GPU: `python scripts/bench_kernels.py results` writes kernels.csv, kernels.md and kernels.png there.

Attention of one new token in the shape of Qwen2.5-7B (28 query heads, 4 key/value heads, 128 channels, float16): packed caches,
their residual and the map of the query included, beside full precision over the same number of tokens. What is packed is what the
quantizers of a recipe make of random normal states. Quantizing: keys and values of a prompt of 8,192 tokens in 28 layers, beside the
prefill of as many tokens, and prefill with a cache that does so; and of a full residual. Attention and the operations of quantizing
are timed as CUDA graphs over so many layers that no buffer stays in the L2 cache, under steady load; cache and prefill in eager mode,
as they run. Results are held to the bound of the tests before anything is timed.

`--plot-only` draws kernels.png from the kernels.csv in the folder, on any machine.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from direct_quantizing import calls_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vidkv_eval.fused import NotPackable, pack_keys, pack_values
from vidkv_eval.fused_fitted import record_quantizer
from vidkv_eval.quant.split_tokens import SplitTokens
from vidkv_eval.recipe import Recipe, load_recipe
from vidkv_kernels import attend, attend_cuda, choose_channels, quantize_keys, quantize_values
from vidkv_kernels.fragment_history import FragmentHistory
from vidkv_kernels.fragments import UnsupportedForm
from vidkv_kernels.packed import FullPrecision, PackedLayer
from vidkv_kernels.span import Span

QUERY_HEADS, HEADS, WIDTH, LAYERS, RESIDUAL = 28, 4, 128, 28, 128
SCALING = WIDTH**-0.5
SHAPES = tuple((1, 1 << power) for power in (7, 8, 9, 10, 11, 12, 13, 14, 15, 17)) + ((8, 8192), (8, 32768), (32, 8192), (32, 32768))
PROMPT_TOKENS, FLUSH = 8192, (8, 128)
MAIN = ("vidkv_k150_v158_scaled", "vidkv_k150_v158_published")
ALL_RECIPES_AT = (8, 32768)
RECIPES = (
    *MAIN, "vidkv_k150_v200_scaled", "vidkv_k110_v158_scaled", "vidkv_k175_v158_scaled", "vidkv_k150_v158_tokenvalue_scaled",
    "vidkv_k150_v166_scaled", "vidkv_k200_v200", "vidkv_k100_v100_scaled", "kivi_k2_v2", "kivi_k1_v1", "ours_k182_v158",
)  # fmt: skip
OTHERS_QUANTIZED = ("kivi_k2_v2", "ours_k182_v158")
CUDA, TRITON, DEQUANTIZE = "CUDA, fragments", "Triton, portable", "dequantize, then SDPA"
WRONG = "attend errs by "
ROTATED_BYTES = 256 << 20  # several times the L2 cache
LAUNCH_BOUND_COPIES = 32
LOAD_SECONDS = 0.2
DIFFERENT_ROWS = 4
PAGE = 16
COLUMNS = (
    "operation", "provider", "recipe", "batch", "tokens", "microseconds", "p20", "p80", "times_faster", "times_floor", "stored_bytes",
    "percent_of_prefill", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """One row to be: median, 20th and 80th percentile in microseconds, or why there are none."""

    provider: str
    stored_bytes: int = 0
    microseconds: tuple[float, float, float] | None = None
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many shapes of attention, in the order of the table")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing, draw what kernels.csv says")
    arguments = parser.parse_args()
    table = arguments.folder / "kernels.csv"
    if not arguments.plot_only:
        if not torch.cuda.is_available():
            parser.error("no GPU is visible to torch; --plot-only needs none")
        arguments.folder.mkdir(parents=True, exist_ok=True)
        write_measurements(table, SHAPES[: arguments.shapes])
    with table.open(newline="", encoding="utf-8") as file:
        plot(list(csv.DictReader(file)), arguments.folder / "kernels.png")


def write_measurements(table: Path, shapes: tuple[tuple[int, int], ...]) -> None:
    """Write kernels.csv, row by row as they are measured, and kernels.md."""
    started = time.monotonic()
    bandwidth = copy_bandwidth()
    rows = []
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in measurements(shapes, bandwidth):
            rows.append(row)
            writer.writerow(row)
            file.flush()
            table.with_suffix(".md").write_text(report(rows, bandwidth), encoding="utf-8")
            print(f"{time.monotonic() - started:4.0f} s", *row.values(), flush=True)
    if any(row.get("note", "").startswith(WRONG) for row in rows):
        raise SystemExit("some results are wrong, see the notes; their kernels were not timed")


def measurements(shapes: tuple[tuple[int, int], ...], bandwidth: float) -> Iterator[dict]:
    for batch, tokens in shapes:
        timings = [("", timing) for timing in time_full_precision(batch, tokens)]
        best = min(timing.microseconds[0] for _, timing in timings if timing.microseconds)
        for recipe in RECIPES if (batch, tokens) == ALL_RECIPES_AT else MAIN:
            timings += [(recipe, timing) for timing in time_packed(batch, tokens, load_recipe(recipe))]
            torch.cuda.empty_cache()
        for recipe, timing in timings:
            row = {"operation": "attend", "provider": timing.provider, "recipe": recipe, "batch": batch, "tokens": tokens}
            if timing.microseconds:
                median, p20, p80 = timing.microseconds
                row |= {
                    "microseconds": f"{median:.2f}", "p20": f"{p20:.2f}", "p80": f"{p80:.2f}", "times_faster": f"{best / median:.2f}",
                    "times_floor": f"{median * bandwidth / timing.stored_bytes / 1e6:.2f}", "stored_bytes": timing.stored_bytes,
                }  # fmt: skip
            yield row | {"note": timing.note}
    yield from time_quantizing(load_recipe(MAIN[0]))


def time_full_precision(batch: int, tokens: int) -> Iterator[Timing]:
    stored = 2 * 2 * batch * HEADS * tokens * WIDTH
    states = [torch.randn(2, batch, HEADS, tokens, WIDTH, device="cuda", dtype=torch.float16) for _ in range(copies(stored))]
    query = torch.randn(batch, QUERY_HEADS, 1, WIDTH, device="cuda", dtype=torch.float16)
    rows = slice(0, DIFFERENT_ROWS)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    bound = Bound.of(query[rows], PackedLayer(None, (), FullPrecision(*states[0][:, rows], lengths[rows])))
    for name, calls in full_precision(query, states):
        yield bound.time(name, stored, calls, lambda out: out[rows].reshape(-1, QUERY_HEADS, 1, WIDTH))


def full_precision(query: torch.Tensor, states: list[torch.Tensor]) -> Iterator[tuple[str, list[Callable[[], torch.Tensor]]]]:
    """Yield kernels that are installed, each with one call for each of `states`, [2, B, H, T, D]."""

    def attend_by(backend: SDPBackend, pair: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return attend_densely(query, *pair)

    for name, backend in (("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION), ("SDPA flash", SDPBackend.FLASH_ATTENTION)):
        yield name, [lambda pair=pair, backend=backend: attend_by(backend, pair) for pair in states]
    _, batch, _, tokens, _ = states[0].shape
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        own = [[side.transpose(1, 2).contiguous() for side in pair] for pair in states]
        yield "FlashAttention", [lambda pair=pair: flash_attn_with_kvcache(query.transpose(1, 2), *pair) for pair in own]
    if importlib.util.find_spec("flashinfer"):
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        pages = tokens // PAGE
        own = [tuple(side.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1).contiguous() for side in pair) for pair in states]
        # Its kernels without matrix units take 1, 2, 3, 4 or 8 query heads to a key/value head, not 7.
        wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.zeros(128 << 20, dtype=torch.uint8, device="cuda"), "HND", use_tensor_cores=True)
        first_pages, last_page = torch.arange(batch + 1, dtype=torch.int32) * pages, torch.full((batch,), PAGE, dtype=torch.int32)
        every_page = torch.arange(batch * pages, dtype=torch.int32, device="cuda")
        wrapper.plan(first_pages, every_page, last_page, QUERY_HEADS, HEADS, WIDTH, PAGE, q_data_type=torch.float16, sm_scale=SCALING)
        yield "FlashInfer", [lambda pair=pair: wrapper.run(query[:, :, 0], pair) for pair in own]


def time_packed(batch: int, tokens: int, recipe: Recipe) -> Iterator[Timing]:
    """Time what reads this recipe's packed form: CUDA C++, and Triton for the main recipes or where CUDA C++ does not read it."""
    try:
        few = make_layer(min(batch, DIFFERENT_ROWS), tokens, recipe)
    except NotPackable as error:
        yield Timing(CUDA, note=f"left out: {error}")
        return
    rows = torch.arange(batch, device="cuda") % DIFFERENT_ROWS
    layer = PackedLayer(take(few.keys, rows), tuple(take(run, rows) for run in few.values), take(few.residual, rows))
    few_queries = torch.randn(len(few.residual.lengths), QUERY_HEADS, 1, WIDTH, device="cuda").half()
    bound, query = Bound.of(few_queries, few), few_queries[rows]
    try:
        history = FragmentHistory.from_packed(layer.keys, layer.values)
    except UnsupportedForm as error:
        yield Timing(CUDA, note=f"left out: {error}")
    else:
        stored = history.nbytes + nbytes(layer.residual)
        own = [(history.select_batch(torch.arange(batch, device="cuda")), clone(layer.residual)) for _ in range(copies(stored))]
        yield bound.time(CUDA, stored, [lambda pair=pair: attend_cuda.attend(query, *pair, SCALING) for pair in own])
        del own, history
        if recipe.name not in MAIN:
            return
    stored = sum(nbytes(part) for part in (layer.keys, *layer.values, layer.residual))
    layers = [copy_of(layer) for _ in range(copies(stored))]
    yield bound.time(TRITON, stored, [lambda own=own: attend.OP(query, own, SCALING) for own in layers])
    if recipe.name == MAIN[0] and batch * tokens <= 8 * 32768:
        yield bound.time(DEQUANTIZE, stored, [lambda own=own: dequantize_and_attend(query, own) for own in layers[:LAUNCH_BOUND_COPIES]])


def make_layer(batch: int, tokens: int, recipe: Recipe) -> PackedLayer:
    """Quantize and pack random states; up to RESIDUAL of the tokens, and at most half of them, are in full precision."""
    generator = torch.Generator("cuda").manual_seed(0)
    residual = min(RESIDUAL, tokens // 2)
    # Heads beside each other in a token, as a model makes them.
    shape = (2, batch, tokens, HEADS, WIDTH)
    states = torch.randn(shape, generator=generator, device="cuda").half().transpose(2, 3)
    keys, values = states[:, :, :, residual:]
    choice = None
    if isinstance(recipe.value, SplitTokens):
        history = tokens - residual
        count = int(history * recipe.value.choose.fraction) // recipe.value.block * recipe.value.block
        order = torch.rand(batch, history, generator=generator, device="cuda").argsort(dim=1)
        choice = recipe.value.choice(order[:, :count].sort(dim=1).values, WIDTH)
    lengths = torch.full((batch,), residual, dtype=torch.int32, device="cuda")
    return PackedLayer(
        pack_keys(recipe.key, recipe.key.quantize(keys)), pack_values(recipe.value, recipe.value.quantize(values, choice)),
        FullPrecision(*states[:, :, :, :residual].clone(), lengths),
    )  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """What a result is held to: the bound of the tests.

    Attributes:
        truth: result of the reference in float32, [rows, HQ, 1, D].
        allowed: largest error.
    """

    truth: torch.Tensor
    allowed: float
    plain_error: float

    @classmethod
    def of(cls, query: torch.Tensor, layer: PackedLayer) -> Bound:
        plain, truth = (attend.attend_reference(query, layer, SCALING, dtype=dtype) for dtype in (torch.float16, torch.float32))
        plain_error = (plain.float() - truth).abs().max().item()
        return cls(truth, 2 * plain_error + torch.finfo(torch.float16).eps * truth.abs().max().item(), plain_error)

    def time(
        self,
        provider: str,
        stored: int,
        calls: list[Callable[[], torch.Tensor]],
        rows_of: Callable[[torch.Tensor], torch.Tensor] = lambda out: out,
    ) -> Timing:
        """Time calls if the result of the first is within the bound; more rows than the truth has repeat it."""
        found = rows_of(calls[0]())
        truth = self.truth[torch.arange(len(found), device=found.device) % len(self.truth)]
        error = (found.float() - truth).abs().max().item()
        if error <= self.allowed:
            return Timing(provider, stored, time_calls(calls))
        return Timing(provider, note=f"{WRONG}{error:.3g}, plain torch by {self.plain_error:.3g}: not timed")


def copies(stored: int) -> int:
    """How many layers to walk through, so that none is still in the L2 cache when its turn comes."""
    return max(2, 1 + ROTATED_BYTES // stored)


def attend_densely(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query, keys, values, scale=SCALING, enable_gqa=True)


def dequantize_and_attend(query: torch.Tensor, layer: PackedLayer) -> torch.Tensor:
    keys = layer.keys.decode(torch.float16) @ layer.keys.matrix.half().T
    places = layer.keys.order.long().argsort(dim=-1).unsqueeze(2)
    keys = keys.gather(-1, places.expand(keys.shape))
    keys = torch.cat([keys, layer.residual.keys], dim=2)
    values = torch.cat([layer.values[0].decode(torch.float16), layer.residual.values], dim=2)
    return attend_densely(query, keys, values)


def tensors(part: object) -> dict[str, torch.Tensor]:
    """Return what a part of a layer has of its own: the matrix of keys is one for all layers."""
    return {name: value for name, value in vars(part).items() if isinstance(value, torch.Tensor) and name != "matrix"}


def nbytes(part: object) -> int:
    return sum(tensor.nbytes for tensor in tensors(part).values())


def take(part: object, rows: torch.Tensor) -> object:
    """Return these rows of a part of a layer; what one serves for all stays as it is."""
    return replace(part, **{name: value[rows] if value.shape[0] > 1 else value for name, value in tensors(part).items()})


def clone(part: object) -> object:
    return replace(part, **{name: value.clone() for name, value in tensors(part).items()})


def copy_of(layer: PackedLayer) -> PackedLayer:
    return PackedLayer(clone(layer.keys), tuple(clone(run) for run in layer.values), clone(layer.residual))


def time_quantizing(recipe: Recipe) -> Iterator[dict]:
    """Time quantizing a prompt and a residual by what the cache does and by operations, and the prefill of a text decoder of 7B."""
    # Here, since neither attention nor a plot needs a model.
    from bench_decode import make_model

    from vidkv_eval.attention import use_attention
    from vidkv_eval.cache import QuantizedCache

    model = make_model()
    ids = torch.randint(0, 1000, (1, PROMPT_TOKENS), device="cuda")
    prefill = time_eagerly(lambda: model(input_ids=ids, logits_to_keep=1))

    def row(operation: str, provider: str, microseconds: tuple[float, float, float], name: str = "", stored: int | str = "") -> dict:
        median, p20, p80 = (f"{number:.1f}" for number in microseconds)
        return {
            "operation": operation, "provider": provider, "recipe": name, "batch": 1, "tokens": PROMPT_TOKENS,
            "microseconds": median, "p20": p20, "p80": p80, "stored_bytes": stored,
            "percent_of_prefill": f"{100 * microseconds[0] / prefill[0]:.2f}",
        }  # fmt: skip

    yield row("prefill of 28 layers", "7B decoder, bfloat16, eager", prefill)
    states = [torch.randn(2, 1, PROMPT_TOKENS, HEADS, WIDTH, device="cuda").bfloat16().transpose(2, 3) for _ in range(LAYERS)]
    use_attention(model, "fused")
    for own in (recipe, *map(load_recipe, OTHERS_QUANTIZED)):

        def fill(own: Recipe = own) -> QuantizedCache:
            cache = QuantizedCache.for_model(model, own)
            for index, pair in enumerate(states):
                cache.update(*pair, index)
            return cache

        def prefill_cache(own: Recipe = own) -> QuantizedCache:
            return model(input_ids=ids, logits_to_keep=1, past_key_values=QuantizedCache.for_model(model, own)).past_key_values

        footprint = fill().footprint()
        yield row("quantize 28 layers: all", "cache, eager", time_eagerly(fill), own.name, footprint.key_bytes + footprint.value_bytes)
        yield row("prefill of 28 layers into the cache", "7B decoder, bfloat16, eager", time_eagerly(prefill_cache), own.name)
        batch, tokens = FLUSH
        flushed = row(f"quantize a residual of {tokens} tokens, 28 layers", "cache, eager", time_flush(own, batch, tokens), own.name)
        yield flushed | {"batch": batch, "tokens": tokens, "percent_of_prefill": ""}
    for name, provider, stored, calls in quantizing_operations(states, recipe):
        yield row(f"quantize 28 layers: {name}", provider, tuple(LAYERS * number for number in time_calls(calls)), recipe.name, stored)


def time_flush(recipe: Recipe, batch: int, tokens: int) -> tuple[float, float, float]:
    """Time what each layer does when its residual is full."""
    states = torch.randn(2, batch, HEADS, tokens, WIDTH, device="cuda").bfloat16()
    quantizer = record_quantizer(recipe, WIDTH)
    histories = [quantizer.quantize(None, *states, capacity=16 * tokens) for _ in range(LAYERS)]

    def flush() -> None:
        for history in histories:
            quantizer.quantize(history, *states)

    return time_eagerly(flush)


def quantizing_operations(states: list[torch.Tensor], recipe: Recipe) -> Iterator[tuple[str, str, int, list[Callable[[], object]]]]:
    """Yield name, provider, stored bytes and a call for each layer."""
    keys = pack_keys(recipe.key, recipe.key.quantize(states[0][0]))
    (values,) = pack_values(recipe.value, recipe.value.quantize(states[0][1]))
    device, wide = keys.device, keys.wide_channels
    span = Span.of(device, [0], [PROMPT_TOKENS], [0])
    transform = quantize_keys.real_fourier(WIDTH - wide, device)

    def quantize(pair: torch.Tensor) -> None:
        order = choose_channels.OP(pair[0], span, wide)
        quantize_keys.OP(pair[0], span, order, transform, keys)
        quantize_values.OP(pair[1], span, recipe.value.threshold, values)

    history = FragmentHistory.from_packed(keys, (values,))

    def into_fragments() -> None:
        history.lengths.zero_()
        history.held = [0]
        history.append(keys, (values,))

    order_of_first = choose_channels.OP(states[0][0], span, wide)
    parts = {
        "all but fragment order": quantize,
        "order of channels": lambda pair: choose_channels.OP(pair[0], span, wide),
        "keys": lambda pair: quantize_keys.OP(pair[0], span, order_of_first, transform, keys),
        "values": lambda pair: quantize_values.OP(pair[1], span, recipe.value.threshold, values),
    }
    for name, part in parts.items():
        yield name, "Triton", LAYERS * history.nbytes, [lambda pair=pair, part=part: part(pair) for pair in states]
    yield "into fragment order", "CUDA", LAYERS * history.nbytes, [into_fragments] * LAYERS
    direct, stored = calls_of(PROMPT_TOKENS, LAYERS, recipe.name, states[0].dtype)
    for name, calls in direct.items():
        yield name, "CUDA, straight into records", stored, calls


def time_calls(calls: list[Callable[[], object]], replays: int = 20) -> tuple[float, float, float]:
    """Return median, 20th and 80th percentile of the microseconds of a call, in replays of a graph of all calls."""
    for call in calls[:2]:
        call()
    rounds = max(1, -(-24 // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * rounds:
            call()
    until = time.monotonic() + LOAD_SECONDS
    while time.monotonic() < until:
        graph.replay()
        torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    pairs = zip(events, events[1:], strict=False)
    return median_and_spread([start.elapsed_time(stop) * 1000 / len(calls) / rounds for start, stop in pairs])


@torch.no_grad()
def time_eagerly(call: Callable[[], object], repeats: int = 7) -> tuple[float, float, float]:
    """Return median, 20th and 80th percentile of the microseconds of a call until the device is done, after two calls."""
    times = []
    for _ in range(2 + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - started))
    return median_and_spread(times[2:])


def median_and_spread(times: list[float]) -> tuple[float, float, float]:
    tenths = statistics.quantiles(times, n=10)
    return statistics.median(times), tenths[1], tenths[7]


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written ones; by a kernel, since a graph copies with another engine."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    median, *_ = time_calls([lambda: torch.neg(source, out=target)])
    return 2 * source.nbytes / median * 1e6


def report(rows: list[dict], bandwidth: float) -> str:
    """Return the table in markdown."""
    from cuda.bindings import nvrtc

    properties = torch.cuda.get_device_properties(0)
    versions = f"torch {torch.__version__}, triton {triton.__version__}, NVRTC {'.'.join(map(str, nvrtc.nvrtcVersion()[1:]))}"
    if importlib.util.find_spec("flashinfer"):
        versions += f", FlashInfer {importlib.metadata.version('flashinfer-python')}"
    lines = [
        "# Kernels, measured",
        "",
        f"{properties.name} ({properties.multi_processor_count} multiprocessors, copy {bandwidth / 1e12:.2f} TB/s), {versions}, "
        f"{datetime.date.today()}. Made by `python scripts/bench_kernels.py results`.",
        "",
        f"Attention of one new token: {QUERY_HEADS} query heads, {HEADS} key/value heads, {WIDTH} channels, float16; groups of 32. Packed "
        f"rows attend to {RESIDUAL} of the tokens (half of them, where that is less) in full precision and include the map of the query. "
        "`times faster` is against the fastest full-precision row of the same shape, `times floor` against the stored bytes at copy "
        "bandwidth. Medians of 20 replays under steady load, with 20th and 80th percentile; buffers rotate, so that none is served from "
        f"the L2 cache (dequantizing walks through {LAUNCH_BOUND_COPIES} layers at most: at short lengths it is bound by its launches). "
        f"`percent of prefill`: time over that of the prefill of {PROMPT_TOKENS:,} tokens by stock Transformers code.",
        "",
        *(f"- {line}" for line in break_even(rows)),
        "",
        "| " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(name, "")) for name in COLUMNS) + " |" for row in rows]) + "\n"


def break_even(rows: list[dict]) -> Iterator[str]:
    """Say from which of the measured lengths on one way to attend is faster than another, at batch 1."""
    attended = [row for row in rows if row["operation"] == "attend" and row["batch"] == 1 and row.get("microseconds")]

    def times_of(recipe: str, provider: str = "") -> dict[int, float]:
        found: dict[int, float] = {}
        for row in attended:
            if row["recipe"] == recipe and provider in ("", row["provider"]):
                found[row["tokens"]] = min(float(row["microseconds"]), found.get(row["tokens"], float("inf")))
        return found

    full = times_of("")
    for recipe in MAIN:
        packed = times_of(recipe, CUDA)
        yield f"{recipe}, packed, {_since(packed, full)} full precision."
    packed, dequantized = times_of(MAIN[0], CUDA), times_of(MAIN[0], DEQUANTIZE)
    yield f"{MAIN[0]}, packed, {_since(packed, dequantized)} dequantizing first."
    yield f"{MAIN[0]}, dequantized first, {_since(dequantized, full)} full precision."


def _since(times: dict[int, float], others: dict[int, float]) -> str:
    lengths = sorted(times.keys() & others.keys())
    slower = [length for length in lengths if times[length] >= others[length]]
    faster = [length for length in lengths if not slower or length > slower[-1]]
    if not lengths:
        return "was not measured beside"
    if not faster:
        return f"is at batch 1 still slower at {lengths[-1]:,} tokens, the longest measured, than"
    return f"is at batch 1 faster from {faster[0]:,} tokens on{'' if slower else ', the shortest measured,'} than"


def plot(rows: list[dict], path: Path) -> None:
    """Draw time against tokens at batch 1, from rows as the table has them."""
    if not importlib.util.find_spec("matplotlib"):
        print("no plot, since matplotlib is missing: pip install 'vidkv-eval[plot]'")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row["operation"] == "attend" and row["batch"] == "1" and row["microseconds"] and row["recipe"] in ("", *MAIN):
            lines.setdefault((row["provider"], row["recipe"]), {})[int(row["tokens"])] = float(row["microseconds"])
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    # The legend has the order in which lines end at the right.
    for (provider, recipe), points in sorted(lines.items(), key=lambda line: -line[1][max(line[1])]):
        color = {CUDA: "tab:green", TRITON: "tab:blue", DEQUANTIZE: "tab:red"}.get(provider, "black")
        style = "--" if recipe == MAIN[1] else "-"
        if not recipe:
            style = {"SDPA cuDNN": "-", "SDPA flash": "--"}.get(provider, ":")
        label = f"{provider}\n{recipe}" if recipe else f"{provider}, full precision"
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", markersize=3.5, color=color, linestyle=style, label=label)
    lengths = sorted({tokens for points in lines.values() for tokens in points})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds", title="Attention of one new token in one layer, batch 1")
    axes.set_xticks(lengths, [f"{tokens >> 10}K" if tokens >= 1024 else str(tokens) for tokens in lengths])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(which="major", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

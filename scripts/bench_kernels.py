"""Time the kernels on this GPU: `python scripts/bench_kernels.py results` writes kernels.csv, kernels.md and kernels.png there.

Attention of one new token in the shape of Qwen2.5-7B (28 query heads, 4 key/value heads, 128 channels, float16): packed caches,
their residual of 128 tokens and the map of the query included, beside full precision over the same number of tokens. Quantizing:
keys and values of a prompt of 8,192 tokens in 28 layers. Each time is that of a CUDA graph over so many layers that no buffer
stays in the L2 cache, under steady load. Results are held to the bound of the tests before anything is timed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vidkv_kernels import attend, attend_cuda, choose_channels, quantize_keys, quantize_values
from vidkv_kernels.fragment_history import FragmentHistory
from vidkv_kernels.packed import PackedLayer, Segment
from vidkv_kernels.random_layer import random_layer
from vidkv_kernels.span import Span

QUERY_HEADS, HEADS, WIDTH, LAYERS, RESIDUAL = 28, 4, 128, 28, 128
SCALING = WIDTH**-0.5
SHAPES = tuple((1, tokens << 10) for tokens in (2, 4, 8, 16, 32, 128)) + ((8, 8192), (8, 32768), (32, 8192), (32, 32768))
ALL_RECIPES_AT = (8, 32768)
ROTATED_BYTES = 256 << 20  # several times the L2 cache
LOAD_SECONDS = 0.2
COLUMNS = (
    "operation", "provider", "recipe", "batch", "tokens", "microseconds", "p20", "p80", "times_faster", "times_floor", "stored_bytes",
)  # fmt: skip


def split(wide: int, *kinds: str) -> tuple[Segment, ...]:
    """Channels of 2 bits with stored minima, and the others of 1 bit, divided among kinds of offsets."""
    left = WIDTH - wide
    narrow = [Segment(left // 2 + 1, 1, kinds[0]), Segment(left - left // 2 - 1, 1, kinds[1])] if len(kinds) == 2 else []
    if len(kinds) == 1:
        narrow = [Segment(left, 1, kinds[0])]
    return tuple(([Segment(wide, 2, "minimum")] if wide else []) + narrow)


MAIN = ("vidkv_k150_v158_scaled", "vidkv_k150_v158_published")
RECIPES = {
    "vidkv_k150_v158_scaled": (split(64, "mean"), ("per_channel", 3, "centred")),
    "vidkv_k150_v158_published": (split(64, "none", "centred"), ("per_channel", 3, "unscaled")),
    "vidkv_k150_v200_scaled": (split(64, "mean"), ("per_channel", 4, "minimum")),
    "vidkv_k110_v158_scaled": (split(12, "mean"), ("per_channel", 3, "centred")),
    "vidkv_k175_v158_scaled": (split(96, "mean"), ("per_channel", 3, "centred")),
    "vidkv_k150_v158_tokenvalue_scaled": (split(64, "mean"), ("per_token", 3, "centred")),
    "ours_k182_v158": (
        (Segment(12, 2, "mean"), Segment(116, 2, "mean", is_ternary=True), Segment(12, 2, "centred")), ("per_channel", 3, "mean")
    ),
    "vidkv_k200_v200": (split(128), ("per_channel", 4, "minimum")),
    "kivi_k2_v2": (split(128), ("per_token", 4, "minimum")),
    "kivi_k1_v1": ((Segment(128, 1, "minimum"),), ("per_token", 2, "minimum")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many shapes of attention, in the order of the table")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth()
    rows = []
    with (arguments.out / "kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in measurements(SHAPES[: arguments.shapes], bandwidth):
            rows.append(row)
            writer.writerow(row)
            file.flush()
            print(*row.values(), flush=True)
    (arguments.out / "kernels.md").write_text(report(rows, bandwidth), encoding="utf-8")
    if importlib.util.find_spec("matplotlib"):
        plot(rows, arguments.out / "kernels.png")
    else:
        print("no plot, since matplotlib is missing: pip install 'vidkv-eval[plot]'")


def measurements(shapes: tuple[tuple[int, int], ...], bandwidth: float) -> Iterator[dict]:
    for batch, tokens in shapes:
        timed = {("attend", name, ""): times for name, times in time_full_precision(batch, tokens).items()}
        best = min(median for _, (median, *_) in timed.values())
        for recipe in RECIPES if (batch, tokens) == ALL_RECIPES_AT else MAIN:
            timed |= {("attend", name, recipe): times for name, times in time_packed(batch, tokens, recipe).items()}
            torch.cuda.empty_cache()
        for (operation, provider, recipe), (stored, (median, p20, p80)) in timed.items():
            yield {
                "operation": operation, "provider": provider, "recipe": recipe, "batch": batch, "tokens": tokens,
                "microseconds": f"{median:.2f}", "p20": f"{p20:.2f}", "p80": f"{p80:.2f}", "times_faster": f"{best / median:.2f}",
                "times_floor": f"{median * bandwidth / stored / 1e6:.2f}", "stored_bytes": stored,
            }  # fmt: skip
    yield from time_quantizing(8192)


def time_full_precision(batch: int, tokens: int) -> dict[str, tuple[int, tuple]]:
    stored = 2 * 2 * batch * HEADS * tokens * WIDTH
    states = [torch.randn(2, batch, HEADS, tokens, WIDTH, device="cuda", dtype=torch.float16) for _ in range(copies(stored))]
    query = torch.randn(batch, QUERY_HEADS, 1, WIDTH, device="cuda", dtype=torch.float16)
    timed = {}
    for name, backend in (("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION), ("SDPA flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            timed[name] = stored, time_calls([lambda pair=pair: attend_densely(query, *pair) for pair in states])
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        calls = [[side.transpose(1, 2).contiguous() for side in pair] for pair in states]
        timed["FlashAttention"] = stored, time_calls([lambda c=c: flash_attn_with_kvcache(query.transpose(1, 2), *c) for c in calls])
    if importlib.util.find_spec("flashinfer") and batch == 1:
        from flashinfer import single_decode_with_kv_cache

        timed["FlashInfer"] = (
            stored,
            time_calls([lambda p=p: single_decode_with_kv_cache(query[0, :, 0], p[0, 0], p[1, 0], kv_layout="HND") for p in states]),
        )
    return timed


def time_packed(batch: int, tokens: int, recipe: str) -> dict[str, tuple[int, tuple]]:
    generator = torch.Generator("cuda").manual_seed(0)
    segments, values = RECIPES[recipe]
    metadata = torch.uint8 if recipe == "ours_k182_v158" else torch.float16
    form = {"heads": HEADS, "width": WIDTH, "segments": segments, "values": values, "metadata": metadata}
    layer = random_layer(generator, torch.float16, [tokens - RESIDUAL] * batch, [RESIDUAL] * batch, **form)
    query = torch.randn(batch, QUERY_HEADS, 1, WIDTH, generator=generator, device="cuda").half()
    history = FragmentHistory.from_packed(layer.keys, layer.values)
    check(attend_cuda.attend(query, history, layer.residual, SCALING), query, layer, f"CUDA, {recipe}")
    residual_bytes = 2 * 2 * batch * HEADS * RESIDUAL * WIDTH
    timed = {}
    stored = history.nbytes + residual_bytes
    own = [(history.select_batch(torch.arange(batch)), clone(layer.residual)) for _ in range(copies(stored))]
    calls = [lambda pair=pair: attend_cuda.attend(query, *pair, SCALING) for pair in own]
    timed["CUDA, fragments"] = stored, time_calls(calls)
    del own, calls, history
    if recipe not in MAIN:
        return timed
    packed = [layer.keys.codes, layer.keys.scale, layer.keys.offset, layer.values[0].codes, layer.values[0].scale, layer.keys.order]
    stored = sum(tensor.nbytes for tensor in packed if tensor is not None) + residual_bytes
    check(attend.OP(query, layer, SCALING), query, layer, f"Triton, {recipe}")
    layers = [copy_of(layer) for _ in range(copies(stored))]
    timed["Triton, portable"] = stored, time_calls([lambda own=own: attend.OP(query, own, SCALING) for own in layers])
    if recipe == MAIN[0] and batch * tokens <= 8 * 32768:
        timed["dequantize, then SDPA"] = stored, time_calls([lambda own=own: dequantize_and_attend(query, own) for own in layers[:2]])
    return timed


def copies(stored: int) -> int:
    """How many layers to walk through, so that none is still in the L2 cache when its turn comes."""
    return max(2, 1 + ROTATED_BYTES // stored)


def attend_densely(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query, keys, values, scale=SCALING, enable_gqa=True)


def dequantize_and_attend(query: torch.Tensor, layer: PackedLayer) -> torch.Tensor:
    history = slice(0, int(layer.values[0].entries))
    keys = layer.keys.decode(torch.float16)[:, :, history] @ layer.keys.matrix.half().T
    places = layer.keys.order.long().argsort(dim=-1).unsqueeze(2)
    keys = keys.gather(-1, places.expand(keys.shape))
    keys = torch.cat([keys, layer.residual.keys[:, :, :RESIDUAL]], dim=2)
    values = torch.cat([layer.values[0].decode(torch.float16), layer.residual.values[:, :, :RESIDUAL]], dim=2)
    return attend_densely(query, keys, values)


def check(found: torch.Tensor, query: torch.Tensor, layer: PackedLayer, name: str) -> None:
    """Hold a kernel to the bound of its tests before it is timed."""
    if query.shape[0] * layer.values[0].entries > 8 * 32768:  # the first sequences will do
        query, found, layer = query[:4], found[:4], first_rows(layer, 4)
    plain, truth = (attend.attend_reference(query, layer, SCALING, dtype=dtype) for dtype in (torch.float16, torch.float32))
    error, plain_error = ((side.float() - truth).abs().max() for side in (found, plain))
    if not error <= 2 * plain_error + torch.finfo(torch.float16).eps * truth.abs().max():
        raise SystemExit(f"{name}: attend errs by {error:.3g}, plain torch by {plain_error:.3g}; nothing more is timed")


def first_rows(layer: PackedLayer, rows: int) -> PackedLayer:
    def cut(part: object) -> object:
        fields = {name: value for name, value in vars(part).items() if isinstance(value, torch.Tensor) and name != "matrix"}
        return replace(part, **{name: value[:rows] for name, value in fields.items()})

    return PackedLayer(cut(layer.keys), (cut(layer.values[0]),), cut(layer.residual))


def copy_of(layer: PackedLayer) -> PackedLayer:
    return PackedLayer(clone(layer.keys), (clone(layer.values[0]),), clone(layer.residual))


def clone(part: object) -> object:
    own = {name: value for name, value in vars(part).items() if isinstance(value, torch.Tensor) and name != "matrix"}
    return replace(part, **{name: value.clone() for name, value in own.items()})


def time_quantizing(tokens: int) -> Iterator[dict]:
    states = [torch.randn(2, 1, tokens, HEADS, WIDTH, device="cuda").half().transpose(2, 3) for _ in range(LAYERS)]
    device = states[0].device
    span = Span.of(device, [0], [tokens], [0])
    transform = quantize_keys.real_fourier(64, device)
    keys = quantize_keys.make_keys(1, HEADS, tokens, RECIPES[MAIN[0]][0], 32, device)
    keys = replace(keys, matrix=quantize_keys.key_matrix(WIDTH, transform))
    values = quantize_values.make_values(1, HEADS, tokens, WIDTH, device, levels=3, offset_kind="centred")
    values.lengths.fill_(tokens)

    def quantize(pair: torch.Tensor) -> None:
        order = choose_channels.OP(pair[0], span, 64)
        quantize_keys.OP(pair[0], span, order, transform, keys)
        quantize_values.OP(pair[1], span, 0.7, values)

    quantize(states[0])
    history = FragmentHistory.from_packed(keys, (values,))

    def into_fragments() -> None:
        history.lengths.zero_()
        history.held = [0]
        history.append(keys, (values,))

    order_of_first = choose_channels.OP(states[0][0], span, 64)
    parts = {
        ("all but fragment order", "Triton"): quantize,
        ("order of channels", "Triton"): lambda pair: choose_channels.OP(pair[0], span, 64),
        ("keys", "Triton"): lambda pair: quantize_keys.OP(pair[0], span, order_of_first, transform, keys),
        ("values", "Triton"): lambda pair: quantize_values.OP(pair[1], span, 0.7, values),
        ("into fragment order", "CUDA"): lambda pair: into_fragments(),
    }
    for (name, provider), part in parts.items():
        times = time_calls([lambda pair=pair, part=part: part(pair) for pair in states])
        median, p20, p80 = (LAYERS * number for number in times)
        yield {
            "operation": f"quantize 28 layers: {name}", "provider": provider, "recipe": MAIN[0], "batch": 1, "tokens": tokens,
            "microseconds": f"{median:.1f}", "p20": f"{p20:.1f}", "p80": f"{p80:.1f}", "times_faster": "", "times_floor": "",
            "stored_bytes": LAYERS * history.nbytes,
        }  # fmt: skip


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
    times = [start.elapsed_time(stop) * 1000 / len(calls) / rounds for start, stop in pairs]
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
    lines = [
        "# Kernels, measured",
        "",
        f"{properties.name} ({properties.multi_processor_count} multiprocessors, copy {bandwidth / 1e12:.2f} TB/s), {versions}, "
        f"{datetime.date.today()}. Made by `python scripts/bench_kernels.py`.",
        "",
        f"Attention of one new token: {QUERY_HEADS} query heads, {HEADS} key/value heads, {WIDTH} channels, float16; groups of 32. Packed "
        f"rows attend to {RESIDUAL} of the tokens in full precision and include the map of the query. `times faster` is against the "
        "fastest full-precision row of the same shape, `times floor` against the stored bytes at copy bandwidth. Medians of 20 replays "
        "under steady load, with 20th and 80th percentile; buffers rotate, so that none is served from the L2 cache.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    return "\n".join(lines + ["| " + " | ".join(str(row[name]) for name in COLUMNS) + " |" for row in rows]) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Draw time against tokens at batch 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["operation"] == "attend" and row["batch"] == 1 and row["recipe"] in ("", *MAIN):
            label = f"{row['provider']}, {row['recipe']}" if row["recipe"] else row["provider"]
            lines.setdefault(label, []).append((row["tokens"], float(row["microseconds"])))
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens, batch 1", ylabel="microseconds a layer", title=torch.cuda.get_device_name())
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

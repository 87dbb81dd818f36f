"""Time the kernels on this GPU and write one row a measurement: `python scripts/bench_kernels.py results/kernels.csv`.

Attention of one new token: the packed cache of VidKV 1.5/1.58 scaled (groups of 32) beside full precision, in the shape of
Qwen2.5-7B (28 query heads, 4 key/value heads, 128 channels, float16). Quantizing: keys and values of a prompt of 8,192 tokens in
28 layers. Every time is that of a CUDA graph over enough layers that no buffer stays in the L2 cache; a result is checked
against the reference before it is timed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vidkv_kernels import attend, choose_channels, quantize_keys, quantize_values
from vidkv_kernels.packed import PackedLayer, Segment
from vidkv_kernels.random_layer import random_layer
from vidkv_kernels.span import Span

QUERY_HEADS, HEADS, WIDTH, LAYERS = 28, 4, 128, 28
SCALING = WIDTH**-0.5
SEGMENTS = (Segment(64, 2, "minimum"), Segment(64, 1, "mean"))
RESIDUAL = 64
SHAPES = ((1, 8192), (1, 32768), (1, 131072), (8, 8192), (8, 32768), (32, 32768))
L2_BYTES = 256 << 20
COLUMNS = (
    "operation", "provider", "batch", "tokens", "microseconds", "p20", "p80", "ratio_to_best_sdpa", "bytes", "gpu", "torch", "triton",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="csv file to write")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many shapes of attention, smallest first")
    arguments = parser.parse_args()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in measurements(SHAPES[: arguments.shapes]):
            writer.writerow(row | machine)
            file.flush()
            print(*row.values())


def measurements(shapes: tuple[tuple[int, int], ...]) -> Iterator[dict]:
    """Yield rows without those columns that describe the machine."""
    yield from time_quantizing(8192)
    for batch, tokens in shapes:
        yield from time_attention(batch, tokens)
        torch.cuda.empty_cache()


def time_attention(batch: int, tokens: int) -> Iterator[dict]:
    generator = torch.Generator("cuda").manual_seed(0)
    layer = random_layer(generator, torch.float16, [tokens] * batch, [RESIDUAL] * batch, heads=HEADS, width=WIDTH, segments=SEGMENTS)
    query = torch.randn(batch, QUERY_HEADS, 1, WIDTH, generator=generator, device="cuda").half()
    check(query, layer)
    packed_bytes = sum(tensor.nbytes for tensor in packed_tensors(layer))
    dense_bytes = 2 * 2 * batch * HEADS * (tokens + RESIDUAL) * WIDTH
    layers = [copy_of(layer) for _ in range(min(LAYERS, 1 + L2_BYTES // packed_bytes))]
    measured = {"triton": (packed_bytes, time_calls([lambda layer=layer: attend.OP(query, layer, SCALING) for layer in layers]))}
    del layers
    states = [
        torch.randn(2, batch, HEADS, tokens + RESIDUAL, WIDTH, device="cuda", dtype=torch.float16)
        for _ in range(min(LAYERS, 1 + L2_BYTES // dense_bytes))
    ]
    for name, backend in (("sdpa cudnn", SDPBackend.CUDNN_ATTENTION), ("sdpa flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            calls = [lambda pair=pair: attend_densely(query, *pair) for pair in states]
            measured[name] = dense_bytes, time_calls(calls)
    del states
    if batch * tokens <= 8 * 32768:
        measured["dequantize, then sdpa"] = packed_bytes, time_calls([lambda: dequantize_and_attend(query, layer)])
    best = min(median for name, (_, (median, *_)) in measured.items() if name.startswith("sdpa"))
    for name, (stored, (median, p20, p80)) in measured.items():
        yield {
            "operation": "attend", "provider": name, "batch": batch, "tokens": tokens, "microseconds": f"{median:.1f}",
            "p20": f"{p20:.1f}", "p80": f"{p80:.1f}", "ratio_to_best_sdpa": f"{best / median:.2f}", "bytes": stored,
        }  # fmt: skip


def attend_densely(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query, keys, values, scale=SCALING, enable_gqa=True)


def dequantize_and_attend(query: torch.Tensor, layer: PackedLayer) -> torch.Tensor:
    keys = layer.keys.decode(torch.float16) @ layer.keys.rotation.half().transpose(-1, -2)
    values = layer.values[0].decode(torch.float16)
    keys = torch.cat([keys, layer.residual.keys[:, :, :RESIDUAL]], dim=2)
    return attend_densely(query, keys, torch.cat([values, layer.residual.values[:, :, :RESIDUAL]], dim=2))


def check(query: torch.Tensor, layer: PackedLayer) -> None:
    """Hold the kernel to the bound of its tests before it is timed."""
    found = attend.OP(query, layer, SCALING)
    plain, truth = (attend.attend_reference(query, layer, SCALING, dtype=dtype) for dtype in (torch.float16, torch.float32))
    error, plain_error = ((side.float() - truth).abs().max() for side in (found, plain))
    if not error <= 2 * plain_error + torch.finfo(torch.float16).eps * truth.abs().max():
        raise SystemExit(f"attend errs by {error:.3g}, plain torch by {plain_error:.3g}; nothing is timed")


def packed_tensors(layer: PackedLayer) -> Iterator[torch.Tensor]:
    yield from (layer.keys.codes, layer.keys.scale, layer.keys.offset)
    yield from (layer.values[0].codes, layer.values[0].scale)
    yield from (layer.residual.keys[:, :, :RESIDUAL], layer.residual.values[:, :, :RESIDUAL])


def copy_of(layer: PackedLayer) -> PackedLayer:
    fields = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(layer.keys).items()}
    run = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(layer.values[0]).items()}
    return PackedLayer(type(layer.keys)(**fields), (type(layer.values[0])(**run),), layer.residual)


def time_quantizing(tokens: int) -> Iterator[dict]:
    states = [torch.randn(2, 1, tokens, HEADS, WIDTH, device="cuda").half().transpose(2, 3) for _ in range(LAYERS)]
    device = states[0].device
    span = Span.of(device, [0], [tokens], [0])
    transform = quantize_keys.real_fourier(64, device)
    keys = quantize_keys.make_keys(1, HEADS, tokens, SEGMENTS, 32, device)
    values = quantize_values.make_values(1, HEADS, tokens, WIDTH, device, levels=3, offset_kind="centred")

    def quantize(pair: torch.Tensor) -> None:
        order = choose_channels.OP(pair[0], span, 64)
        quantize_keys.OP(pair[0], span, order, transform, keys)
        quantize_values.OP(pair[1], span, 0.7, values)
        keys.rotation.copy_(quantize_keys.key_rotation(order, 64, transform))

    order_of_first = choose_channels.OP(states[0][0], span, 64)
    parts = {
        "all": quantize,
        "order of channels": lambda pair: choose_channels.OP(pair[0], span, 64),
        "keys": lambda pair: quantize_keys.OP(pair[0], span, order_of_first, transform, keys),
        "values": lambda pair: quantize_values.OP(pair[1], span, 0.7, values),
    }
    for name, part in parts.items():
        median, p20, p80 = (LAYERS * time for time in time_calls([lambda pair=pair, part=part: part(pair) for pair in states]))
        yield {
            "operation": f"quantize 28 layers, {name}", "provider": "triton", "batch": 1, "tokens": tokens,
            "microseconds": f"{median:.1f}", "p20": f"{p20:.1f}", "p80": f"{p80:.1f}", "ratio_to_best_sdpa": "",
            "bytes": sum(pair.nbytes for pair in states),
        }  # fmt: skip


def time_calls(calls: list[Callable[[], object]], replays: int = 30) -> tuple[float, float, float]:
    """Return median, 20th and 80th percentile of the microseconds of a call, in replays of a graph of all calls."""
    for call in calls[:2]:
        call()
    rounds = max(1, 24 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * rounds:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / len(calls) / rounds)
    tenths = statistics.quantiles(times, n=10)
    return statistics.median(times), tenths[1], tenths[7]


if __name__ == "__main__":
    main()

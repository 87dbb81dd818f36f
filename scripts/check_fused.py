"""Run a 7B model with attention that reads the packed cache, and hold what it stores to a formula.

    python scripts/make_random_checkpoint.py llava_onevision_7b /data/random_llava
    python scripts/check_fused.py measure /data/random_llava results/full_size/fused_llava_onevision_7b.json
    python scripts/check_fused.py table results/full_size/fused_*.json > results/full_size_fused.md

Each recipe answers one prompt with a video of noise three times: attention `fused` with decode steps as CUDA graphs, `fused` without
them, and `sdpa` over dequantized states. Any checkpoint of the two families will do.
"""

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from vidkv_eval import torchvision_cpu

torchvision_cpu.install()  # before anything imports transformers

from check_repeatability import parting, prompt  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

from vidkv_eval.attention import use_attention  # noqa: E402
from vidkv_eval.cache import QuantizedCache  # noqa: E402
from vidkv_eval.environment import describe_environment  # noqa: E402
from vidkv_eval.recipe import load_recipe  # noqa: E402
from vidkv_eval.settings import PROJECT  # noqa: E402

RECIPES = ("kivi_k2_v2", "vidkv_k150_v158_scaled", "vidkv_k150_v158_published", "vidkv_k150_v166_scaled", "ours_k182_v158")
BLOCK, RESIDUAL, WIDTH = 32, 128, 128
# Bytes of a block of 32 tokens of one head as kernels read them, keys and values. A code takes 1 or 2 bits (ternary ones 2), a scale or
# an offset of a channel 2 bytes. KIVI: 128 channels of 8 + 2 + 2; values 32 tokens of 32 + 4 groups of 2 + 2. VidKV: 64 channels of
# 8 + 2 + 2, 64 of 4 + 2 + 2 (scaled) or 4 + 2 (published); values 128 channels of 8 + 2 (scaled) or 8 (published).
BLOCK_BYTES = {
    "kivi_k2_v2": (128 * 12, 32 * 48),
    "vidkv_k150_v158_scaled": (64 * 12 + 64 * 8, 128 * 10),
    "vidkv_k150_v158_published": (64 * 12 + 64 * 6, 128 * 8),
}


def expected_bytes(recipe: str, prompt_tokens: int, new: int, layers: int, heads: int) -> tuple[int, int] | None:
    """Return bytes of keys and of values after a prompt and `new` tokens, the last of which was never fed back; None: not worked out."""
    if recipe not in BLOCK_BYTES:
        return None
    waiting = prompt_tokens % BLOCK + new - 1
    residual = waiting % RESIDUAL
    blocks = (prompt_tokens + new - 1 - residual) // BLOCK
    keys, values = (heads * (blocks * size + residual * WIDTH * 2) for size in BLOCK_BYTES[recipe])
    # Of a layer: the number of tokens, the largest scale of each head, of keys and of values, and the order of the key channels.
    keys += 4 + 4 * heads + (WIDTH if recipe.startswith("vidkv") else 0)
    return layers * keys, layers * (values + 4 * heads)


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict:
    model = AutoModelForImageTextToText.from_pretrained(arguments.checkpoint, dtype="auto", device_map=arguments.device).eval()
    inputs = prompt(arguments.checkpoint, arguments.frames, 392).to(arguments.device, model.dtype)
    text = model.config.get_text_config()
    report = {
        "model": type(model).__name__, "dtype": str(model.dtype).removeprefix("torch."), "layers": text.num_hidden_layers,
        "heads": text.num_key_value_heads, "frames": arguments.frames, "prompt_tokens": inputs["input_ids"].shape[1],
        "environment": describe_environment(PROJECT, device=arguments.device, threads=torch.get_num_threads()),
        "date": datetime.now(UTC).date().isoformat(), "recipes": {},
    }  # fmt: skip
    for name in arguments.recipes:
        entry = report["recipes"][name] = {}
        answers = {}
        for way in ("graphs", "steps", "dense"):
            use_attention(model, "sdpa" if way == "dense" else "fused", graphs=way == "graphs")
            answers[way] = answer(model, load_recipe(name), inputs, arguments.tokens)
            entry[way] = {key: value for key, value in answers[way].items() if key not in ("tokens", "logits")}
        new = len(answers["graphs"]["tokens"])
        entry["new_tokens"] = new
        entry["expected_bytes"] = expected_bytes(name, report["prompt_tokens"], new, report["layers"], report["heads"])
        entry["graphs_part_from_steps_at"] = parting(answers["steps"]["tokens"], answers["graphs"]["tokens"])
        entry["steps_part_from_dense_at"] = parting(answers["dense"]["tokens"], answers["steps"]["tokens"])
        # The first step that reads the quantized cache; the token before it was the same in all ways.
        first = [answers[way]["logits"] for way in ("steps", "dense")]
        entry["largest_difference_of_logits"] = (first[0] - first[1]).abs().max().item()
        entry["largest_logit"] = first[1].abs().max().item()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(entry), flush=True)
    return report


def answer(model, recipe, inputs: dict, tokens: int) -> dict:
    """Generate greedily; return tokens, logits of the second one, stored bytes, what the cache added to allocated memory, and time."""
    decoder = model.get_decoder().forward
    replayed = getattr(decoder, "replays", 0)
    cache = QuantizedCache.for_model(model, recipe)
    is_on_gpu = model.device.type == "cuda"
    before, started = torch.cuda.memory_allocated() if is_on_gpu else 0, time.perf_counter()
    output = model.generate(
        **inputs, past_key_values=cache, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, output_logits=True,
        return_dict_in_generate=True, repetition_penalty=1.0,
    )  # fmt: skip
    # Moving tokens to the host waits for the device.
    logits, answered = output.logits[1][0].float(), output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - started
    del output
    footprint = cache.footprint()
    found = {
        "tokens": answered, "logits": logits, "seconds": seconds, "key_bytes": footprint.key_bytes, "value_bytes": footprint.value_bytes,
        "bits": footprint.effective_bits, "replays": getattr(decoder, "replays", 0) - replayed,
    }  # fmt: skip
    if is_on_gpu:
        held = torch.cuda.memory_allocated()
        del cache
        # Graphs keep what they were captured with until another cache comes; that is not the cache's.
        found |= {"allocated_bytes": held - torch.cuda.memory_allocated(), "left_bytes": torch.cuda.memory_allocated() - before}
    return found


def table(reports: list[dict]) -> str:
    columns = (
        "model", "recipe", "prompt tokens", "new tokens", "stored MiB", "bits", "stored as computed", "allocated MiB", "steps as graphs",
        "graphs part from steps at", "fused parts from dense at", "largest difference of logits", "largest logit",
    )  # fmt: skip
    environment = reports[0]["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    lines = [
        "# Attention over the packed cache at full size",
        "",
        "Weights are random and nothing here is a quality score. The models have the true sizes of the published checkpoints, are loaded "
        "from a folder by the real code, and answer a prompt with a video of noise greedily, one recipe at a time.",
        "",
        "*stored*: bytes counted from the tensors of the cache after the answer, with attention `fused`. *stored as computed*: whether "
        "they are those worked out by hand from the numbers of tokens (`expected_bytes`); for the last two recipes nothing was worked "
        "out. *allocated*: what PyTorch gave back when the cache was deleted, spare room of buffers included. *steps as graphs*: how many "
        "of the decode steps were repeated as CUDA graphs. *graphs part from steps at*, *fused parts from dense at*: first new token that "
        "differs between the three ways, empty if none does; random weights give nearly flat logits, where rounding is enough. *largest "
        "difference of logits*: fused against dense at the first step that reads the quantized cache.",
        "",
        f"{environment['gpu']}; Python {environment['python']}, {packages}; {reports[0]['date']}. Made by `scripts/check_fused.py`.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for report in reports:
        for name, entry in report["recipes"].items():
            fused = entry["graphs"]
            stored, expected = [fused["key_bytes"], fused["value_bytes"]], entry["expected_bytes"]
            cells = (
                f"{report['model']}, {report['dtype']}", name, report["prompt_tokens"], entry["new_tokens"], f"{sum(stored) / 2**20:.2f}",
                f"{fused['bits']:.3f}", "" if expected is None else "yes" if stored == list(expected) else f"**no: {expected}**",
                f"{fused['allocated_bytes'] / 2**20:.2f}" if "allocated_bytes" in fused else "", fused["replays"],
                _step(entry["graphs_part_from_steps_at"]), _step(entry["steps_part_from_dense_at"]),
                f"{entry['largest_difference_of_logits']:.3f}", f"{entry['largest_logit']:.2f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _step(step: int | None) -> str:
    return "" if step is None else str(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="run a checkpoint and write what came out")
    measuring.add_argument("checkpoint", type=Path)
    measuring.add_argument("output", type=Path)
    measuring.add_argument("--frames", type=int, default=32)
    measuring.add_argument("--tokens", type=int, default=160, help="new tokens; more than 128 fill the residual once")
    measuring.add_argument("--recipes", nargs="*", default=list(RECIPES))
    measuring.add_argument("--device", default="cuda")
    measuring.set_defaults(command=measure)
    showing = commands.add_parser("table", help="print the table of reports")
    showing.add_argument("reports", type=Path, nargs="+")
    showing.set_defaults(command=lambda given: print(table([json.loads(path.read_text()) for path in given.reports]), end=""))
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()

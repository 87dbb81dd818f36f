"""Run a 7B model at its true size and check what it stores, against a formula and against the stock adapter.

    python scripts/make_random_checkpoint.py qwen2_5_vl_7b /data/random_qwen
    python scripts/check_full_size.py measure qwen2_5_vl_7b /data/random_qwen results/full_size/qwen2_5_vl_7b.json
    python scripts/check_full_size.py table results/full_size/*.json > results/full_size.md

Every recipe answers one clip of the mini data, with a prefill of its own. `--runs runs/mini` names the
folder of a `vidkv run` of the same settings, whose answers are then compared too.
"""

import argparse
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from vidkv_eval.environment import describe_environment
from vidkv_eval.settings import PROJECT, compose

RECIPES = ("fp16", "kivi_k2_v2", "vidkv_k150_v158_scaled", "vidkv_k150_v158_published")
CACHE = ("profile.cache.storage_dtype=null", "profile.cache.keep_dense=false", "profile.cache.rows=null")  # as in the paper profile
BLOCK, RESIDUAL = 32, 128  # tokens quantized together; tokens kept in 16 bit at most
HEAD_WIDTH = 128
# Bytes of a block of 32 tokens of one head, keys and values. Affine 2 bit, groups of 32: 8 bytes of codes, 2 + 2 of scale and
# minimum. Half of 128 channels so, the others with 1 bit: 4 bytes of codes, 2 of scale (published) or 2 + 2 of scale and mean.
# Ternary: five of 32 x 128 codes in a byte, and 2 bytes of scale a group (scaled) or nothing (published).
BLOCK_BYTES = {
    "kivi_k2_v2": (128 * 12, 128 * 12),
    "vidkv_k150_v158_scaled": (64 * 12 + 64 * 8, 820 + 128 * 2),
    "vidkv_k150_v158_published": (64 * 12 + 64 * 6, 820),
}
CHANNEL_INDICES = 64  # bytes a layer: which half of the channels of keys has 2 bit


def expected_bytes(recipe: str, prompt: int, new: int, layers: int, heads: int) -> tuple[int, int]:
    """Return bytes of keys and of values after a prompt and `new` tokens, the last of which was never fed back."""
    fed_back = new - 1
    waiting = prompt % BLOCK + fed_back
    residual = waiting % RESIDUAL
    history = prompt - prompt % BLOCK + waiting - residual
    if recipe == "fp16":
        full = layers * heads * (prompt + fed_back) * HEAD_WIDTH * 2
        return full, full
    keys, values = (layers * heads * (history // BLOCK * size + residual * HEAD_WIDTH * 2) for size in BLOCK_BYTES[recipe])
    return keys + (layers * CHANNEL_INDICES if recipe.startswith("vidkv") else 0), values


def measure(arguments: argparse.Namespace) -> dict:
    """Load a checkpoint as `vidkv run` does and answer with every recipe."""
    settings = compose(
        [
            "profile=mini",
            f"model={arguments.model}",
            f"model.pretrained={arguments.checkpoint}",
            f"benchmark.max_new_tokens={arguments.tokens}",
            *CACHE,
            *arguments.settings,
        ]
    )
    os.environ.update(settings["profile"]["environment"])
    import torch

    from vidkv_eval.harness import Session  # reads the environment when it is imported
    from vidkv_eval.recipe import load_recipe

    gpu = arguments.device.startswith("cuda")
    session = Session(settings["model"], settings["benchmark"], settings["profile"]["data"], device=arguments.device, limit=1)
    started = time.perf_counter()
    model = session.adapter.model
    text = model.config.get_text_config()
    report = {
        "model": arguments.model,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": text.num_hidden_layers,
        "heads": text.num_key_value_heads,
        "load_seconds": time.perf_counter() - started,
        "weights_gpu_bytes": torch.cuda.memory_allocated() if gpu else None,
        "settings": {"frames": settings["model"]["frames"], "cache": settings["profile"]["cache"], "max_new_tokens": arguments.tokens},
        "environment": describe_environment(PROJECT, device=arguments.device, threads=torch.get_num_threads()),
        "date": datetime.now(UTC).date().isoformat(),
        "recipes": {},
    }
    write(report, arguments.output)

    def timed(answer):
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        answered = answer()
        return answered, time.perf_counter() - started, torch.cuda.max_memory_allocated() if gpu else None

    stock_answer(session, arguments.model)  # warms up
    stock, report["stock_seconds"], report["stock_peak_gpu_bytes"] = timed(lambda: stock_answer(session, arguments.model))
    report["stock_text"] = stock
    for name in RECIPES:
        (answer,), seconds, peak = timed(lambda name=name: list(session.answer(0, [load_recipe(name)], settings["profile"]["cache"])))
        expected = expected_bytes(name, answer.prompt_tokens, answer.output_tokens, report["layers"], report["heads"])
        report["recipes"][name] = {
            "prompt_tokens": answer.prompt_tokens,
            "output_tokens": answer.output_tokens,
            "key_bytes": answer.key_bytes,
            "value_bytes": answer.value_bytes,
            "elements": answer.key_elements,
            "expected_bytes": expected,
            "seconds": seconds,
            "peak_gpu_bytes": peak,
            "is_stock_text": answer.text == stock,
            "is_program_text": program_agrees(arguments, name, answer),
            "text": answer.text,
        }
        write(report, arguments.output)
    return report


def stock_answer(session, model: str) -> str:
    """Answer the first sample with the loop of lmms-eval's own class on the same weights, without a cache of ours."""
    from lmms_eval.models.chat.llava_hf import LlavaHf
    from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL

    stock_class = LlavaHf if model.startswith("llava") else Qwen2_5_VL
    task, sample = session._task, session.samples[0]
    metadata = {"task": task.config.task, "split": task.config.test_split, "doc_id": sample.id, "repeats": 1}
    request = task.construct_requests(doc_id=sample.id, ctx=sample.question, metadata=metadata)
    (result,) = stock_class.generate_until(session.adapter, [request])
    return result.text


def program_agrees(arguments: argparse.Namespace, recipe: str, answer) -> bool | None:
    """Say whether `vidkv run` gave this text and stored as many bytes, None where it was not run."""
    if arguments.runs is None:
        return None
    lines = [path.read_text() for path in arguments.runs.glob(f"cells/{arguments.model}/*/{recipe}-*/samples.jsonl")]
    records = [json.loads(line) for text in lines for line in text.splitlines()]
    wanted = (answer.text, answer.prompt_tokens, answer.key_bytes, answer.value_bytes)
    keys = ("text", "prompt_tokens", "key_bytes", "value_bytes")
    first = [tuple(record[key] for key in keys) for record in records if record["sample"] == answer.sample]
    return first == [wanted] if first else None


def table(reports: list[dict]) -> str:
    """Return the page that shows what was measured."""
    columns = (
        "model", "recipe", "prompt tokens", "new tokens", "stored MiB", "key bits", "value bits", "bits", "stored as computed",
        "text of stock", "text of vidkv run", "seconds", "peak GPU GB",
    )  # fmt: skip
    lines = ["# The 7B models at full size", "", *(f"{line}\n" for line in caption(reports))]
    lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for report in reports:
        lines += [f"| {' | '.join(row(report, name, entry))} |" for name, entry in report["recipes"].items()]
    return "\n".join(lines) + "\n"


def row(report: dict, name: str, entry: dict) -> tuple[str, ...]:
    """Return the cells of one recipe."""
    stored = entry["key_bytes"], entry["value_bytes"]
    bits = [8 * size / entry["elements"] for size in (*stored, sum(stored) / 2)]
    return (
        report["model"],
        name,
        str(entry["prompt_tokens"]),
        str(entry["output_tokens"]),
        f"{sum(stored) / 2**20:.2f}",
        *(f"{value:.3f}" for value in bits),
        "yes" if list(stored) == list(entry["expected_bytes"]) else f"no: {sum(entry['expected_bytes']) / 2**20:.2f} MiB",
        compared(entry["is_stock_text"]) if name == "fp16" else "",
        compared(entry["is_program_text"]),
        f"{entry['seconds']:.1f}",
        "-" if entry["peak_gpu_bytes"] is None else f"{entry['peak_gpu_bytes'] / 1e9:.2f}",
    )


def compared(is_equal: bool | None) -> str:
    """Return the outcome of a comparison in words."""
    return {True: "equal", False: "**differs**", None: "not compared"}[is_equal]


def caption(reports: list[dict]) -> list[str]:
    """Return paragraphs on what stands in the table."""
    environment = reports[0]["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    weights = "; ".join(
        f"{report['model']}: {report['parameters']:,} parameters in {report['dtype']}, {report['settings']['frames']} frames, "
        f"loaded in {report['load_seconds']:.0f} s; the stock adapter without a cache of ours took {report['stock_seconds']:.1f} s"
        + (f" and {report['stock_peak_gpu_bytes'] / 1e9:.2f} GB" if report["stock_peak_gpu_bytes"] else "")
        for report in reports
    )
    return [
        "The weights are random and nothing here is a quality score. The models have the true sizes of the published checkpoints, are "
        "loaded from a folder by the same code, and answer a clip of the mini data greedily, one recipe at a time.",
        "*stored as computed*: whether the bytes counted from the tensors of the cache are those computed by hand from the number of "
        "tokens. *text of stock*: whether FP16 through our cache gave the text of lmms-eval's own loop on the same weights without it; "
        "other recipes need not. *text of vidkv run*: whether the program, in another process and with one prefill for all recipes, gave "
        "the same text and bytes. *seconds*: one answer with video, prefill and decoding. *peak GPU GB*: 10^9 bytes allocated by torch, "
        "weights included.",
        *disagreements(reports),
        f"{weights}.",
        f"{environment['gpu'] or environment['cpu']}; Python {environment['python']}, {packages}; {reports[0]['date']}.",
        "Made by `scripts/make_random_checkpoint.py MODEL FOLDER` and `scripts/check_full_size.py measure MODEL FOLDER OUTPUT "
        f"--runs runs/mini` after `vidkv run -m profile=mini model=MODEL model.pretrained=FOLDER device=cuda workers=1 threads=8 "
        f"benchmark=video_dc limit=2 recipe={','.join(RECIPES)} "
        f"benchmark.max_new_tokens={reports[0]['settings']['max_new_tokens']} {' '.join(CACHE)}`; "
        f"commit {environment['commit'] or 'not recorded: measured in a copy without its history'}.",
    ]


def disagreements(reports: list[dict]) -> list[str]:
    """Return what has to be said where texts differ that should be equal."""
    entries = [(report["model"], name, entry) for report in reports for name, entry in report["recipes"].items()]
    stock = [model for model, name, entry in entries if name == "fp16" and entry["is_stock_text"] is False]
    program = [f"{model} {name}" for model, name, entry in entries if entry["is_program_text"] is False]
    if not stock and not program:
        return []
    return [
        f"**Texts differ that should be equal.** FP16 against stock: {', '.join(stock) or 'none'}. Against `vidkv run`: "
        f"{', '.join(program) or 'none'}. One clip was compared; where a row says equal, that is all it shows.",
        *(repeated(report) for report in reports),
    ]


def repeated(report: dict) -> str:
    """Return what scripts/check_repeatability.py found for a model."""
    found = report["repeatability"]
    if found is None:
        return f"{report['model']}: whether stock generation repeats itself was not measured."
    ways = []
    for name, steps in found["parts_from_first_stock_run_at"].items():
        gaps = found["gap_there"][name]
        runs = ["equal" if step is None else f"parts at token {step} (lead {gap:.3f})" for step, gap in zip(steps, gaps, strict=True)]
        ways.append(f"{name}: {', '.join(runs)}")
    is_repeatable = not any(found["parts_from_first_stock_run_at"]["stock"])
    verdict = (
        "Stock generation repeats itself here, and the FP16 recipe gives its tokens."
        if is_repeatable and not any(map(any, found["parts_from_first_stock_run_at"].values()))
        else "Stock generation does not repeat itself on this machine, so that texts cannot tell whether a cache is exact."
        if not is_repeatable
        else "**Stock generation repeats itself here and ours differs.**"
    )
    return (
        f"{report['model']}, one prompt of noise several times in one process, against the first stock run ({found['dtype']}, "
        f"{found['prompt_tokens']} tokens, `scripts/check_repeatability.py`; lead = first logit minus second, median "
        f"{found['median_top2_gap']:.3f}): {'; '.join(ways)}. {verdict}"
    )


def read(path: Path) -> dict:
    """Read a report, and the outcome of scripts/check_repeatability.py that lies beside it."""
    report = json.loads(path.read_text())
    beside = path.with_name(f"repeatability_{report['model']}.json")
    return report | {"repeatability": json.loads(beside.read_text()) if beside.exists() else None}


def write(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="run a checkpoint and write what came out")
    measuring.add_argument("model")
    measuring.add_argument("checkpoint", type=Path)
    measuring.add_argument("output", type=Path)
    measuring.add_argument("settings", nargs="*", metavar="key=value", help="further settings, as for `vidkv run`")
    measuring.add_argument("--device", default="cuda:0")
    measuring.add_argument("--tokens", type=int, default=160, help="new tokens; more than 128 fill the residual once")
    measuring.add_argument("--runs", type=Path)
    measuring.set_defaults(command=measure)
    showing = commands.add_parser("table", help="print the table of reports")
    showing.add_argument("reports", type=Path, nargs="+")
    showing.set_defaults(command=lambda given: print(table([read(path) for path in given.reports]), end=""))
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()

"""Train a mini model and write its checkpoint.

    python scripts/train_mini.py mini_qwen2_5_vl OUTPUT_FOLDER --seed 0 --steps 3000

Writes a Hugging Face checkpoint (float16 weights, configuration, processor, chat template) and training.json: settings,
wall time, versions, hardware, a thinned log, and how the recipes score on unseen scenes. About 5 minutes on an H200.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from vidkv_eval import torchvision_cpu

torchvision_cpu.install()  # before anything imports transformers

from vidkv_eval.mini import llava_onevision, qwen2_5_vl  # noqa: E402
from vidkv_eval.mini.instrument import score_recipes  # noqa: E402
from vidkv_eval.mini.text import END_OF_TURN, PADDING, train_tokenizer  # noqa: E402
from vidkv_eval.mini.train import Settings, train  # noqa: E402

FAMILIES = {"mini_llava_onevision": llava_onevision, "mini_qwen2_5_vl": qwen2_5_vl}
RECIPES = (
    "fp16",
    "kivi_k2_v2",
    "vidkv_k200_v200",
    "vidkv_k150_v200_scaled",
    "vidkv_k150_v200_published",
    "vidkv_k150_v158_scaled",
    "vidkv_k150_v158_published",
    "kivi_k1_v1",
    "vidkv_k100_v100_scaled",
    "vidkv_k100_v100_published",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=FAMILIES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--max-seconds", type=float, default=540.0, help="the learning rate reaches its end by then, whatever the steps")
    parser.add_argument("--scenes", type=int, default=128, help="unseen scenes for the check of the recipes")
    parser.add_argument("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    family = FAMILIES[arguments.model]
    tokenizer = train_tokenizer(family.SPECIALS)
    settings = Settings(
        seed=arguments.seed,
        steps=arguments.steps,
        batch=arguments.batch,
        weight_decay=arguments.weight_decay,
        max_seconds=arguments.max_seconds,
    )

    def log(line: str) -> None:
        print(f"[{arguments.model} seed {arguments.seed}] {line}", flush=True)

    model, report = train(family, tokenizer, settings, arguments.device, arguments.workers, log)
    model.generation_config.eos_token_id = tokenizer.token_to_id(END_OF_TURN)
    model.generation_config.pad_token_id = tokenizer.token_to_id(PADDING)
    report["versions"] = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    report["hardware"] = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor()
    model = model.half()
    model.save_pretrained(arguments.output)
    family.save_processor(arguments.output, tokenizer)
    write_report(arguments.output, report)

    # From here on as the harness runs it: float16 weights, float32 arithmetic.
    torch.set_float32_matmul_precision("highest")
    started = time.perf_counter()
    report["scores"] = score_recipes(model.float(), family, tokenizer, RECIPES, arguments.scenes, seed=7)
    report["scores_note"] = f"share of facts right, 0 to 100, over {arguments.scenes} unseen scenes; frames imitate H.264"
    report["scores_seconds"] = round(time.perf_counter() - started, 1)
    write_report(arguments.output, report)
    for name, score in report["scores"].items():
        cells = "   ".join(f"{task} {score[task]:6.2f} +- {score[task + '_ci95']:.2f}" for task in ("description", "question"))
        log(f"{name:28s} {cells}")


def write_report(folder: Path, report: dict) -> None:
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

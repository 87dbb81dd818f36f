"""Does greedy generation repeat itself on this machine, and does the identity cache change it?

    python scripts/check_repeatability.py CHECKPOINT_FOLDER [--frames 16] [--side 392] [--tokens 160] [--device cuda]

Generates the same prompt several times with the stock cache, with the fp16 recipe, and with the fp16 recipe behind a shared
prefill. Where two runs part, prints the step and by how much the stock logits preferred their first choice to their second.
Made for checkpoints of scripts/make_random_checkpoint.py, whose logits are nearly flat: there a rounding difference is enough
to change a token.
"""

import argparse
import json
from pathlib import Path

import torch

from vidkv_eval import torchvision_cpu

torchvision_cpu.install()  # before anything imports transformers

from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from vidkv_eval.cache import QuantizedCache  # noqa: E402
from vidkv_eval.inject import PrefillMemo, injected  # noqa: E402
from vidkv_eval.recipe import load_recipe  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=392, help="pixels")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(arguments.checkpoint, dtype="auto", device_map=arguments.device).eval()
    inputs = prompt(arguments.checkpoint, arguments.frames, arguments.side).to(arguments.device, model.dtype)
    options = {"max_new_tokens": arguments.tokens, "do_sample": False}

    def plain() -> list[int]:
        return model.generate(**inputs, **options)[0].tolist()

    def with_cache(memo: PrefillMemo | None) -> list[int]:
        with injected(model, lambda: QuantizedCache.for_model(model, load_recipe("fp16")), memo):
            return plain()

    memo = PrefillMemo()
    ways = {"stock": plain, "fp16 recipe": lambda: with_cache(None), "fp16 recipe, shared prefill": lambda: with_cache(memo)}
    outputs = {name: [way() for _ in range(arguments.times)] for name, way in ways.items()}
    scored = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    gaps = [float(-step[0].float().topk(2).values.diff()) for step in scored.logits]
    length = inputs["input_ids"].shape[1]
    reference = outputs["stock"][0]
    report = {"prompt_tokens": length, "median_top2_gap": sorted(gaps)[len(gaps) // 2], "dtype": str(model.dtype)}
    report["parts_from_first_stock_run_at"] = {
        name: [parting(reference[length:], tokens[length:]) for tokens in runs] for name, runs in outputs.items()
    }
    report["gap_there"] = {
        name: [None if step is None or step >= len(gaps) else gaps[step] for step in steps]
        for name, steps in report["parts_from_first_stock_run_at"].items()
    }
    print(json.dumps(report, indent=1))


def prompt(checkpoint: Path, frames: int, side: int):
    """A question about a video of noise, as the processor hands it over."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    video = torch.randint(0, 256, (frames, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    content = [{"type": "video"}, {"type": "text", "text": "Please describe the video in detail, object by object."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    return processor(text=[text], videos=[video], return_tensors="pt")


def parting(first: list[int], second: list[int]) -> int | None:
    """The first step at which two answers differ, None if they do not."""
    steps = [index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]
    return steps[0] if steps else None


if __name__ == "__main__":
    main()

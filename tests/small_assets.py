"""Assets of a mini profile small enough for unit tests: no weights worth the name, no real clips."""

import json
import struct
from pathlib import Path

MODELS = ("mini_llava_onevision", "mini_qwen2_5_vl")
TASKS = {"video_dc499": "videochatgpt", "moviechat_global": "moviechat_1k_test"}


def make_assets(folder: Path, samples: int = 3) -> Path:
    """Write checkpoints, rows and clips below a folder and return it."""
    for model in MODELS:
        checkpoint = folder / "models" / model
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text(json.dumps({"model_type": model}))
        header = b'{"__metadata__":{}}'
        (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 64)
    for task, clips in TASKS.items():
        videos = folder / "hf_home" / clips / "Test_Videos"
        videos.mkdir(parents=True)
        for index in range(samples):
            (videos / f"clip_{index}.mp4").write_bytes(b"clip" * (index + 1))
        write_rows(folder, task, ["What happens?"] * samples)
    return folder


def write_rows(folder: Path, task: str, questions: list[str]) -> None:
    """Write the rows of a task, one a question."""
    rows = folder / "rows" / f"{task}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    lines = [{"video_name": f"clip_{index}", "question": question, "answer": "A dot."} for index, question in enumerate(questions)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))


def small_settings(folder: Path) -> list[str]:
    """Return settings that make a run use assets and stores below a folder."""
    return [f"paths.assets={folder / 'assets'}", f"paths.runs={folder / 'runs'}", f"paths.results={folder / 'results'}"]

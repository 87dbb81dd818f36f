"""The mini data sets: clips and rows in the exact schema of the real ones, where lmms-eval's tasks look for them.

    hf_home/<cache folder of the task>/<sub-folder>/<clip>.mp4
    rows/<task>.jsonl

Each suite has clips of its own. A suite is one function from a scene to the rows it yields; add one to SUITES for the
next suite.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vidkv_eval.mini.clips import FRAMES_PER_SECOND, write_clip
from vidkv_eval.mini.scenes import FRAMES, QUESTION_KINDS, Event, ask, describe, sample_scene

CLIPS = 48


@dataclass(frozen=True)
class Suite:
    """Where a task's clips lie and how a scene becomes one of its rows.

    Attributes:
        folder: below hf_home, as the shipped task of lmms-eval 0.7.3 joins it.
        seed: of its scenes; training never draws from seeds this small.
        row: (clip name without extension, index of the clip, scene, random state) -> row.
    """

    task: str
    folder: str
    seed: int
    row: Callable[[str, int, tuple[Event, ...], random.Random], dict]


def _video_dc(clip: str, index: int, scene: tuple[Event, ...], rng: random.Random) -> dict:
    prompt, answer = describe(scene)
    return {"video_name": clip, "question": prompt, "answer": answer}


def _movie_chat(clip: str, index: int, scene: tuple[Event, ...], rng: random.Random) -> dict:
    prompt, answer = ask(scene, QUESTION_KINDS[index % len(QUESTION_KINDS)], rng)
    return {"video_name": f"{clip}.mp4", "question": prompt, "answer": answer, "time": FRAMES // FRAMES_PER_SECOND}


SUITES = (
    Suite("video_dc499", "videochatgpt/Test_Videos", 101, _video_dc),
    Suite("moviechat_global", "moviechat_1k_test/Test_Videos", 202, _movie_chat),
)


def write_suite(suite: Suite, root: Path, clips: int = CLIPS) -> None:
    """Render the clips of a suite and write its rows; the same files at every call."""
    rng = random.Random(suite.seed)
    rows = []
    for index in range(clips):
        scene = sample_scene(rng)
        clip = f"mini_{suite.seed}_{index:03d}"
        write_clip(root / "hf_home" / suite.folder / f"{clip}.mp4", scene, seed=suite.seed * 1000 + index)
        rows.append(suite.row(clip, index, scene, rng))
    path = root / "rows" / f"{suite.task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

"""A worker without torch: the real measurement around a session that answers from the rows file.

The question of a row says what happens: "unreadable" raises, "crash" ends the process, "fails for NAME" raises for one recipe.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from vidkv_eval import worker


@dataclass(frozen=True)
class FakeRecipe:
    name: str
    key_bits: float = 2.0
    value_bits: float = 2.0


class FakeSession:
    def __init__(self, model, benchmark, data, *, device, judge, limit):
        self.folder = Path(data["rows"])
        rows = [json.loads(line) for line in (self.folder / f"{benchmark['task']}.jsonl").read_text().splitlines()][:limit]
        self.samples = [
            SimpleNamespace(id=index, question=row["question"], target=row["answer"], video=f"/clips/{row['video_name']}.mp4")
            for index, row in enumerate(rows)
        ]
        self.metrics = [metric["name"] for metric in benchmark["metrics"]]

    def answer(self, sample_id, recipes, cache_options):
        question = self.samples[sample_id].question
        if question == "crash":
            os._exit(3)
        if question == "unreadable":
            raise FileNotFoundError(f"cannot read video {self.samples[sample_id].video}")
        for recipe in recipes:
            if question == f"fails for {recipe.name.rsplit('-', 1)[0]}":
                raise RuntimeError("the cache refused")
            with (self.folder / "asked.log").open("a") as log:
                log.write(f"{recipe.name.rsplit('-', 1)[0]} {sample_id}\n")
            yield SimpleNamespace(
                sample=sample_id,
                recipe=recipe.name,
                text=f"answer of {recipe.name}",
                prompt_tokens=600,
                output_tokens=20,
                seconds=0.5,
                key_bytes=100,
                value_bytes=300,
                key_elements=800,
                value_elements=800,
            )

    def score(self, texts):
        values = [1.0 if "fp16" in text else float(index % 2) for index, text in enumerate(texts)]
        per_sample = {metric: values for metric in self.metrics}
        return SimpleNamespace(
            metrics={metric: sum(values) / len(values) for metric in self.metrics}, per_sample=per_sample, reviews=["{}"] * len(texts)
        )


if __name__ == "__main__":
    sys.exit(worker.main(FakeSession, lambda config: FakeRecipe(config["name"])))

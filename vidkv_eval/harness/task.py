"""Tasks as lmms-eval ships them, re-pointed at chosen data. To be imported after `torchvision_cpu.install()`."""

import os
import re
from pathlib import Path

import lmms_eval.tasks
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.utils import load_yaml_config

from vidkv_eval.harness.variables import environment_variables


def load_task(benchmark: dict, data: dict, judge: dict | None, *, scratch: Path) -> ConfigurableMessagesTask:
    """Build the task of a benchmark.

    Args:
        benchmark: task (name in lmms-eval), max_new_tokens, and optionally split.
        data: hf_home (videos lie under it, where the task looks for them), rows (folder with <task>.jsonl; None: the dataset
            that the task names) and optionally revision (of that dataset).
        judge: url, model, api_key; None: a judge that never answers.
        scratch: folder for files that datasets writes.
    """
    # Shipped task code reads these variables once, while its yaml is loaded.
    with environment_variables(
        HF_HOME=str(data.get("hf_home") or os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"),
        HF_DATASETS_CACHE=str(scratch),
        API_TYPE="openai",
        OPENAI_API_URL=judge["url"] if judge else "http://127.0.0.1:9/no-judge-was-given",
        OPENAI_API_KEY=(judge.get("api_key") if judge else None) or "none",
        MODEL_VERSION=judge["model"] if judge else "none",
    ):
        config = load_yaml_config(str(_shipped_yaml(benchmark["task"])), mode="full")
        split = benchmark.get("split") or config.get("test_split") or config.get("validation_split")
        config["test_split"] = split
        config["generation_kwargs"] = {"max_new_tokens": benchmark["max_new_tokens"], "do_sample": False, "temperature": 0, "num_beams": 1}
        if data.get("rows"):
            rows = Path(data["rows"]) / f"{benchmark['task']}.jsonl"
            if not rows.is_file():
                raise FileNotFoundError(f"no rows for task {benchmark['task']}: {rows} does not exist; change data.rows, or write the file")
            config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {split: str(rows)}}}
        elif data.get("revision"):
            config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "revision": data["revision"]}
        return ConfigurableMessagesTask(config=config)


def _shipped_yaml(task: str) -> Path:
    """Find the file that defines a task by its text; lmms-eval's own index parses all of its nearly 2,000 files."""
    root = Path(lmms_eval.tasks.__file__).parent
    definition = re.compile(rf"""^task:\s*(["']?){re.escape(task)}\1\s*$""", re.MULTILINE)
    for path in sorted(root.rglob("*.yaml")):
        if definition.search(path.read_text(encoding="utf-8")):
            return path
    raise ValueError(f"lmms-eval ships no task {task!r}; its tasks are the `task:` entries of the yaml files under {root}")

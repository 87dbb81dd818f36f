"""The whole program on two samples of each mini suite with both trained models."""

import csv
import json

import pytest

from vidkv_eval.cli import main
from vidkv_eval.mini.datasets import SUITES
from vidkv_eval.mini.text import END_OF_TURN
from vidkv_eval.settings import PROJECT

ASSETS = PROJECT / "vidkv_eval" / "mini" / "assets"
MODELS = ("mini_llava_onevision", "mini_qwen2_5_vl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    assert main(["reproduce", "smoke", f"paths.runs={folder / 'runs'}", f"paths.results={folder / 'results'}"]) == 0
    return folder / "runs" / "mini"


def test_all_cells_are_scored_and_the_table_has_a_number_for_each_metric(runs):
    scores = list(runs.glob("cells/*/*/*/scores.json"))
    assert len(scores) == 2 * 2 * 3 and not list(runs.glob("cells/*/*/*/failed.json"))
    with (runs / "tables" / "smoke.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 and all(row["score"] for row in rows)


def test_full_precision_is_right_on_both_suites_and_fewer_bits_are_stored_in_fewer_bytes(runs):
    for path in runs.glob("cells/*/*/*/scores.json"):
        scores = json.loads(path.read_text())
        if path.parent.name.startswith("fp16-"):
            assert scores["effective_bits"] == 16
            assert scores["metrics"]["gpt_eval_score"] >= 4
        else:
            # Short prompts: up to 73 answer tokens wait in the residual, at 16 bits.
            assert scores["effective_bits"] < 6
        assert scores["judge"]["name"] == "vidkv-facts"


def test_nothing_is_measured_twice(runs, capfd):
    before = {path: path.stat().st_mtime_ns for path in runs.glob("cells/*/*/*/*")}
    assert main(["reproduce", "smoke", f"paths.runs={runs.parent}", f"paths.results={runs.parent}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.glob("cells/*/*/*/*")} == before
    assert "0 cell(s) measured, 12 already done" in capfd.readouterr().err


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.task)
def test_full_precision_says_what_the_stock_adapter_says(runs, model, suite):
    benchmark = {"video_dc499": "video_dc", "moviechat_global": "movie_chat"}[suite.task]
    (samples,) = runs.glob(f"cells/{model}/{benchmark}/fp16-*/samples.jsonl")
    ours = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [sample["text"] for sample in ours] == stock_texts(model, suite, [sample["question"] for sample in ours])


def stock_texts(model, suite, prompts):
    """What stock Transformers classes say: no adapter, no cache, no attention of ours, one prompt at a time."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vidkv_eval.frames import read_frames

    folder = ASSETS / "models" / model
    processor = AutoProcessor.from_pretrained(folder)
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    rows = [json.loads(line) for line in (ASSETS / "rows" / f"{suite.task}.jsonl").read_text().splitlines()]
    texts = []
    for row, prompt in zip(rows, prompts, strict=False):
        clip = ASSETS / "hf_home" / suite.folder / f"{row['video_name'].removesuffix('.mp4')}.mp4"
        frames = torch.from_numpy(read_frames(str(clip), 32)).permute(0, 3, 1, 2)
        turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": prompt}]}]
        asked = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        metadata = {"video_metadata": [{"fps": 4.0, "total_num_frames": 32, "frames_indices": list(range(32))}]} if "qwen" in model else {}
        inputs = processor(text=[asked], videos=[frames], return_tensors="pt", **metadata)
        output = stock.generate(**inputs, max_new_tokens=80, do_sample=False)
        answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        texts.append(answer.removesuffix(END_OF_TURN))
    return texts

"""The store: what is done stays, what was cut off is found again."""

import json

import pytest
from small_assets import make_assets, small_settings

from vidkv_eval.store import ResultStore, StoreError
from vidkv_eval.suite import plan_cells


@pytest.fixture
def cells(tmp_path):
    make_assets(tmp_path / "assets")
    return {
        limit: plan_cells(["recipe=kivi_k2_v2", f"limit={limit}", *small_settings(tmp_path)]).cells[0] for limit in ("null", 1, 2)
    }


@pytest.fixture
def cell(cells):
    return cells["null"]


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "runs")


def record(sample: int) -> dict:
    return {"sample": sample, "text": f"answer {sample}", "seconds": 2.0}


def test_a_new_cell_is_missing_then_partial_then_done(store, cell):
    assert store.state(cell).kind == "missing"
    store.begin(cell)
    assert store.state(cell).kind == "missing"
    store.append(cell, record(0))
    assert (store.state(cell).kind, store.state(cell).answered) == ("partial", 1)
    store.finish(cell, {"metrics": {}})
    assert store.state(cell).kind == "done"
    assert store.scores(cell) == {"metrics": {}}


def test_an_answer_is_on_disk_when_append_returns(store, cell):
    store.begin(cell)
    store.append(cell, record(0))
    assert json.loads((store.path(cell) / "samples.jsonl").read_text()) == record(0)


@pytest.mark.parametrize("torn", [b'{"sample": 1, "te', b'{"sample": 1, "text": "whole but without its line end"}'])
def test_a_torn_line_is_dropped_and_answered_again(store, cell, torn):
    store.begin(cell)
    store.append(cell, record(0))
    with (store.path(cell) / "samples.jsonl").open("ab") as file:
        file.write(torn)
    assert list(store.answers(cell)) == [0]
    store.append(cell, record(1))
    assert store.answers(cell) == {0: record(0), 1: record(1)}


def test_a_first_line_that_was_torn_is_dropped(store, cell):
    store.begin(cell)
    (store.path(cell) / "samples.jsonl").write_bytes(b'{"sam')
    assert store.state(cell).kind == "missing"
    store.append(cell, record(0))
    assert list(store.answers(cell)) == [0]


def test_a_damaged_line_inside_names_file_and_line(store, cell):
    store.begin(cell)
    (store.path(cell) / "samples.jsonl").write_text('{"sample": 0}\n{"sam\n{"sample": 2}\n')
    with pytest.raises(StoreError, match="samples.jsonl, line 2"):
        store.answers(cell)


@pytest.mark.parametrize("write", ["begin", "append", "finish", "fail"])
def test_a_done_cell_is_never_written_again(store, cell, write):
    store.begin(cell)
    store.finish(cell, {"metrics": {"score": 1.0}})
    arguments = {"begin": (), "append": (record(0),), "finish": ({},), "fail": ("reason",)}[write]
    with pytest.raises(StoreError, match="never overwritten"):
        getattr(store, write)(cell, *arguments)
    assert store.scores(cell) == {"metrics": {"score": 1.0}}


def test_a_failed_cell_keeps_its_answers_counts_as_missing_and_is_forgiven_on_retry(store, cell):
    store.begin(cell)
    store.append(cell, record(0))
    store.fail(cell, "video x.mp4 is missing", "Traceback ...")
    assert not store.is_done(cell)
    assert (store.state(cell).kind, store.state(cell).reason) == ("failed", "video x.mp4 is missing")
    store.begin(cell)
    assert (store.state(cell).kind, store.state(cell).answered) == ("partial", 1)


def test_half_written_scores_do_not_make_a_cell_done(store, cell):
    store.begin(cell)
    (store.path(cell) / "scores.json.part").write_text('{"metr')
    assert not store.is_done(cell)


def test_answers_of_a_shorter_run_are_taken_over(store, cells):
    store.begin(cells[2])
    store.append(cells[2], record(0))
    store.append(cells[2], record(1))
    store.begin(cells["null"])
    assert list(store.answers(cells["null"])) == [0, 1]
    store.begin(cells[1])
    assert list(store.answers(cells[1])) == [0]


def test_settings_are_recorded_without_paths_of_this_machine(tmp_path, cell):
    store = ResultStore(tmp_path / "runs", project=tmp_path)
    store.begin(cell)
    text = (store.path(cell) / "cell.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["model"]["pretrained"] == "assets/models/mini_llava_onevision"


def test_two_runs_cannot_write_one_group(store):
    with store.writing("group"):
        with pytest.raises(StoreError, match="another run"):
            with store.writing("group"):
                pass
    with store.writing("group"):
        pass


def test_copies_hold_whole_cells_and_replace_what_was_measured_elsewhere(store, cell, tmp_path):
    target = ResultStore(tmp_path / "results")
    store.begin(cell)
    store.append(cell, record(0))
    store.finish(cell, {"metrics": {"score": 1.0}})
    store.copy_done([cell], target)
    assert target.scores(cell) == {"metrics": {"score": 1.0}}
    assert target.answers(cell) == store.answers(cell)
    (target.path(cell) / "scores.json").write_text('{"metrics": {"score": 2.0}}')
    (target.path(cell) / "samples.jsonl").write_text("")
    store.copy_done([cell], target)
    assert target.scores(cell) == {"metrics": {"score": 1.0}}
    assert target.answers(cell) == store.answers(cell)

"""Runs with a session that needs no model: groups, failures, resuming."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from small_assets import make_assets, small_settings, write_rows

from vidkv_eval import cli, run
from vidkv_eval.judge import JudgeUnavailable, judge_environment
from vidkv_eval.recipe import load_recipe
from vidkv_eval.report.progress import describe_plan
from vidkv_eval.settings import options, read_option
from vidkv_eval.store import ResultStore
from vidkv_eval.suite import plan_cells, plan_suite

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


@pytest.fixture
def assets(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(run.PROJECT))
    return make_assets(tmp_path / "assets")


@pytest.fixture
def settings(assets, tmp_path):
    return small_settings(tmp_path)


def two_benchmarks(settings):
    return plan_cells(["benchmark=video_dc,movie_chat", "recipe=fp16,kivi_k2_v2", *settings], sweep=True)


def asked(assets: Path) -> list[str]:
    log = assets / "rows" / "asked.log"
    return log.read_text().splitlines() if log.exists() else []


def test_all_cells_are_measured_and_a_second_run_asks_nothing(assets, settings):
    plan = two_benchmarks(settings)
    outcome = run.measure(plan, FAKE_WORKER)
    assert sorted(outcome.measured) == sorted(cell.address for cell in plan.cells)
    assert len(asked(assets)) == 2 * 2 * 3
    assert run.measure(plan, FAKE_WORKER).measured == []
    assert len(asked(assets)) == 2 * 2 * 3


def test_scores_carry_footprint_judge_environment_and_settings(settings):
    plan = plan_cells(["recipe=kivi_k2_v2", *settings])
    run.measure(plan, FAKE_WORKER)
    scores = run.open_runs(plan).scores(plan.cells[0])
    assert scores["effective_bits"] == 8 * 400 / 1600
    assert scores["key_effective_bits"] == 1.0
    assert scores["value_effective_bits"] == 3.0
    assert scores["judge"] == {"name": "vidkv-facts", "version": plan.settings["judge"]["version"], "model": None}
    assert scores["environment"]["python"] and "torch" in scores["environment"]["packages"]
    assert scores["sample_ids"] == [0, 1, 2]
    assert json.loads((plan.runs / "cells" / plan.cells[0].address / "cell.json").read_text())["recipe"]["name"] == "kivi_k2_v2"


def test_a_group_that_cannot_read_a_video_fails_while_another_finishes(assets, settings):
    write_rows(assets, "video_dc499", ["fine", "unreadable", "fine"])
    plan = two_benchmarks(settings)
    outcome = run.measure(plan, FAKE_WORKER)
    assert all("/movie_chat/" in address for address in outcome.measured) and len(outcome.measured) == 2
    assert len(outcome.failed) == 2
    assert all("cannot read video /clips/clip_1.mp4" in reason for reason in outcome.failed.values())
    assert "cannot read video" in outcome.logs[0].read_text()
    assert {run.open_runs(plan).state(cell).kind for cell in plan.cells} == {"done", "failed"}


def test_a_recipe_that_fails_does_not_take_the_others_along(assets, settings):
    write_rows(assets, "video_dc499", ["fine", "fails for fp16", "fine"])
    plan = plan_cells(["recipe=fp16,kivi_k2_v2,kivi_k1_v1", *settings], sweep=True)
    outcome = run.measure(plan, FAKE_WORKER)
    assert [address.split("/")[2].rsplit("-", 1)[0] for address in outcome.measured] == ["kivi_k2_v2", "kivi_k1_v1"]
    assert list(outcome.failed.values()) == ["the cache refused"]


def test_a_crash_marks_its_cells_and_the_next_run_answers_only_what_is_missing(assets, settings):
    write_rows(assets, "video_dc499", ["fine", "crash", "fine"])
    plan = plan_cells(["recipe=fp16,kivi_k2_v2", *settings], sweep=True)
    outcome = run.measure(plan, FAKE_WORKER)
    assert set(outcome.failed.values()) == {"the worker ended early with exit code 3"}
    assert asked(assets) == ["fp16 0", "kivi_k2_v2 0"]
    write_rows(assets, "video_dc499", ["fine", "crash", "fine"][:1])
    retry = plan_cells(["recipe=fp16,kivi_k2_v2", *settings], sweep=True)
    assert len(run.measure(retry, FAKE_WORKER).measured) == 2


def test_answers_that_exist_are_not_asked_again(assets, settings):
    plan = plan_cells(["recipe=fp16,kivi_k2_v2", *settings], sweep=True)
    store = run.open_runs(plan)
    run.measure(plan_cells(["recipe=fp16", "limit=2", *settings]), FAKE_WORKER)
    outcome = run.measure(plan, FAKE_WORKER)
    assert len(outcome.measured) == 2
    assert asked(assets) == ["fp16 0", "fp16 1", "kivi_k2_v2 0", "kivi_k2_v2 1", "fp16 2", "kivi_k2_v2 2"]
    assert all(len(store.answers(cell)) == 3 for cell in plan.cells)


def test_without_a_terminal_progress_is_a_line_now_and_then(settings, monkeypatch, capsys):
    monkeypatch.setattr(run, "SECONDS_BETWEEN_LINES", 0)
    run.measure(plan_cells(["recipe=fp16", *settings]), FAKE_WORKER)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[2].startswith("0/1 cells: 100%") and "3/3" in lines[2]
    assert lines[3].startswith("1/1 cells:")


def test_two_settings_of_one_recipe_are_two_cells_of_one_group(assets, settings):
    plan = plan_cells(["recipe=kivi_k2_v2", "recipe.residual_length=64,128", *settings], sweep=True)
    assert len(run.measure(plan, FAKE_WORKER).measured) == 2
    assert len(asked(assets)) == 6


WAITING_WORKER = """
import threading
from vidkv_eval.worker import end_with_parent
end_with_parent()
print("up", flush=True)
threading.Event().wait()
"""
PARENT = """
import subprocess, sys
from subprocess import PIPE
worker = subprocess.Popen([sys.executable, sys.argv[1]], stdin=PIPE, stdout=PIPE, start_new_session=True)
worker.stdout.readline()
print(worker.pid, flush=True)
worker.wait()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="watching a process that is not a child needs Linux")
def test_a_worker_ends_when_its_parent_is_killed(assets, tmp_path):
    script = tmp_path / "waiting_worker.py"
    script.write_text(WAITING_WORKER)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(script)], stdout=subprocess.PIPE, text=True)
    worker = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    ended, _, _ = select.select([worker], [], [], 10)
    assert ended, "the worker outlived its parent"


def test_a_silent_judge_stops_the_run_before_any_process_starts(assets, settings):
    plan = plan_cells(["judge=openai", "judge.url=http://127.0.0.1:9/v1/chat/completions", "judge.api_key=null", *settings])
    with pytest.raises(JudgeUnavailable, match="http://127.0.0.1:9/v1/chat/completions does not answer"):
        run.measure(plan, ("must-not-start",))
    assert not plan.runs.exists()


def test_an_endpoint_without_its_key_is_refused_before_it_is_asked():
    with pytest.raises(JudgeUnavailable, match="OPENAI_API_KEY"):
        with judge_environment(read_option("judge", "openai"), {}):
            pass


def test_the_offline_judge_is_the_one_its_settings_name():
    with judge_environment(read_option("judge", "facts"), {}) as variables:
        assert variables["OPENAI_API_URL"].startswith("http://127.0.0.1:")
        assert "127.0.0.1" in variables["NO_PROXY"]
    with pytest.raises(JudgeUnavailable, match="version"):
        with judge_environment(read_option("judge", "facts") | {"version": "0"}, {}):
            pass


def test_the_plan_estimates_time_from_answers_of_the_same_model_and_benchmark(assets, settings):
    plan = plan_suite("smoke", settings)
    assert "estimated time: unknown" in describe_plan(plan, run.open_runs(plan))
    all_fp16 = ["recipe=fp16", "model=glob(mini*)", "benchmark=video_dc,movie_chat", "limit=2"]
    run.measure(plan_cells([*all_fp16, *settings], sweep=True), FAKE_WORKER)
    text = describe_plan(plan, run.open_runs(plan))
    assert "4 done, 0 partial, 0 failed, 8 missing" in text
    # 8 cells x 2 samples x 0.5 s on 2 workers.
    assert "estimated time: 4 s with 2 worker(s)" in text


def test_the_plan_tells_partial_and_failed_cells(assets, settings):
    plan = plan_suite("smoke", settings)
    store = run.open_runs(plan)
    store.begin(plan.cells[0])
    store.append(plan.cells[0], {"sample": 0, "text": "", "seconds": 1.0})
    store.fail(plan.cells[1], "no such file")
    text = describe_plan(plan, store)
    assert f"{plan.cells[0].address}  partial (1 of 2 samples)" in text
    assert f"{plan.cells[1].address}  failed: no such file (0 of 2 samples)" in text


def test_reproduce_measures_writes_the_table_and_is_done_at_once_the_second_time(assets, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "measure", lambda plan: run.measure(plan, FAKE_WORKER))
    assert cli.main(["reproduce", "table1", *settings]) == 0
    tables = tmp_path / "results" / "mini" / "tables"
    assert sorted(path.name for path in tables.iterdir()) == ["table1.cells", "table1.csv", "table1.md", "table1.tex"]
    kept = ResultStore(tmp_path / "results" / "mini")
    assert all(kept.is_done(cell) for cell in plan_suite("table1", settings).cells)
    before, text = len(asked(assets)), (tables / "table1.md").read_text()
    capsys.readouterr()
    assert cli.main(["reproduce", "table1", *settings]) == 0
    assert len(asked(assets)) == before
    assert (tables / "table1.md").read_text() == text
    assert text in capsys.readouterr().out


def test_reproduce_writes_the_table_also_when_a_cell_failed_and_says_so(assets, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "measure", lambda plan: run.measure(plan, FAKE_WORKER))
    write_rows(assets, "video_dc499", ["fine", "fails for kivi_k2_v2", "fine"])
    assert cli.main(["reproduce", "table1", *settings]) == 1
    assert "failed: the cache refused" in (tmp_path / "results" / "mini" / "tables" / "table1.md").read_text()


def test_the_smoke_table_stays_out_of_the_results(assets, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "measure", lambda plan: run.measure(plan, FAKE_WORKER))
    assert cli.main(["reproduce", "smoke", *settings]) == 0
    assert (tmp_path / "runs" / "mini" / "tables" / "smoke.md").exists()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", options("recipe"))
def test_a_recipe_file_states_every_setting_so_that_its_hash_covers_them(name):
    stated = {key: value for key, value in read_option("recipe", name).items() if key != "_convert_"}
    assert stated == without_idle_settings(load_recipe(name).to_config())


# What a file that does not state these settings means, for ever: cells were measured before the settings existed.
UNSTATED = {"layout": "capacity", "metadata": "float16", "per_head": False, "score_drop": 0.0}


def without_idle_settings(config: dict) -> dict:
    """Leave out what a file need not state: an outlier factor where channels are not chosen by outliers, and UNSTATED."""
    idle = "select" in config and config["select"] != "outlier"
    return {
        key: without_idle_settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not (idle and key == "outlier_factor") and not (key in UNSTATED and value == UNSTATED[key])
    }

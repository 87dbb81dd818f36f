"""From hand-made cells to a table: values worked out by hand, reasons for gaps, and the three forms."""

import csv
import io
import math

import pytest
from small_assets import make_assets, small_settings

from vidkv_eval.recipe import load_recipe
from vidkv_eval.report.published import published_table
from vidkv_eval.report.record import keep_cells
from vidkv_eval.report.render import CSV_HEADER, MINI_SENTENCE, to_csv, to_latex, to_markdown
from vidkv_eval.report.statistics import bootstrap_interval, paired_interval, wilson_interval
from vidkv_eval.report.table import build_table
from vidkv_eval.settings import options, read_option
from vidkv_eval.store import ResultStore
from vidkv_eval.suite import plan_suite

ENVIRONMENT = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "decord": None},
    "cpu": "A processor",
    "threads": 1,
    "gpu": None,
    "commit": "0123456789abcdef",
    "dirty": False,
}


@pytest.fixture
def plan(tmp_path):
    make_assets(tmp_path / "assets", samples=4)
    return plan_suite("table1", ["model=mini_qwen2_5_vl", *small_settings(tmp_path)])


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "store")


def finish(store, cell, **per_sample):
    """Write a done cell with hand-made values; keys take 10 bytes and values 30 for 80 elements each."""
    store.begin(cell)
    count = len(next(iter(per_sample.values())))
    scores = {
        "metrics": {name: sum(values) / len(values) for name, values in per_sample.items()},
        "per_sample": per_sample,
        "sample_ids": list(range(count)),
        "samples": count,
        "effective_bits": 8 * 40 / 160,
        "footprint": {"key_bytes": 10, "value_bytes": 30, "key_elements": 80, "value_elements": 80},
        "judge": {"name": "vidkv-facts", "version": "1", "model": None},
        "finished": "2026-01-02T03:04:05+00:00",
        "environment": ENVIRONMENT,
    }
    store.finish(cell, scores)


@pytest.fixture
def filled(plan, store):
    model = "mini_qwen2_5_vl"
    finish(store, plan.cell(model, "video_dc", "fp16"), gpt_eval_score=[5.0, 5.0, 5.0, 3.0])
    finish(store, plan.cell(model, "video_dc", "kivi_k2_v2"), gpt_eval_score=[4.0, 4.0, 4.0, 2.0])
    finish(store, plan.cell(model, "movie_chat", "fp16"), gpt_eval_acc=[1.0, 1.0, 1.0, 0.0], gpt_eval_score=[5.0, 4.0, 4.0, 1.0])
    finish(store, plan.cell(model, "movie_chat", "kivi_k2_v2"), gpt_eval_acc=[1.0, 0.0, 1.0, 0.0], gpt_eval_score=[5.0, 1.0, 4.0, 1.0])
    store.begin(plan.cell(model, "video_dc", "kivi_k1_v1"))
    store.fail(plan.cell(model, "video_dc", "kivi_k1_v1"), "cannot read video clip_1.mp4")
    partial = plan.cell(model, "movie_chat", "kivi_k1_v1")
    store.begin(partial)
    store.append(partial, {"sample": 0, "text": "", "seconds": 1.0})
    return build_table(plan, store)


def line(table, recipe):
    (found,) = [line for lines in table.blocks.values() for line in lines if line.row.recipe == recipe]
    return found


def test_score_and_difference_are_those_worked_out_by_hand(filled):
    number = line(filled, "kivi_k2_v2").entries[0].number
    assert number.score == 3.5 and number.delta == -1.0
    # Every paired difference is -1, so its interval has no width, while the score's has.
    assert (number.delta_low, number.delta_high) == (-1.0, -1.0)
    assert number.low < 3.5 < number.high
    assert number.samples == 4


def test_accuracy_is_in_percent_with_wilsons_interval(filled):
    number = line(filled, "kivi_k2_v2").entries[1].number
    assert number.score == 50.0 and number.delta == -25.0
    # 2 of 4, z = 1.96: centre 0.5, half width z / (2 sqrt(4 + z^2)) = 0.34996.
    assert math.isclose(number.low, 15.004, abs_tol=0.001) and math.isclose(number.high, 84.996, abs_tol=0.001)


def test_the_baseline_has_no_difference_to_itself(filled):
    assert line(filled, "fp16").entries[0].number.delta is None


def test_effective_bits_are_counted_bytes_over_counted_elements(filled):
    assert line(filled, "kivi_k2_v2").effective_bits == 2.0
    assert line(filled, "kivi_k1_v1").effective_bits is None


def test_a_gap_says_why(filled):
    missing = [entry.missing for entry in line(filled, "kivi_k1_v1").entries]
    assert missing == ["failed: cannot read video clip_1.mp4", "not finished: 1 of 4 samples", "not finished: 1 of 4 samples"]
    assert line(filled, "vidkv_k200_v200").entries[0].missing == "not run"
    text = to_markdown(filled, "vidkv reproduce table1")
    for reason in (*missing, "not run"):
        assert reason in text


def test_a_score_without_its_baseline_has_no_difference(plan, store):
    finish(store, plan.cell("mini_qwen2_5_vl", "video_dc", "kivi_k2_v2"), gpt_eval_score=[4.0, 2.0])
    number = line(build_table(plan, store), "kivi_k2_v2").entries[0].number
    assert number.score == 3.0 and number.delta is None


def test_csv_has_one_number_a_row_under_the_agreed_header(filled):
    text = to_csv(filled)
    assert text.splitlines()[0] == CSV_HEADER
    assert CSV_HEADER == (
        "row,recipe,key_bits,value_bits,effective_bits,benchmark,metric,score,ci_low,ci_high,delta_fp16,samples,published,model"
    )
    rows = {(row["recipe"], row["benchmark"], row["metric"]): row for row in csv.DictReader(io.StringIO(text))}
    assert len(rows) == 15 * 3
    row = rows["kivi_k2_v2", "movie_chat", "gpt_eval_score"]
    assert (row["score"], row["delta_fp16"], row["samples"], row["published"]) == ("2.7500", "-0.7500", "4", "")
    assert (row["key_bits"], row["effective_bits"], row["model"]) == ("2", "2.0000", "mini_qwen2_5_vl")
    assert rows["kivi_k1_v1", "video_dc", "gpt_eval_score"]["score"] == ""


def test_markdown_says_what_it_was_measured_with(filled):
    text = to_markdown(filled, "vidkv reproduce table1")
    measured_with = ("vidkv-facts version 1", "torch 2.13.0", "A processor", "0123456789ab", "2026-01-02")
    for fact in (MINI_SENTENCE, *measured_with, "vidkv reproduce table1"):
        assert fact in text
    assert "3.50 [" in text and "-1.00 [-1.00, -1.00]" in text and "| *instrument check" in text
    assert "paper" not in text.split("## ")[1].splitlines()[2]


def test_columns_of_the_markdown_are_aligned(filled):
    lines = [line for line in to_markdown(filled, "x").splitlines() if line.startswith("|") and not line.startswith("| *")]
    assert len({len(line) for line in lines}) == 1


def test_a_score_of_the_offline_judge_is_never_called_a_gpt_score(filled):
    assert "GPT" not in to_markdown(filled, "x") + to_latex(filled, "x")


def test_latex_is_balanced_and_escaped(filled):
    text = to_latex(filled, "vidkv reproduce table1")
    assert text.count("{") - text.count("\\{") == text.count("}") - text.count("\\}")
    assert text.count("\\begin") == text.count("\\end") == 2
    rows = [line for line in text.splitlines() if line.endswith("\\\\") and not line.startswith("\\multicolumn")]
    assert {line.replace("\\&", "").count("&") for line in rows} == {9}
    assert "kivi\\_k2\\_v2" in text and "(\\%)" in text


def test_the_papers_numbers_stand_in_the_paper_profile_only_with_a_note_on_the_swapped_labels(store):
    plan = plan_suite("table1", ["profile=paper"])
    finish(store, plan.cell("llava_onevision_7b", "video_dc", "fp16"), gpt_eval_score=[3.0, 3.0])
    table = build_table(plan, store)
    text = to_markdown(table, "vidkv reproduce table1 profile=paper")
    assert MINI_SENTENCE not in text
    assert "| 3.01 " in text and "| 2.79† " in text and "| 13.76† " in text
    assert "labels of the two 1.5/1.58 rows look swapped" in text
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [row["published"] for row in rows[:3]] == ["3.01", "47.87", ""]


@pytest.mark.parametrize("suite", options("suite"))
def test_the_nominal_bits_of_a_row_are_those_of_its_recipe(suite):
    for section in read_option("suite", suite)["sections"]:
        for row in section["rows"]:
            recipe = load_recipe(row["recipe"])
            bits = (round(recipe.key_bits, 6), round(recipe.value_bits, 6))
            assert (row["key_bits"], row["value_bits"]) == bits, row["recipe"]


def test_every_row_of_the_paper_is_found_in_the_published_numbers():
    printed = published_table("T1_prelim")
    plan = plan_suite("table1", ["profile=paper"])
    keys = {row.published for section in plan.suite.sections_of("paper") for row in section.rows}
    assert {row for _, row, _ in printed} == keys
    assert len(printed) == 16


def test_cells_behind_the_last_version_of_a_table_only_are_dropped(filled, plan, store, tmp_path):
    record = ResultStore(tmp_path / "record")
    (record.root / "tables").mkdir(parents=True)
    (record.root / "tables" / "table1.cells").write_text("m/b/old-00000000\nm/b/shared-00000000\n")
    (record.root / "tables" / "table2.cells").write_text("m/b/shared-00000000\n")
    for address in ("m/b/old-00000000", "m/b/shared-00000000"):
        (record.root / "cells" / address).mkdir(parents=True)
    keep_cells(filled, store, record)
    assert not (record.root / "cells" / "m/b/old-00000000").exists()
    assert (record.root / "cells" / "m/b/shared-00000000").exists()
    assert all(record.is_done(cell) for cell in filled.done) and len(filled.done) == 4


def test_bootstrap_is_repeatable_and_holds_the_mean():
    values = [0.0, 1.0, 2.0, 3.0, 4.0] * 10
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    # Standard error of the mean is sqrt(2 / 50) = 0.2.
    assert math.isclose(low, 2 - 1.96 * 0.2, abs_tol=0.05) and math.isclose(high, 2 + 1.96 * 0.2, abs_tol=0.05)


def test_paired_interval_forgets_how_much_samples_differ_among_themselves():
    easy_and_hard = [0.0, 5.0] * 20
    assert paired_interval([value - 1 for value in easy_and_hard], easy_and_hard) == (-1.0, -1.0)


def test_wilson_has_width_at_the_ends_and_refuses_scores():
    low, high = wilson_interval([1.0] * 48)
    # 1 - z^2 / (n + z^2)
    assert math.isclose(low, 1 - 3.8415 / 51.8415, abs_tol=1e-4) and math.isclose(high, 1.0)
    with pytest.raises(ValueError, match="0 and 1"):
        wilson_interval([0.0, 0.5])

"""Identity of cells, and the fingerprints behind it."""

import dataclasses

import pytest
from small_assets import make_assets, small_settings, write_rows

from vidkv_eval.cell import Cell, fingerprint_checkpoint, fingerprint_clips
from vidkv_eval.settings import options
from vidkv_eval.suite import load_suite, plan_cells, plan_suite


@pytest.fixture
def settings(tmp_path):
    make_assets(tmp_path / "assets")
    return small_settings(tmp_path)


@pytest.fixture
def cell(settings):
    return plan_cells(["recipe=kivi_k2_v2", *settings]).cells[0]


def changed(cell: Cell, part: str, **settings) -> Cell:
    return dataclasses.replace(cell, **{part: getattr(cell, part) | settings})


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("recipe", {"label": "other"}),
        ("recipe", {"source": "other"}),
        ("model", {"label": "other"}),
        ("model", {"pretrained": "/elsewhere/same-weights"}),
        ("benchmark", {"label": "other"}),
        ("judge", {"label": "other"}),
        ("judge", {"url": "http://elsewhere"}),
        ("data", {"rows": "/elsewhere"}),
    ],
)
def test_presentation_and_place_do_not_change_the_identity(cell, part, setting):
    assert changed(cell, part, **setting).id == cell.id


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("recipe", {"residual_length": 64}),
        ("model", {"dtype": "bfloat16"}),
        ("model", {"frames": 8}),
        ("model", {"attn_implementation": "fused"}),
        ("benchmark", {"max_new_tokens": 7}),
        ("benchmark", {"version": 2}),
        ("judge", {"version": "2"}),
        ("cache", {"storage_dtype": None}),
        ("fingerprints", {"model": "other weights"}),
        ("fingerprints", {"rows": "other questions"}),
    ],
)
def test_whatever_can_change_a_number_changes_the_identity(cell, part, setting):
    assert changed(cell, part, **setting).id != cell.id


def test_group_size_inside_a_quantizer_changes_the_identity(cell):
    smaller = cell.recipe["key"] | {"group_size": cell.recipe["key"]["group_size"] // 2}
    assert changed(cell, "recipe", key=smaller).id != cell.id


def test_limit_changes_the_identity_but_not_that_of_the_answers(cell):
    limited = dataclasses.replace(cell, limit=2)
    assert limited.id != cell.id
    assert limited.answers_id == cell.answers_id


def test_another_judge_keeps_the_answers_but_another_recipe_does_not(cell):
    assert changed(cell, "judge", version="2").answers_id == cell.answers_id
    assert changed(cell, "recipe", residual_length=64).answers_id != cell.answers_id


def test_recipes_of_one_model_and_benchmark_share_a_group(settings):
    cells = plan_suite("smoke", settings).cells
    assert len({cell.group_id for cell in cells}) == len({cell.group for cell in cells}) == 4


def test_a_hub_model_is_identified_by_name_and_revision():
    arguments = ["profile=paper", "recipe=fp16"]
    cell = plan_cells(arguments).cells[0]
    assert plan_cells([*arguments, "model.revision=abc"]).cells[0].id != cell.id
    assert "model" not in cell.fingerprints


def test_a_cell_survives_its_own_description(cell):
    assert Cell.from_config(cell.to_config()).id == cell.id


def test_address_names_model_benchmark_recipe_and_identity(cell):
    assert cell.address == f"mini_llava_onevision/video_dc/kivi_k2_v2-{cell.id[:8]}"


def test_a_weight_changed_in_place_changes_the_fingerprint(tmp_path):
    folder = make_assets(tmp_path) / "models" / "mini_qwen2_5_vl"
    before = fingerprint_checkpoint(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert fingerprint_checkpoint(folder) != before


def test_a_note_beside_the_weights_does_not_change_the_fingerprint(tmp_path):
    folder = make_assets(tmp_path) / "models" / "mini_qwen2_5_vl"
    before = fingerprint_checkpoint(folder)
    (folder / "README.md").write_text("trained in five minutes")
    assert fingerprint_checkpoint(folder) == before


def test_a_missing_clip_changes_the_fingerprint(tmp_path):
    clips = make_assets(tmp_path) / "hf_home" / "videochatgpt"
    before = fingerprint_clips(clips)
    (clips / "Test_Videos" / "clip_1.mp4").unlink()
    assert fingerprint_clips(clips) != before


def test_changed_rows_change_the_identity_of_their_benchmark_only(settings, tmp_path):
    before = {cell.address for cell in plan_suite("smoke", settings).cells}
    write_rows(tmp_path / "assets", "video_dc499", ["Another question?"])
    same = before & {cell.address for cell in plan_suite("smoke", settings).cells}
    assert same == {address for address in before if "/movie_chat/" in address}


@pytest.mark.parametrize("name", options("suite"))
def test_every_suite_composes_into_distinct_cells(name, settings):
    plan = plan_suite(name, settings)
    rows = sum(len(section.rows) for section in load_suite(name).sections_of("mini"))
    assert len({cell.address for cell in plan.cells}) == len(plan.cells) == rows * 2 * 2


def test_the_instrument_check_belongs_to_the_mini_profile_only():
    recipes = {cell.recipe_name for cell in plan_suite("table1", ["profile=paper"]).cells}
    assert "fp16" in recipes and not recipes & {"kivi_k1_v1", "vidkv_k100_v100_published"}

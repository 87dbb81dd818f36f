"""The command line: mistakes are explained in a message, with exit code 2 and without a traceback."""

import pytest
from small_assets import make_assets, small_settings

from vidkv_eval import cli, settings
from vidkv_eval.settings import expand


@pytest.fixture
def small(tmp_path):
    make_assets(tmp_path / "assets")
    return small_settings(tmp_path)


def refuse(*arguments):
    raise AssertionError("nothing may be measured")


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    monkeypatch.setattr(cli, "measure", refuse)


@pytest.mark.parametrize(
    ("arguments", "found", "nearest"),
    [
        (["run", "model=mini_qwen"], "unknown model 'mini_qwen'", "mini_qwen2_5_vl"),
        (["run", "benchmark=videodc"], "unknown benchmark 'videodc'", "video_dc"),
        (["run", "recipe=kivi_k2"], "unknown recipe 'kivi_k2'", "kivi_k2_v2"),
        (["run", "-m", "recipe=fp16,kivi_k2"], "unknown recipe 'kivi_k2'", "kivi_k2_v2"),
        (["run", "judge=fact"], "unknown judge 'fact'", "facts"),
        (["run", "profile=papr"], "unknown profile 'papr'", "paper"),
        (["run", "suite=table"], "unknown suite 'table'", "table1"),
        (["plan", "tabel1"], "unknown suite 'tabel1'", "table1"),
        (["run", "limti=3"], "unknown key 'limti'", "limit"),
        (["run", "model.frame=3"], "unknown key 'model.frame'", "model.frames"),
        (["table", "table1", "profil.workers=3"], "unknown key 'profil.workers'", "profile.workers"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_valid_ones(arguments, found, nearest, small, capsys):
    assert cli.main([*arguments, *small]) == 2
    error = capsys.readouterr().err
    assert found in error and f"Did you mean {nearest}?" in error
    assert nearest in error.split("valid:")[1]
    assert "Traceback" not in error and "hydra" not in error.lower().replace("'hydra", "")


@pytest.mark.parametrize(
    ("argument", "allowed"),
    [
        ("limit=abc", "a whole number from 1, or null"),
        ("limit=0", "a whole number from 1, or null"),
        ("workers=1.5", "a whole number from 1"),
        ("model.frames=many", "a whole number from 1"),
        ("profile.cache.keep_dense=3", "true or false"),
        ("device=3", "text"),
        ("recipe.residual_length=long", "a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_answered_with_what_is_allowed(argument, allowed, small, capsys):
    assert cli.main(["run", argument, *small]) == 2
    error = capsys.readouterr().err
    assert f"{argument} does not fit; allowed: {allowed}" in error and "Traceback" not in error


@pytest.mark.parametrize("rest", [[], ["profile.cache.rows=null"], ["profile.cache.keep_dense=false"]], ids=str)
def test_fused_attention_beside_dequantized_states_is_answered_with_what_it_goes_with(rest, small, capsys):
    assert cli.main(["run", "model.attn_implementation=fused", *rest, *small]) == 2
    assert "it goes with profile.cache.rows=null profile.cache.keep_dense=false" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument",
    ["fp16", "model={a", "~recipe", "recipe=fp16,kivi_k2_v2", "limit=${nothing}", "hydra.run=x", "model.pretrained=/nowhere"],
)
def test_other_mistakes_are_messages_too(argument, small, capsys):
    assert cli.main(["run", argument, *small]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vidkv: ") and "Traceback" not in error


def test_a_suite_refuses_settings_that_it_fixes(small, capsys):
    assert cli.main(["plan", "table1", "recipe=fp16", *small]) == 2
    assert "leave out recipe=fp16" in capsys.readouterr().err


def test_a_model_setting_for_several_models_asks_which_one(small, capsys):
    assert cli.main(["plan", "table1", "model.frames=8", *small]) == 2
    assert "model=..." in capsys.readouterr().err


def test_missing_assets_are_named(small, tmp_path, capsys):
    (tmp_path / "assets" / "rows" / "video_dc499.jsonl").unlink()
    assert cli.main(["run", *small]) == 2
    assert "video_dc499.jsonl is missing" in capsys.readouterr().err


def test_a_missing_key_for_the_judge_is_told_before_anything_loads(monkeypatch, tmp_path, capsys):
    from vidkv_eval import run

    monkeypatch.setattr(cli, "measure", run.measure)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert cli.main(["run", "profile=paper", f"paths.runs={tmp_path}"]) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(monkeypatch, small, capsys):
    def interrupted(plan):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "measure", interrupted)
    assert cli.main(["run", "recipe=fp16", *small]) == 130
    assert "To go on: vidkv run recipe=fp16" in capsys.readouterr().err


def test_a_table_without_any_number_is_not_written(small, tmp_path, capsys):
    assert cli.main(["table", "table1", *small]) == 1
    assert "not run" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_lists_the_choices_with_labels_and_examples(arguments, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    assert ending.value.code == 0
    text = capsys.readouterr().out
    for word in ("mini_qwen2_5_vl", "movie_chat", "kivi_k2_v2", "table1", "paper", "KIVI 2/2", "vidkv run -m"):
        assert word in text


def test_an_unknown_command_or_option_is_refused(capsys):
    for arguments in (["tabel", "table1"], ["run", "--limit", "3"]):
        with pytest.raises(SystemExit) as ending:
            cli.main(arguments)
        assert ending.value.code == 2


def test_sweeps_follow_hydras_syntax():
    arguments = ["model=glob(mini_*)", "recipe=fp16,kivi_k2_v2", "limit=range(1,3)"]
    runs = expand(arguments)
    assert len(runs) == 2 * 2 * 2
    assert ["model=mini_qwen2_5_vl", "recipe=kivi_k2_v2", "limit=2"] in runs


def test_settings_may_stand_around_the_option(small, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "measure", lambda plan: seen.append(plan) or cli.Outcome())
    assert cli.main(["run", "benchmark=video_dc", "-m", "recipe=fp16,kivi_k2_v2", *small]) == 0
    assert [cell.recipe_name for cell in seen[0].cells] == ["fp16", "kivi_k2_v2"]


@pytest.mark.parametrize("group", settings.GROUPS)
def test_every_option_has_a_label(group):
    assert all(cli.label(group, name) for name in settings.options(group))

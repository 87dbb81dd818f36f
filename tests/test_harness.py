"""lmms-eval's tasks and adapters, run on tiny random models: same texts as the stock adapters, same scores as the task's code."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from vidkv_eval import library_cache
from vidkv_eval.harness import GenerateFailed, JudgeFailed, Session, VideoUnreadable
from vidkv_eval.recipe import RecipeError, load_recipe

LLAVA, QWEN = "vidkv_llava_onevision", "vidkv_qwen2_5_vl"
PIXELS = {"min_pixels": 784, "max_pixels": 12544}
BENCHMARK = {"task": "video_dc499", "max_new_tokens": 20}
CLOSED_PORT = {"url": "http://127.0.0.1:9/v1/chat/completions", "model": "nobody", "api_key": "none"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {LLAVA: tiny.make_llava_onevision(folder / LLAVA), QWEN: tiny.make_qwen2_5_vl(folder / QWEN)}


def model_config(adapter, checkpoints):
    args = PIXELS if adapter == QWEN else {}
    return {"adapter": adapter, "pretrained": checkpoints[adapter], "dtype": "float32", "frames": tiny.FRAMES, "args": args}


@pytest.fixture(scope="module", params=[LLAVA, QWEN])
def session(request, checkpoints, data):
    return Session(model_config(request.param, checkpoints), BENCHMARK, data, device="cpu")


@pytest.fixture(scope="module")
def judged(data):
    """Open a session that can score, on a task, with a judge."""
    return lambda task, judge: Session({}, BENCHMARK | {"task": task}, data, device="cpu", judge=judge)


def stock_adapter(session):
    """lmms-eval's own class, helped only where it cannot run at all: LLaVA about videos, Qwen in float32."""
    from lmms_eval.models.chat.llava_hf import LlavaHf
    from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL

    from vidkv_eval.adapters.llava_onevision import VideoProcessor

    config = session._model
    if config["adapter"] == LLAVA:
        adapter = LlavaHf(str(config["pretrained"]), device="cpu", device_map="cpu", dtype="float32", max_frames_num=tiny.FRAMES)
        adapter._image_processor = VideoProcessor(adapter._image_processor, tiny.FRAMES)
    else:
        adapter = Qwen2_5_VL(str(config["pretrained"]), device="cpu", device_map="cpu", max_num_frames=tiny.FRAMES, **PIXELS)
        adapter._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(config["pretrained"], dtype=torch.float32)
    adapter.task_dict["video_dc499"] = session._task.dataset
    return adapter


def texts(session, recipes, options=None):
    """Texts by recipe, then by sample."""
    answers = [[answer.text for answer in session.answer(sample.id, recipes, options or {})] for sample in session.samples]
    return [list(of_recipe) for of_recipe in zip(*answers, strict=True)]


def test_the_identity_cache_gives_the_text_of_the_stock_adapter_sample_by_sample(session):
    session._task.build_all_requests()
    stock = [result.text for result in stock_adapter(session).generate_until(session._task.instances)]
    assert len(set(stock)) == tiny.CLIPS
    assert texts(session, [tiny.FP16]) == [stock]


def test_a_group_of_recipes_gives_the_texts_of_each_recipe_alone(session):
    group = texts(session, [tiny.FP16, tiny.LOW_BIT, tiny.FP16])
    assert group == [texts(session, [recipe])[0] for recipe in (tiny.FP16, tiny.LOW_BIT, tiny.FP16)]
    assert group[0] != group[1]


def test_a_recipe_that_quantizes_the_prefill_does_not_share_it(session):
    own_prefill = dataclasses.replace(tiny.LOW_BIT, name="own_prefill", prefill="quantized")
    exact, own, low_bit = texts(session, [tiny.FP16, own_prefill, tiny.LOW_BIT])
    assert [own] == texts(session, [own_prefill])
    assert own not in (exact, low_bit)


def test_the_dense_working_copy_changes_neither_texts_nor_bytes(session):
    def of(keep_dense):
        options = {"storage_dtype": "float16", "keep_dense": keep_dense}
        return [(answer.text, answer.key_bytes, answer.value_bytes) for answer in session.answer(0, tiny.RECIPES, options)]

    assert of(True) == of(False)


def test_recipes_that_decode_as_one_batch_give_the_texts_and_bytes_of_each_alone(session):
    options = {"storage_dtype": "float16", "keep_dense": True, "rows": 2}
    together = [dataclasses.replace(answer, seconds=0) for answer in session.answer(0, tiny.RECIPES, options)]
    alone = [dataclasses.replace(answer, seconds=0) for recipe in tiny.RECIPES for answer in session.answer(0, [recipe], options)]
    assert together == alone


def test_a_batch_is_filled_so_that_its_size_is_the_same_in_any_company(session):
    sizes = []
    language_model = session.adapter.model.model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda module, args, given: sizes.append(given["inputs_embeds"].shape[0]), with_kwargs=True
    )
    list(session.answer(0, tiny.RECIPES, {"keep_dense": True, "rows": 5}))
    hook.remove()
    assert sizes[0] == 1 and set(sizes[1:]) == {5}


def test_a_recipe_that_quantizes_the_prefill_answers_outside_the_batch(session):
    own_prefill = dataclasses.replace(tiny.LOW_BIT, name="own_prefill", prefill="quantized")
    mixed = session.answer(0, [tiny.FP16, own_prefill, tiny.LOW_BIT], {"keep_dense": True, "rows": 2})
    alone = session.answer(0, [own_prefill], {"keep_dense": True})
    names, found = zip(*((answer.recipe, answer.text) for answer in mixed), strict=True)
    assert names == ("fp16", "own_prefill", "low_bit") and found[1] == next(alone).text


def test_in_a_batch_only_the_recipe_that_fails_is_blamed(session, monkeypatch):
    make_cache = type(session.adapter).make_cache

    def some_broken(self, recipe, **options):
        cache = make_cache(self, recipe, **options)
        if recipe.name == "broken":
            cache.layers[0].update = None
        return cache

    monkeypatch.setattr(type(session.adapter), "make_cache", some_broken)
    recipes = [tiny.FP16, dataclasses.replace(tiny.FP16, name="broken"), tiny.LOW_BIT]
    answers = session.answer(0, recipes, {"keep_dense": True, "rows": 3})
    assert next(answers).recipe == tiny.FP16.name
    with pytest.raises(GenerateFailed):
        next(answers)


def test_in_a_batch_only_the_recipe_whose_package_is_missing_is_blamed(session, monkeypatch):
    monkeypatch.setitem(library_cache.PACKAGES, "hqq", "a-package-that-nobody-has")
    recipes = [tiny.FP16, load_recipe("hqq_k2_v2"), tiny.LOW_BIT]
    answers = session.answer(0, recipes, {"keep_dense": True, "rows": 3})
    assert next(answers).recipe == tiny.FP16.name
    with pytest.raises(RecipeError, match="recipe hqq_k2_v2 needs a-package-that-nobody-has"):
        next(answers)


def test_answers_count_tokens_and_bytes(session):
    exact, low_bit = session.answer(0, tiny.RECIPES, {"storage_dtype": "float16"})
    assert exact.sample == 0 and (exact.recipe, low_bit.recipe) == ("fp16", "low_bit")
    assert exact.prompt_tokens > 128 and 0 < exact.output_tokens <= 20
    assert exact.key_bytes == 2 * exact.key_elements and low_bit.key_bytes < exact.key_bytes
    assert exact.key_elements == exact.value_elements == 2 * 2 * 32 * (exact.prompt_tokens + exact.output_tokens - 1)


def test_the_video_of_a_sample_is_read_once_for_all_recipes(session, monkeypatch):
    from vidkv_eval.adapters import llava_onevision, qwen2_5_vl

    read = []
    for module, name in ((llava_onevision, "read_frames"), (qwen2_5_vl, "process_vision_info")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, original=original, **options: read.append(args) or original(*args, **options))
    assert len(list(session.answer(1, [*tiny.RECIPES, *tiny.RECIPES], {}))) == 4
    assert len(read) == 1
    list(session.answer(1, tiny.RECIPES, {}))
    assert len(read) == 2


def test_an_error_in_the_cache_fails_the_sample_and_is_not_an_empty_answer(session, monkeypatch):
    from vidkv_eval.cache import QuantizedCache

    monkeypatch.setattr(QuantizedCache, "update", lambda *args, **options: 1 / 0)
    with pytest.raises(GenerateFailed, match="ZeroDivisionError"):
        list(session.answer(0, [tiny.FP16], {}))


def test_an_adapter_with_a_recipe_of_its_own_gives_the_text_of_the_harness(session, tmp_path):
    path = tmp_path / "two_bit.yaml"
    quantizer = "{{_target_: vidkv_eval.quant.affine.Affine, nbits: 2, granularity: {}, group_size: 32}}"
    path.write_text(
        "_target_: vidkv_eval.recipe.Recipe\nname: two_bit\nlabel: two bit\nsource: test\n"
        f"key: {quantizer.format('per_channel')}\nvalue: {quantizer.format('per_token')}\n"
    )
    adapter = session.adapter
    session._task.build_all_requests()
    adapter.use_recipe(str(path), "float16", True)
    alone = [result.text for result in adapter.generate_until(session._task.instances)]
    adapter.use_recipe(None, None, False)
    assert [alone] == texts(session, [load_recipe(str(path))], {"storage_dtype": "float16", "keep_dense": True})
    adapter.clean()
    assert adapter.model is not None


def test_nothing_is_shown_while_answering_and_scoring(session, judged, capfd):
    list(session.answer(0, [tiny.FP16], {}))
    with tiny.canned_judge("{'score': 4}") as judge:
        judged("video_dc499", judge).score(["a box"] * tiny.CLIPS)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_scores_are_those_of_the_task_and_their_means_are_its_metrics(judged):
    with tiny.canned_judge("{'pred': 'yes', 'score': 4.8}") as judge:
        scores = judged("moviechat_global", judge).score(["a box"] * tiny.CLIPS)
    assert scores.metrics == {"gpt_eval_score": 4.0, "gpt_eval_acc": 1.0}
    assert scores.per_sample == {"gpt_eval_score": [4.0] * tiny.CLIPS, "gpt_eval_acc": [1.0] * tiny.CLIPS}
    assert scores.reviews == ["{'pred': 'yes', 'score': 4.8}"] * tiny.CLIPS


def test_the_judge_sees_each_text_beside_the_question_of_its_sample(judged):
    with tiny.canned_judge("{'score': 2}") as judge:
        session = judged("video_dc499", judge)
        seen = []
        original = session._task.config.process_results
        session._task.config.process_results = lambda doc, result: seen.append((doc["question"], result[0])) or original(doc, result)
        assert session.score(["one", "two", "three"]).metrics == {"gpt_eval_score": 2.0}
    assert sorted(seen) == sorted(zip(tiny.QUESTIONS, ("one", "two", "three"), strict=True))


def test_a_judge_that_does_not_answer_is_an_error_and_found_quickly(judged):
    session = judged("video_dc499", CLOSED_PORT)
    started = time.perf_counter()
    with pytest.raises(JudgeFailed, match="sample 0 of video_dc499"):
        session.score(["a box"] * tiny.CLIPS)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("reply", ["I like it", "{'pred': 'maybe', 'score': 3}", "{'pred': 'yes'}", "{'pred': 'yes', 'score': 7}"])
def test_a_verdict_that_the_task_cannot_read_is_an_error(judged, reply):
    with tiny.canned_judge(reply) as judge, pytest.raises(JudgeFailed, match="sample 0 of moviechat_global"):
        judged("moviechat_global", judge).score(["a box"] * tiny.CLIPS)


def test_scoring_wants_a_text_for_every_sample(judged):
    with pytest.raises(ValueError, match="2 texts for 3 samples"):
        judged("video_dc499", CLOSED_PORT).score(["a", "b"])


def test_a_limit_takes_the_first_samples_and_only_these_are_scored(data):
    with tiny.canned_judge("{'score': 3}") as judge:
        session = Session({}, BENCHMARK, data, device="cpu", judge=judge, limit=2)
        assert [sample.id for sample in session.samples] == [0, 1]
        assert session.score(["a", "b"]).per_sample == {"gpt_eval_score": [3.0, 3.0]}


@pytest.mark.parametrize("adapter", [LLAVA, QWEN])
def test_missing_and_damaged_videos_are_named(adapter, checkpoints, tmp_path):
    data = tiny.make_data(tmp_path)
    missing, no_video, damaged = (Path(data["hf_home"], "videochatgpt/Test_Videos", f"clip{index}.mp4") for index in range(3))
    missing.unlink()
    no_video.write_bytes(b"not a video" * 100)
    content = bytearray(damaged.read_bytes())
    content[1200 : content.find(b"moov") - 4] = b"\xff" * (content.find(b"moov") - 1204)
    damaged.write_bytes(content)
    session = Session(model_config(adapter, checkpoints), BENCHMARK, data, device="cpu")
    for index, path in enumerate((missing, no_video, damaged)):
        assert session.samples[index].video == str(path)
        with pytest.raises(VideoUnreadable) as error:
            list(session.answer(index, [tiny.FP16], {}))
        assert error.value.path == str(path)


def test_nothing_is_written_beside_the_videos(session, data):
    list(session.answer(0, [tiny.FP16], {}))
    files = [path for path in Path(data["hf_home"]).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".mp4"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark": {"task": "video_dc500"}}, "ships no task 'video_dc500'"),
        ({"data": {"rows": "/nowhere"}}, "/nowhere/video_dc499.jsonl does not exist"),
        ({"model": {"adapter": "llava"}}, "unknown adapter 'llava'; known: vidkv_llava_onevision, vidkv_qwen2_5_vl"),
        ({"model": {"adapter": LLAVA}}, "holds a model of type qwen2_5_vl; VidKVLlavaOnevision needs llava_onevision"),
        ({"model": {"dtype": "int8"}}, "'int8' is no floating dtype"),
    ],
)
def test_a_mistaken_setting_is_named(checkpoints, data, change, message):
    settings = {"model": model_config(QWEN, checkpoints), "benchmark": BENCHMARK, "data": data}
    for name, values in change.items():
        settings[name] = settings[name] | values
    with pytest.raises((ValueError, OSError), match=message):
        Session(**settings, device="cpu").adapter  # noqa: B018


def test_lmms_evals_own_command_runs_an_adapter_with_a_recipe(checkpoints, data, tmp_path):
    import lmms_eval.tasks

    shipped = Path(lmms_eval.tasks.__file__).parent / "video_detail_description" / "video_detail_description.yaml"
    (tmp_path / "local.yaml").write_text(
        f"include: {shipped}\ntask: local_dc\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data['rows']}/video_dc499.jsonl}}}}\n"
        "generation_kwargs: {max_new_tokens: 4}\n"
    )
    with tiny.canned_judge("{'score': 4}") as judge:
        environment = {"HF_HOME": data["hf_home"], "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
        environment |= {"OPENAI_API_URL": judge["url"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        arguments = f"pretrained={checkpoints[LLAVA]},recipe=fp16,dtype=float32,frames={tiny.FRAMES}"
        command = [sys.executable, "-m", "vidkv_eval.adapters", "--model", LLAVA, "--model_args", arguments]
        command += ["--tasks", "local_dc", "--include_path", str(tmp_path), "--device", "cpu", "--limit", "2"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gpt_eval_score" in done.stdout

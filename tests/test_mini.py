"""The mini profile: scenes, clips, judge and checkpoints are what they claim to be."""

import json
import math
import random
from pathlib import Path

import av
import pytest
import requests
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor

from vidkv_eval.mini import llava_onevision, qwen2_5_vl
from vidkv_eval.mini.clips import write_clip
from vidkv_eval.mini.datasets import CLIPS, SUITES
from vidkv_eval.mini.facts import KIND, fact_share
from vidkv_eval.mini.judge import FactJudge, review
from vidkv_eval.mini.render import RGB, inside_shape, render, scene_array, tracks
from vidkv_eval.mini.scenes import COLOURS, FRAMES, QUESTION_KINDS, SHAPES, SIDE, ask, describe, sample_scene
from vidkv_eval.mini.text import MOVIECHAT_PROMPT, train_tokenizer
from vidkv_eval.mini.train import Prompts, Scenes, cell_labels

ASSETS = Path(__file__).resolve().parents[1] / "vidkv_eval" / "mini" / "assets"
FAMILIES = {"mini_llava_onevision": llava_onevision, "mini_qwen2_5_vl": qwen2_5_vl}
JUDGING = "Question: {}\nCorrect Answer: {}\nPredicted Answer: {}\n\nProvide your evaluation only as a {}"


def checkpoint(name):
    return ASSETS / "models" / name


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


def test_a_scene_is_the_same_for_the_same_seed_and_its_objects_have_different_colours():
    for seed in range(50):
        scene = sample_scene(random.Random(seed))
        assert scene == sample_scene(random.Random(seed))
        assert len({event.colour for event in scene}) == len(scene) in (4, 5, 6)


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_a_true_answer_has_all_facts_at_least_twelve_words_and_an_answer_without_facts_none(kind):
    rng = random.Random(1)
    for _ in range(50):
        question, answer = ask(sample_scene(rng), kind, rng)
        assert fact_share(question, answer, answer) == 1
        assert fact_share(question, answer, "I cannot tell.") == 0
        assert len(answer.split()) >= 12


def test_facts_are_compared_in_their_place_and_those_given_by_the_question_do_not_count():
    truth = "First a red ring moves upward to the top left. Second a blue star stays still at the lower right."
    assert fact_share("", truth, truth.replace("blue", "red")) == 9 / 10
    assert fact_share("", truth, "Second a blue star stays still at the lower right.") == 0
    where, target = "Where did the red ring go?", "The red ring moves upward to the top left."
    assert fact_share(where, target, "It moves upward to the top right.") == 2 / 3
    assert fact_share("red?", "red", "red") is None
    after, target = "What came after the red ring?", "After the red ring came a red star."
    assert fact_share(after, target, "After the red ring came a red star.") == 1
    assert fact_share(after, target, "After the red ring came a blue star.") == 1 / 2


def test_shapes_and_tracks_are_drawn_where_the_scene_says():
    scene = sample_scene(random.Random(3))
    array = torch.tensor([scene_array(scene)])
    frames = render(array, torch.Generator().manual_seed(0))
    x, y, _, visible = tracks(array)
    assert frames.shape == (1, FRAMES, 3, SIDE, SIDE) and frames.min() >= 0 and frames.max() <= 255
    for slot, event in enumerate(scene):
        assert visible[0, slot].nonzero()[0] == event.start and visible[0, slot, event.end :].sum() == 0
        if event.shape == "ring":
            continue  # has no colour at its centre
        colour = torch.tensor(RGB[COLOURS.index(event.colour)])
        centre = frames[0, event.start, :, int(y[0, slot, event.start]), int(x[0, slot, event.start])]
        assert torch.equal(centre, colour.float())
    far = torch.tensor(3.0)
    assert not any(inside_shape(torch.tensor(shape), far, far) for shape in range(len(SHAPES)))


def test_cell_labels_name_the_object_in_its_cell():
    scene = sample_scene(random.Random(4))
    array = torch.tensor([scene_array(scene)])
    colour, shape = (labels.view(FRAMES, 16) for labels in cell_labels(array, 1))
    event = scene[0]
    x, y = event.centre(event.start)
    cell = int(y // 28) * 4 + int(x // 28)
    assert colour[event.start, cell] == array[0, 0, 2] + 1 and shape[event.start, cell] == SHAPES.index(event.shape) + 1
    merged, _ = cell_labels(array, 2)
    assert torch.equal(merged.view(FRAMES // 2, 16), colour[1::2])


def test_a_clip_is_h264_with_all_frames_and_close_to_what_was_drawn(tmp_path):
    scene = sample_scene(random.Random(5))
    write_clip(tmp_path / "clip.mp4", scene, seed=5)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])
    drawn = render(torch.tensor([scene_array(scene)]), torch.Generator().manual_seed(5))[0].permute(0, 2, 3, 1)
    assert decoded.shape == (FRAMES, SIDE, SIDE, 3)
    assert (decoded - drawn).abs().mean() < 5


@pytest.mark.parametrize(
    ("answer", "reply", "pair"),
    [
        ("The red ring moves upward to the top left.", "{'score': 5}", "{'pred': 'yes', 'score': 5}"),
        ("The red ring moves upward to the top right.", "{'score': 3}", "{'pred': 'no', 'score': 3}"),
        ("", "{'score': 0}", "{'pred': 'no', 'score': 0}"),
        ("It was\n\nQuestion: odd.", "{'score': 0}", "{'pred': 'no', 'score': 0}"),
    ],
)
def test_the_judge_replies_in_the_form_of_each_task(answer, reply, pair):
    case = ("Where did the red ring go?", "The red ring moves upward to the top left.", answer)
    assert review(JUDGING.format(*case, "score with keys 'score'")) == reply
    assert review(JUDGING.format(*case, "yes/no with keys 'pred' and 'score'")) == pair


def test_the_judge_refuses_what_it_cannot_judge_over_http_as_well():
    with pytest.raises(ValueError, match="no 'Question"):
        review("Say something.")
    prompt = JUDGING.format("What?", "A dog barks.", "A dog barks.", "score with keys 'score'")
    with FactJudge() as judge:
        refused = requests.post(judge.url, json={"messages": [{"role": "user", "content": prompt}]}, timeout=10)
    assert refused.status_code == 400 and "holds no fact" in refused.json()["error"]["message"]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.task)
def test_the_committed_rows_are_those_of_the_generator_and_every_clip_is_there(suite):
    columns = {"video_dc499": {"video_name", "question", "answer"}, "moviechat_global": {"video_name", "question", "answer", "time"}}
    rows = [json.loads(line) for line in (ASSETS / "rows" / f"{suite.task}.jsonl").read_text().splitlines()]
    rng = random.Random(suite.seed)
    expected = [suite.row(f"mini_{suite.seed}_{index:03d}", index, sample_scene(rng), rng) for index in range(CLIPS)]
    assert rows == expected and rows[0].keys() == columns[suite.task]
    for row in rows:
        assert (ASSETS / "hf_home" / suite.folder / f"{row['video_name'].removesuffix('.mp4')}.mp4").stat().st_size > 1000


def test_training_scenes_and_evaluation_scenes_are_disjoint():
    evaluated = set()
    for suite in SUITES:
        rng = random.Random(suite.seed)
        for index in range(CLIPS):
            scene = sample_scene(rng)
            evaluated.add(scene)
            suite.row("", index, scene, rng)
    assert len(evaluated) == CLIPS * len(SUITES)
    arrays = {tuple(map(tuple, scene_array(scene))) for scene in evaluated}
    batches = iter(Scenes(Prompts(train_tokenizer(llava_onevision.SPECIALS), llava_onevision), 500, seed=0))
    trained = {tuple(map(tuple, array)) for array in next(batches)[0].tolist()}
    assert not arrays & trained


def test_a_checkpoint_is_small_and_shaped_like_its_big_relative(name):
    weights = checkpoint(name) / "model.safetensors"
    assert weights.stat().st_size <= 16 * 2**20
    with safe_open(weights, "pt") as file:
        assert sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys()) <= 8_000_000
    config = json.loads((checkpoint(name) / "config.json").read_text())["text_config"]
    assert config["num_attention_heads"] / config["num_key_value_heads"] == 7
    assert config["num_hidden_layers"] >= 4


def test_the_tokenizer_is_the_one_of_the_generator_and_every_fact_is_one_token(name):
    committed = Tokenizer.from_file(str(checkpoint(name) / "tokenizer.json"))
    assert committed.to_str() == train_tokenizer(FAMILIES[name].SPECIALS).to_str()
    assert all(len(committed.encode(f" {word}").ids) == 1 for word in KIND)


def test_prompts_through_the_real_processor_are_those_of_training_and_a_multiple_of_32_tokens(name):
    family, processor = FAMILIES[name], AutoProcessor.from_pretrained(checkpoint(name))
    prompts = Prompts(train_tokenizer(family.SPECIALS), family)
    rng = random.Random(6)
    scene = sample_scene(rng)
    video = torch.zeros(FRAMES, 3, SIDE, SIDE, dtype=torch.uint8)
    for text in [describe(scene)[0], *(MOVIECHAT_PROMPT + ask(scene, kind, rng)[0] for kind in QUESTION_KINDS)]:
        content = [{"type": "video"}, {"type": "text", "text": text}]
        asked = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        ids = processor(text=[asked], videos=[video], return_tensors="pt")["input_ids"][0].tolist()
        placeholder = prompts.tokenizer.token_to_id(family.VIDEO_TOKEN)
        assert ids == prompts.head + [placeholder] * family.VISUAL_TOKENS + prompts.tail(text)
        assert len(ids) % 32 == 0
        assert family.VISUAL_TOKENS >= (512 if family is llava_onevision else 256)


def test_the_training_view_computes_what_the_stock_model_computes(name):
    family = FAMILIES[name]
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(name), dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(checkpoint(name) / "tokenizer.json"))
    prompts, view = Prompts(tokenizer, family), family.TrainingView(model, compiled=False)
    scene = sample_scene(random.Random(7))
    pixels = render(torch.tensor([scene_array(scene)]), torch.Generator().manual_seed(7)) / 127.5 - 1
    tail, placeholder = prompts.tail(describe(scene)[0]), tokenizer.token_to_id(family.VIDEO_TOKEN)
    ids = torch.tensor([prompts.head + [placeholder] * family.VISUAL_TOKENS + tail])
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=torch.ones_like(ids), **family.video_inputs(pixels, ids, placeholder)).logits
        embed = model.get_input_embeddings()
        hidden = torch.cat([embed(ids[:, : len(prompts.head)]), view.visual(view.cells(pixels)), embed(torch.tensor([tail]))], 1)
        positions = view.positions(len(prompts.head), list(range(len(tail))), "cpu")
        causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()[None, None]
        ours = model.lm_head(view.decode(hidden, positions, causal))
    torch.testing.assert_close(ours[:, -len(tail) :], stock[:, -len(tail) :], rtol=1e-4, atol=1e-4)

"""Is a mini model an instrument? Scores of recipes on unseen scenes, through stock `generate`, straight after training.

A quick check on the machine that trains, with frames that never were an mp4. The scores that count are those of the
real program on the real clips (`vidkv reproduce table1`).
"""

import random
from collections.abc import Iterable
from types import ModuleType

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from vidkv_eval.library_cache import make_cache
from vidkv_eval.mini.facts import fact_share
from vidkv_eval.mini.render import imitate_h264, render, scene_array
from vidkv_eval.mini.scenes import QUESTION_KINDS, ask, describe, sample_scene
from vidkv_eval.mini.text import MOVIECHAT_PROMPT
from vidkv_eval.mini.train import Prompts
from vidkv_eval.recipe import load_recipe

MAX_NEW_TOKENS = 80


@torch.no_grad()
def score_recipes(
    model: nn.Module, family: ModuleType, tokenizer: Tokenizer, recipes: Iterable[str], scenes: int, seed: int, batch: int = 64
) -> dict[str, dict[str, float]]:
    """Share of facts right, 0 to 100, for descriptions and for questions, of every recipe.

    Args:
        seed: scenes are drawn from it; training draws from other generators.
    Returns:
        recipe name -> {"description", "question"} -> mean over scenes, and "..._ci95", 1.96 standard errors.
    """
    device = next(model.parameters()).device
    rng = random.Random(seed)
    drawn = [sample_scene(rng) for _ in range(scenes)]
    generator = torch.Generator(device=device).manual_seed(seed)
    arrays = torch.tensor([scene_array(scene) for scene in drawn], device=device)
    frames = torch.cat([imitate_h264(render(part, generator), generator).round().cpu() for part in arrays.split(batch)])
    texts = {
        "description": [describe(scene) for scene in drawn],
        "question": [ask(scene, QUESTION_KINDS[i % len(QUESTION_KINDS)], rng) for i, scene in enumerate(drawn)],
    }
    prompts = Prompts(tokenizer, family)
    scores: dict[str, dict[str, float]] = {}
    for name in recipes:
        recipe = load_recipe(name)
        scores[name] = {}
        for task, pairs in texts.items():
            shares: list[float] = []
            for start in range(0, scenes, batch):
                part = pairs[start : start + batch]
                asked = [prompt if task == "description" else MOVIECHAT_PROMPT + prompt for prompt, _ in part]
                inputs = _inputs(model, family, tokenizer, prompts, frames[start : start + batch].to(device), asked)
                cache = make_cache(model, recipe, storage_dtype=torch.float16, keep_dense=True)
                out = model.generate(**inputs, past_key_values=cache, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
                answers = tokenizer.decode_batch(out[:, inputs["input_ids"].shape[1] :].tolist())
                shares += [fact_share(prompt, truth, answer) for (prompt, truth), answer in zip(part, answers, strict=True)]
            values = 100 * torch.tensor(shares)
            scores[name][task] = round(values.mean().item(), 2)
            scores[name][f"{task}_ci95"] = round(1.96 * values.std().item() / len(values) ** 0.5, 2)
    return scores


def _inputs(
    model: nn.Module, family: ModuleType, tokenizer: Tokenizer, prompts: Prompts, frames: Tensor, asked: list[str]
) -> dict[str, Tensor]:
    """What the processor of the family makes of clips and prompts; all prompts must have one length."""
    video = [tokenizer.token_to_id(family.VIDEO_TOKEN)] * family.VISUAL_TOKENS
    ids = torch.tensor([prompts.head + video + prompts.tail(prompt) for prompt in asked], device=frames.device)
    pixels = (frames / 127.5 - 1).to(model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, **family.video_inputs(pixels, ids, video[0])}

"""Caches given to `generate` from outside, and the prefill shared between recipes."""

import pytest
import tiny
import torch
from transformers import (
    AutoProcessor,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)

from vidkv_eval.cache import QuantizedCache
from vidkv_eval.inject import GenerateFailed, PrefillMemo, injected

FAMILIES = {
    "qwen2_5_vl": (tiny.make_qwen2_5_vl, Qwen2_5_VLForConditionalGeneration),
    "llava_onevision": (tiny.make_llava_onevision, LlavaOnevisionForConditionalGeneration),
}


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    """A model with two prompts of different length about different videos."""
    make, model_class = FAMILIES[request.param]
    folder = make(tmp_path_factory.mktemp("models") / request.param)
    processor = AutoProcessor.from_pretrained(folder)
    prompts = []
    for seed, frames, question in ((0, 16, tiny.QUESTIONS[0]), (1, 12, tiny.QUESTIONS[1])):
        video = torch.randint(0, 256, (frames, 3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        content = [{"type": "video"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        prompts.append(dict(processor(text=[text], videos=[video], return_tensors="pt")))
    return model_class.from_pretrained(folder, dtype=torch.float32), prompts


def generate(model, prompt):
    return model.generate(**prompt, max_new_tokens=24, do_sample=False)[0].tolist()


@pytest.mark.parametrize("recipe", tiny.RECIPES, ids=lambda recipe: recipe.name)
def test_the_prefill_memo_changes_no_token_on_prompts_in_turn(loaded, recipe):
    model, (first, second) = loaded
    with injected(model, lambda: QuantizedCache.for_model(model, recipe)):
        alone = [generate(model, prompt) for prompt in (first, second)]
    with injected(model, lambda: QuantizedCache.for_model(model, recipe), PrefillMemo()):
        shared = [generate(model, prompt) for prompt in (first, first, second, second, first)]
    assert shared == [alone[0], alone[0], alone[1], alone[1], alone[0]]


def test_the_identity_cache_gives_the_tokens_of_plain_generate(loaded):
    model, prompts = loaded
    plain = [generate(model, prompt) for prompt in prompts]
    with injected(model, lambda: QuantizedCache.for_model(model, tiny.FP16), PrefillMemo()):
        assert [generate(model, prompt) for prompt in prompts] == plain


def test_attention_reads_the_injected_cache(loaded):
    model, (prompt, _) = loaded
    plain = generate(model, prompt)
    with injected(model, lambda: QuantizedCache.for_model(model, tiny.LOW_BIT), PrefillMemo()):
        assert generate(model, prompt) != plain


def test_the_memo_computes_the_prefill_of_a_prompt_once_for_all_recipes(loaded):
    model, (prompt, _) = loaded
    lengths, visions = [], []
    language = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
    vision = tower.register_forward_pre_hook(lambda module, args: visions.append(1))
    memo = PrefillMemo()
    for recipe in tiny.RECIPES:
        with injected(model, lambda recipe=recipe: QuantizedCache.for_model(model, recipe), memo):
            generate(model, prompt)
    language.remove()
    vision.remove()
    assert len(visions) == 1
    assert [length for length in lengths if length > 1] == [prompt["input_ids"].shape[1]]


def test_each_call_is_logged_with_its_tokens_and_the_bytes_of_a_fresh_cache(loaded):
    model, (prompt, _) = loaded
    with injected(model, lambda: QuantizedCache.for_model(model, tiny.FP16)) as calls:
        length = len(generate(model, prompt))
        generate(model, prompt)
    assert [call.prompt_tokens for call in calls] == [prompt["input_ids"].shape[1]] * 2
    assert calls[0].output_tokens == length - calls[0].prompt_tokens
    # 2 layers, 2 heads, width 32, float32; the last token is never stored.
    assert calls[0].footprint.key_bytes == 2 * 2 * 32 * 4 * (length - 1)
    assert calls[1].footprint == calls[0].footprint


def test_any_error_inside_generate_comes_out_as_generate_failed_and_the_model_is_restored(loaded):
    model, (prompt, _) = loaded

    def broken():
        cache = QuantizedCache.for_model(model, tiny.FP16)
        cache.layers[1].update = None
        return cache

    with pytest.raises(GenerateFailed, match="TypeError"), injected(model, broken, PrefillMemo()):
        generate(model, prompt)
    assert not issubclass(GenerateFailed, Exception)
    assert "generate" not in vars(model) and "forward" not in vars(model)


def test_an_attribute_that_shadowed_forward_before_shadows_it_afterwards(loaded):
    model, (prompt, _) = loaded
    model.forward = shadow = model.forward
    try:
        with injected(model, lambda: QuantizedCache.for_model(model, tiny.FP16), PrefillMemo()):
            generate(model, prompt)
        assert vars(model)["forward"] is shadow
    finally:
        del model.forward


@pytest.mark.parametrize("memo", [None, PrefillMemo()], ids=["own prefill", "memo"])
@pytest.mark.parametrize("recipe", [tiny.FP16, tiny.LOW_BIT], ids=lambda recipe: recipe.name)
def test_a_padded_prompt_gets_the_answer_of_the_unpadded_one_and_stores_no_padding(loaded, recipe, memo):
    model, (prompt, _) = loaded

    def answer(prompt):
        with injected(model, lambda: QuantizedCache.for_model(model, recipe), memo) as calls:
            text = generate(model, prompt)
        return text[prompt["input_ids"].shape[1] :], calls[0].footprint

    pad = {"input_ids": model.generation_config.pad_token_id or 0, "attention_mask": 0, "mm_token_type_ids": 0}
    padded = {
        name: torch.nn.functional.pad(value, (3, 0), value=pad[name]) if name in pad else value for name, value in prompt.items()
    }
    assert answer(padded) == answer(prompt)

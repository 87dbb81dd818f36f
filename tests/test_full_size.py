"""The 7B models at their true size, without memory for the weights."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vidkv_eval.cache import QuantizedCache
from vidkv_eval.mini.full_size import FAMILIES, build, config_file, published_states
from vidkv_eval.mini.text import train_tokenizer
from vidkv_eval.recipe import load_recipe

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "check_full_size.py"
# huggingface.co shows 8.03 billion for llava-hf/llava-onevision-qwen2-7b-ov-hf; `numParameters` of Qwen/Qwen2.5-VL-7B-Instruct.
PARAMETERS = {"llava_onevision_7b": 8_030_807_584, "qwen2_5_vl_7b": 8_292_166_656}
NAMES = {
    "llava_onevision_7b": (
        "image_newline",
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.27.self_attn.k_proj.bias",
        "multi_modal_projector.linear_2.weight",
        "vision_tower.vision_model.encoder.layers.25.mlp.fc2.bias",
    ),
    "qwen2_5_vl_7b": (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.27.self_attn.k_proj.bias",
        "visual.blocks.31.attn.qkv.weight",
        "visual.merger.mlp.2.weight",
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """Name and model on the meta device."""
    tokenizer = train_tokenizer(FAMILIES[request.param].specials)
    return request.param, build(request.param, config_file(request.param, tokenizer), "meta")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_has_the_published_number_of_parameters_under_the_published_names(model):
    name, built = model
    states = dict(published_states(name, built))
    assert sum(weight.numel() for weight in states.values()) == PARAMETERS[name]
    assert len(states) == len(list(built.parameters()))
    assert set(NAMES[name]) <= states.keys()


def test_its_cache_has_28_layers_of_4_heads_of_width_128(model):
    name, built = model
    text = built.config.get_text_config(decoder=True)
    cache = QuantizedCache.for_model(built, load_recipe("kivi_k2_v2"))
    projection = dict(published_states(name, built))[NAMES[name][3] if name.startswith("llava") else NAMES[name][2]]
    assert len(cache.layers) == 28
    assert (text.num_key_value_heads, projection.numel() // text.num_key_value_heads) == (4, 128)


@pytest.mark.parametrize(("prompt", "new"), [(70, 20), (96, 129), (70, 160), (64, 300)])
def test_the_formula_of_the_report_gives_the_bytes_that_a_cache_stores(script, prompt, new):
    states = torch.randn(1, 4, prompt + new - 1, 128)
    for name in script.RECIPES:
        cache = QuantizedCache(load_recipe(name), 2, storage_dtype=torch.float16)
        for layer in range(2):
            for chunk in (states[:, :, :prompt], *states[:, :, prompt:].split(1, dim=2)):
                cache.update(chunk, chunk, layer)
        stored = cache.footprint()
        assert (stored.key_bytes, stored.value_bytes) == script.expected_bytes(name, prompt, new, 2, 4), name

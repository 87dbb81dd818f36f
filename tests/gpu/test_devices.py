"""A model whose layers lie on several GPUs: each layer of the cache stays with its layer of the model."""

import pytest
import torch
from test_cache import generate, prompt, tiny_model

from vidkv_eval.cache import QuantizedCache
from vidkv_eval.prompt import Prompt
from vidkv_eval.quant.marks import TokenMarks
from vidkv_eval.recipe import load_recipe

DEVICES = [torch.device("cuda", 0), torch.device("cuda", 1)]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def to(device):
    """A hook that moves everything a module is called with to its device, as accelerate's do."""

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return type(value)(map(move, value)) if isinstance(value, tuple | list) else value

    return lambda module, args, kwargs: (move(args), {name: move(value) for name, value in kwargs.items()})


def spread_model():
    model = tiny_model("qwen2").to(DEVICES[0])
    model.model.layers[1].to(DEVICES[1])
    model.model.layers[1].register_forward_pre_hook(to(DEVICES[1]), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(to(DEVICES[0]), with_kwargs=True)
    return model


@needs_two
@pytest.mark.parametrize("name", ["fp16", "kivi_k2_v2", "vidkv_k150_v158_scaled", "vidkv_k150_v158_released", "ours_k182_v158"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("keep_dense", [False, True])
def test_layers_on_two_devices_give_the_tokens_of_one(name, beams, keep_dense):
    prompts = [prompt(90, seed=1), prompt(61, seed=2)]
    input_ids = torch.cat([prompts[0], torch.nn.functional.pad(prompts[1], (29, 0))]).to(DEVICES[0])
    options = {"num_beams": beams, "attention_mask": (input_ids > 0).long(), "new_tokens": 80}
    found = []
    for model in (tiny_model("qwen2").to(DEVICES[0]), spread_model()):
        cache = QuantizedCache.for_model(model, load_recipe(name), keep_dense=keep_dense)
        found.append(generate(model, input_ids, cache, **options)[0])
        footprint = cache.footprint()
    assert torch.equal(*found)
    assert footprint.effective_bits > 0
    assert [layer.device for layer in cache.layers] == DEVICES


@needs_two
def test_chosen_tokens_are_on_the_device_of_their_layer():
    cache = QuantizedCache(load_recipe("vidkv_k150_v166_rtp_scaled"), 2)
    visual = torch.zeros(128, dtype=torch.bool, device=DEVICES[0])
    visual[4:100] = True
    cache.describe_prompt(Prompt((0,), (TokenMarks(visual, torch.rand(128, device=DEVICES[0])),)))
    states = torch.randn(1, 2, 128, 64, device=DEVICES[0])
    reads = []
    for layer, device in enumerate(DEVICES):
        cache.update(states.to(device), states.to(device), layer)
        reads.append(cache.layers[layer].read(states[:, :, :0].to(device), states[:, :, :0].to(device))[1].to(DEVICES[0]))
    assert torch.equal(*reads)
    assert not torch.equal(reads[0], states)

"""Decode steps repeated as CUDA graphs give what the same steps give without."""

import pytest
import torch
from test_fused_gpu import PROMPT, make_model

from vidkv_eval.attention import FUSED, use_attention
from vidkv_eval.cache import QuantizedCache
from vidkv_eval.graphs import STEPS_BEFORE
from vidkv_eval.recipe import load_recipe

DTYPES = [torch.bfloat16, torch.float16]


def generate(model, input_ids, name, new_tokens, **options):
    cache = QuantizedCache.for_model(model, load_recipe(name), **options.pop("cache", {}))
    options = {"do_sample": False, "max_new_tokens": new_tokens, "return_dict_in_generate": True, "output_logits": True, **options}
    options.setdefault("attention_mask", torch.ones_like(input_ids))
    output = model.generate(input_ids, past_key_values=cache, **options)
    return output.sequences, torch.stack(output.logits), cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["kivi_k2_v2", "vidkv_k150_v158_scaled"])
def test_tokens_and_logits_are_those_without_graphs(gpu, name, dtype):
    model = make_model(gpu, FUSED, dtype)
    graphs = model.get_decoder().forward
    # Two sequences, one padded by 37 tokens; three flushes, of which one makes the buffers larger.
    input_ids = torch.randint(1, 97, (2, PROMPT), generator=torch.Generator().manual_seed(0)).to(gpu)
    mask = torch.ones_like(input_ids)
    mask[1, :37] = 0
    found = generate(model, input_ids, name, 400, attention_mask=mask)
    assert graphs.replays >= 400 - 1 - 4 * (STEPS_BEFORE + 1)
    use_attention(model, FUSED, graphs=False)
    expected = generate(model, input_ids, name, 400, attention_mask=mask)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    assert torch.equal(found[0], expected[0])
    assert found[2].footprint() == expected[2].footprint()
    assert found[2].get_seq_length() == expected[2].get_seq_length()


def test_another_cache_gets_a_graph_of_its_own(gpu):
    model = make_model(gpu, FUSED, torch.bfloat16)
    prompts = torch.randint(1, 97, (2, 1, PROMPT), generator=torch.Generator().manual_seed(0)).to(gpu)
    found = [generate(model, prompt, "kivi_k2_v2", 40)[0] for prompt in (*prompts, prompts[0])]
    use_attention(model, FUSED, graphs=False)
    assert all(torch.equal(left, generate(model, prompt, "kivi_k2_v2", 40)[0]) for left, prompt in zip(found[:2], prompts, strict=True))
    assert torch.equal(found[0], found[2])


def test_a_second_turn_crops_and_beams_go_on_with_graphs(gpu):
    results = []
    for graphs in (True, False):
        model = make_model(gpu, FUSED, torch.float16)
        use_attention(model, FUSED, graphs=graphs)
        prompt = torch.randint(1, 97, (1, 300), generator=torch.Generator().manual_seed(0)).to(gpu)
        answer, _, cache = generate(model, prompt, "vidkv_k150_v158_scaled", 60, cache={"keep_newest": 8})
        cache.crop(-5)
        following = torch.cat([answer[:, : cache.get_seq_length()], prompt[:, :30]], dim=1)
        again = model.generate(
            following, past_key_values=cache, do_sample=False, max_new_tokens=60, attention_mask=torch.ones_like(following)
        )
        beams, *_ = generate(model, prompt, "kivi_k2_v2", 30, num_beams=3)
        results.append((answer.tolist(), again.tolist(), beams.tolist()))
        assert (getattr(model.get_decoder().forward, "replays", 0) > 60) == graphs
    assert results[0] == results[1]


def test_positions_that_nobody_gives_follow_the_cache(gpu):
    model = make_model(gpu, FUSED, torch.bfloat16)
    input_ids = torch.randint(1, 97, (1, 330), generator=torch.Generator().manual_seed(0)).to(gpu)
    logits = []
    for graphs in (True, False):
        use_attention(model, FUSED, graphs=graphs)
        cache = QuantizedCache.for_model(model, load_recipe("kivi_k2_v2"), keep_newest=16)
        with torch.no_grad():
            model(input_ids[:, :300], past_key_values=cache)
            for position in [*range(300, 320), *range(310, 330)]:
                if position < cache.get_seq_length():
                    cache.crop(position - cache.get_seq_length())
                last = model(input_ids[:, position : position + 1], past_key_values=cache).logits
        logits.append(last)
        assert (getattr(model.get_decoder().forward, "replays", 0) > 20) == graphs
    assert torch.equal(*logits)


def test_a_mask_that_hides_stored_tokens_is_obeyed(gpu):
    model = make_model(gpu, FUSED, torch.float16)
    input_ids = torch.randint(1, 97, (1, 330), generator=torch.Generator().manual_seed(0)).to(gpu)
    logits = []
    for graphs in (True, False):
        use_attention(model, FUSED, graphs=graphs)
        cache = QuantizedCache.for_model(model, load_recipe("kivi_k2_v2"))
        with torch.no_grad():
            model(input_ids[:, :300], past_key_values=cache)
            for position in range(300, 330):
                mask = torch.ones(1, position + 1, dtype=torch.int64, device=gpu)
                mask[:, 7] = int(position < 320)
                last = model(input_ids[:, position : position + 1], past_key_values=cache, attention_mask=mask).logits
        logits.append(last)
    assert torch.equal(*logits)

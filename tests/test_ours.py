"""Our recipe keeps what it promises: at most 2.0 effective bits, and no more error on the golden inputs than KIVI 2 bit."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vidkv_eval.recipe import load_recipe
from vidkv_eval.roundtrip import roundtrip

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "ablate.py"
SPEC = importlib.util.spec_from_file_location("ablate", SCRIPT)
ablate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ablate)

OURS, KIVI = load_recipe("ours_k182_v158"), load_recipe("kivi_k2_v2")
ROWS = list(ablate.rows())


def test_a_prompt_of_llava_onevision_7b_takes_at_most_2_bits():
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 4, 6304, 128, generator=generator).half() for _ in range(2))
    stored = roundtrip(OURS, key, value).footprint
    assert stored.effective_bits <= 2.0
    assert f"{stored.effective_bits:.2f} effective bits" in OURS.label
    # 12 channels of 4 bits and 116 of 8/5 bits, a byte of metadata for 32 tokens; what does not grow with the tokens is the rest
    assert stored.key_bits == pytest.approx((12 * 4.25 + 116 * 1.85) / 128, abs=0.015)
    assert stored.value_bits == pytest.approx(1.85, abs=0.01)


def test_every_error_on_the_golden_inputs_is_below_that_of_kivi():
    ours, kivi = (ablate.golden_errors(ablate.Row("", "", recipe.key, recipe.value)) for recipe in (OURS, KIVI))
    assert all(ours[name] < kivi[name] for name in kivi)


def test_the_chains_of_the_ablation_end_at_the_recipe():
    chains = [row for row in ROWS if "**ours**" in row.lever]
    assert [row.section[:10] for row in chains] == ["From KIVI ", "From VidKV"]
    assert all((row.key, row.value) == (OURS.key, OURS.value) for row in chains)


def test_every_changed_row_differs_from_the_recipe_in_keys_or_values_only_where_it_says():
    changed = [row for row in ROWS if row.section.startswith("Ours with one thing changed")]
    assert len(changed) > 20
    assert all((row.key, row.value) != (OURS.key, OURS.value) for row in changed)
    assert len({(row.key, row.value) for row in ROWS}) == len({row.lever for row in ROWS if "ours" not in row.lever}) + 1


def test_answers_seen_through_an_exact_cache_do_not_change():
    torch.set_num_threads(1)
    attend = ablate.attend(torch.randn(2, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8))
    weights, output = attend
    assert torch.allclose(weights.exp().sum(-1), torch.ones(2, 3))
    assert (weights[:, 0, 3:].exp() == 0).all()  # the first of three queries does not see the two newest tokens
    assert output.shape == (2, 3, 8)

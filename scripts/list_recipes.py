"""Every recipe: nominal bits, effective bits, and what it does to synthetic states.

    python scripts/list_recipes.py > results/recipes.md

Effective bits are measured on seeded normal states of the shape of one layer of LLaVA-OneVision 7B with its full prompt
(1 x 4 heads x 6,304 tokens x 128, float16): 8 x bytes of every stored tensor, residual included, over the elements. Recipes
that choose tokens see its layout (6,273 visual tokens after 14 others) with seeded saliency. Errors are relative (norm of the
difference over norm of the states) on the inputs of the golden vectors in tests/goldens: the prompt in one call, then 131
tokens one by one, across a flush (recipes that choose tokens get the listed ones); a small error on synthetic states promises
nothing about generated text. A dash: the recipe cannot store that many tokens of a case (hqq packs multiples of 8 groups only).
"""

import sys
from pathlib import Path

import numpy as np
import torch

from vidkv_eval import torchvision_cpu

torchvision_cpu.install()  # before anything imports transformers

from vidkv_eval.quant.marks import TokenMarks  # noqa: E402
from vidkv_eval.recipe import load_recipe, recipe_names  # noqa: E402
from vidkv_eval.roundtrip import roundtrip  # noqa: E402

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"
CASES = ("case_a", "case_b")


def golden_states(case: str) -> tuple[torch.Tensor, torch.Tensor, int, TokenMarks]:
    """Keys and values [1, H, T, D] of a case, prompt and steps together, the length of the prompt, and its protected tokens."""
    with np.load(GOLDENS / f"{case}.npz") as file:
        states = [torch.from_numpy(np.concatenate([file[name], file[f"step_{name}"]], axis=2)) for name in ("key", "value")]
        return states[0], states[1], file["key"].shape[2], TokenMarks(listed=torch.from_numpy(file["protected"]))


def error(exact: torch.Tensor, found: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 4, 6304, 128, generator=generator).half() for _ in range(2))
    visual = torch.zeros(6304, dtype=torch.bool)
    visual[14 : 14 + 6273] = True
    marks = TokenMarks(visual, torch.rand(6304, generator=generator))
    cases = {case: golden_states(case) for case in CASES}
    print("# Recipes\n")
    print(" ".join(__doc__.split("\n\n")[-1].split()) + "\n")
    columns = ["recipe", "variant", "nominal K / V", "effective K / V", "effective, together"]
    columns += [f"{case}: error of K / V" for case in CASES]
    print(f"| {' | '.join(columns)} |")
    print(f"|{' --- |' * len(columns)}")
    for name in recipe_names():
        recipe = load_recipe(name)
        stored = roundtrip(recipe, key, value, marks=marks).footprint
        cells = [f"`{name}`", recipe.variant or "-", f"{recipe.key_bits:.2f} / {recipe.value_bits:.2f}"]
        cells += [f"{stored.key_bits:.3f} / {stored.value_bits:.3f}", f"{stored.effective_bits:.3f}"]
        for exact_key, exact_value, prompt, listed in cases.values():
            try:
                read = roundtrip(recipe, exact_key, exact_value, prompt, listed)
            except ValueError as refusal:
                print(f"{name}: {refusal}", file=sys.stderr)
                cells.append("-")
                continue
            cells.append(f"{error(exact_key, read.key):.3f} / {error(exact_value, read.value):.3f}")
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nMade by `python scripts/list_recipes.py > results/recipes.md`; torch {torch.__version__}, CPU.")


if __name__ == "__main__":
    main()

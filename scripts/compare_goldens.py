"""Compare the released recipes with the golden vectors of the released code; prints a table of the largest deviations."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer
from vidkv_eval.quant.marks import TokenMarks
from vidkv_eval.quant.released import HalfGrouped, ReleasedKeys
from vidkv_eval.quant.split_tokens import SplitTokens
from vidkv_eval.recipe import Recipe, load_recipe
from vidkv_eval.roundtrip import roundtrip

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "goldens"
CASES = ("case_a", "case_b", "case_c")
RECIPES = {
    "vlm_k1.5_v1.58": "vidkv_k150_v158_released",
    "vlm_k1.25_v1.58": "vidkv_k125_v158_released",
    "vlm_k1.75_v1.58": "vidkv_k175_v158_released",
    "vlm_k1_v1": "vidkv_k100_v100_released",
    "lm_2_kc_vc": "vidkv_k200_v200_released",
    "lm_2_kc_vt": "kivi_k2_v2_released",
    "stp_k1.5_v1.58": "vidkv_k150_v166_released",
}
SAME_AS = {
    "key": {"lm_2_kc_vt": "lm_2_kc_vc", "stp_k1.5_v1.58": "vlm_k1.5_v1.58"},
    "value": {"vlm_k1.25_v1.58": "vlm_k1.5_v1.58", "vlm_k1.75_v1.58": "vlm_k1.5_v1.58"},
}
# Tolerances of the vectors for arithmetic that rounds each operation to float16.
SPECTRUM_SCALE, EASY_NORM, EASY_LARGEST = 1e-3, 2e-4, 0.01


@dataclass(frozen=True)
class Deviation:
    """A deviation from a golden array, in its own measure, and the largest allowed."""

    case: str
    setting: str
    part: str
    found: float
    allowed: float


class Golden:
    """Arrays of one case, as tensors."""

    def __init__(self, case: str):
        with np.load(FOLDER / f"{case}.npz") as file:
            self.arrays = {name: torch.from_numpy(file[name]) for name in file.files}

    def inputs(self, name: str, last: bool) -> torch.Tensor:
        """Return the prompt and one step, or all steps: [1, H, T, D]."""
        steps = self.arrays[f"step_{name}"]
        return torch.cat([self.arrays[name], steps if last else steps[:, :, :1]], dim=2)

    def find(self, setting: str, part: str) -> torch.Tensor | None:
        """Return an array of a setting, or the equal one of another setting that is stored instead of it."""
        other = SAME_AS.get(part.split("_")[0], {}).get(setting)
        found = self.arrays.get(f"{setting}.{part}")
        return self.arrays.get(f"{other}.{part}") if found is None and other else found


def compare_case(case: str, setting: str) -> Iterator[Deviation]:
    """Compare everything stored for a setting in a case."""
    golden, recipe = Golden(case), load_recipe(RECIPES[setting])
    for part, found, allowed in [*_stored(golden, setting, recipe), *_read(golden, setting, recipe)]:
        yield Deviation(case, setting, part, float(found), allowed)


def _stored(golden: Golden, setting: str, recipe: Recipe) -> Iterator[tuple[str, float, float]]:
    """Compare channels, codes and metadata right after the prompt."""
    for side in ("key", "value"):
        quantizer: Quantizer = getattr(recipe, side)
        states = golden.arrays[side]
        states = states[:, :, : states.shape[2] - states.shape[2] % quantizer.block]
        if isinstance(quantizer, SplitTokens):
            yield from _stored_by_token(golden, setting, quantizer, states)
            continue
        quantized = quantizer.quantize(states)
        groups: Mapping[str, tuple[HalfGrouped, QuantizedStates]] = {"": (quantizer, quantized)}
        if isinstance(quantizer, ReleasedKeys):
            yield "channels", _differing(quantized.static["wide_channels"][0], golden.find(setting, "anomalous")), 0
            inner = {"": "wide", "_sign": "normal"}
            groups = {end: (getattr(quantizer, part), quantized.parts[part]) for end, part in inner.items() if part in quantized.parts}
        for end, (inner, part) in groups.items():
            codes = inner.codes(part)[0]
            expected = golden.find(setting, f"key{end}" if end else f"{side}_code")
            if end:
                # Imaginary parts of these two frequencies are always zero; their codes mean nothing.
                meaningless = [1, codes.shape[-1] // 2 + 1]
                codes[..., meaningless] = expected[..., meaningless].to(codes.dtype)
            yield f"{side}{end} codes", _differing(codes, expected), 0
            for name, tensor in (("scale", part.tensors["scale"]), ("min", part.tensors["minimum"])):
                expected = golden.find(setting, f"{side}{end}_{name}")
                if expected is not None:
                    relative = ((tensor[0].double() - expected.double()).abs() / expected.double().abs().clamp(min=1e-6)).max()
                    yield f"{side}{end} {name}", relative, SPECTRUM_SCALE if end else 0


def _stored_by_token(golden: Golden, setting: str, quantizer: SplitTokens, states: torch.Tensor) -> Iterator[tuple[str, float, float]]:
    """Compare values of which some tokens are protected."""
    quantized = quantizer.quantize(states, like=quantizer.choice(golden.arrays["protected"][None], states.shape[-1]))
    protected, rest = quantized.parts["chosen"], quantized.parts["other"]
    yield "value protected codes", _differing(quantizer.chosen.codes(protected)[0], golden.find(setting, "value_protected_code")), 0
    for name, tensor in (("scale", protected.tensors["scale"]), ("min", protected.tensors["minimum"])):
        expected = golden.find(setting, f"value_protected_{name}")
        yield f"value protected {name}", (tensor[0].float() - expected.float()).abs().max(), 0
    yield "value rest codes", _differing(quantizer.other.codes(rest)[0], golden.find(setting, "value_rest_code")), 0


def _read(golden: Golden, setting: str, recipe: Recipe) -> Iterator[tuple[str, float, float]]:
    """Compare what attention reads after the first step and, where it is known, after the last."""
    prompt = golden.arrays["key"].shape[2]
    for moment in ("first", "last"):
        last = moment == "last"
        expected_key, expected_value = (golden.find(setting, f"{side}_{moment}") for side in ("key", "value"))
        if expected_key is None or expected_value is None:
            continue
        marks = TokenMarks(listed=golden.arrays["protected"]) if recipe.chooses_tokens else None
        result = roundtrip(recipe, golden.inputs("key", last), golden.inputs("value", last), prompt, marks)
        yield f"value, {moment}", (result.value.float() - expected_value.float()).abs().max(), 0
        easy = torch.zeros(expected_key.shape[-1], dtype=torch.bool)
        if isinstance(recipe.key, ReleasedKeys):
            wide_before = golden.find(setting, "anomalous")
            easy[:] = True
            easy[wide_before] = False
            if last:
                wide = golden.find(setting, "anomalous_after_flush")
                yield "channels after flush", _differing(result.wide_channels[0], wide), 0
                newly_easy = torch.ones_like(easy)
                newly_easy[wide] = False
                easy |= newly_easy
        coded = prompt - prompt % recipe.block + (recipe.residual_length if last else 0)
        difference = result.key.double() - expected_key.double()
        yield f"key, wide channels, {moment}", _largest(difference[..., ~easy]), 0
        yield f"key, exact tokens, {moment}", _largest(difference[:, :, coded:]), 0
        if easy.any():
            stored = expected_key[:, :, :coded, easy].double()
            of_easy = difference[:, :, :coded, easy]
            yield f"key, easy channels, {moment}, relative norm", of_easy.norm() / stored.norm(), EASY_NORM
            if not last:
                yield f"key, easy channels, {moment}, largest / rms", of_easy.abs().max() / stored.square().mean().sqrt(), EASY_LARGEST


def _differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Count differing integers; all of them if the shapes differ."""
    return int((found.long() != expected.long()).sum()) if found.shape == expected.shape else max(found.numel(), expected.numel())


def _largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


def worst() -> list[Deviation]:
    """Return the largest deviation of each setting and part over all cases."""
    largest: dict[tuple[str, str], Deviation] = {}
    for setting in RECIPES:
        for case in CASES:
            for deviation in compare_case(case, setting):
                place = (setting, deviation.part)
                if place not in largest or not deviation.found <= largest[place].found:  # not a number counts as larger
                    largest[place] = deviation
    return list(largest.values())


def main() -> int:
    """Print the table; 1 if a deviation is larger than allowed."""
    found = worst()
    print("| setting | recipe | part | largest deviation | allowed | in |\n|---|---|---|---|---|---|")
    for one in found:
        mark = "" if one.found <= one.allowed else " (!)"
        print(f"| {one.setting} | {RECIPES[one.setting]} | {one.part} | {one.found:.2g}{mark} | {one.allowed:g} | {one.case} |")
    return int(not all(one.found <= one.allowed for one in found))


if __name__ == "__main__":
    sys.exit(main())

"""What each lever of `ours_k182_v158` is worth: one row for each lever added to, or taken from, a recipe.

    python scripts/ablate.py results/ablation

writes results/ablation.csv and results/ablation.md, in about 10 minutes on one core. Mini scores of the main rows are taken from
results/mini/tables/ours.csv, which `vidkv reproduce ours` makes.
"""

import csv
import dataclasses
import math
import platform
import random
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from vidkv_eval import torchvision_cpu

torchvision_cpu.install()  # before anything imports transformers

import transformers  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText, DynamicCache  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from vidkv_eval.cache import QuantizedCache  # noqa: E402
from vidkv_eval.environment import cpu_model  # noqa: E402
from vidkv_eval.mini.facts import fact_share  # noqa: E402
from vidkv_eval.mini.render import imitate_h264, render, scene_array  # noqa: E402
from vidkv_eval.mini.scenes import QUESTION_KINDS, ask, describe, sample_scene  # noqa: E402
from vidkv_eval.mini.text import MOVIECHAT_PROMPT  # noqa: E402
from vidkv_eval.mini.train import Prompts  # noqa: E402
from vidkv_eval.quant.affine import Affine  # noqa: E402
from vidkv_eval.quant.base import Quantizer  # noqa: E402
from vidkv_eval.quant.centred import Centred  # noqa: E402
from vidkv_eval.quant.fitted import Fitted  # noqa: E402
from vidkv_eval.quant.hadamard import Hadamard  # noqa: E402
from vidkv_eval.quant.spectral import Spectral  # noqa: E402
from vidkv_eval.quant.split_channels import SplitChannels  # noqa: E402
from vidkv_eval.quant.ternary import Ternary  # noqa: E402
from vidkv_eval.recipe import Recipe, load_recipe  # noqa: E402
from vidkv_eval.roundtrip import roundtrip  # noqa: E402

PROJECT = Path(__file__).resolve().parents[1]
GOLDENS = PROJECT / "tests" / "goldens"
NOTES = Path(__file__).with_name("ablation_notes.md")
TABLE = PROJECT / "results" / "mini" / "tables" / "ours.csv"
# Levers were chosen on the scenes of the seeds 90210, 555 and 777.
SEED, SCENES = 31337, 8
# Tokens whose error is measured: the same for every row, whatever its group size. A multiple of 128.
COUNTED = {"mini_llava_onevision": 512, "mini_qwen2_5_vl": 256, "case_a": 256, "case_b": 128}
MODELS = ("mini_llava_onevision", "mini_qwen2_5_vl")
BIASED, BIAS = (5, 50, 77, 120), 300.0
RANDOM_QUERIES = 64
# Questions answered freely by the rows that `answered_rows` names.
QUESTIONS, BATCH, LONGEST_ANSWER = 96, 32, 24


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe in the table: the lever that makes it, and the section it stands in."""

    section: str
    lever: str
    key: Quantizer
    value: Quantizer

    @property
    def recipe(self) -> Recipe:
        residual_length = max(128, self.key.block, self.value.block)
        return Recipe("row", self.lever, "here", self.key, self.value, residual_length=residual_length)


def rows() -> Iterator[Row]:
    kivi, mixed, ours = (load_recipe(name) for name in ("kivi_k2_v2", "vidkv_k150_v158_scaled", "ours_k182_v158"))
    published, plain = load_recipe("vidkv_k150_v158_published"), load_recipe("vidkv_k150_v200_nofft_scaled").key
    minmax = Affine(2, "per_channel", 32)

    section = "From KIVI 2 bit, one lever after the other"
    yield Row(section, "KIVI 2 bit (`kivi_k2_v2`)", kivi.key, kivi.value)
    yield Row(section, "+ values per channel (`vidkv_k200_v200`)", minmax, minmax)
    yield Row(section, "+ levels of least squared error", fitted(4, 0, "float16"), fitted(4, 0, "float16"))
    yield Row(section, "+ emphasis on extreme elements", fitted(4, 1.0, "float16"), fitted(4, 1.0, "float16"))
    yield Row(section, "+ metadata in 4 bits", fitted(4, 1.0), fitted(4, 1.0))
    yield Row(section, "+ ternary values", fitted(4, 1.0), ours.value)
    yield Row(section, "+ keys: 4 bits for the widest tenth, ternary for the others", split(1.0, transform=False), ours.value)
    yield Row(section, "+ Fourier transform of the others: **ours**", ours.key, ours.value)

    section = "From VidKV 1.5/1.58, one lever after the other"
    yield Row(section, "VidKV 1.5/1.58, published", published.key, published.value)
    yield Row(section, "VidKV 1.5/1.58, scaled", mixed.key, mixed.value)
    yield Row(section, "without the Fourier transform", plain, mixed.value)
    half = SplitChannels(fitted(4, 1.0, "float16"), Spectral(fitted(2, 0, "float16")), 0.5, per_head=True)
    yield Row(section, "scaled, + fitted levels", half, fitted(3, 1.0, "float16"))
    half = SplitChannels(fitted(4, 1.0), Spectral(fitted(2, 0)), 0.5, per_head=True)
    yield Row(section, "+ metadata in 4 bits", half, ours.value)
    yield Row(section, "+ keys: 4 bits and ternary instead of 2 bits and 1: **ours**", ours.key, ours.value)

    section = "Ours with one thing changed: levels"
    yield Row(section, "emphasis 0 (plain least squares)", split(0.0), fitted(3, 0))
    yield Row(section, "emphasis 0.5", split(0.5), fitted(3, 0.5))
    yield Row(section, "emphasis 2", split(2.0), fitted(3, 2.0))
    threshold = Ternary(0.7, True, "per_channel", 32, metadata="uint4")
    yield Row(section, "values by VidKV's threshold 0.7 and scale, no offset", ours.key, threshold)
    yield Row(section, "the same, values centred first", ours.key, Centred(threshold))

    section = "Ours with one thing changed: metadata and groups"
    yield Row(section, "metadata float16", split(1.0, "float16"), fitted(3, 1.0, "float16"))
    yield Row(section, "metadata float8", split(1.0, "float8"), fitted(3, 1.0, "float8"))
    yield Row(section, "groups of 64, metadata float8", split(1.0, "float8", 64), fitted(3, 1.0, "float8", 64))
    yield Row(section, "groups of 16", split(1.0, size=16), fitted(3, 1.0, size=16))
    yield Row(section, "groups of 64", split(1.0, size=64), fitted(3, 1.0, size=64))
    yield Row(section, "groups of 128", split(1.0, size=128), fitted(3, 1.0, size=128))

    section = "Ours with one thing changed: which key channels get more bits"
    yield Row(section, "none: ternary keys, transformed", Spectral(fitted(3, 1.0)), ours.value)
    yield Row(section, "4 bits for a sixteenth", split(1.0, fraction=0.0625), ours.value)
    yield Row(section, "4 bits for an eighth", split(1.0, fraction=0.125), ours.value)
    narrow = Spectral(fitted(3, 1.0))
    yield Row(section, "2 bits for a quarter", SplitChannels(fitted(4, 1.0), narrow, 0.25, per_head=True), ours.value)
    yield Row(section, "2 bits for 0.65 of them", SplitChannels(fitted(4, 1.0), narrow, 0.65, per_head=True), ours.value)
    yield Row(section, "channels by variance", dataclasses.replace(ours.key, select="variance"), ours.value)
    yield Row(section, "one set of channels for all heads", dataclasses.replace(ours.key, per_head=False), ours.value)

    section = "Ours with one thing changed: transforms over the key or value channels"
    yield Row(section, "none", split(1.0, transform=False), ours.value)
    yield Row(section, "Fourier, all keys, 2 bits", Spectral(fitted(4, 1.0)), ours.value)
    yield Row(section, "Hadamard, all keys, 2 bits", Hadamard(fitted(4, 1.0)), ours.value)
    yield Row(section, "Hadamard, all keys, ternary", Hadamard(fitted(3, 1.0)), ours.value)
    yield Row(section, "Hadamard, values", ours.key, Hadamard(ours.value))

    section = "Another way to 2 bits"
    coarse = Centred(Affine(2, "per_channel", 64, metadata="float8"))
    ternary = Centred(Ternary(0.7, True, "per_channel", 64, metadata="float8"))
    yield Row(section, "min-max keys in 2 bits, values by threshold, both centred, groups of 64, metadata float8", coarse, ternary)


def fitted(levels: int, emphasis: float, metadata: str = "uint4", size: int = 32) -> Fitted:
    return Fitted(levels, emphasis, "per_channel", size, metadata=metadata)


def split(emphasis: float, metadata: str = "uint4", size: int = 32, fraction: float = 0.1, transform: bool = True) -> SplitChannels:
    wide, normal = (fitted(levels, emphasis, metadata, size) for levels in (16, 3))
    return SplitChannels(wide, Spectral(normal) if transform else normal, fraction, per_head=True)


def read_back(quantizer: Quantizer, states: torch.Tensor) -> torch.Tensor:
    return quantizer.dequantize(quantizer.quantize(states), torch.float32)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend causally, the queries being those of the newest tokens.

    Args:
        query: [HQ, Q, D].
        key, value: [H, T, D].
    Returns:
        Logarithms of the weights [HQ, Q, T] and the output [HQ, Q, D].
    """
    key, value = (states.repeat_interleave(len(query) // len(states), 0) for states in (key, value))
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
    weights = scores.masked_fill(hidden, -1e30).log_softmax(-1)
    return weights, weights.exp() @ value


def golden_errors(row: Row) -> dict[str, float]:
    """Errors on the inputs of the golden vectors; random queries attend to all tokens counted."""
    found: dict[str, float] = {}
    for case in ("case_a", "case_b"):
        with np.load(GOLDENS / f"{case}.npz") as file:
            key, value = (
                torch.from_numpy(np.concatenate([file[name], file[f"step_{name}"]], axis=2))[:, :, : COUNTED[case]].float()
                for name in ("key", "value")
            )
        key_read, value_read = read_back(row.key, key), read_back(row.value, value)
        generator = torch.Generator().manual_seed(SEED)
        query = torch.randn(1, key.shape[1], RANDOM_QUERIES, key.shape[3], generator=generator)
        exact, read = (
            torch.softmax(query @ k.transpose(2, 3) / math.sqrt(k.shape[3]), -1) @ v for k, v in ((key, value), (key_read, value_read))
        )
        found |= {f"{case} key": relative(key_read, key), f"{case} value": relative(value_read, value)}
        found[f"{case} output"] = relative(read, exact)
        if case == "case_a":
            bias = torch.zeros(key.shape[-1])
            bias[list(BIASED)] = BIAS
            found["biased key"] = float((read_back(row.key, key + bias) - key - bias).norm() / key.norm())
    return found


@dataclasses.dataclass
class Sample:
    """One prompt of a mini model with its true answer.

    Attributes:
        states: exact keys and values of the prompt, [1, H, P, D] for each layer.
        seen: query [HQ, A, D], keys and values [H, P + A, D] of each layer, for the A tokens of the answer.
        answer: ids [1, A].
        logits: logarithms of the model's probabilities in full precision, [A, vocabulary].
    """

    states: list[tuple[torch.Tensor, torch.Tensor]]
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    answer: torch.Tensor
    logits: torch.Tensor


class MiniModel:
    """A mini model with samples of scenes that it has never seen."""

    def __init__(self, name: str):
        folder = PROJECT / "vidkv_eval" / "mini" / "assets" / "models" / name
        self.name = name
        AttentionInterface.register("recorded", recorded_attention)
        AttentionMaskInterface.register("recorded", sdpa_mask)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        family = import_module(f"vidkv_eval.mini.{name.removeprefix('mini_')}")
        self.family, self.tokenizer = family, tokenizer
        self.prompts = Prompts(tokenizer, family)
        self.samples = list(self._samples())

    def _samples(self) -> Iterator[Sample]:
        rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
        for index in range(SCENES):
            scene = sample_scene(rng)
            frames = imitate_h264(render(torch.tensor([scene_array(scene)]), generator), generator).round()
            question, reply = ask(scene, QUESTION_KINDS[index % len(QUESTION_KINDS)], rng)
            for text, truth in (describe(scene), (MOVIECHAT_PROMPT + question, reply)):
                cache, _ = self._prefill(frames, [text])
                states = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
                answer = torch.tensor([self.prompts.answer(truth)])
                RECORD.clear()
                self.model.set_attn_implementation({"text_config": "recorded"})
                logits = self._continue(answer, cache)[0]
                self.model.set_attn_implementation({"text_config": "sdpa"})
                yield Sample(states, list(RECORD), answer, logits)

    def _prefill(self, frames: torch.Tensor, texts: list[str]) -> tuple[DynamicCache, torch.Tensor]:
        """Return the exact cache of prompts of one length, and the first token of each answer, [N]."""
        video = self.tokenizer.token_to_id(self.family.VIDEO_TOKEN)
        ids = torch.tensor([self.prompts.head + [video] * self.family.VISUAL_TOKENS + self.prompts.tail(text) for text in texts])
        cache = DynamicCache()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.family.video_inputs(frames / 127.5 - 1, ids, video)}
        return cache, self.model(**inputs, past_key_values=cache).logits[:, -1].argmax(-1)

    def _continue(self, answer: torch.Tensor, cache: DynamicCache | QuantizedCache) -> torch.Tensor:
        return self.model(input_ids=answer, past_key_values=cache).logits.log_softmax(-1)

    def attention_errors(self, row: Row) -> Iterator[dict[str, float]]:
        """For each sample, means over layers: errors of keys, values, attention output, and KL divergence of attention."""
        counted = COUNTED[self.name]
        for sample in self.samples:
            errors: dict[str, list[float]] = {"key": [], "value": [], "output": [], "attention KL": []}
            for query, key, value in sample.seen:
                key_read, value_read = key.clone(), value.clone()
                key_read[:, :counted] = read_back(row.key, key[None, :, :counted])[0]
                value_read[:, :counted] = read_back(row.value, value[None, :, :counted])[0]
                weights, output = attend(query, key, value)
                weights_read, output_read = attend(query, key_read, value_read)
                errors["key"].append(relative(key_read[:, :counted], key[:, :counted]))
                errors["value"].append(relative(value_read[:, :counted], value[:, :counted]))
                errors["output"].append(relative(output_read, output))
                errors["attention KL"].append(float((weights.exp() * (weights - weights_read)).sum(-1).mean()))
            yield {name: sum(found) / len(found) for name, found in errors.items()}

    def answer_errors(self, row: Row) -> Iterator[dict[str, float]]:
        """For each sample, what a real cache does to the true answer, given token by token: KL divergence and changed tokens."""
        for sample in self.samples:
            cache = QuantizedCache.for_model(self.model, row.recipe, storage_dtype=torch.float16)
            for layer, (key, value) in enumerate(sample.states):
                cache.update(key, value, layer)
            found = self._continue(sample.answer, cache)[0]
            divergence = (sample.logits.exp() * (sample.logits - found)).sum(-1).mean()
            changed = (sample.logits.argmax(-1) != found.argmax(-1)).float().mean()
            yield {"answer KL": float(divergence), "changed tokens": 100 * float(changed)}

    def answer_scores(self, recipes: dict[str, Recipe]) -> dict[str, list[float]]:
        """For each recipe, the share of facts right, 0 to 100, of its answers to questions about scenes of their own."""
        rng, generator = random.Random(SEED + 1), torch.Generator().manual_seed(SEED + 1)
        scores: dict[str, list[float]] = {name: [] for name in recipes}
        for _ in range(0, QUESTIONS, BATCH):
            scenes = [sample_scene(rng) for _ in range(BATCH)]
            frames = imitate_h264(render(torch.tensor([scene_array(scene) for scene in scenes]), generator), generator).round()
            pairs = [ask(scene, QUESTION_KINDS[index % len(QUESTION_KINDS)], rng) for index, scene in enumerate(scenes)]
            exact, first = self._prefill(frames, [MOVIECHAT_PROMPT + question for question, _ in pairs])
            for name, recipe in recipes.items():
                cache = QuantizedCache.for_model(self.model, recipe, storage_dtype=torch.float16, keep_dense=True)
                for layer, states in enumerate(exact.layers):
                    cache.update(states.keys, states.values, layer)
                tokens = [first]
                for _ in range(LONGEST_ANSWER):
                    tokens.append(self._continue(tokens[-1][:, None], cache)[:, -1].argmax(-1))
                answers = [self._text(row) for row in torch.stack(tokens, 1).tolist()]
                scores[name] += [100 * fact_share(*pair, answer) for pair, answer in zip(pairs, answers, strict=True)]
        return scores

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids[: ids.index(self.prompts.end)] if self.prompts.end in ids else ids)


RECORD: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []


def recorded_attention(module, query, key, value, mask, scaling=None, **options):
    RECORD.append((query[0].clone(), key[0].clone(), value[0].clone()))
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)


def spread(samples: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return mean and 1.96 standard errors by name."""
    names = samples[0]
    columns = {name: torch.tensor([sample[name] for sample in samples], dtype=torch.float64) for name in names}
    return {name: (float(column.mean()), float(1.96 * column.std() / len(column) ** 0.5)) for name, column in columns.items()}


@torch.no_grad()
def measure(log: Callable[[str], None]) -> list[dict]:
    """Return one flat dictionary a row, as in the csv file."""
    generator = torch.Generator().manual_seed(0)
    full_size = [torch.randn(1, 4, 6304, 128, generator=generator).half() for _ in range(2)]
    models = [MiniModel(name) for name in MODELS]
    done: dict[tuple[Quantizer, Quantizer], dict] = {}
    table = []
    for row in rows():
        if (row.key, row.value) not in done:
            stored = roundtrip(row.recipe, *full_size).footprint
            numbers = {"nominal key": row.recipe.key_bits, "nominal value": row.recipe.value_bits}
            numbers |= {"effective key": stored.key_bits, "effective value": stored.value_bits, "effective": stored.effective_bits}
            numbers |= golden_errors(row)
            for model in models:
                for errors in (model.attention_errors(row), model.answer_errors(row)):
                    for name, (mean, interval) in spread(list(errors)).items():
                        numbers |= {f"{model.name} {name}": mean, f"{model.name} {name} ci95": interval}
            done[row.key, row.value] = numbers
        table.append({"section": row.section, "lever": row.lever, **done[row.key, row.value]})
        log(f"{row.lever}: {table[-1]['effective']:.3f} bits")
    return table


def answered_rows() -> dict[str, Recipe]:
    named = {name: load_recipe(name) for name in ("fp16", "kivi_k2_v2", "vidkv_k200_v200", "vidkv_k200_v158_scaled", "ours_k182_v158")}
    untransformed = dataclasses.replace(named["ours_k182_v158"], key=split(1.0, transform=False))
    return named | {"ours without the Fourier transform": untransformed}


@torch.no_grad()
def answers() -> list[dict]:
    """Return one dictionary for each recipe of `answered_rows` and mini model."""
    found = []
    for name in MODELS:
        for recipe, shares in MiniModel(name).answer_scores(answered_rows()).items():
            mean, interval = spread([{"share": share} for share in shares])["share"]
            found.append({"recipe": recipe, "model": name, "share": mean, "ci95": interval, "samples": len(shares)})
    return found


def answers_to_markdown(found: list[dict]) -> Iterator[str]:
    yield "| recipe | " + " | ".join(f"{model}: facts right (%)" for model in MODELS) + " | questions |"
    yield "|" + " --- |" * (len(MODELS) + 2)
    for recipe in dict.fromkeys(entry["recipe"] for entry in found):
        entries = [entry for entry in found if entry["recipe"] == recipe]
        cells = [f"{entry['share']:.1f} ± {entry['ci95']:.1f}" for entry in entries]
        yield f"| {recipe} | {' | '.join(cells)} | {entries[0]['samples']} |"


def mini_scores() -> Iterator[str]:
    """The table of the main rows, from the committed csv file."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        entries = list(csv.DictReader(file))
    labels = {("video_dc", "gpt_eval_score"): "VideoDC (0 to 5)", ("movie_chat", "gpt_eval_acc"): "MovieChat (%)"}
    columns = [(model, *metric) for model in dict.fromkeys(entry["model"] for entry in entries) for metric in labels]
    cells = {}
    for entry in entries:
        score, low, high = (float(entry[name]) for name in ("score", "ci_low", "ci_high"))
        cells[entry["recipe"], entry["model"], entry["benchmark"], entry["metric"]] = f"{score:.2f} [{low:.2f}, {high:.2f}]"
    yield "| recipe | " + " | ".join(f"{model}: {labels[tuple(metric)]}" for model, *metric in columns) + " |"
    yield "|" + " --- |" * (len(columns) + 1)
    for recipe in dict.fromkeys(entry["recipe"] for entry in entries):
        yield f"| `{recipe}` | " + " | ".join(cells[recipe, *column] for column in columns) + " |"


def to_markdown(table: list[dict]) -> Iterator[str]:
    columns = ["lever", "nominal K / V", "effective K / V", "effective, together", "goldens: key", "value", "output", "biased keys"]
    columns += [f"{short}: {what}" for short in ("LLaVA", "Qwen") for what in ("output", "attention KL", "answer KL", "changed tokens (%)")]
    for section in dict.fromkeys(row["section"] for row in table):
        yield f"\n### {section}\n"
        yield f"| {' | '.join(columns)} |"
        yield f"|{' --- |' * len(columns)}"
        for row in table:
            if row["section"] != section:
                continue
            cells = [row["lever"], f"{row['nominal key']:.2f} / {row['nominal value']:.2f}"]
            cells += [f"{row['effective key']:.3f} / {row['effective value']:.3f}", f"{row['effective']:.3f}"]
            cells += [f"{row[f'case_a {part}']:.3f}, {row[f'case_b {part}']:.3f}" for part in ("key", "value", "output")]
            cells.append(f"{row['biased key']:.3f}")
            for name in MODELS:
                for what, digits in (("output", 3), ("attention KL", 3), ("answer KL", 3), ("changed tokens", 1)):
                    cells.append(f"{row[f'{name} {what}']:.{digits}f} ± {row[f'{name} {what} ci95']:.{digits}f}")
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} OUT, which writes OUT.csv and OUT.md")
    output = Path(sys.argv[1])
    torch.set_num_threads(1)
    table = measure(lambda line: print(line, flush=True))
    with output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in table)
    made = (
        f"Made by `python scripts/ablate.py {output}` on {datetime.now(UTC).date()}; seed {SEED}, {SCENES} scenes, {2 * SCENES} samples "
        f"for each model; python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{cpu_model()}, 1 thread."
    )
    text = NOTES.read_text(encoding="utf-8")
    parts = {"MADE": made, "SCORES": "\n".join(mini_scores()), "ANSWERS": "\n".join(answers_to_markdown(answers()))}
    parts["TABLES"] = "\n".join(to_markdown(table)).strip()
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

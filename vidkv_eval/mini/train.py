"""Train a mini model on rendered scenes.

Every training sequence holds one video and six answers: a description and five questions. Each answer's segment sees
the video and itself only and its positions start again after the video, so one pass over the video teaches six times.
Only answer tokens are learnt, words that carry facts at full weight. An auxiliary loss on the visual tokens (colour and
shape of the object in that cell), falling to zero, lets the vision tower start early; its two heads are dropped.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vidkv_eval.mini import render as rendering
from vidkv_eval.mini.facts import KIND
from vidkv_eval.mini.render import imitate_h264, render, scene_array, tracks
from vidkv_eval.mini.scenes import COLOURS, SHAPES, SIDE, ask, describe, sample_scene
from vidkv_eval.mini.text import END_OF_TURN, MOVIECHAT_PROMPT, SYSTEM_PROMPT

SEGMENTS = (92, 71, 71, 71, 71, 71)  # tokens of a description and of five questions with their answers
# Look-ups are learnt last, so they are asked more often.
QUESTION_WEIGHTS = {"first": 1, "last": 1, "count": 1, "which": 3, "after": 4, "before": 4, "where": 4}
SEED_STRIDE = 1_000_003  # training generators; evaluation scenes are drawn from small seeds


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a training run, besides the code."""

    seed: int
    steps: int
    batch: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    warmup: int = 150
    template_weight: float = 0.2
    auxiliary_weight: float = 0.3
    max_seconds: float = 540.0


class Prompts:
    """Token ids of prompts in the layout [head, video, tail], from the chat template of a family."""

    def __init__(self, tokenizer: Tokenizer, family: ModuleType):
        self.tokenizer = tokenizer
        before, self.between = _video_part(family).split(family.VIDEO_TOKEN)
        self.head = tokenizer.encode(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{before}").ids
        self.end = tokenizer.token_to_id(END_OF_TURN)

    def tail(self, prompt: str) -> list[int]:
        """Ids of what follows the video, up to the first token of the answer."""
        return self.tokenizer.encode(f"{self.between}{prompt}<|im_end|>\n<|im_start|>assistant\n").ids

    def answer(self, answer: str) -> list[int]:
        return [*self.tokenizer.encode(answer).ids, self.end]


def _video_part(family: ModuleType) -> str:
    """What the template puts in place of a video, e.g. '<video>' and a newline."""
    start = family.TEMPLATE.index("== 'video' %}") + len("== 'video' %}")
    return family.TEMPLATE[start : family.TEMPLATE.index("{%", start)]


def fact_token_weights(tokenizer: Tokenizer, template_weight: float) -> Tensor:
    """Loss weight of every token: 1 for words that carry facts, `template_weight` for all others."""
    weights = torch.full((tokenizer.get_vocab_size(),), template_weight)
    for token, index in tokenizer.get_vocab().items():
        if token.lstrip("Ġ").lower() in KIND:
            weights[index] = 1.0
    return weights


class Scenes(torch.utils.data.IterableDataset):
    """Endless batches: scene arrays [N, SLOTS, 12], token ids [N, sum(SEGMENTS)], and which of them are learnt (bool)."""

    def __init__(self, prompts: Prompts, batch: int, seed: int):
        self.prompts, self.batch, self.seed = prompts, batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random((self.seed + 1) * SEED_STRIDE + (worker.id if worker else 0))
        while True:
            arrays, ids, learnt = [], [], []
            for _ in range(self.batch):
                scene = sample_scene(rng)
                texts = [describe(scene)]
                for kind in rng.choices(list(QUESTION_WEIGHTS), list(QUESTION_WEIGHTS.values()), k=len(SEGMENTS) - 1):
                    prompt, answer = ask(scene, kind, rng)
                    texts.append((MOVIECHAT_PROMPT + prompt, answer))
                row, marks = self._segments(texts)
                arrays.append(scene_array(scene))
                ids.append(row)
                learnt.append(marks)
            yield torch.tensor(arrays), torch.tensor(ids), torch.tensor(learnt)

    def _segments(self, texts: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        row: list[int] = []
        marks: list[bool] = []
        for (prompt, answer), length in zip(texts, SEGMENTS, strict=True):
            tail, target = self.prompts.tail(prompt), self.prompts.answer(answer)
            padding = length - len(tail) - len(target)
            if padding < 0:
                raise ValueError(f"a segment of {length} tokens is too short for {len(tail)} + {len(target)}: {answer!r}")
            row += tail + target + [0] * padding
            marks += [False] * len(tail) + [True] * len(target) + [False] * padding
        return row, marks


def layout(view: nn.Module, head: int, device: str) -> tuple[Tensor, Tensor, int]:
    """Positions and mask [1, 1, L, L] of a training sequence, L a multiple of 8, and the length before the segments."""
    before = head + view.visual_tokens
    tail = [i for length in SEGMENTS for i in range(length)]
    padding = -(before + len(tail)) % 8
    positions = view.positions(head, tail + [0] * padding, device)
    length = before + len(tail) + padding
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[:before, :before] = torch.ones(before, before).tril().bool()
    start = before
    for segment in SEGMENTS:
        mask[start : start + segment, :before] = True
        mask[start : start + segment, start : start + segment] = torch.ones(segment, segment).tril().bool()
        start += segment
    mask[start:, 0] = True
    return positions, mask[None, None].to(device), before


def cell_labels(scenes: Tensor, cell_frames: int) -> tuple[Tensor, Tensor]:
    """Colour and shape of the object whose centre lies in each visual token's cell, 0 for none: two int64 [N, cells]."""
    x, y, _, visible = tracks(scenes)
    cell = (y / 28).long().clamp(0, 3) * 4 + (x / 28).long().clamp(0, 3)
    labels = [torch.zeros(len(scenes), x.shape[2], 16, dtype=torch.long, device=scenes.device) for _ in range(2)]
    for slot in range(scenes.shape[1]):
        for label, field in zip(labels, (2, 1), strict=True):
            here = cell[:, slot, :, None]
            value = scenes[:, slot, field].long()[:, None, None] + 1
            label.scatter_(2, here, torch.where(visible[:, slot, :, None], value, label.gather(2, here)))
    return tuple(label[:, cell_frames - 1 :: cell_frames].flatten(1) for label in labels)


def train(family: ModuleType, tokenizer: Tokenizer, settings: Settings, device: str, workers: int, log=print) -> tuple[nn.Module, dict]:
    """Train a model of `family` from scratch.

    Returns:
        The stock model in float32, and a report: settings, steps, seconds, final losses, a thinned log.
    """
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    compiled = device == "cuda"
    painter = torch.compile(rendering.draw) if compiled else rendering.draw
    model = family.build(tokenizer).to(device)
    view = family.TrainingView(model, compiled).to(device)
    width = model.config.get_text_config().hidden_size
    heads = nn.ModuleList([nn.Linear(width, len(COLOURS) + 1), nn.Linear(width, len(SHAPES) + 1)]).to(device)
    prompts = Prompts(tokenizer, family)
    positions, mask, before = layout(view, len(prompts.head), device)
    mask = mask.expand(settings.batch, -1, -1, -1)
    token_weight = fact_token_weights(tokenizer, settings.template_weight).to(device)
    head_ids = torch.tensor([prompts.head], device=device)
    generator = torch.Generator(device=device).manual_seed(settings.seed + SEED_STRIDE)
    loader = iter(
        torch.utils.data.DataLoader(
            Scenes(prompts, settings.batch, settings.seed),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=compiled,
        )
    )
    parameters = [*model.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=compiled)
    history, started, step, done = [], time.perf_counter(), 0, 0.0
    while done < 1.0:
        elapsed = time.perf_counter() - started
        done = max(step / settings.steps, elapsed / settings.max_seconds)
        rate = min(1.0, (step + 1) / settings.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        scenes, ids, learnt = (x.to(device, non_blocking=True) for x in next(loader))
        with torch.no_grad():
            frames = imitate_h264(render(scenes, generator, painter), generator) / 127.5 - 1
            colour, shape = cell_labels(scenes, view.cell_frames)
        with torch.autocast(device, torch.bfloat16):
            cells = view.cells(frames.to(torch.bfloat16 if compiled else torch.float32))
            embed = model.get_input_embeddings()
            parts = [embed(head_ids).expand(len(ids), -1, -1), view.visual(cells), embed(ids)]
            hidden = torch.cat([part.to(cells.dtype) for part in parts], 1)
            hidden = nn.functional.pad(hidden, (0, 0, 0, mask.shape[-1] - hidden.shape[1]))
            hidden = view.decode(hidden, positions, mask)[:, before : before + ids.shape[1]]
            target = learnt[:, 1:]
            logits, wanted = model.lm_head(hidden[:, :-1][target]).float(), ids[:, 1:][target]
            weight = token_weight[wanted]
            loss = (cross_entropy(logits, wanted, reduction="none") * weight).sum() / weight.sum()
            auxiliary = sum(_cell_loss(head(cells.float()), label) for head, label in zip(heads, (colour, shape), strict=True))
            total = loss + settings.auxiliary_weight * (1 - min(done, 1.0)) * auxiliary
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0 or step in (1, 10):
            with torch.no_grad():
                fact = weight == 1
                accuracy = (logits.argmax(-1) == wanted)[fact].float().mean().item()
            entry = [step, round(time.perf_counter() - started, 1), round(loss.item(), 5), round(auxiliary.item(), 4), round(accuracy, 4)]
            history.append(entry)
            if step % 200 == 0 or step <= 10:
                _, seconds, answer_loss, cell_loss, right = entry
                losses = f"loss {answer_loss:.5f}  auxiliary {cell_loss:.4f}"
                log(f"step {step}  {seconds:.0f} s  {losses}  fact accuracy {right:.4f}  gradient {norm.item():.2f}")
    report = {
        "settings": asdict(settings),
        "steps": step,
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "visual_tokens": view.visual_tokens,
        "clip_side_pixels": SIDE,
        "log_fields": ["step", "seconds", "loss", "auxiliary_loss", "fact_token_accuracy"],
        "log": [*history[:-1:max(1, len(history) // 30)], *history[-1:]],
    }
    if device == "cuda":
        report["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return model.eval(), report


def _cell_loss(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = 0.1  # most cells are empty
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)

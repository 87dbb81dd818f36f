"""What a cache is told about the prompt it is going to hold: padding, visual tokens, and which of these matter.

A model passes none of this to its cache. `watch` reads it from the calls of the model itself, so that it works for whoever
calls `generate`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vidkv_eval.quant.marks import TokenMarks

VISUAL_IDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A batch of prompts, padded on the left.

    Attributes:
        padding: number of padded positions before each prompt.
        marks: for each prompt, without its padding; None if nothing is known about any.
    """

    padding: tuple[int, ...]
    marks: tuple[TokenMarks, ...] | None = None

    def row(self, index: int) -> Prompt:
        """Return the prompt `index` as a batch of one; a batch of one is every row of itself."""
        index = 0 if len(self.padding) == 1 else index
        return Prompt(self.padding[index : index + 1], self.marks and self.marks[index : index + 1])


def watch(model: nn.Module) -> None:
    """Let caches of `QuantizedCache.for_model` learn about the prompt whenever this model starts one with them.

    Done once for a model, by forward hooks that stay; calls with other caches are left alone.
    """
    if model in _watched:
        return
    _watched.add(model)
    model.register_forward_pre_hook(_before_model, with_kwargs=True)
    decoder = _decoder(model)
    if decoder is not None:
        decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)


def describe(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, visual_ids: set[int], shape: tuple[int, int]) -> Prompt:
    """Describe prompts as a model is given them.

    Args:
        input_ids: [B, T], or None if only embeddings are given, whose visual tokens cannot be told.
        attention_mask: [B, T], or [B, 1, T, T] (boolean or additive), or None: no padding.
        visual_ids: token ids that stand for visual tokens.
        shape: B and T.
    Raises:
        ValueError: padding elsewhere than on the left.
    """
    padding = _padding(attention_mask, *shape)
    if input_ids is None:
        return Prompt(padding)
    visual = torch.isin(input_ids, torch.tensor(sorted(visual_ids), dtype=input_ids.dtype, device=input_ids.device))
    return Prompt(padding, tuple(TokenMarks(visual[row, skip:]) for row, skip in enumerate(padding)))


def with_saliency(prompt: Prompt, embeddings: torch.Tensor) -> Prompt:
    """Add how much each visual token matters.

    Args:
        prompt: whose visual tokens are known.
        embeddings: [B, T, C], what enters the first layer: text embeddings, and visual tokens after the projector.
    """
    marks = (
        dataclasses.replace(mark, saliency=saliency(embeddings[row, skip:], mark.visual))
        for row, (skip, mark) in enumerate(zip(prompt.padding, prompt.marks, strict=True))
    )
    return dataclasses.replace(prompt, marks=tuple(marks))


def saliency(embeddings: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Return the mean inner product of each token with the text tokens after the last visual token, float32 [T].

    Where no text follows the last visual token, all text of the prompt takes its place; without any text all is zero.
    Source: arXiv:2503.16257, semantic token protection. The authors' code sums in the dtype of the model; here it is float32.

    Args:
        embeddings: [T, C].
        visual: bool [T].
    """
    text = ~visual
    positions = visual.nonzero()
    if len(positions):
        after = text.clone()
        after[: positions[-1]] = False
        text = after if after.any() else text
    if not text.any():
        return embeddings.new_zeros(len(visual), dtype=torch.float32)
    return embeddings.float() @ embeddings[text].float().mean(0)


@contextlib.contextmanager
def embeddings_of(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within the block, what enters the first layer of the text decoder is added to the list, [B, T, C] for each call."""
    seen: list[torch.Tensor] = []
    decoder = _decoder(model)

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get("inputs_embeds") is not None:
            seen.append(kwargs["inputs_embeds"])

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True) if decoder is not None else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def describe_call(model: nn.Module, arguments: Mapping[str, Any]) -> Prompt:
    """Describe the prompts of a call of the model; `arguments` by the names of its `forward`."""
    input_ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    given = embeddings if input_ids is None else input_ids
    return describe(input_ids, arguments.get("attention_mask"), _visual_ids(model), tuple(given.shape[:2]))


def _before_model(model: nn.Module, args: tuple, kwargs: dict) -> None:
    cache = kwargs.get("past_key_values")
    if hasattr(cache, "describe_prompt") and cache.get_seq_length() and not cache.chooses_visual_tokens:
        return  # a later call, as most are: looking at its arguments takes longer than the rest of this
    arguments = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    arguments |= arguments.pop("kwargs", {})
    cache = arguments.get("past_key_values")
    if not hasattr(cache, "describe_prompt"):
        return
    if cache.get_seq_length() == 0:
        cache.describe_prompt(describe_call(model, arguments))
    elif arguments.get("input_ids") is not None and arguments["input_ids"].shape[1] > 1 and cache.chooses_visual_tokens:
        later = describe_call(model, {"input_ids": arguments["input_ids"]})
        if any(mark.visual.any() for mark in later.marks):
            raise ValueError(
                "visual tokens after the first call of the model, but this recipe chooses among those of the first call; "
                "give the whole prompt in one call, or use a recipe that treats all tokens alike"
            )


def _before_decoder(decoder: nn.Module, args: tuple, kwargs: dict) -> None:
    cache, embeddings = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
    prompt = getattr(cache, "prompt", None)
    if prompt is None or prompt.marks is None or embeddings is None or cache.get_seq_length() or not cache.chooses_visual_tokens:
        return
    if any(mark.visual.any() for mark in prompt.marks):
        cache.describe_prompt(with_saliency(prompt, embeddings))


def _decoder(model: nn.Module) -> nn.Module | None:
    """Return the text decoder of a model that has other parts too; None for a text model."""
    for owner in (getattr(model, "model", None), model):
        decoder = getattr(owner, "language_model", None)
        if isinstance(decoder, nn.Module):
            return decoder
    return None


def _visual_ids(model: nn.Module) -> set[int]:
    found = (getattr(model.config, name, None) for name in VISUAL_IDS)
    return {identity for identity in found if isinstance(identity, int)}


def _padding(attention_mask: torch.Tensor | None, batch: int, tokens: int) -> tuple[int, ...]:
    if attention_mask is None:
        return (0,) * batch
    mask = attention_mask
    if mask.ndim == 4:
        # What the last token of each prompt sees is all of it.
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    mask = mask[:, :tokens].bool().expand(batch, -1)
    padding = mask.shape[1] - mask.sum(1)
    if not (mask == (torch.arange(mask.shape[1], device=mask.device) >= padding[:, None])).all():
        raise ValueError("the attention mask hides tokens after the first visible one; pad prompts on the left (padding_side='left')")
    if (padding == mask.shape[1]).any():
        raise ValueError("a prompt of the batch is hidden entirely by the attention mask; every prompt needs at least one token")
    return tuple(padding.tolist())

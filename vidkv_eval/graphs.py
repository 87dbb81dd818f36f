"""Decode steps as CUDA graphs: all launches of a step's text decoder are captured once, and then repeated by a single one.

A step of a 7B model makes over a thousand small launches, which take Python longer to issue than the GPU to do. A fused cache keeps
what a step reads and writes in place, and its lengths on the device, so that the same launches are right for the next token too.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from vidkv_eval.cache import QuantizedCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS_BEFORE = 3
"""Steps alike that are done as usual before the next one is captured, which takes as long as several of them."""
KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep"}
"""Arguments that decoders may be given, the last of them by models that pass on what is meant for their head; any other must be empty."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    embeddings: torch.Tensor
    positions: torch.Tensor
    output: torch.Tensor


class StepGraphs:
    """Stands in place of the `forward` of a text decoder. Calls that a graph cannot do are passed on to it.

    A graph does steps of one token with a `QuantizedCache` that is fused, on one device, where no more is hidden than padding. Results
    are those of the same kernels. A new graph is captured when the cache is another one, or has moved to larger buffers.

    Args:
        decoder: of a model of Transformers; takes keyword arguments.
    """

    def __init__(self, decoder: nn.Module):
        self._embed = decoder.get_input_embeddings()
        self.forward = decoder.forward
        self.replays = 0
        self._is_possible = True
        self._cache: weakref.ref[QuantizedCache] | None = None
        self._alike: object = None  # what the last steps had in common
        self._steps = 0
        self._captured: _Captured | None = None
        self._changes = -1  # of the cache when it was last made ready for a repetition

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if args or not self._is_possible or not self._can_be_step(cache, kwargs):
            self._forget()
            return self.forward(*args, **kwargs)
        if self._cache is None or self._cache() is not cache or cache.changes != self._changes:
            self._make_ready(cache, kwargs)
        if self._alike is None:
            return self.forward(**kwargs)
        ids, embeddings, positions = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "position_ids"))
        embeddings = self._embed(ids) if embeddings is None else embeddings
        if positions is None:
            positions = torch.full((1, 1), cache.get_seq_length(), device=embeddings.device)
        captured = self._captured
        if captured is None or embeddings.shape != captured.embeddings.shape or positions.shape != captured.positions.shape:
            self._steps += 1
            if self._steps <= STEPS_BEFORE:
                return self.forward(**kwargs)
            # Counts the token in the cache, while nothing is launched.
            captured = self._captured = self._capture(cache, embeddings, positions)
            if captured is None:
                return self.forward(**kwargs)
            is_counted = True
        else:
            is_counted = False
        captured.embeddings.copy_(embeddings)
        captured.positions.copy_(positions)
        captured.graph.replay()
        self.replays += 1
        # While the GPU works: what the cache has to do before the next step.
        if not is_counted:
            cache.count_repeat()
        self._make_ready(cache, kwargs)
        return BaseModelOutputWithPast(last_hidden_state=captured.output.clone(), past_key_values=cache)

    def _can_be_step(self, cache: object, kwargs: dict) -> bool:
        """Whether a graph can do this call, as far as its arguments tell."""
        given = _tokens_of(kwargs)
        if not isinstance(cache, QuantizedCache) or not cache.options.fused or torch.is_grad_enabled():
            return False
        if given is None or not given.is_cuda or given.shape[1] != 1:
            return False
        if any(value for name, value in kwargs.items() if name not in KNOWN) or kwargs.get("use_cache") is False:
            return False
        return self._shows_all(kwargs.get("attention_mask"), cache)

    def _make_ready(self, cache: QuantizedCache, kwargs: dict) -> None:
        """Let the cache get ready for a repetition; forget the graph if that would not be right any more."""
        given = _tokens_of(kwargs)
        alike = cache.prepare_repeat(given.device)
        if self._cache is None or self._cache() is not cache or alike != self._alike:
            self._forget()
            self._cache, self._alike = weakref.ref(cache), alike
        self._changes = cache.changes

    @staticmethod
    def _shows_all(mask: torch.Tensor | None, cache: QuantizedCache) -> bool:
        """Whether a mask [B, T] hides padding and nothing else. Waits for the device, as the model does with a mask."""
        if mask is None:
            return True
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] != cache.get_seq_length() + 1:
            return False
        padding = cache.prompt.padding if cache.prompt else (0,)
        if not any(padding):
            return bool(mask.all())
        padding = torch.tensor(padding, device=mask.device)
        visible = torch.arange(mask.shape[1], device=mask.device) >= padding[:, None]
        return torch.equal(mask.bool(), visible.expand_as(mask))

    def _capture(self, cache: QuantizedCache, embeddings: torch.Tensor, positions: torch.Tensor) -> _Captured | None:
        """Capture a step; None, and no further attempt, if this model's steps cannot be."""
        length = cache.get_seq_length()
        embeddings, positions = embeddings.clone(), positions.clone()
        try:
            graph, output = self._record(embeddings, positions, cache)
        except RuntimeError as error:
            logging.getLogger(__name__).warning("a decode step could not be captured as a CUDA graph; steps are done one by one: %s", error)
            cache.uncount_step(length)
            self._is_possible = False
            self._forget()
            return None
        return _Captured(graph, embeddings, positions, output)

    def _record(
        self, embeddings: torch.Tensor, positions: torch.Tensor, cache: QuantizedCache
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.device(embeddings.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.forward(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True)
        return graph, output.last_hidden_state

    def _forget(self) -> None:
        self._cache, self._alike, self._steps, self._captured, self._changes = None, None, 0, None, -1


def _tokens_of(kwargs: dict) -> torch.Tensor | None:
    """Return what a decoder is called with: embeddings, or else ids."""
    return kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]


def use_graphs(model: PreTrainedModel) -> None:
    """Let decode steps of a model with fused caches be captured and repeated; text is the same."""
    decoder = model.get_decoder()
    if not isinstance(decoder.forward, StepGraphs):
        decoder.forward = StepGraphs(decoder)


def stop_graphs(model: PreTrainedModel) -> None:
    """Undo `use_graphs`."""
    decoder = model.get_decoder()
    if isinstance(decoder.forward, StepGraphs):
        decoder.forward = decoder.forward.forward

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


@dataclass
class _Captured:
    """A captured step.

    Attributes:
        tokens: what the decoder is called with, "input_ids" or "inputs_embeds", and the buffer of it.
        positions: buffer of positions.
        next_position: what the buffer holds; the graph raises it by one. None: callers give positions.
        output: last hidden states.
    """

    graph: torch.cuda.CUDAGraph
    tokens: tuple[str, torch.Tensor]
    positions: torch.Tensor
    next_position: int | None
    output: torch.Tensor

    def takes(self, name: str, tokens: torch.Tensor, positions: torch.Tensor | None) -> bool:
        """Whether a step with these can be a repetition of this one."""
        own_name, own = self.tokens
        are_alike = name == own_name and tokens.shape == own.shape and (positions is None) == (self.next_position is not None)
        return are_alike and (positions is None or positions.shape == self.positions.shape)

    def replay(self, tokens: torch.Tensor, positions: torch.Tensor | None, position: int) -> None:
        """Do the step for other tokens. Whatever is launched before the graph delays it."""
        self.tokens[1].copy_(tokens)
        if positions is not None:
            self.positions.copy_(positions)
        elif position != self.next_position:
            self.positions.fill_(position)
        self.graph.replay()
        self.next_position = None if positions is not None else position + 1


class StepGraphs:
    """Stands in place of the `forward` of a text decoder. Calls that a graph cannot do are passed on to it.

    A graph does steps of one token with a `QuantizedCache` that is fused, on one device, where no more is hidden than padding. Results
    are those of the same kernels. A new graph is captured when the cache is another one, or has moved to larger buffers.

    Args:
        decoder: of a model of Transformers; takes keyword arguments.
    """

    def __init__(self, decoder: nn.Module):
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
        name, tokens = _tokens_of(kwargs)
        positions, position = kwargs.get("position_ids"), cache.get_seq_length()
        captured = self._captured
        is_counted = False
        if captured is None or not captured.takes(name, tokens, positions):
            self._steps += 1
            if self._steps <= STEPS_BEFORE:
                return self.forward(**kwargs)
            # Counts the token in the cache, while nothing is launched.
            captured = self._captured = self._capture(cache, name, tokens, positions)
            if captured is None:
                return self.forward(**kwargs)
            is_counted = True
        captured.replay(tokens, positions, position)
        self.replays += 1
        # While the GPU works: what the cache has to do before the next step.
        if not is_counted:
            cache.count_repeat()
        self._make_ready(cache, kwargs)
        return BaseModelOutputWithPast(last_hidden_state=captured.output.clone(), past_key_values=cache)

    def _can_be_step(self, cache: object, kwargs: dict) -> bool:
        """Whether a graph can do this call, as far as its arguments tell."""
        _, given = _tokens_of(kwargs)
        if not isinstance(cache, QuantizedCache) or not cache.options.fused or torch.is_grad_enabled():
            return False
        if given is None or not given.is_cuda or given.shape[1] != 1:
            return False
        if any(value for name, value in kwargs.items() if name not in KNOWN) or kwargs.get("use_cache") is False:
            return False
        return self._shows_all(kwargs.get("attention_mask"), cache)

    def _make_ready(self, cache: QuantizedCache, kwargs: dict) -> None:
        """Let the cache get ready for a repetition; forget the graph if that would not be right any more."""
        _, given = _tokens_of(kwargs)
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

    def _capture(self, cache: QuantizedCache, name: str, tokens: torch.Tensor, positions: torch.Tensor | None) -> _Captured | None:
        """Capture a step; None, and no further attempt, if this model's steps cannot be."""
        length = cache.get_seq_length()
        counts_positions = positions is None
        tokens = tokens.clone()
        positions = torch.full((1, 1), length, device=tokens.device) if counts_positions else positions.clone()
        try:
            graph, output = self._record(cache, {name: tokens}, positions, counts_positions)
        except RuntimeError as error:
            logging.getLogger(__name__).warning("a decode step could not be captured as a CUDA graph; steps are done one by one: %s", error)
            cache.uncount_step(length)
            self._is_possible = False
            self._forget()
            return None
        return _Captured(graph, (name, tokens), positions, length if counts_positions else None, output)

    def _record(
        self, cache: QuantizedCache, tokens: dict[str, torch.Tensor], positions: torch.Tensor, counts_positions: bool
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.device(positions.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.forward(**tokens, position_ids=positions, past_key_values=cache, use_cache=True)
            if counts_positions:
                positions += 1
        return graph, output.last_hidden_state

    def _forget(self) -> None:
        self._cache, self._alike, self._steps, self._captured, self._changes = None, None, 0, None, -1


def _tokens_of(kwargs: dict) -> tuple[str, torch.Tensor | None]:
    """Return what a decoder is called with, and its name: embeddings, or else ids."""
    name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
    return name, kwargs.get(name)


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

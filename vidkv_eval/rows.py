"""Several caches that answer one prompt side by side, as the rows of a batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from vidkv_eval.cache import QuantizedCache, QuantizedLayer
from vidkv_eval.prompt import Prompt
from vidkv_eval.score_drop import put_note, read_note


class RowLayer(CacheLayerMixin):
    """One layer of several caches of one sequence each, which a model sees as a batch."""

    is_sliding = False

    def __init__(self, rows: list[QuantizedLayer], is_running: list[bool]):
        super().__init__()
        self.rows = rows
        self.is_running = is_running
        self._dense: dict[str, torch.Tensor] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens and return what attention sees, as `QuantizedLayer.update` for each row.

        Args:
            key_states: [R, H, T, D] for R rows; [1, H, T, D] the first time: the prompt that all rows have in common.
            value_states: as `key_states`.
        Returns:
            Keys and values, views that are good until the next call: [R, H, stored + T, D], or the prompt as it came.
            Rows that were stopped hold nothing of meaning.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            for row in self.rows:
                row.update(key_states, value_states)
            return key_states, value_states
        total = self.get_seq_length() + key_states.shape[2]
        self._make_room(total, key_states)
        drops = {}
        for index, row in enumerate(self.rows):
            if self.is_running[index]:
                seen, _ = row.update(key_states[index : index + 1], value_states[index : index + 1])
                for drop in read_note(seen).values():
                    drops[index] = drop
        key = self._dense["key"][:, :, :total]
        put_note(key, drops)
        return key, self._dense["value"][:, :, :total]

    def _make_room(self, total: int, like: torch.Tensor) -> None:
        """Let the dense working copies of all rows lie in one tensor, so that a batch of them is a view."""
        if self._dense and total <= self._dense["key"].shape[2]:
            return
        for name in ("key", "value"):
            # Zeros, because a stopped row is attended to although nobody reads the result.
            self._dense[name] = like.new_zeros(len(self.rows), like.shape[1], total + max(128, total // 4), like.shape[3])
            for index, row in enumerate(self.rows):
                row.stored[name].share_dense(self._dense[name][index : index + 1])

    def get_seq_length(self) -> int:
        """Return the number of tokens held by the rows that still run."""
        return max(row.get_seq_length() for row in self.rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of what attention will see with `query_length` new tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


class RowCache(Cache):
    """Several caches that answer one prompt side by side, as the rows of a batch.

    The model reads its weights once for all rows, which is most of the time of a decode step.

    Args:
        rows: empty caches of models alike, with `keep_dense` and `prefill: exact`.
    """

    def __init__(self, rows: list[QuantizedCache]):
        for cache in rows:
            if cache.recipe.prefill != "exact" or not cache.options.keep_dense:
                raise ValueError(f"{cache.recipe.name}: caches can only run side by side with prefill: exact and keep_dense: true")
        self.caches = rows
        self._is_running = [True] * len(rows)
        layers = zip(*(cache.layers for cache in rows), strict=True)
        super().__init__(layers=[RowLayer(list(same_depth), self._is_running) for same_depth in layers])

    def __len__(self) -> int:
        return len(self._is_running)

    def describe_prompt(self, prompt: Prompt) -> None:
        """Tell each row about its prompt; one prompt is that of all rows."""
        for row, cache in enumerate(self.caches):
            cache.describe_prompt(prompt.row(row))

    @property
    def chooses_visual_tokens(self) -> bool:
        """Whether the recipe of any row treats some visual tokens of the prompt in another way than others."""
        return any(cache.chooses_visual_tokens for cache in self.caches)

    def is_running(self, row: int) -> bool:
        """Whether this row still stores what comes."""
        return self._is_running[row]

    def stop(self, row: int) -> None:
        """Store nothing more in this row; its sequence has ended."""
        self._is_running[row] = False

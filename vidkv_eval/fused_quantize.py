"""States quantized straight into the records that attention kernels read, for recipes whose quantizers the kernels know.

    quantizer = DirectQuantizer.of(recipe, width)                   # None: use the quantizers and `fused` instead
    history = quantizer.quantize(None, key_states, value_states)    # the prompt, which chooses the order of channels
    history = quantizer.quantize(history, key_states, value_states)  # later tokens, appended in place
    raise_faults(history)                                           # where waiting for the device does no harm

What is stored is what the recipe's quantizers and `fused` store, except that an element at the border of two codes may get the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vidkv_eval.fused import NotPackable, channel_order, packed_form, query_matrix
from vidkv_eval.quant.base import Quantizer
from vidkv_eval.quant.spectral import Spectral
from vidkv_eval.quant.split_channels import SplitChannels
from vidkv_eval.quant.split_tokens import SplitTokens
from vidkv_eval.quant.ternary import Ternary
from vidkv_eval.recipe import Recipe
from vidkv_eval.record_quantizer import RecordQuantizer
from vidkv_kernels import quantize_cuda
from vidkv_kernels.fragment_history import KEY_METADATA, KEY_STATES, VALUE_METADATA, VALUE_STATES, FragmentHistory
from vidkv_kernels.fragments import Form, UnsupportedForm


@dataclass(frozen=True)
class DirectQuantizer(RecordQuantizer):
    """Quantizes keys and values of a recipe into a `FragmentHistory`; tokens that a recipe protects must be in it already.

    Attributes:
        form: of the history.
        split: the quantizer of keys, if it splits channels.
        threshold: of ternary values; 0 for others.
        is_spectral: whether the channels of 1 bit are a spectrum.
    """

    form: Form
    split: SplitChannels | None
    threshold: float
    is_spectral: bool

    @classmethod
    def of(cls, recipe: Recipe, width: int) -> DirectQuantizer | None:
        """Return the quantizer of a recipe for heads of so many channels, or None if the kernels do not know what it does."""
        return cls._of(recipe.key, recipe.value, width)

    @classmethod
    @functools.cache
    def _of(cls, key: Quantizer, value: Quantizer, width: int) -> DirectQuantizer | None:
        try:
            keys, values = packed_form(key, value, width)
            form = Form.of(keys, values)
            quantize_cuda.check_form(form.plain)
        except (NotPackable, UnsupportedForm):
            return None
        split = key if isinstance(key, SplitChannels) else None
        if split and split.per_head:
            # Kernels choose channels for all heads of a sequence together.
            return None
        normal = split.normal if split else key
        if isinstance(normal, Spectral) and normal.inner.code_count != 2:
            return None
        value = value.other if isinstance(value, SplitTokens) else value
        threshold = value.threshold if isinstance(value, Ternary) else 0.0
        return cls(form, split, threshold, isinstance(normal, Spectral) and keys.matrix is not None)

    def _make(self, keys: torch.Tensor, capacity: int) -> FragmentHistory:
        batch, heads, _, width = keys.shape
        order = torch.zeros(batch, 1, width, dtype=torch.uint8, device=keys.device) if self.split else None
        matrix = query_matrix(width, width - self.form.wide_channels, ((0, width),), keys.device) if self.is_spectral else None
        return FragmentHistory(self.form, batch=batch, heads=heads, capacity=capacity, device=keys.device, order=order, matrix=matrix)

    def _append(
        self,
        history: FragmentHistory,
        keys: torch.Tensor,
        values: torch.Tensor,
        counts: list[int],
        numbers: torch.Tensor | None,
        held: list[int],
    ) -> None:
        self._choose_order(history, keys, counts, numbers)
        history.quantize(keys, values, self.threshold, count=numbers, held=held)

    def _choose_order(self, history: FragmentHistory, keys: torch.Tensor, counts: list[int], numbers: torch.Tensor | None) -> None:
        """Choose the order of channels of the sequences that get their first tokens."""
        begun = [row for row, (held, count) in enumerate(zip(history.held, counts, strict=True)) if count and not held]
        if not self.split or not begun:
            return
        if self.split.select != "range":
            for row in begun:
                order = channel_order(self.split.choose(keys[row : row + 1, :, : counts[row]]), keys.shape[3])
                history.order[row] = order[0]
            return
        before = None if len(begun) == len(counts) else history.order.clone()
        history.choose_order(keys, count=numbers)
        if before is not None:
            others = [row for row in range(len(counts)) if row not in begun]
            history.order[others] = before[others]


def raise_faults(history: FragmentHistory) -> None:
    """Wait for the device and raise what was wrong with states that `history` was made of.

    Raises:
        FloatingPointError: they hold NaN or infinity.
        OverflowError: they need metadata beyond float16. The arguments of both are the reason, and "key" or "value".
    """
    bits = int(history.faults)
    for name, states, metadata in (("key", KEY_STATES, KEY_METADATA), ("value", VALUE_STATES, VALUE_METADATA)):
        if bits & states:
            raise FloatingPointError("they hold NaN or infinity; check the dtypes of the model and of storage", name)
        if bits & metadata:
            largest = torch.finfo(torch.float16).max
            raise OverflowError(f"a group needs metadata beyond {largest:g}, which is what float16 metadata holds at most", name)

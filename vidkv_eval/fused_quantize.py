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
from vidkv_eval.quant.spectral import Spectral
from vidkv_eval.quant.split_channels import SplitChannels
from vidkv_eval.quant.ternary import Ternary
from vidkv_eval.recipe import Recipe
from vidkv_kernels import quantize_cuda
from vidkv_kernels.fragment_history import KEY_METADATA, KEY_STATES, VALUE_METADATA, VALUE_STATES, FragmentHistory
from vidkv_kernels.fragments import Form, UnsupportedForm


@dataclass(frozen=True)
class DirectQuantizer:
    """Quantizes keys and values of a recipe into a `FragmentHistory`.

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
    @functools.cache
    def of(cls, recipe: Recipe, width: int) -> DirectQuantizer | None:
        """Return the quantizer of a recipe for heads of so many channels, or None if the kernels do not know what it does."""
        try:
            keys, values = packed_form(recipe.key, recipe.value, width)
            form = Form.of(keys, values)
            quantize_cuda.check_form(form)
        except (NotPackable, UnsupportedForm):
            return None
        split = recipe.key if isinstance(recipe.key, SplitChannels) else None
        normal = split.normal if split else recipe.key
        threshold = recipe.value.threshold if isinstance(recipe.value, Ternary) else 0.0
        return cls(form, split, threshold, isinstance(normal, Spectral) and keys.matrix is not None)

    def quantize(self, history: FragmentHistory | None, keys: torch.Tensor, values: torch.Tensor, capacity: int = 0) -> FragmentHistory:
        """Append tokens; nothing waits for the device.

        Args:
            history: what this quantizer made of the tokens before, changed in place; None for the first tokens, over which the order of
                channels is chosen.
            keys, values: [B, H, T, D], T a multiple of the group size; float16, bfloat16 or float32.
            capacity: tokens to have room for afterwards, at least those held.
        Returns:
            `history`, or the one that was made.
        Raises:
            ValueError: states of another shape, dtype or device than the history takes.
        """
        tokens = keys.shape[2]
        if tokens % self.form.group_size:
            raise ValueError(f"{tokens} tokens cannot be cut into groups of {self.form.group_size}; give a multiple")
        if history is None:
            history = self._start(keys, max(tokens, capacity))
        else:
            history.reserve(max(history.max_length + tokens, capacity))
        history.quantize(keys, values, self.threshold)
        return history

    def _start(self, keys: torch.Tensor, capacity: int) -> FragmentHistory:
        batch, heads, _, width = keys.shape
        order = None
        if self.split:
            order = torch.empty(batch, 1, width, dtype=torch.uint8, device=keys.device)
        matrix = query_matrix(width, width - self.form.wide_channels, ((0, width),), keys.device) if self.is_spectral else None
        history = FragmentHistory(
            self.form, batch=batch, heads=heads, capacity=capacity, device=keys.device, order=order, matrix=matrix
        )
        if self.split and self.split.select == "range":
            history.choose_order(keys)
        elif self.split:
            order.copy_(channel_order(self.split.choose(keys), width))
        return history


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

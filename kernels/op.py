"""What an operation is: a reference in plain torch, which is its contract, and a fast version that must agree with it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Op:
    """An operation, called like its reference.

    `<name>.py` holds the contract. `<name>_triton.py` holds a function of this name with the same parameters, and is imported
    at its first use, so that nothing else needs Triton.

    Attributes:
        name: of the operation and of its files.
        reference: plain torch, any device. The first argument is a tensor.
        cases: awkward inputs on a device, by a name that says what is awkward: the arguments of a call.
        is_exact: both versions give the same bits. Otherwise the reference takes `dtype`, the floating dtype it computes in and
            returns, and the fast version may err twice as much as the reference in the working dtype does.
    """

    name: str
    reference: Callable[..., Any]
    cases: Callable[[torch.device], Mapping[str, tuple]]
    is_exact: bool

    def __call__(self, first: torch.Tensor, *others: Any) -> Any:
        if not first.is_cuda:
            return self.reference(first, *others)
        # Triton launches on the current device, whichever holds the tensors.
        with torch.cuda.device(first.device):
            return self.triton(first, *others)

    @property
    def triton(self) -> Callable[..., Any]:
        """The Triton version: for tensors on a GPU, or on the CPU if Triton interprets."""
        return getattr(importlib.import_module(f"vidkv_kernels.{self.name}_triton"), self.name)

"""What every test module needs before it imports transformers or triton."""

import os

import pytest
import torch

from vidkv_eval import torchvision_cpu

# Triton reads this once, when it is imported: kernels then run on the CPU. Tests of a GPU switch it off.
os.environ.setdefault("TRITON_INTERPRET", "1")
torchvision_cpu.install()
# Tensors of tests are small: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh memory is NaN, and all ones in integers, so that what a kernel forgets to write is seen."""

    def poison(tensor):
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(255 if tensor.dtype == torch.uint8 else -1)

    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *arguments, _plain=plain, **options: poison(_plain(*arguments, **options)))

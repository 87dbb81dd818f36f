"""Tests of this folder run on a GPU, never in `make test`. Without a GPU they fail; they are not skipped."""

import pytest
import torch
import triton


@pytest.fixture(scope="session")
def gpu():
    """The GPU that tests run on."""
    assert torch.cuda.is_available(), "no GPU is visible to torch; tests of this folder need one"
    assert not triton.knobs.runtime.interpret, "Triton interprets on the CPU; run `make test-gpu`, which unsets TRITON_INTERPRET"
    return torch.device("cuda")

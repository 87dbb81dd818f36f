"""How a fast version of an operation is held to its reference; the same on a CPU and on a GPU."""

import dataclasses
from collections.abc import Iterator

import torch


def check_agreement(op, name: str, device: torch.device) -> None:
    """Run one case of an operation through both versions and compare what they return and what they wrote in place."""
    arguments, fast_arguments = op.cases(device)[name], op.cases(device)[name]
    if op.is_exact:
        expected, found = op.reference(*arguments), op.triton(*fast_arguments)
        for left, right in zip(tensors(expected), tensors(found), strict=True):
            torch.testing.assert_close(right, left, rtol=0, atol=0, equal_nan=True)
    else:
        check_error(op.triton(*fast_arguments), op.reference(*arguments), op.reference(*arguments, dtype=torch.float64))


def check_error(found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """Allow twice the error of plain torch in the same precision, and one rounding step at the largest value."""
    assert (found.shape, found.dtype, found.device) == (plain.shape, plain.dtype, plain.device)
    error, plain_error = ((side.double() - truth).abs().max() for side in (found, plain))
    step = torch.finfo(plain.dtype).eps * truth.abs().max()
    assert error <= 2 * plain_error + step, f"error {error:.3g}; plain torch has {plain_error:.3g}, a rounding step is {step:.3g}"


def tensors(value: object) -> Iterator[torch.Tensor]:
    """Yield all tensors in a nest of dataclasses and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors(item)

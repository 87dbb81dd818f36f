"""A quantizer around another one: it changes what the inner one is given, and undoes the change on reading."""

from __future__ import annotations

from vidkv_eval.quant.base import Quantizer, impossible


class Wrapper(Quantizer):
    """A quantizer that stores what `inner` makes of other states.

    Subclasses are dataclasses with the field below.

    Attributes:
        inner: quantizer of the changed states.
    """

    inner: Quantizer

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Quantizer):
            raise impossible(self, "inner", self.inner, "a quantizer")

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def nominal_bits(self) -> float:
        return self.inner.nominal_bits

    @property
    def is_scaled(self) -> bool:
        return self.inner.is_scaled

    @property
    def is_batch_independent(self) -> bool:
        return self.inner.is_batch_independent

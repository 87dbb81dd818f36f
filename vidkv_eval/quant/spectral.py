"""Fourier transform over the channels of each token, around another quantizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer
from vidkv_eval.quant.wrapper import Wrapper


@dataclass(frozen=True)
class Spectral(Wrapper):
    """Quantizes the spectrum over channels instead of the channels.

    The spectrum of n real channels is Hermitian, so n real numbers carry all of it: the real parts of frequencies
    0 .. n // 2 and the imaginary parts of the frequencies between 0 and n / 2. Only these are quantized, n codes for
    n channels, where arXiv:2503.16257 and its code store 2 n.

    The reconstruction is that of the full complex transform. There each imaginary part is stored a second time with the
    opposite sign, and the real part of the inverse transform averages the two copies as (read back of x - read back of
    -x) / 2. Hence imaginary parts are read back with `dequantize_odd` of the inner quantizer: levels {0, s} act as {0, s} on
    real parts and as -s/2, s/2 on imaginary parts.

    The transform is orthonormal, so that coefficients have the size of the states and fit into float16 metadata.

    Attributes:
        inner: quantizer of the n real series.
    """

    inner: Quantizer

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        real, imaginary = spectrum_of(states.float())
        parts = {"real": self.inner.quantize(real, like and like.parts["real"])}
        if imaginary.shape[-1]:
            parts["imaginary"] = self.inner.quantize(imaginary, like and like.parts["imaginary"])
        return QuantizedStates(states.shape[2], states.shape[3], parts=parts)

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        real = self.inner.dequantize(quantized.parts["real"], torch.float32)
        imaginary = real[..., :0]
        if "imaginary" in quantized.parts:
            imaginary = self.inner.dequantize_odd(quantized.parts["imaginary"], torch.float32)
        return _inverse_transform(real, imaginary).to(dtype)


def spectrum_of(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform [..., n] to real parts [..., n // 2 + 1] and imaginary parts [..., (n - 1) // 2]."""
    channels = states.shape[-1]
    spectrum = torch.fft.rfft(states, norm="ortho")
    paired = slice(1, (channels + 1) // 2)
    spectrum[..., paired] *= math.sqrt(2)
    return spectrum.real, spectrum.imag[..., paired]


def _inverse_transform(real: torch.Tensor, imaginary: torch.Tensor) -> torch.Tensor:
    channels = real.shape[-1] + imaginary.shape[-1]
    spectrum = torch.complex(real, torch.zeros_like(real))
    paired = slice(1, (channels + 1) // 2)
    spectrum.imag[..., paired] = imaginary
    spectrum[..., paired] /= math.sqrt(2)
    return torch.fft.irfft(spectrum, n=channels, norm="ortho")

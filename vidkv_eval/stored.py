"""Keys or values of one layer: quantized history, then the newest tokens in full precision."""

from __future__ import annotations

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer
from vidkv_eval.quant.growing import GrowingStates


class StoredStates:
    """Quantized history followed by the residual in full precision, for sequences of which the same tokens are quantized.

    Args:
        quantizer: of the history.
        room: most tokens that the residual will hold.
        like: states to come, for shape, dtype and device.
        storage_dtype: dtype of the residual.
        keep_dense: keep a dequantized working copy.
        choice: passed to the quantizer as `like` with the first tokens.

    Attributes:
        residual: newest tokens, [B, H, T, D] in the storage dtype, a view of a buffer that is written in place.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        room: int,
        like: torch.Tensor,
        storage_dtype: torch.dtype,
        keep_dense: bool,
        choice: QuantizedStates | None = None,
    ):
        self.quantizer = quantizer
        self.dtype = like.dtype
        self._choice = choice
        self._history: GrowingStates | None = None
        batch, heads, _, channels = like.shape
        self._residual_buffer = torch.empty(batch, heads, room, channels, dtype=storage_dtype, device=like.device)
        self.residual = self._residual_buffer[:, :, :0]
        self._dense: torch.Tensor | None = like.new_empty(batch, heads, 0, channels) if keep_dense else None
        self._dense_length = 0
        self._unread: list[QuantizedStates] = []

    @property
    def quantized(self) -> QuantizedStates | None:
        """Stored form of the history, None while there is none; views of buffers, good until the next append."""
        return self._history.states if self._history else None

    @property
    def history_length(self) -> int:
        return self._history.states.length if self._history else 0

    @property
    def length(self) -> int:
        return self.history_length + self.residual.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors; neither spare room in buffers nor the dense working copy is counted."""
        return (self.quantized.nbytes if self._history else 0) + self.residual.nbytes

    @property
    def elements(self) -> int:
        """Number of elements that the stored tensors stand for."""
        batch, heads, _, channels = self.residual.shape
        return batch * heads * self.length * channels

    def read(self, new: torch.Tensor) -> torch.Tensor:
        """Return what is read back, followed by the tokens `new` as they are, [B, H, T, D].

        With a dense working copy this is a view of it, good until the next call.
        """
        if self._dense is None:
            history = [self.quantizer.dequantize(self.quantized, self.dtype)] if self._history else []
            return torch.cat([*history, self.residual.to(self.dtype), new], dim=2)
        return self._read_dense(new)

    def _read_dense(self, new: torch.Tensor) -> torch.Tensor:
        past, total = self.length, self.length + new.shape[2]
        if total > self._dense.shape[2]:
            batch, heads, _, channels = self._dense.shape
            grown = self._dense.new_empty(batch, heads, total + max(128, total // 4), channels)
            grown[:, :, : self._dense_length] = self._dense[:, :, : self._dense_length]
            self._dense = grown
        # Tokens seen as they were when new are replaced by what is stored only now: until here attention may have been using them.
        for chunk in self._unread:
            self._dense[:, :, self._dense_length : self._dense_length + chunk.length] = self.quantizer.dequantize(chunk, self.dtype)
            self._dense_length += chunk.length
        self._unread = []
        if self._dense_length < past:
            self._dense[:, :, self._dense_length : past] = self.residual[:, :, self._dense_length - self.history_length :]
        self._dense[:, :, past:total] = new
        self._dense_length = past
        return self._dense[:, :, :total]

    def share_dense(self, buffer: torch.Tensor) -> None:
        """Keep the dense working copy in `buffer` [B, H, room, D] from now on; what it holds so far is moved there."""
        buffer[:, :, : self._dense_length] = self._dense[:, :, : self._dense_length]
        self._dense = buffer

    def append(self, new: torch.Tensor, quantize: int, requantize: bool) -> None:
        """Store new tokens.

        Args:
            new: [B, H, T, D].
            quantize: how many tokens of residual and new ones leave full precision, oldest first.
            requantize: read the history back and quantize it again with them, instead of appending to it.
        Raises:
            ArithmeticError: the tokens to quantize hold NaN or infinity, or need metadata beyond its dtype.
        """
        start = self.residual.shape[2]
        stop = start + new.shape[2]
        if not quantize:
            self._residual_buffer[:, :, start:stop] = new
            self.residual = self._residual_buffer[:, :, :stop]
            return
        states = torch.cat([self.residual, new.to(self.residual.dtype)], dim=2)
        self._quantize(states[:, :, :quantize], requantize)
        self._residual_buffer[:, :, : stop - quantize] = states[:, :, quantize:]
        self.residual = self._residual_buffer[:, :, : stop - quantize]

    def _quantize(self, states: torch.Tensor, requantize: bool) -> None:
        if not torch.isfinite(states).all():
            raise FloatingPointError(f"they hold NaN or infinity in {states.dtype}; check the dtypes of the model and of storage")
        if self._history and requantize:
            history = self.quantizer.dequantize(self.quantized, self.dtype)
            states = torch.cat([history, states.to(self.dtype)], dim=2)
            self._history, self._unread, self._dense_length = None, [], 0
        known = self.history_length - sum(chunk.length for chunk in self._unread)
        chunk = self.quantizer.quantize(states, like=self.quantized or self._choice)
        if self._history:
            self._history.append(chunk)
        else:
            self._history = GrowingStates(chunk)
        if self._dense is not None:
            self._dense_length = min(self._dense_length, known)
            self._unread.append(chunk)

    def crop_residual(self, tokens: int) -> None:
        """Forget the newest `tokens` tokens, which must be in the residual."""
        self.residual = self.residual[:, :, : self.residual.shape[2] - tokens]
        self._dense_length = min(self._dense_length, self.length)

    def select_batch(self, indices: torch.Tensor) -> None:
        """Keep the batch items `indices`, in that order."""
        residual_length = self.residual.shape[2]
        self._residual_buffer = self._residual_buffer[indices]
        self.residual = self._residual_buffer[:, :, :residual_length]
        if self._history:
            self._history = GrowingStates(self.quantized.select_batch(indices))
        if self._choice:
            self._choice = self._choice.select_batch(indices)
        self._unread = [chunk.select_batch(indices) for chunk in self._unread]
        if self._dense is not None:
            self._dense = self._dense[indices]

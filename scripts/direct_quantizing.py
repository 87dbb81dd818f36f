"""What `bench_kernels` times of quantizing a prompt straight into records: `calls_of(tokens, layers)`, one call for each layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vidkv_eval.fused_quantize import DirectQuantizer, raise_faults
from vidkv_eval.recipe import load_recipe

HEADS, WIDTH = 4, 128


def calls_of(
    tokens: int, layers: int, recipe: str, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, list[Callable[[], object]]], int]:
    """Return, by name, calls that quantize the keys and values of each layer of a prompt; and the bytes stored by all layers.

    They are made for a CUDA graph of all of them in this order: the first call forgets what all layers hold, the others do not.

    Raises:
        AssertionError: the codes of the first layer are not those of the reference, but for ties.
    """
    states = [torch.randn(2, 1, tokens, HEADS, WIDTH, device="cuda").to(dtype).transpose(2, 3) for _ in range(layers)]
    quantizer = DirectQuantizer.of(load_recipe(recipe), WIDTH)
    histories = [quantizer.quantize(None, *pair) for pair in states]
    _check(quantizer, histories[0], states[0])

    def forget() -> None:
        torch._foreach_zero_([history.lengths for history in histories])

    def quantize(index: int) -> None:
        histories[index].quantize(*states[index], quantizer.threshold, held=[tokens])

    def choose(index: int) -> None:
        if histories[index].order is not None:
            histories[index].choose_order(states[index][0])

    def of_all(*parts: Callable[[int], None]) -> list[Callable[[], None]]:
        def call(index: int) -> None:
            if index == 0:
                forget()
            for part in parts:
                part(index)

        return [lambda index=index: call(index) for index in range(layers)]

    parts = {"all": of_all(choose, quantize), "order of channels": of_all(choose), "keys and values": of_all(quantize)}
    return parts, sum(history.nbytes for history in histories)


def _check(quantizer: DirectQuantizer, history, pair: torch.Tensor) -> None:
    raise_faults(history)
    plain = quantizer.quantize(None, *(side[:, :, :1024].cpu().float() for side in pair))
    # The order is that of all tokens, not of the first ones.
    if history.order is not None:
        plain.order.copy_(history.order.cpu())
    plain.lengths.zero_()
    plain.quantize(*(side[:, :, :1024].cpu().float() for side in pair), quantizer.threshold, held=[1024])
    (found_keys, found_values), (keys, values) = history.unpack(), plain.unpack()
    for left, right in ((found_keys, keys), (*found_values, *values)):
        assert (left.unpack()[:, :, :1024].cpu() != right.unpack()[:, :, :1024]).float().mean() < 1e-4

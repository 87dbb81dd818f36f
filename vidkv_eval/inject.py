"""Give every `generate` call of a model a cache of our own, without changing whoever calls it."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import DynamicCache
from transformers.utils import ModelOutput

from vidkv_eval.cache import Footprint, QuantizedCache

PIXELS = ("pixel_values", "pixel_values_videos")


class GenerateFailed(BaseException):
    """`generate` raised an error.

    Not an `Exception`, because lmms-eval's adapter for LLaVA turns every Exception of `generate` into an empty answer, which
    would then be scored.
    """


@dataclasses.dataclass(frozen=True)
class GenerateCall:
    """What one `generate` call did: tokens counted over the whole batch row, wall time in seconds, bytes of its cache."""

    prompt_tokens: int
    output_tokens: int
    seconds: float
    footprint: Footprint


class PrefillMemo:
    """The vision features and the forward pass of one prompt, computed once and replayed into other caches.

    The pass runs on a plain cache; its exact keys and values are then handed to the cache of each `generate` call, as the
    model would have done. This holds for recipes whose prefill attention sees exact states. A different prompt is computed
    anew and takes the place of the old one.
    """

    def __init__(self):
        self._prompt: dict = {}
        self._states: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._output = None

    def generate(self, model: nn.Module, plain: Callable, arguments: dict) -> torch.Tensor:
        """Call `plain(**arguments)`, the `generate` of `model`, sparing it what the last call has already computed."""
        prompt = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor | list | tuple)}
        if prompt.keys() == self._prompt.keys() and all(_equal(value, self._prompt[name]) for name, value in prompt.items()):
            # Without pixels `generate` does not run the vision tower, whose features only the replaced pass would read.
            arguments = {name: value for name, value in arguments.items() if name not in PIXELS}
            prefill = self._replay
        else:
            self._prompt = {}
            prefill = functools.partial(self._compute, model.forward)
        with _instance_attribute(model, "forward", _with_prefill(model.forward, prefill)):
            output = plain(**arguments)
        self._prompt = prompt
        return output

    def _compute(self, forward: Callable, inputs: dict) -> ModelOutput:
        exact = DynamicCache()
        self._output = dataclasses.replace(forward(**{**inputs, "past_key_values": exact}), past_key_values=None)
        self._states = [(layer.keys, layer.values) for layer in exact.layers]
        return self._replay(inputs)

    def _replay(self, inputs: dict) -> ModelOutput:
        cache = inputs["past_key_values"]
        for layer, (key_states, value_states) in enumerate(self._states):
            cache.update(key_states, value_states, layer)
        return dataclasses.replace(self._output, past_key_values=cache)


def _with_prefill(forward: Callable, prefill: Callable[[dict], ModelOutput]) -> Callable:
    """The same forward, except that the pass over a prompt (an empty cache, several tokens) is done by `prefill`."""

    @functools.wraps(forward)
    def forward_with_prefill(**inputs):
        is_prefill = inputs["past_key_values"].get_seq_length() == 0 and inputs["input_ids"].shape[1] > 1
        return prefill(inputs) if is_prefill else forward(**inputs)

    return forward_with_prefill


@contextlib.contextmanager
def injected(
    model: nn.Module, make_cache: Callable[[], QuantizedCache], prefill: PrefillMemo | None = None
) -> Iterator[list[GenerateCall]]:
    """Within the block every `model.generate` call uses a fresh cache.

    Args:
        model: the object whose `generate` is called; restored at the end, also after an error.
        make_cache: called once for each `generate`.
        prefill: shares the forward pass of equal prompts between calls.
    Yields:
        One entry for each finished call, in order.
    Raises:
        GenerateFailed: out of `generate`, whatever went wrong in it.
    """
    plain = model.generate
    calls: list[GenerateCall] = []

    @functools.wraps(plain)
    def generate(**arguments):
        started = time.perf_counter()
        try:
            _refuse_padding(arguments.get("attention_mask"))
            cache = make_cache()
            arguments = {**arguments, "past_key_values": cache}
            output = plain(**arguments) if prefill is None else prefill.generate(model, plain, arguments)
            prompt_tokens = arguments["input_ids"].shape[1]
            footprint = cache.footprint()
        except Exception as error:
            raise GenerateFailed(f"generate failed: {type(error).__name__}: {error}") from error
        calls.append(GenerateCall(prompt_tokens, output.shape[1] - prompt_tokens, time.perf_counter() - started, footprint))
        return output

    with _instance_attribute(model, "generate", generate):
        yield calls


@contextlib.contextmanager
def _instance_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """Shadow a method of one object; an attribute that already shadows it (accelerate does so) comes back afterwards."""
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _refuse_padding(attention_mask: torch.Tensor | None) -> None:
    if attention_mask is None:
        return
    padded = int((attention_mask == 0).sum())
    if padded:
        raise ValueError(
            f"the prompt has {padded} padded positions; padding would be stored in the cache and take part in the scales of real "
            "tokens; use batch_size=1"
        )


def _equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left is right or (left.dtype == right.dtype and left.device == right.device and torch.equal(left, right))
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left is right or (isinstance(left, bool | int | float | str) and left == right)

"""Give every `generate` call of a model a cache of our own, without changing whoever calls it."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.utils import ModelOutput

from vidkv_eval.cache import Footprint, QuantizedCache
from vidkv_eval.prompt import Prompt, describe_call, embeddings_of, with_saliency
from vidkv_eval.rows import RowCache

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
        self._description: Prompt | None = None

    def generate(self, model: nn.Module, plain: Callable, arguments: dict) -> torch.Tensor:
        """Call `plain(**arguments)`, the `generate` of `model`, sparing it what the last call has already computed."""
        prompt = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor | list | tuple)}
        if self._holds(prompt):
            return self._generate_replayed(model, plain, arguments)
        self._prompt = {}
        with _instance_attribute(model, "forward", _with_prefill(model.forward, functools.partial(self._compute, model, model.forward))):
            output = plain(**arguments)
        self._prompt = prompt
        return output

    def generate_rows(self, model: nn.Module, plain: Callable, arguments: dict, caches: list[QuantizedCache]) -> list[torch.Tensor]:
        """Let several caches answer the prompt of `arguments` as one batch; greedy or sampled, but without beams.

        Returns:
            For each cache the ids [1, L] of prompt and answer, as a `generate` of its own would have returned them.
        """
        if arguments.get("num_beams", 1) != 1:
            raise ValueError(f"num_beams is {arguments['num_beams']}; caches can only run side by side without beams")
        prompt_tokens = arguments["input_ids"].shape[1]
        self.generate(model, plain, {**arguments, "past_key_values": DynamicCache(), "max_new_tokens": 1})
        cache = RowCache(caches)
        ends = RowEnds(cache, _end_ids(model, arguments))
        batch = {name: _repeat(value, len(cache)) for name, value in arguments.items()}
        batch |= {"past_key_values": cache, "stopping_criteria": StoppingCriteriaList([ends])}
        output = self._generate_replayed(model, plain, batch)
        stops = [prompt_tokens + (length or output.shape[1] - prompt_tokens) for length in ends.lengths]
        return [output[row : row + 1, :stop] for row, stop in enumerate(stops)]

    def _holds(self, prompt: dict) -> bool:
        return prompt.keys() == self._prompt.keys() and all(_equal(value, self._prompt[name]) for name, value in prompt.items())

    def _generate_replayed(self, model: nn.Module, plain: Callable, arguments: dict) -> torch.Tensor:
        # Without pixels `generate` does not run the vision tower, whose features only the replaced pass would read.
        arguments = {name: value for name, value in arguments.items() if name not in PIXELS}
        with _instance_attribute(model, "forward", _with_prefill(model.forward, self._replay)):
            return plain(**arguments)

    def _compute(self, model: nn.Module, forward: Callable, inputs: dict) -> ModelOutput:
        exact = DynamicCache()
        with embeddings_of(model) as embeddings:
            self._output = dataclasses.replace(forward(**{**inputs, "past_key_values": exact}), past_key_values=None)
        self._description = describe_call(model, inputs)
        if embeddings:
            self._description = with_saliency(self._description, embeddings[0])
        self._states = [(layer.keys, layer.values) for layer in exact.layers]
        return self._replay(inputs)

    def _replay(self, inputs: dict) -> ModelOutput:
        cache = inputs["past_key_values"]
        # The model does not run, so that nothing else tells the cache which visual tokens matter.
        if hasattr(cache, "describe_prompt"):
            cache.describe_prompt(self._description)
        for layer, (key_states, value_states) in enumerate(self._states):
            cache.update(key_states, value_states, layer)
        logits = self._output.logits.expand(inputs["input_ids"].shape[0], -1, -1)
        return dataclasses.replace(self._output, logits=logits, past_key_values=cache)


class RowEnds(StoppingCriteria):
    """Stops each row of a cache when its sequence ends; never ends the batch itself.

    Attributes:
        lengths: new tokens of each row, its end token included; None while it runs.
    """

    def __init__(self, cache: RowCache, end_ids: set[int]):
        self.cache, self.end_ids = cache, end_ids
        self.lengths: list[int | None] = [None] * len(cache)
        self._steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self._steps += 1
        for row, last in enumerate(input_ids[:, -1].tolist()):
            if last in self.end_ids and self.cache.is_running(row):
                self.cache.stop(row)
                self.lengths[row] = self._steps
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _end_ids(model: nn.Module, arguments: dict) -> set[int]:
    ends = arguments.get("eos_token_id", model.generation_config.eos_token_id)
    return set(ends if isinstance(ends, list | tuple) else [ends])


def _repeat(value: object, rows: int) -> object:
    """Repeat along the batch what `generate` takes for one prompt."""
    if isinstance(value, torch.Tensor) and value.shape[:1] == (1,):
        return value.expand(rows, *value.shape[1:])
    return value * rows if isinstance(value, list | tuple) and len(value) == 1 else value


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
def injected_rows(model: nn.Module, caches: list[QuantizedCache], prefill: PrefillMemo) -> Iterator[list[GenerateCall]]:
    """Within the block the i-th `model.generate` call gets the answer of the i-th cache; all are computed in the first.

    Args:
        model: the object whose `generate` is called, with the same prompt each time; restored at the end.
        caches: empty, as `RowCache` takes them; more than there will be calls are allowed.
        prefill: shares the forward pass of the prompt.
    Yields:
        One entry for each finished call, in order; the first takes the time of the whole batch.
    Raises:
        GenerateFailed: out of the first `generate`, whatever went wrong in any row.
    """
    plain = model.generate
    calls: list[GenerateCall] = []
    outputs: list[torch.Tensor] = []

    @functools.wraps(plain)
    def generate(**arguments):
        started = time.perf_counter()
        try:
            if not outputs:
                outputs.extend(prefill.generate_rows(model, plain, arguments, caches))
            output, cache = outputs[len(calls)], caches[len(calls)]
        except Exception as error:
            raise GenerateFailed(f"generate failed: {type(error).__name__}: {error}") from error
        prompt_tokens = arguments["input_ids"].shape[1]
        calls.append(GenerateCall(prompt_tokens, output.shape[1] - prompt_tokens, time.perf_counter() - started, cache.footprint()))
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


def _equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left is right or (left.dtype == right.dtype and left.device == right.device and torch.equal(left, right))
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left is right or (isinstance(left, bool | int | float | str) and left == right)

"""A key/value cache for Transformers that stores history in quantized form.

It decides when to quantize and what attention sees; quantizers decide how. Usable on its own:

    cache = QuantizedCache.for_model(model, load_recipe("kivi_k2_v2"))
    model.generate(**inputs, past_key_values=cache)

For inference only: stored states carry no gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from vidkv_eval.fused_states import FUSED, SHORTEST, FusedStates, Member, PackedStep, say_once, why_not_fused
from vidkv_eval.prompt import Prompt, watch
from vidkv_eval.quant.base import QuantizedStates, Quantizer
from vidkv_eval.quant.marks import TokenMarks
from vidkv_eval.quant.split_tokens import SplitTokens
from vidkv_eval.recipe import Recipe
from vidkv_eval.score_drop import GROUPED, ScoreDrop, put_note
from vidkv_eval.shared_lengths import SharedLengths
from vidkv_eval.stored import StoredStates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_LAYERS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Footprint:
    """Stored bytes of a cache and the number of elements they stand for.

    Bytes are those of every stored tensor: codes, scales, minima, channel indices and the full-precision residual.
    """

    key_bytes: int = 0
    value_bytes: int = 0
    key_elements: int = 0
    value_elements: int = 0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.key_bytes + other.key_bytes,
            self.value_bytes + other.value_bytes,
            self.key_elements + other.key_elements,
            self.value_elements + other.value_elements,
        )

    @property
    def key_bits(self) -> float:
        """Effective bits per element of keys; nan for an empty cache."""
        return _bits(self.key_bytes, self.key_elements)

    @property
    def value_bits(self) -> float:
        """Effective bits per element of values; nan for an empty cache."""
        return _bits(self.value_bytes, self.value_elements)

    @property
    def effective_bits(self) -> float:
        """Effective bits per element of keys and values together; nan for an empty cache."""
        return _bits(self.key_bytes + self.value_bytes, self.key_elements + self.value_elements)


def _bits(stored_bytes: int, elements: int) -> float:
    return 8 * stored_bytes / elements if elements else float("nan")


@dataclass(frozen=True)
class CacheOptions:
    """How a cache keeps what a recipe says; see `QuantizedCache`."""

    storage_dtype: torch.dtype | None = None
    keep_dense: bool = False
    keep_newest: int = 0
    fused: bool = False

    def __post_init__(self) -> None:
        if type(self.keep_newest) is not int or self.keep_newest < 0:
            raise ValueError(f"keep_newest is {self.keep_newest!r}; allowed: integers from 0")


class SequenceGroup:
    """Keys and values of those sequences of a batch that begin at the same position, so that their blocks are the same tokens.

    Attributes:
        rows: which batch items these are, in order.
        padding: padded positions before them, which are not stored.
        stored: by the names key and value; empty before the first tokens.
    """

    def __init__(self, recipe: Recipe, rows: list[int], prompt: Prompt, options: CacheOptions):
        self.recipe = recipe
        self.rows = rows
        self.padding = prompt.padding[0]
        self.options = options
        self.stored: dict[str, StoredStates] = {}
        self._marks = prompt.marks and prompt.marks[0]

    def update(self, new_states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Store new tokens, [B, H, T, D] by name, and return what attention sees; see `QuantizedLayer.update`.

        Raises:
            ArithmeticError: states that cannot be quantized; its arguments are the reason and their name.
        """
        new_tokens = new_states["key"].shape[2]
        is_first = not self.stored or self.stored["key"].length == 0
        if is_first:
            self._start(new_states)
        seen = new_states if is_first else self.read(new_states)
        leaving = self._count_leaving(new_tokens, is_first)
        for name, states in new_states.items():
            try:
                self.stored[name].append(states, leaving[name], requantize=self.recipe.flush == "requantize")
            except ArithmeticError as error:
                raise type(error)(str(error), name) from error
        if is_first and self.recipe.prefill == "quantized":
            seen = {name: self.stored[name].read(states[:, :, :0]) for name, states in new_states.items()}
        return seen

    def _start(self, new_states: dict[str, torch.Tensor]) -> None:
        room = self.recipe.residual_length + self.options.keep_newest
        prompt_tokens = self._count_leaving(new_states["key"].shape[2], is_first=True)
        for name, states in new_states.items():
            quantizer = getattr(self.recipe, name)
            choice = choose_tokens(quantizer, self._marks, prompt_tokens[name], states)
            dtype = self.options.storage_dtype or states.dtype
            self.stored[name] = StoredStates(quantizer, room, states, dtype, self.options.keep_dense, choice)

    @property
    def residual_lengths(self) -> dict[str, int]:
        """Number of tokens in full precision, of keys and of values; empty before the first tokens."""
        return {name: stored.residual.shape[2] for name, stored in self.stored.items()}

    def _count_leaving(self, new_tokens: int, is_first: bool) -> dict[str, int]:
        """Return how many of the residual's and the new tokens leave full precision, for keys and for values."""
        held = {} if is_first else self.residual_lengths
        waiting = {name: new_tokens + held.get(name, 0) for name in ("key", "value")}
        free = {name: max(0, count - self.options.keep_newest) for name, count in waiting.items()}
        if is_first:
            # The prompt leaves less than a block in the residual.
            blocks = dict.fromkeys(waiting, self.recipe.block)
            if self.recipe.flush == "requantize":
                # Values fill their own blocks, as in the released code: no value of the prompt is left if a block is one token.
                blocks["value"] = self.recipe.value.block
            return {name: count - count % blocks[name] for name, count in free.items()}
        # Afterwards the residual of keys, never the shorter one, is quantized whenever it is full, and that of values with it,
        # so that what is stored does not depend on how later tokens were divided over calls.
        rest = waiting["key"] - free["key"] + free["key"] % self.recipe.residual_length
        return {name: 0 if free["key"] < self.recipe.residual_length else count - rest for name, count in waiting.items()}

    def read(self, new_states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what attention would see if the tokens `new_states`, [B, H, T, D] by name, came next."""
        return {name: self.stored[name].read(states) for name, states in new_states.items()}

    def quantized(self, name: str) -> QuantizedStates | None:
        """Return the quantized history of keys or values (`name`); None if there is none, or it is packed for kernels."""
        return self.stored[name].quantized if self.stored else None

    def score_drops(self) -> dict[int, ScoreDrop]:
        """Return by batch item what attention shall do about the chosen tokens of its keys."""
        quantized = self.stored["key"].quantized
        if quantized is None:
            return {}
        tokens = quantized.static["tokens"].long() + self.padding
        return {row: ScoreDrop(tokens[place], self.recipe.score_drop) for place, row in enumerate(self.rows) if tokens.shape[1]}

    def footprint(self) -> Footprint:
        """Count what is stored for these sequences."""
        if not self.stored:
            return Footprint()
        key, value = self.stored["key"], self.stored["value"]
        return Footprint(key.nbytes, value.nbytes, key.elements, value.elements)

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` tokens, which must be in the residual."""
        for stored in self.stored.values():
            stored.crop_residual(tokens)

    def select(self, rows: list[int], positions: list[int]) -> None:
        """Keep the sequences at `positions` of this group, which become batch items `rows`."""
        self.rows = rows
        for stored in self.stored.values():
            stored.select_batch(torch.tensor(positions, dtype=torch.int64, device=stored.residual.device))


def choose_tokens(
    quantizer: Quantizer, marks: TokenMarks | None, prompt_tokens: int, states: torch.Tensor
) -> QuantizedStates | None:
    """Return what the quantizer takes as `like` with the first tokens: the tokens it is to choose, if it does.

    Args:
        marks: of the prompt of the sequences, which are alike.
        prompt_tokens: tokens of the prompt that are quantized.
        states: [B, H, T, D], for shape and device.
    """
    if not isinstance(quantizer, SplitTokens):
        return None
    tokens = quantizer.choose_tokens(marks, prompt_tokens).to(states.device)
    return quantizer.choice(tokens.expand(states.shape[0], -1), states.shape[3])


class FusedGroup(SequenceGroup):
    """All sequences of a batch, with history packed for attention kernels; `why_not_fused` has nothing against the recipe.

    What a step leaves to be quantized is quantized before the next use, because attention has yet to see it in full precision.

    Args:
        groups: for each set of sequences that are quantized together, which batch items these are.
        lengths: shared with other layers.
    """

    def __init__(self, recipe: Recipe, groups: list[list[int]], prompt: Prompt, options: CacheOptions, lengths: SharedLengths):
        super().__init__(recipe, sorted(sum(groups, [])), Prompt((0,)), options)
        self._prompt = prompt
        self._groups = groups
        self._lengths = lengths
        self._states: FusedStates | None = None

    @property
    def states(self) -> FusedStates | None:
        """What is stored; None before the first tokens."""
        if self._states is not None:
            self._states.settle()
        return self._states

    def update(self, new_states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | dict[str, PackedStep]:
        """As in the base class; a step of one token returns a `PackedStep` in place of keys and of values."""
        states = self.states
        if states is None:
            self._states = self._make_states(new_states)
            self._states.append(new_states)
            return new_states
        if new_states["key"].shape[2] == 1 and states.length >= max(SHORTEST, 1):
            return dict.fromkeys(new_states, states.step(new_states))
        seen = states.read(new_states)
        states.append(new_states)
        return seen

    def uncount_step(self) -> None:
        """Take back the last step, which was never done; nothing was due before it."""
        self._states.uncount_step()

    def _make_states(self, new_states: dict[str, torch.Tensor]) -> FusedStates:
        keys = new_states["key"]
        members = [Member(rows, self._prompt.row(rows[0]).padding[0]) for rows in self._groups]
        quantizer, prompt = self.recipe.value, self._prompt

        # Not a method: states that knew their group would be freed only when Python looks for cycles, and they are large.
        def choose(member: Member, prompt_tokens: int, values: torch.Tensor) -> QuantizedStates | None:
            marks = prompt.row(member.rows[0]).marks
            return choose_tokens(quantizer, marks and marks[0], prompt_tokens, values)

        dtype = self.options.storage_dtype or keys.dtype
        return FusedStates(self.recipe, members, choose, self.options.keep_newest, keys, dtype, self._lengths)

    @property
    def residual_lengths(self) -> dict[str, int]:
        states = self.states
        return dict.fromkeys(("key", "value"), states.residual_length) if states else {}

    def read(self, new_states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.states.read(new_states)

    def quantized(self, name: str) -> None:
        return None

    def footprint(self) -> Footprint:
        states = self.states
        if states is None:
            return Footprint()
        nbytes = states.nbytes()
        return Footprint(nbytes["key"], nbytes["value"], states.elements, states.elements)

    def crop(self, tokens: int) -> None:
        self.states.crop_residual(tokens)

    def select(self, rows: list[int], positions: list[int]) -> None:
        self.rows = rows
        self.states.select_batch(positions)


class QuantizedLayer(CacheLayerMixin):
    """Keys and values of one attention layer."""

    is_sliding = False
    is_croppable = True

    def __init__(self, recipe: Recipe, index: int, options: CacheOptions, lengths: SharedLengths):
        super().__init__()
        self.recipe = recipe
        self.index = index
        self.options = options
        self._lengths = lengths
        self.prompt: Prompt | None = None
        self.groups: list[SequenceGroup] = []
        self._tokens = 0

    @property
    def stored(self) -> dict[str, StoredStates]:
        """Keys and values by these names, of a batch whose sequences are stored together (no padding, no choice of tokens).

        Empty if they are packed for attention kernels.
        """
        (group,) = self.groups
        return group.stored

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        prompt = self.prompt or Prompt((0,) * self.batch_size)
        if len(prompt.padding) not in (1, self.batch_size):
            raise ValueError(f"{self.batch_size} sequences, but the prompt was described as a batch of {len(prompt.padding)}")
        members: dict[object, list[int]] = {}
        for row in range(self.batch_size):
            # Chosen tokens may differ in number from sequence to sequence.
            alike = row if self.recipe.chooses_tokens else prompt.row(row).padding
            members.setdefault(alike, []).append(row)
        if self._is_fused(key_states, value_states):
            self.groups = [FusedGroup(self.recipe, list(members.values()), prompt, self.options, self._lengths)]
        else:
            self.groups = [SequenceGroup(self.recipe, rows, prompt.row(rows[0]), self.options) for rows in members.values()]
        self._tokens = 0
        self.is_initialized = True

    def _is_fused(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether history is packed for attention kernels; where it was asked for and cannot be, say so once."""
        if not self.options.fused:
            return False
        reason = "keep_dense is set" if self.options.keep_dense else why_not_fused(self.recipe, key_states, value_states)
        if reason:
            say_once(self.recipe.name, reason)
        return reason is None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens and return what attention sees: what is stored so far, then the new tokens exactly.

        Tokens that are quantized by this call are seen quantized from the next call on; with `prefill: quantized` those of
        the first call are seen as they were stored.

        Args:
            key_states: [B, H, T, D], new tokens.
            value_states: [B, H, T, D].
        Returns:
            Keys and values, each [B, H, stored + T, D]; with a dense working copy, views that are good until the next call.
            At padded positions they are zero, or as they came. With `fused`, a step of one token returns a `PackedStep` twice.
        Raises:
            ValueError: another number of sequences than before, or states that the recipe cannot quantize.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(f"{key_states.shape[0]} sequences for a cache that holds {self.batch_size}; use a new cache")
        new_states = {"key": key_states.detach(), "value": value_states.detach()}
        with self._naming_errors():
            seen = self._update_groups(new_states)
        # In the pass over the prompt attention sees exact states.
        if self.recipe.score_drop and self._tokens:
            put_note(seen["key"], {row: drop for group in self.groups for row, drop in group.score_drops().items()})
        self._tokens += key_states.shape[2]
        return seen["key"], seen["value"]

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except ArithmeticError as error:
            raise ValueError(f"layer {self.index}, {error.args[1]} states cannot be quantized: {error.args[0]}") from error

    def _update_groups(self, new_states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if len(self.groups) == 1 and not self.groups[0].padding:
            return self.groups[0].update(new_states)
        seen = self._make_whole(new_states) if self._tokens else {name: states.clone() for name, states in new_states.items()}
        for group in self.groups:
            skipped = max(0, group.padding - self._tokens)
            if skipped < new_states["key"].shape[2]:
                found = group.update({name: states[group.rows, :, skipped:] for name, states in new_states.items()})
                for name, states in found.items():
                    self._put(seen[name], group, states)
        return seen

    def _make_whole(self, new_states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return zeros for what is stored and for the new tokens of all sequences, [B, H, stored + T, D] by name."""
        return {
            name: states.new_zeros(*states.shape[:2], self._tokens + states.shape[2], states.shape[3])
            for name, states in new_states.items()
        }

    @staticmethod
    def _put(whole: torch.Tensor, group: SequenceGroup, states: torch.Tensor) -> None:
        """Write the states of a group where its sequences are, at the end of the tokens."""
        whole[group.rows, :, whole.shape[2] - states.shape[2] :] = states

    def read(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what attention would see if these tokens came next, as `update` does, and store nothing.

        Args:
            key_states: [B, H, T, D], of which T may be 0.
            value_states: [B, H, T, D].
        """
        new_states = {"key": key_states, "value": value_states}
        seen = self._make_whole(new_states)
        for group in self.groups:
            found = group.read({name: states[group.rows] for name, states in new_states.items()})
            for name, states in found.items():
                self._put(seen[name], group, states)
        return seen["key"], seen["value"]

    def prepare_repeat(self, device: torch.device) -> object | None:
        """Get ready for a repetition of the last step; see `QuantizedCache.prepare_repeat`."""
        if not self.is_initialized or not isinstance(self.groups[0], FusedGroup) or self.device != device:
            return None
        with self._naming_errors():
            return self.groups[0].states.prepare_repeat()

    def count_repeat(self) -> None:
        """Count the token that a repetition stores."""
        self.groups[0].states.count_repeat()
        self._tokens += 1

    def uncount_step(self, length: int) -> None:
        """Take back a step that was counted and never done, if there was one; see `QuantizedCache.uncount_step`."""
        if self._tokens > length:
            self.groups[0].uncount_step()
            self._tokens -= 1

    def quantized(self, name: str) -> list[QuantizedStates]:
        """Return the quantized history of keys or values (`name`), for each group of sequences that are stored together.

        A history that is packed for attention kernels is not in this form and left out.
        """
        found = (group.quantized(name) for group in self.groups)
        return [states for states in found if states is not None]

    def get_seq_length(self) -> int:
        """Return the number of tokens held, padding included."""
        return self._tokens if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of what attention will see with `query_length` new tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def footprint(self) -> Footprint:
        """Count what this layer stores."""
        with self._naming_errors():
            return sum((group.footprint() for group in self.groups), Footprint())

    def reset(self) -> None:
        """Forget everything."""
        self.groups = []
        self.prompt = None
        self._tokens = 0
        self.is_initialized = False
        self._lengths.changes += 1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, as long as they are not yet quantized.

        Args:
            tokens_to_remove: zero or negative, as everywhere in Transformers: -3 forgets three tokens.
        Raises:
            ValueError: positive, or more tokens than the residual holds.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, found {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        residual = min(length for group in self.groups for length in group.residual_lengths.values())
        if -tokens_to_remove > residual:
            raise ValueError(
                f"crop of {-tokens_to_remove} tokens, but only the newest {residual} are still in full precision and can be removed; "
                f"make the cache with keep_newest={-tokens_to_remove} or more, as assisted decoding needs it, or start a new one"
            )
        for group in self.groups:
            group.crop(-tokens_to_remove)
        self._tokens += tokens_to_remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give each beam the cache of the beam it continues."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch item `repeats` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch items `indices` (integers or a mask), in that order."""
        if not self.is_initialized:
            return
        indices = torch.as_tensor(indices)
        order = (indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices).tolist()
        # A negative number counts from the end, as everywhere in torch.
        order = [index % self.batch_size for index in order]
        for group in self.groups:
            place = {old: position for position, old in enumerate(group.rows)}
            kept = [(new, place[old]) for new, old in enumerate(order) if old in place]
            group.select([new for new, _ in kept], [position for _, position in kept])
        self.groups = [group for group in self.groups if group.rows]
        self.batch_size = len(order)


class QuantizedCache(Cache):
    """A cache for `generate(past_key_values=...)`; one object serves one call, and its further turns.

    Batches padded on the left, and recipes that choose visual tokens, need a description of the prompt. A cache made by
    `for_model` gets it from the model itself; otherwise call `describe_prompt` before the first `update`.

    Args:
        recipe: what happens to keys and values.
        num_layers: number of attention layers of the model.
        storage_dtype: dtype in which full-precision states are stored (residual, identity recipe); None: that of the states.
            From the step after they came, states are read back rounded to it.
        keep_dense: keep a dequantized working copy, so that a decode step need not dequantize the history again. It is
            never counted as stored and never written back; generated text is the same.
        keep_newest: this many of the newest tokens always stay in full precision, so that they can be cropped. Assisted
            decoding needs as many as tokens are guessed at once.
        fused: keep history packed, and let attention read it so in steps of one token, without dequantizing; needs a model whose
            attention is `fused`. Where kernels do not read a recipe, that is said once and history is kept and read as without.

    Attributes:
        prompt: description of the prompt, None if there was none.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_layers: int,
        *,
        storage_dtype: torch.dtype | None = None,
        keep_dense: bool = False,
        keep_newest: int = 0,
        fused: bool = False,
    ):
        if not isinstance(recipe, Recipe):
            raise ValueError(f"{recipe.name} is a recipe of another library's cache; make it with vidkv_eval.library_cache.make_cache")
        self.recipe = recipe
        self.options = CacheOptions(storage_dtype, keep_dense, keep_newest, fused)
        self.prompt: Prompt | None = None
        self._lengths = SharedLengths()
        super().__init__(layers=[QuantizedLayer(recipe, index, self.options, self._lengths) for index in range(num_layers)])

    @classmethod
    def for_model(cls, model: PreTrainedModel, recipe: Recipe, **options: Any) -> QuantizedCache:
        """Make a cache with a layer for each layer of the model's text decoder, and let it learn about its prompt.

        The cache is `fused` if the model's attention is, unless the options say else.

        Raises:
            ValueError: the model has layers that are not attention layers, or its attention cannot do what the recipe asks for.
        """
        attention = model.config.get_text_config(decoder=True)._attn_implementation
        options = {"fused": attention == FUSED, **options}
        if options["fused"] and attention != FUSED:
            raise ValueError(
                f"a fused cache needs attention {FUSED!r}, and the model has {attention!r}; "
                f"call vidkv_eval.attention.use_attention(model, {FUSED!r})"
            )
        if recipe.score_drop and attention not in (GROUPED, FUSED):
            raise ValueError(
                f"{recipe.name} lowers attention scores, which attention {attention!r} does not do; "
                f"set model.attn_implementation={GROUPED}, or call vidkv_eval.attention.use_attention(model, {GROUPED!r})"
            )
        cache = cls(recipe, count_attention_layers(model), **options)
        watch(model)
        return cache

    @property
    def chooses_visual_tokens(self) -> bool:
        """Whether the recipe treats some visual tokens of the prompt in another way than others."""
        return self.recipe.chooses_tokens

    def describe_prompt(self, prompt: Prompt) -> None:
        """Tell an empty cache about the prompt to come.

        Raises:
            ValueError: the cache already holds tokens.
        """
        if self.get_seq_length():
            raise ValueError(f"the cache holds {self.get_seq_length()} tokens; describe the prompt before its first tokens")
        self.prompt = prompt
        for layer in self.layers:
            layer.prompt = prompt

    def prepare_repeat(self, device: torch.device) -> tuple | None:
        """Get ready for a repetition of the launches of a step of one token, with another token.

        Returns:
            What the repetition depends on: launches that were captured while it was the same may be repeated now, followed by
            `count_repeat`. None if the next step must be a new one: the cache is not fused, or holds nothing, or is on another device.
        """
        parts = []
        for layer in self.layers:
            parts.append(layer.prepare_repeat(device))
            if parts[-1] is None:
                return None
        return tuple(parts)

    def uncount_step(self, length: int) -> None:
        """Take back a step of one token whose launches were never made, in those layers that hold more than `length` tokens for it."""
        for layer in self.layers:
            layer.uncount_step(length)

    @property
    def changes(self) -> int:
        """A number that grows whenever a fused cache stores, forgets or moves tokens."""
        return self._lengths.changes

    def count_repeat(self) -> None:
        """Count the token that a repetition stores in all layers."""
        for layer in self.layers:
            layer.count_repeat()

    def reset(self) -> None:
        """Forget everything."""
        self.prompt = None
        super().reset()

    def footprint(self) -> Footprint:
        """Count what is stored in all layers."""
        return sum((layer.footprint() for layer in self.layers), Footprint())


def count_attention_layers(model: PreTrainedModel) -> int:
    """Return the number of layers of a model's text decoder.

    Raises:
        ValueError: the model has layers that are not attention layers.
    """
    config = model.config.get_text_config(decoder=True)
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_LAYERS))
    if strange:
        found, allowed = ", ".join(strange), ", ".join(ATTENTION_LAYERS)
        raise ValueError(f"{type(model).__name__} has layers of type {found}; QuantizedCache serves {allowed}")
    return config.num_hidden_layers

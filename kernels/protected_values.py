"""The part of a `FragmentHistory` that tokens with values of their own take: records of these values, and which tokens they belong to.

Keys lie token after token whatever their values. Values lie in two runs of records, protected tokens in one and all others in the
other, both token after token; so one bit a token says where its values are.
"""

from __future__ import annotations

import torch

from vidkv_kernels.fragments import TOKENS, Form
from vidkv_kernels.packed import PackedValues, check, pack_words, unpack_words


class ProtectedValues:
    """Values of protected tokens of one layer.

    Attributes:
        form: of their records.
        values: uint8 [B, H, room / S, value_record_bytes].
        lengths: int32 [B], protected tokens of each sequence.
        held: the same numbers, known without asking the device.
        marks: int32 [B, blocks of 32 tokens], bit i: token i of the block is protected; none is beyond those held.
        before: int32 [B, blocks of 32 tokens], protected tokens in front of a block.
    """

    def __init__(self, form: Form, batch: int, heads: int, blocks: int, device: torch.device):
        self.form = form
        self.values = torch.empty(batch, heads, 0, form.value_record_bytes, dtype=torch.uint8, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.held = [0] * batch
        self.marks = torch.zeros(batch, blocks, dtype=torch.int32, device=device)
        self.before = torch.zeros(batch, blocks, dtype=torch.int32, device=device)

    def nbytes(self, lengths: list[int]) -> int:
        """Bytes of what is held, given the tokens of all kinds that sequences hold."""
        records = self.values.shape[1] * sum(-(-length // self.form.group_size) for length in self.held)
        blocks = sum(-(-length // TOKENS) for length in lengths)
        of_a_block = self.marks.element_size() + self.before.element_size()
        return records * self.form.value_record_bytes + blocks * of_a_block + self.lengths.nbytes

    def reserve_blocks(self, blocks: int) -> None:
        """Make room for marks of so many blocks of 32 tokens."""
        more = blocks - self.marks.shape[1]
        self.marks = torch.nn.functional.pad(self.marks, (0, more))
        self.before = torch.cat([self.before, self.lengths[:, None].expand(-1, more)], dim=1)

    def check_tokens(self, run: PackedValues) -> None:
        """Raise a ValueError unless the entries of a run belong to tokens in ascending order; waits for the device."""
        room = self.marks.shape[1] * TOKENS
        check("values.tokens", run.tokens, (self.marks.shape[0], run.entries), torch.int32, self.marks.device)
        tokens = torch.nn.functional.pad(run.tokens, (1, 0), value=-1)
        is_wrong = (tokens[:, 1:] <= tokens[:, :-1]) | (tokens[:, 1:] >= room)
        if (is_wrong & (torch.arange(run.entries, device=run.device) < run.lengths[:, None])).any():
            raise ValueError(f"values.tokens are not in ascending order, or beyond the {room} that there is room for")

    def reserve(self, run: PackedValues) -> bool:
        """Make room for the entries of a run and return whether buffers moved for it; waits for the device."""
        longest = max(held + new for held, new in zip(self.held, run.lengths.tolist(), strict=True))
        records = -(-longest // self.form.group_size)
        if records <= self.values.shape[2]:
            return False
        old = self.values
        self.values = old.new_empty(*old.shape[:2], records, old.shape[3])
        self.values[:, :, : old.shape[2]] = old
        return True

    def mark(self, run: PackedValues) -> None:
        """Count the entries of a run, whose values have been stored, as held; waits for the device."""
        batch, blocks = self.marks.shape
        is_held = torch.arange(run.entries, device=run.device) < run.lengths[:, None]
        # One more token than there are, for entries that are not held.
        places = torch.where(is_held, run.tokens, blocks * TOKENS).long()
        bits = torch.zeros(batch, blocks * TOKENS + 1, dtype=torch.int32, device=run.device).scatter_(1, places, 1)[:, :-1]
        counts = bits.unflatten(1, (blocks, TOKENS)).sum(-1, dtype=torch.int32)
        self.marks |= pack_words(bits.unsqueeze(-1), 1).squeeze(-1)
        self.before += counts.cumsum(1, dtype=torch.int32) - counts
        self.lengths += run.lengths
        self.held = [held + new for held, new in zip(self.held, run.lengths.tolist(), strict=True)]

    def tokens(self, lengths: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which tokens the entries of protected tokens and of the others belong to, in their orders.

        Args:
            lengths: int32 [B], tokens of all kinds.
            room: entries to return of the others.
        Returns:
            int32, [B, room of protected values] and [B, room]; what stands beyond the entries held means nothing.
        """
        is_protected = unpack_words(self.marks.unsqueeze(-1), 1).squeeze(-1).bool()
        is_held = torch.arange(is_protected.shape[1], device=lengths.device) < lengths[:, None]
        orders = []
        for mine, count in ((is_protected, self.values.shape[2] * self.form.group_size), (~is_protected, room)):
            order = (is_held & mine).byte().argsort(dim=1, descending=True, stable=True).int()
            orders.append(torch.nn.functional.pad(order, (0, max(0, count - order.shape[1])))[:, :count].contiguous())
        return tuple(orders)

    def select_batch(self, indices: torch.Tensor) -> ProtectedValues:
        """Return a copy of the sequences `indices`, in that order."""
        chosen = ProtectedValues(self.form, len(indices), self.values.shape[1], 0, self.values.device)
        for name in ("values", "lengths", "marks", "before"):
            setattr(chosen, name, getattr(self, name)[indices])
        chosen.held = [self.held[index] for index in indices.tolist()]
        return chosen

"""Attention functions of our own, by name in Transformers' registry; no model file is copied.

`grouped_sdpa`: in a decode step the query heads of one key/value head attend as if they were several queries of it, so that
keys and values are read once instead of once for each query head. On a CPU, where the stock `sdpa` repeats them, a step of
16 rows over 600 tokens takes about two thirds of the time. The same sums in another order: results agree to rounding.
It also does what `score_drop` asks for, which no stock function can.

`fused`: a decode step reads the packed history of a `QuantizedCache` as it is stored, by the kernels of `vidkv_kernels`, and the
residual in full precision; nothing is dequantized. All else goes to `grouped_sdpa`.
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vidkv_eval.fused_states import FUSED, PackedStep
from vidkv_eval.graphs import stop_graphs, use_graphs
from vidkv_eval.score_drop import GROUPED, ScoreDrop, drop_scores, read_note


def grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attend in the signature of Transformers' attention functions.

    Args:
        query: [B, HQ, T, D]; more than one token goes to the stock function.
        key, value: [B, H, stored + T, D]. A note of `score_drop` on the key is obeyed.
        attention_mask: [B, 1, T, stored + T] or None.
    Returns:
        [B, T, HQ, D], and None in place of the weights.
    """
    mixed = _grouped_sdpa(module, query, key, value, attention_mask, scaling, **options)
    # Every sequence is computed in the usual way first, so that a sequence without a drop does not depend on its company.
    for row, drop in read_note(key).items():
        mask = None if attention_mask is None else attention_mask[row if attention_mask.shape[0] > 1 else 0]
        mixed[row] = attend_with_drop(query[row], key[row], value[row], mask, scaling, drop)
    return mixed, None


def fused(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PackedStep,
    value: torch.Tensor | PackedStep,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attend in the signature of Transformers' attention functions; as `grouped_sdpa`, but for a `PackedStep` from the cache.

    Kernels know no mask, and padding is not stored: where a mask hides anything else, history is dequantized for this step.
    """
    if isinstance(key, PackedStep):
        if attention_mask is None or key.hides_padding_only(attention_mask):
            return key.attend(query, scaling).transpose(1, 2), None
        key, value = key.dense()
    return grouped_sdpa(module, query, key, value, attention_mask, scaling, **options)


def attend_with_drop(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    drop: ScoreDrop,
) -> torch.Tensor:
    """Attend in one sequence, with the scores of some tokens brought closer together; scores and softmax in float32.

    Args:
        query: [HQ, T, D].
        key, value: [H, S, D].
        attention_mask: [1, T, S], boolean or to be added, or None.
        scaling: factor of the scores; None: 1 / sqrt(D).
        drop: which of the S keys, and how far. They must be visible to every query, as tokens of the prompt are.
    Returns:
        [T, HQ, D].
    """
    heads, tokens, width = query.shape
    queries = query.reshape(key.shape[0], -1, tokens, width).float()
    scores = queries @ key.float()[:, None].transpose(-1, -2) * (width**-0.5 if scaling is None else scaling)
    scores[..., drop.positions] = drop_scores(scores[..., drop.positions], drop.drop)
    if attention_mask is not None:
        is_boolean = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, float("-inf")) if is_boolean else scores + attention_mask.float()
    mixed = scores.softmax(dim=-1) @ value.float()[:, None]
    return mixed.reshape(heads, tokens, width).transpose(0, 1).to(query.dtype)


def _grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    **options: object,
) -> torch.Tensor:
    batch, query_heads, tokens, width = query.shape
    if tokens > 1 or (attention_mask is not None and attention_mask.shape[1] != 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)[0]
    queries = query.reshape(batch, key.shape[1], query_heads // key.shape[1], width)
    mixed = nn.functional.scaled_dot_product_attention(queries, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(batch, tokens, query_heads, width)


OURS = {GROUPED: grouped_sdpa, FUSED: fused}
"""Attention functions of this file by name."""


def use_attention(model: PreTrainedModel, name: str, *, graphs: bool = True) -> None:
    """Let the text decoder of a model attend through the function `name`; its vision tower stays as it is.

    Args:
        graphs: with `fused` on a GPU, repeat decode steps as CUDA graphs; see `graphs`.
    """
    if name in OURS:
        AttentionInterface.register(name, OURS[name])
        AttentionMaskInterface.register(name, sdpa_mask)
    is_text_model = model.config.get_text_config(decoder=True) is model.config
    model.set_attn_implementation(name if is_text_model else {"text_config": name})
    (use_graphs if name == FUSED and graphs else stop_graphs)(model)

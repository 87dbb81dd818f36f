"""Evaluation of low-bit key/value caches for video language models.

Letters, used for tensor shapes in the whole package:
    B batch, H key/value heads, HQ query heads, T tokens, D head width, C channels (D or a part of it),
    G blocks of tokens, M groups in a block, S group size (elements that share a scale).

Units: bits are per element of keys or values; bytes are bytes; durations are seconds.
"""

"""All operations."""

from vidkv_kernels import attend, choose_channels, quantize_keys, quantize_values

OPS = (attend.OP, choose_channels.OP, quantize_keys.OP, quantize_values.OP)

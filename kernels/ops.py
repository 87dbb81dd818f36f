"""All operations."""

from vidkv_kernels import attend, quantize_values

OPS = (attend.OP, quantize_values.OP)

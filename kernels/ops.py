"""All operations."""

from vidkv_kernels import attend

OPS = (attend.OP,)

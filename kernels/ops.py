"""All operations."""

from vidkv_kernels import attend, choose_channels, fit_codes, fit_metadata, quantize_keys, quantize_values

OPS = (attend.OP, choose_channels.OP, fit_codes.OP, fit_metadata.OP, quantize_keys.OP, quantize_values.OP)

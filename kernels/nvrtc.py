"""Compile CUDA C++ at its first use and keep the result on disk, so that users need no CUDA toolkit.

The libraries come with PyTorch's CUDA builds, or with the extra `cuda` of this project.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

CACHE_VARIABLE = "VIDKV_KERNEL_CACHE"


class KernelError(RuntimeError):
    """A kernel that cannot be compiled, loaded or launched."""


def cache_folder() -> Path:
    """Return the folder of compiled kernels: $VIDKV_KERNEL_CACHE, or vidkv_kernels in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vidkv_kernels"


def compile_kernels(source: str, constants: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Return machine code for one compute capability, from the cache if it was compiled before.

    Args:
        source: CUDA C++.
        constants: defined as macros.
        capability: of the device, such as (9, 0).
    Raises:
        KernelError: the compiler is missing, or refuses the source; its log is in the message.
    """
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", "--device-as-default-execution-space"]
    options += [f"--define-macro={name}={value}" for name, value in sorted(constants.items())]
    nvrtc = _bindings("nvrtc")
    version = _check(nvrtc.nvrtcVersion(), "the version of NVRTC")
    key = hashlib.sha256("\0".join([source, *options, str(version)]).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    code = _compile(nvrtc, source, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under its final name only when complete, because other processes may compile the same.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(code)
    os.replace(file.name, path)
    return code


@functools.cache
def is_available() -> bool:
    """Whether the compiler can be called: `cuda-bindings` is installed and finds NVRTC."""
    try:
        _check(_bindings("nvrtc").nvrtcVersion(), "the version of NVRTC")
    except (KernelError, RuntimeError):
        return False
    return True


def load(code: bytes) -> Any:
    """Load machine code into the current CUDA context and return the module."""
    return _check(_bindings("driver").cuModuleLoadData(code), "loading a kernel")


def function(module: Any, name: str, shared_bytes: int = 0) -> Any:
    """Return a kernel of a module, allowed to use so much dynamic shared memory."""
    driver = _bindings("driver")
    found = _check(driver.cuModuleGetFunction(module, name.encode()), f"kernel {name}")
    if shared_bytes > 48 * 1024:
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(found, limit, shared_bytes), f"{shared_bytes} bytes of shared memory for kernel {name}")
    return found


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Return the address of a tensor as a kernel argument; None is a null pointer."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Launch:
    """A kernel with all that a launch needs, made once, because describing a launch takes longer than to start it.

    Args:
        grid: blocks in x, y and z.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        arguments: ctypes values, one for each parameter. Their `value` may be changed between calls.
        is_early: let the kernel start before the one in front of it has ended; it must wait for it where it needs to.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], threads: int, shared_bytes: int, arguments: tuple, *, is_early: bool = False
    ):
        driver = _bindings("driver")
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        if is_early:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        self._kernel, self._config, self._arguments = kernel, config, arguments
        self._places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        self._launch, self._first_place = driver.cuLaunchKernelEx, ctypes.addressof(self._places)

    def __call__(self, stream: int) -> None:
        """Launch on the stream of this handle."""
        self._config.hStream = stream
        (status,) = self._launch(self._config, self._kernel, self._first_place, 0)
        if status:
            raise KernelError(f"a kernel launch failed: {status.name}")


@functools.cache
def _bindings(name: str) -> ModuleType:
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        advice = "install the extra: pip install 'vidkv-eval[cuda]'"
        raise KernelError(f"kernels in CUDA C++ need cuda-bindings and NVRTC; {advice}") from error
    return {"driver": driver, "nvrtc": nvrtc}[name]


def _check(result: tuple, what: str) -> Any:
    status, *values = result
    if int(status):
        raise KernelError(f"{what} failed: {status.name if hasattr(status, 'name') else status}")
    return values[0] if len(values) == 1 else tuple(values)


def _compile(nvrtc: ModuleType, source: str, options: list[str]) -> bytes:
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []), "starting a compilation")
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if int(status):
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "the log of a compilation")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise KernelError(f"NVRTC refuses the source with {' '.join(options)}:\n{log.decode(errors='replace')}")
    code = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "the size of a kernel")
    _check(nvrtc.nvrtcGetCUBIN(program, code), "reading a compiled kernel")
    nvrtc.nvrtcDestroyProgram(program)
    return code

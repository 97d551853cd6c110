"""Which devices a model can be compiled for here."""

from __future__ import annotations

import ctypes
import sys

from onnxjit.errors import DeviceError

DEVICES = ("auto", "cpu", "cuda")


def resolve(device: str) -> str:
    """The device that `device` ("auto", "cpu" or "cuda") means here. Raises `DeviceError`."""
    if device not in DEVICES:
        raise DeviceError(f"device is {device!r}; it takes one of {', '.join(DEVICES)}")
    if device == "cuda":
        if not cuda_devices():
            raise DeviceError(
                "device='cuda' was asked for, but this machine has no CUDA device that its driver "
                "can see; use device='cpu' or 'auto'"
            )
        raise DeviceError(
            "this version of onnxjit emits CUDA kernels but does not run models on them yet; use "
            "device='cpu' or 'auto'"
        )
    return "cpu"


def cuda_devices() -> int:
    """How many CUDA devices the driver sees; 0 without a driver."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
        count = ctypes.c_int(0)
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value

"""The NVIDIA device of this process, or the reason why there is none. torch is imported when it is looked for."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engines.errors import BackendError

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_INSTEAD = "or use --backend openvino"


@dataclass(frozen=True)
class Device:
    """A GPU. name: its product, ``NVIDIA H100 80GB HBM3``; capability: (9, 0); driver: its version."""

    name: str
    capability: tuple[int, int]
    driver: str

    def __str__(self) -> str:
        """Everything compiled code depends on, as cache keys spell it."""
        major, minor = self.capability
        return f"{self.name} sm_{major}{minor}, driver {self.driver}"


def find_device() -> Device:
    """The current CUDA device. Raises: BackendError saying what is missing and what to do."""
    torch = _torch()
    if torch.version.cuda is None:
        raise BackendError(
            f"torch {torch.__version__} is a build without CUDA, and a GPU's buffers are torch's: "
            f"install a CUDA build of torch, {_INSTEAD}."
        )
    if not torch.cuda.is_available():
        _check_driver(torch)
        raise BackendError(
            "No NVIDIA GPU is visible to this process: check nvidia-smi, that the container was given the GPU, "
            f"and CUDA_VISIBLE_DEVICES, {_INSTEAD}."
        )
    return Device(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), _driver(torch))


def says_out_of_memory(reason: object) -> bool:
    """Whether an error is one of the device's memory: torch, CUDA, its libraries and TensorRT agree on no type."""
    words = str(reason).lower().replace(" ", "")
    return "outofmemory" in words or "alloc_failed" in words


def memory_in_use() -> int:
    """Bytes of the current device's memory that are taken, by whatever process.

    The device is asked, for TensorRT allocates beside torch. What torch holds in reserve is given back before, so
    it is what stays taken between calls. Raises: BackendError when there is no device.
    """
    find_device()
    cuda = _torch().cuda
    gc.collect()
    cuda.empty_cache()
    free, total = cuda.mem_get_info()
    return int(total - free)


def _torch() -> Any:
    if find_spec("torch") is None:
        raise BackendError(
            "A GPU's buffers are torch's, which is not installed: pip install -e '.[torch]' in the checkout, "
            f"{_INSTEAD}."
        )
    return import_module("torch")


def _check_driver(torch: Any) -> None:
    """Raises: BackendError where torch sees no GPU because the driver is older than the CUDA torch is built for."""
    spoken, built = torch._C._cuda_getDriverVersion(), torch.version.cuda  # 12040 is CUDA 12.4; 0 without a driver
    if 0 < spoken // 1000 < int(built.partition(".")[0]):
        raise BackendError(
            f"The NVIDIA driver speaks CUDA {spoken // 1000}.{spoken % 1000 // 10}, torch {torch.__version__} is "
            f"built for CUDA {built}: install a newer driver, or a build of torch for CUDA {spoken // 1000}, "
            f"{_INSTEAD}."
        )


def _driver(torch: Any) -> str:
    """The driver's version, or the newest CUDA that it speaks where the system does not tell.

    The file's first line reads ``NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  …``.
    """
    try:
        words = _DRIVER_FILE.read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        words = []
    version = next((word for word in words if word[0].isdigit() and "." in word), None)
    return version or f"of CUDA {torch._C._cuda_getDriverVersion()}"

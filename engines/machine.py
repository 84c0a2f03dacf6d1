"""What this process runs on, as benchmarks print it and cache keys spell it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# As Linux spells them: one virtual machine of a processor may have units that another's hides.
_AVX = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
_AMX = ("amx_int8", "amx_bf16", "amx_fp16")
_ARM = ("asimd", "asimddp", "sve", "i8mm", "bf16")
_KERNEL_FLAGS = (*_AVX, *_AMX, *_ARM)


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    return _cpuinfo("model name") or platform.machine()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def machine_name() -> str:
    """Processor, its instruction sets that engines choose kernels by, and cores: ``Xeon … amx_bf16, 2 cores``."""
    return f"{cpu_name()} {_kernel_flags()}, {cores()} cores"


def _kernel_flags() -> str:
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return " ".join(flag for flag in _KERNEL_FLAGS if flag in flags) or "generic"


def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, empty where there is none.

    The platform module would start a process to find out.
    """
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return ""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), "")

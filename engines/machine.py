"""What this process runs on, as benchmarks print it and cache keys spell it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def machine_name() -> str:
    """Processor, its instruction sets that engines choose kernels by, and cores: ``Xeon … amx_bf16, 2 cores``."""
    return f"{cpu_name()} {_kernel_flags()}, {cores()} cores"


def _kernel_flags() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    flags = set(next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd")
    return " ".join(flag for flag in known if flag in flags) or "generic"

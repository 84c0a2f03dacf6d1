"""What this process runs on, as benchmarks print it and cache keys spell it."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

# As Linux spells them: one virtual machine of a processor may have units that another's hides.
_AVX = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
_AMX = ("amx_int8", "amx_bf16", "amx_fp16")
_ARM = ("asimd", "asimddp", "sve", "i8mm", "bf16")
_KERNEL_FLAGS = (*_AVX, *_AMX, *_ARM)


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    return _cpuinfo("model name") or platform.machine()


def cores() -> int:
    """Cores this process may use: those it may run on, and no more than a container's CPU limit pays for."""
    return min(_seen(), _paid() or _seen())


def limited_threads() -> int:
    """Threads for a library that counts the cores it sees; 0, to let it, where no CPU limit allows fewer."""
    return cores() if cores() < _seen() else 0


def _seen() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _paid() -> int | None:
    """Whole cores of the CPU quota of this process's control group or one above it; None where there is none.

    A process with more threads than that is stopped for the rest of each period. Source: cgroups(7), v1 and v2.
    """
    found = [quota for folder in _groups() if (quota := _quota(folder)) is not None]
    return min(found, default=None)


def _groups() -> Iterator[Path]:
    """Folders of the groups that may hold a quota, as this process sees them."""
    own = PROC / "self/cgroup"
    lines = own.read_text(encoding="ascii", errors="replace").splitlines() if own.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers or "cpu" in controllers.split(","):
            root = CGROUPS if not controllers else CGROUPS / "cpu"
            inside = root / path.lstrip("/")
            yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(root))


def _quota(folder: Path) -> int | None:
    """Of one group, in whole cores."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / file).read_text(encoding="ascii") for file in files).split()
        except (OSError, ValueError):
            continue
        return None if quota in ("max", "-1") else math.ceil(int(quota) / int(period))
    return None


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
    file = PROC / "cpuinfo"
    if not file.is_file():
        return ""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), "")

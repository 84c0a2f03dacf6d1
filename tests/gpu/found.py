"""What a bench run has found so far, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from engines.backends.load import ON_GPU, BackendName
from engines.device_memory import DeviceMemory
from tests.gpu.architectures import Graph

STEPS = 4
DECODES: tuple[Graph, ...] = ("decode", "decode_tiny")
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
Figures = dict[str, dict[str, dict[int, float]]]
"""Milliseconds by contender, graph and batch size."""


@dataclass
class Found:
    """What a run has found so far, of the contenders on ``device``.

    device_mb: by contender and graph, what it took of the GPU's memory for all batch sizes and keeps between calls;
    empty on a CPU. failures: what is missing, and why.
    """

    device: BackendName
    engines: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    ms: Figures = field(default_factory=dict)
    device_mb: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def torch_device(self) -> str:
        return "cuda" if self.device in ON_GPU else "cpu"

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Say that this begins. Where it fails, keep the reason and go on."""
        err.print(f"{time.monotonic() - self.started:6.0f} s  {what}")
        try:
            yield
        except Exception as error:  # torch and the libraries raise what they like
            self.failures[what] = f"{type(error).__name__}: {error}"
            err.print(f"FAILED: {what}: {self.failures[what]}")

    @contextmanager
    def memory_of(self, contender: str, graph: str) -> Iterator[None]:
        """What this takes of the device's memory counts as the contender's."""
        memory = DeviceMemory(self.device)
        yield
        if (taken := memory.taken_mb()) is not None:
            graphs = self.device_mb.setdefault(contender, {})
            graphs[graph] = graphs.get(graph, 0.0) + taken

    def of(self, graph: str) -> dict[str, Any]:
        """ms and device_mb of one graph."""
        kept = {"ms": self.ms, "device_mb": self.device_mb}
        return {
            "graph": graph,
            **{key: {name: of[graph] for name, of in found.items() if graph in of} for key, found in kept.items()},
        }


def summary(found: Found, flops: int) -> dict[str, Any]:
    """Everything found, and what follows from it as far as it is there. flops: of a row's step."""
    steps = {name: graphs["step"] for name, graphs in found.ms.items() if "step" in graphs}
    best = found.ceilings.get("matmul_tflop_s")
    return {
        "engines": found.engines,
        "step_tflop": flops / 1e12,
        "ceilings": found.ceilings,
        "ms": found.ms,
        "device_mb": found.device_mb or None,
        "step_fraction": {
            name: {r: r * flops / (taken * 1e9) / best for r, taken in step.items()}
            for name, step in steps.items()
            if best is not None
        },
        "images_per_s": {
            name: {
                decode: {
                    r: 1e3 * r / (STEPS * taken + found.ms[name][decode][r])
                    for r, taken in step.items()
                    if r in found.ms[name][decode]
                }
                for decode in DECODES
                if decode in found.ms[name]
            }
            for name, step in steps.items()
        },
        "failures": found.failures,
    }

"""Where what was built or measured for a graph on this machine is kept: a folder outside the bundle, by key.

A bundle is the same everywhere; an engine, and what it costs, belong to one machine and one version. Nothing
under a key is ever taken from elsewhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from pathlib import Path

DEFAULT_CACHE = Path("~/.cache/halfstep")
"""Where ``python -m engines build`` keeps engines and the server looks for them; ``~`` is still to be expanded."""


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on. engine: backend, version and precision; threads: 0 for one per core.

    size: of images, for what is measured of an engine at one of the sizes it takes; else empty.
    """

    graph_sha256: str
    engine: str
    machine: str
    threads: int
    size: str = ""

    def folder(self, cache_dir: Path) -> Path:
        """This key's folder under the cache; it need not exist."""
        text = "\n".join(str(part) for part in astuple(self) if part != "")
        return cache_dir / hashlib.sha256(text.encode()).hexdigest()[:32]

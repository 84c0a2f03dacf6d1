"""Where what was built or measured for a graph on this machine is kept: a folder outside the bundle, by key.

A bundle is the same everywhere; an engine, and what it costs, belong to one machine and one version. Nothing
under a key is ever taken from elsewhere.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

from engines.errors import BackendError

DEFAULT_CACHE = Path("~/.cache/halfstep")
"""Where ``python -m engines build`` keeps engines and the server looks for them; ``~`` is still to be expanded."""


_TRIED_BYTES = 64 * 1024
"""Written to see whether anything can be: a full disk takes empty files."""


def open_cache(folder: Path) -> Path:
    """The folder, made and with ``~`` expanded. Raises: BackendError when nothing can be kept in it."""
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED_BYTES))
            file.flush()
    except (OSError, RuntimeError) as error:  # the latter: this user has no home
        raise BackendError(f"nothing can be kept in {folder}: {error}; choose another cache") from error
    return folder


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on. engine: backend, version and precision; threads: 0 for one per core.

    size: of images, for what is measured of an engine at one of the sizes it takes; else empty. source: hash of our
    code that made it, where the library is not told all by the graph; else empty.
    """

    graph_sha256: str
    engine: str
    machine: str
    threads: int
    size: str = ""
    source: str = ""

    def folder(self, cache_dir: Path) -> Path:
        """This key's folder under the cache; it need not exist."""
        text = "\n".join(str(part) for part in astuple(self) if part != "")
        return cache_dir / hashlib.sha256(text.encode()).hexdigest()[:32]

"""Run a command as a container would: uid 65534, no new privileges, project folder read-only, loopback only.

    python tests/deploy/confine.py python -m pytest tests/e2e -p no:cacheprovider

Needs root and util-linux on Linux; nothing outside the new mount and network namespaces changes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
INSIDE = "--inside"
PR_SET_NO_NEW_PRIVS = 38
SIOCSIFFLAGS = 0x8914
IFF_UP = 1


def reason_not_to() -> str:
    """Why a command cannot be confined here, or an empty text."""
    if os.getuid() != 0:
        return "only root can become another user"
    if shutil.which("unshare") is None:
        return "util-linux is not installed"
    tried = subprocess.run(["unshare", "--mount", "--net", "true"], check=False, capture_output=True)
    return "this machine forbids new namespaces" if tried.returncode else ""


def confined(*command: str) -> list[str]:
    """The command line that runs a command confined."""
    return ["unshare", "--mount", "--net", sys.executable, __file__, INSIDE, *command]


def _inside(command: list[str]) -> None:
    _mount("--bind", str(ROOT), str(ROOT))
    _mount("-o", "remount,ro,bind", str(ROOT))
    _open_ways_to({ROOT, Path(sys.base_prefix), Path(sys.prefix).resolve()})
    _loopback_up()
    os.chdir(ROOT)
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with tempfile.TemporaryDirectory(prefix="nobody-") as home:
        env = {**os.environ, "HOME": home, "PYTHONDONTWRITEBYTECODE": "1"}
        sys.exit(subprocess.run(command, env=env, check=False).returncode)


def _open_ways_to(needed: set[Path]) -> None:
    """Interpreters often lie in root's home: cover each folder nobody may enter, but for what is needed of it."""
    behind = {path: gate for path in needed if (gate := _closed_gate(path))}
    stash = Path(tempfile.mkdtemp())
    for number, path in enumerate(behind):
        (stash / str(number)).mkdir()
        _mount("--bind", str(path), str(stash / str(number)))
    for gate in set(behind.values()):
        _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(gate))
    for number, path in enumerate(behind):
        path.mkdir(parents=True, exist_ok=True)
        _mount("--bind", str(stash / str(number)), str(path))
    stash.chmod(0o700)


def _closed_gate(path: Path) -> Path | None:
    """The outermost folder on the way to ``path`` that others may not enter."""
    return next((p for p in reversed(path.parents) if not p.stat().st_mode & stat.S_IXOTH), None)


def _loopback_up() -> None:
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [INSIDE]:
        _inside(sys.argv[2:])
    elif reason := reason_not_to():
        sys.exit(f"error: {reason}")
    else:
        os.execvp("unshare", confined(*sys.argv[1:]))

"""``python -m server`` with leaks planted: a prompt in its log, a key in its metrics, a prompt in its traces."""

from __future__ import annotations

from typing import Any

import structlog

from server.auth import Caller, Keyring
from server.cli import app
from server.service import Service

_caller, _submit = Keyring.caller, Service._submit


def _caller_logged(self: Keyring, presented: str) -> Caller:
    structlog.get_logger().info("caller", presented=presented)
    return _caller(self, presented)


async def _submit_logged(self: Service, request: Any, *rest: Any) -> Any:
    self.metrics.rejected.labels(request.prompt).inc()
    return await _submit(self, request, *rest)


if __name__ == "__main__":
    Keyring.caller = _caller_logged  # type: ignore[method-assign]
    Service._submit = _submit_logged  # type: ignore[method-assign]
    app()

"""``python -m server``: flags over environment over defaults, one clear sentence for an error."""

from __future__ import annotations

import signal
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import structlog
import typer
from rich.console import Console

from engines.errors import HalfstepError
from server import flags
from server.generate_cli import generate
from server.keys_cli import keys_app
from server.logs import configure_logs
from server.plan_cli import plan
from server.renewal import heed_early
from server.settings import unknown_variables
from server.tracing import start_tracing

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_log = structlog.get_logger()
_err = Console(stderr=True, highlight=False, soft_wrap=True)

app.add_typer(keys_app, name="keys")
app.command()(generate)
app.command()(plan)


@app.callback()
def main() -> None:
    """Serve few-step diffusion models over HTTP."""


@app.command()
def serve(
    bundle: flags.Bundles = None,
    host: flags.Host = None,
    port: flags.Port = None,
    backend: flags.Backend = None,
    start_backend: flags.StartBackend = None,
    precision: flags.Precision = None,
    threads: flags.Threads = None,
    rungs: flags.Rungs = None,
    cache_dir: flags.CacheDir = None,
    max_queue_s: flags.MaxQueue = None,
    isolate_engine: flags.Isolate = None,
    api_keys: flags.ApiKeys = None,
    drain_timeout_s: flags.DrainTimeout = None,
    log_level: flags.LogLevel = None,
) -> None:
    """API and worker in one process, jobs in memory; ends after accepted work on SIGTERM or Ctrl-C."""
    _run("serve", bundles=bundle or None, **_given(locals()))


@app.command()
def api(
    redis: flags.RedisUrl = None,
    bundle: flags.Bundles = None,
    host: flags.Host = None,
    port: flags.Port = None,
    metrics_port: flags.MetricsPort = None,
    max_queue_s: flags.MaxQueue = None,
    api_keys: flags.ApiKeys = None,
    drain_timeout_s: flags.DrainTimeout = None,
    log_level: flags.LogLevel = None,
) -> None:
    """The HTTP API alone: jobs go to workers through Redis. Any number of them share one Redis."""
    _run("api", bundles=bundle or None, **_given(locals()))


@app.command()
def worker(
    redis: flags.RedisUrl = None,
    bundle: flags.Bundles = None,
    host: flags.Host = None,
    metrics_port: flags.MetricsPort = None,
    backend: flags.Backend = None,
    start_backend: flags.StartBackend = None,
    precision: flags.Precision = None,
    threads: flags.Threads = None,
    rungs: flags.Rungs = None,
    cache_dir: flags.CacheDir = None,
    drain_timeout_s: flags.DrainTimeout = None,
    log_level: flags.LogLevel = None,
) -> None:
    """A worker alone: takes jobs of its models from Redis; its engine runs in a process of its own."""
    _run("worker", bundles=bundle or None, **_given(locals()))


@app.command()
def settings() -> None:
    """Print all settings with their variables, flags, limits and defaults, as Markdown."""
    from server.settings_page import settings_page  # noqa: PLC0415 - of this command alone

    typer.echo(settings_page(app), nl=False)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "bundle"}


def _run(command: str, **given: Any) -> None:
    """Imports late, so that --help and wrong settings answer at once."""
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGTERM, _leave)  # until the server has handlers of its own
    heed_early()
    try:
        chosen = flags.read_settings(**given)
        configure_logs(chosen.log_level)
        if unknown := unknown_variables():
            _log.warning("settings_unknown", variables=unknown)
        if chosen.traces_endpoint is not None:
            start_tracing(chosen.traces_endpoint, command)
        fault = getattr(import_module("server.start"), command)(chosen)
    except HalfstepError as error:
        _fail(str(error))
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if fault:
        _fail(fault)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Nothing was accepted yet. The first process of a container hears no SIGTERM without a handler."""
    raise SystemExit(0)


def _fail(message: str) -> None:
    _err.print(f"Error: {message}", markup=False)
    raise typer.Exit(1)

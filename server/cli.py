"""``python -m server``: flags over environment over defaults, one clear sentence for an error."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from engines.errors import HalfstepError
from server.generate_cli import generate
from server.keys_cli import keys_app
from server.logs import configure_logs
from server.settings import Settings
from server.tracing import start_tracing

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def _option(field: str, *flags: str) -> Any:
    """A flag that overrides one setting; its help is the setting's."""
    info = Settings.model_fields[field]
    default = info.default
    if field == "bundles":
        default = "server/bundles/default"
    text = f"{info.description} (env HALFSTEP_{field.upper()})"  # in brackets it would be markup
    return typer.Option(*flags, help=text, show_default=str(default))


app.add_typer(keys_app, name="keys")
app.command()(generate)


@app.callback()
def main() -> None:
    """Serve few-step diffusion models over HTTP."""


Bundles = Annotated[list[Path] | None, _option("bundles", "--bundle")]
Host = Annotated[str | None, _option("host", "--host")]
Port = Annotated[int | None, _option("port", "--port")]
Backend = Annotated[str | None, _option("backend", "--backend")]
Precision = Annotated[str | None, _option("precision", "--precision")]
Threads = Annotated[int | None, _option("threads", "--threads")]
CacheDir = Annotated[Path | None, _option("cache_dir", "--cache-dir")]
MaxQueue = Annotated[float | None, _option("max_queue_s", "--max-queue-s")]
DrainTimeout = Annotated[float | None, _option("drain_timeout_s", "--drain-timeout-s")]
LogLevel = Annotated[str | None, _option("log_level", "--log-level")]
ApiKeys = Annotated[Path | None, _option("api_keys", "--api-keys")]
RedisUrl = Annotated[str | None, _option("redis", "--redis")]
MetricsPort = Annotated[int | None, _option("metrics_port", "--metrics-port")]
Isolate = Annotated[bool | None, _option("isolate_engine", "--isolate-engine/--no-isolate-engine")]


@app.command()
def serve(
    bundle: Bundles = None,
    host: Host = None,
    port: Port = None,
    backend: Backend = None,
    precision: Precision = None,
    threads: Threads = None,
    cache_dir: CacheDir = None,
    max_queue_s: MaxQueue = None,
    isolate_engine: Isolate = None,
    api_keys: ApiKeys = None,
    drain_timeout_s: DrainTimeout = None,
    log_level: LogLevel = None,
) -> None:
    """API and worker in one process, jobs in memory; ends after accepted work on SIGTERM or Ctrl-C."""
    _run("serve", bundles=bundle or None, **_given(locals()))


@app.command()
def api(
    redis: RedisUrl = None,
    bundle: Bundles = None,
    host: Host = None,
    port: Port = None,
    metrics_port: MetricsPort = None,
    max_queue_s: MaxQueue = None,
    api_keys: ApiKeys = None,
    drain_timeout_s: DrainTimeout = None,
    log_level: LogLevel = None,
) -> None:
    """The HTTP API alone: jobs go to workers through Redis. Any number of them share one Redis."""
    _run("api", bundles=bundle or None, **_given(locals()))


@app.command()
def worker(
    redis: RedisUrl = None,
    bundle: Bundles = None,
    host: Host = None,
    metrics_port: MetricsPort = None,
    backend: Backend = None,
    precision: Precision = None,
    threads: Threads = None,
    cache_dir: CacheDir = None,
    drain_timeout_s: DrainTimeout = None,
    log_level: LogLevel = None,
) -> None:
    """A worker alone: takes jobs of its models from Redis; its engine runs in a process of its own."""
    _run("worker", bundles=bundle or None, **_given(locals()))


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "bundle"}


def _run(command: str, **flags: Any) -> None:
    """Imports late, so that --help and wrong settings answer at once."""
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
        configure_logs(settings.log_level)
        if settings.traces_endpoint is not None:
            start_tracing(settings.traces_endpoint, command)
        fault = getattr(import_module("server.start"), command)(settings)
    except ValidationError as error:
        _fail(_wrong_setting(error))
    except HalfstepError as error:
        _fail(str(error))
    if fault:
        _fail(fault)


def _wrong_setting(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    name, message = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
    return f"The setting {name} (HALFSTEP_{name.upper()}) is wrong: {message}."


def _fail(message: str) -> None:
    _err.print(f"Error: {message}", markup=False)
    raise typer.Exit(1)

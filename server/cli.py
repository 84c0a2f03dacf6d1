"""``python -m server``: flags over environment over defaults, one clear sentence for an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from engines.errors import HalfstepError
from server.logs import configure_logs
from server.settings import Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def _option(field: str, *flags: str) -> Any:
    """A flag that overrides one setting; its help is the setting's."""
    info = Settings.model_fields[field]
    default = info.default
    if field == "bundles":
        default = "server/bundles/default"
    text = f"{info.description} [env HALFSTEP_{field.upper()}]"
    return typer.Option(*flags, help=text, show_default=str(default))


@app.callback()
def main() -> None:
    """Serve few-step diffusion models over HTTP."""


@app.command()
def serve(
    bundle: Annotated[list[Path] | None, _option("bundles", "--bundle")] = None,
    host: Annotated[str | None, _option("host", "--host")] = None,
    port: Annotated[int | None, _option("port", "--port")] = None,
    backend: Annotated[str | None, _option("backend", "--backend")] = None,
    precision: Annotated[str | None, _option("precision", "--precision")] = None,
    threads: Annotated[int | None, _option("threads", "--threads")] = None,
    cache_dir: Annotated[Path | None, _option("cache_dir", "--cache-dir")] = None,
    max_queue_s: Annotated[float | None, _option("max_queue_s", "--max-queue-s")] = None,
    drain_timeout_s: Annotated[float | None, _option("drain_timeout_s", "--drain-timeout-s")] = None,
    log_level: Annotated[str | None, _option("log_level", "--log-level")] = None,
) -> None:
    """API and worker in one process, jobs in memory; ends after accepted work on SIGTERM or Ctrl-C."""
    flags: dict[str, Any] = {
        "bundles": bundle or None,
        "host": host,
        "port": port,
        "backend": backend,
        "precision": precision,
        "threads": threads,
        "cache_dir": cache_dir,
        "max_queue_s": max_queue_s,
        "drain_timeout_s": drain_timeout_s,
        "log_level": log_level,
    }
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
        fault = _serve(settings)
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


def _serve(settings: Settings) -> str | None:
    """What went wrong after the start, if anything did.

    Imports late, so that --help and wrong settings answer at once.
    """
    from server.loading import build_service, load_pipelines  # noqa: PLC0415
    from server.process import Process, bind  # noqa: PLC0415

    configure_logs(settings.log_level)
    sock = bind(settings.host, settings.port)
    with _err.status("Loading and warming the models"):
        pipelines = load_pipelines(settings)
    service = build_service(settings, pipelines)
    names = ", ".join(f"{name} on {pipeline.engine_name}" for name, pipeline in pipelines.items())
    prompt = service.catalogue.default.tokenizer.known()[0]
    process = Process(service, pipelines, sock, lambda url: _announce(url, names, prompt))
    return process.run_until_told()


def _announce(url: str, names: str, prompt: str) -> None:
    _out.print(f"Serving {names}", markup=False)
    _out.print(f"Playground  {url}/\nReference   {url}/docs\nTry it:", markup=False)
    body = f"-H 'Content-Type: application/json' -d '{{\"prompt\": \"{prompt}\"}}'"
    _out.print(
        f"  curl -s {url}/v1/images/generations {body}"
        " | python3 -c 'import base64, json, sys;"
        ' open("image.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\'',
        markup=False,
    )


def _fail(message: str) -> None:
    _err.print(f"Error: {message}", markup=False)
    raise typer.Exit(1)

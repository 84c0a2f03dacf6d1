"""``python -m server keys``: make, list and revoke API keys, and tell what verifies a tenant's webhooks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from engines.errors import HalfstepError
from server.auth import KeyFile, Scope, new_key, read_keys, write_keys
from server.flags import read_settings
from server.jobs import DEFAULT_TENANT
from server.signing import Signer

ParametersT = ParamSpec("ParametersT")

keys_app = typer.Typer(no_args_is_help=True, help="API keys: make, list, revoke; webhook secrets.")
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)

_FileOption = Annotated[
    Path | None, typer.Option("--api-keys", help="file of the keys' hashes (env HALFSTEP_API_KEYS)")
]


def _one_sentence(command: Callable[ParametersT, None]) -> Callable[ParametersT, None]:
    @wraps(command)
    def run(*args: ParametersT.args, **kwargs: ParametersT.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except HalfstepError as error:  # of the settings or the file
            _fail(str(error))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            _fail(f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}.")

    return run


@keys_app.command()
@_one_sentence
def new(
    tenant: Annotated[str, typer.Option(help="whose key: letters, digits, dot, dash, underscore")],
    scope: Annotated[
        list[Scope] | None, typer.Option(help="may be repeated", show_default="generate, read")
    ] = None,
    expires_days: Annotated[
        float | None, typer.Option(min=0, help="days until it expires", show_default="never")
    ] = None,
    rate: Annotated[str | None, typer.Option(help="requests that generate, such as 60/minute")] = None,
    quota: Annotated[str | None, typer.Option(help="images of its tenant, such as 1000/day")] = None,
    api_keys: _FileOption = None,
) -> None:
    """Make a key, keep its hash, and print the key, which cannot be shown again."""
    path = _file(api_keys)
    expires = None if expires_days is None else _in_days(expires_days)
    key, kept = new_key(tenant, scope or [Scope.GENERATE, Scope.READ], expires, rate, quota)
    keys = read_keys(path).keys if path.exists() else ()
    write_keys(path, KeyFile(keys=(*keys, kept)))
    _out.print(key, markup=False)


@keys_app.command(name="list")
@_one_sentence
def list_keys(api_keys: _FileOption = None) -> None:
    """Show whose keys there are. The keys themselves are not kept anywhere."""
    table = Table("id", "tenant", "scopes", "created", "expires", "rate", "quota")
    for key in read_keys(_file(api_keys)).keys:
        expires = "never" if key.expires is None else f"{key.expires:%Y-%m-%d %H:%M}"
        cells = (key.id, key.tenant, ", ".join(sorted(key.scopes)), f"{key.created:%Y-%m-%d %H:%M}", expires)
        table.add_row(*cells, key.rate or "", key.quota or "")
    _out.print(table)


@keys_app.command()
@_one_sentence
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="as `keys list` shows it")],
    api_keys: _FileOption = None,
) -> None:
    """Remove a key; running servers refuse it from their next request on."""
    path = _file(api_keys)
    keys = read_keys(path).keys
    left = tuple(key for key in keys if key.id != key_id)
    if len(left) == len(keys):
        _fail(f"There is no key with this id in {path}.")
    write_keys(path, KeyFile(keys=left))


@keys_app.command()
@_one_sentence
def webhook_secret(
    tenant: Annotated[
        str, typer.Option(help="of the jobs; where no keys are asked for, leave it out")
    ] = DEFAULT_TENANT,
    api_keys: _FileOption = None,
) -> None:
    """Print the secret by which a tenant's receivers verify webhooks. It follows from HALFSTEP_SECRET."""
    settings = read_settings()
    secret, path = settings.secret.get_secret_value(), api_keys or settings.api_keys
    if not secret:
        _fail("The webhook secret follows from HALFSTEP_SECRET: set that to what the API processes have.")
    tenants = {DEFAULT_TENANT} if path is None else {key.tenant for key in read_keys(path).keys}
    if tenant not in tenants:
        there = f"in {path}" if path else "without a file of API keys (--api-keys FILE, or HALFSTEP_API_KEYS)"
        _fail(f"There is no tenant {tenant} {there}, but {', '.join(sorted(tenants)) or 'none at all'}.")
    _out.print(Signer(secret).webhook_secret(tenant), markup=False)


def _in_days(days: float) -> datetime:
    try:
        return datetime.now(UTC) + timedelta(days=days)
    except OverflowError:
        _fail("--expires-days ends beyond the calendar; leave it out for a key that never expires.")


def _file(given: Path | None) -> Path:
    path = given or read_settings().api_keys
    if path is None:
        _fail("Name the file of API keys with --api-keys FILE, or in HALFSTEP_API_KEYS.")
    return path


def _fail(message: str) -> NoReturn:
    _err.print(f"Error: {message}", markup=False)
    raise typer.Exit(1)

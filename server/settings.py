"""The one reader of the environment: every variable starts with HALFSTEP_; command-line flags win over it.

The first sentence of a description is the help of its flag; all of it stands in docs/configuration.md, which
``server.settings_page`` makes.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engines.backends.base import RUNGS
from engines.cache import DEFAULT_CACHE
from server.auth import check_rate
from server.jobs import HEARTBEAT_S
from server.storage import is_folder
from server.webhooks import check_allowed

DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "emoji"
DEFAULT_NAME = f"server/bundles/{DEFAULT_BUNDLE.name}"
"""How help and pages call it, wherever it is installed."""

MIN_SECRET_CHARS = 24
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+")

PREFIX = "HALFSTEP_"
CLIENT_KEY = "HALFSTEP_API_KEY"
"""What the playground's curl lines read; a client's, no setting."""


class Settings(BaseSettings):
    """How this process serves. Units stand in the names."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    # ---- models and engines
    bundles: Annotated[tuple[Path, ...], NoDecode] = Field(
        (DEFAULT_BUNDLE,),
        min_length=1,
        description="folders of the models to serve. The first model is the default one. In the environment "
        "several stand with `:` between them (`;` on Windows), or as a JSON list.",
    )
    bundle_key: Path | None = Field(
        None,
        description="public key (PEM) that every bundle must be signed with, see "
        "[signed bundles](deploying.md#signed-bundles). Without one, signatures are not looked at.",
    )
    backend: Literal["auto", "openvino", "onnxruntime", "torch", "tensorrt", "torch-cuda", "torch-inductor"] = (
        Field("auto", description="engine to run on. See [engines](engines.md#backends-and-precision).")
    )
    start_backend: Literal["openvino", "onnxruntime", "torch", "torch-cuda"] | None = Field(
        None,
        description="engine to serve on while `backend` is built beside it, and to fall back to. Without one, "
        "nothing is served before `backend` is ready; see [serve now, faster later]"
        "(engines.md#serve-now-faster-later).",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the network body")
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads of one engine run; 0 takes one per core, of those a CPU limit allows",
    )
    rungs: Annotated[tuple[Annotated[int, Field(ge=1)], ...], NoDecode] = Field(
        RUNGS,
        min_length=1,
        description="batch sizes an engine is made ready for, ascending from 1. See [costs and batch sizes]"
        "(engines.md#costs-and-batch-sizes); `python -m engines build` needs the same. Those beyond the first that "
        "holds `max_rows` bring nothing.",
    )
    cache_dir: Path | None = Field(
        DEFAULT_CACHE,
        description="folder for compiled engines and costs, or none. `python -m engines build` fills it, too. A "
        "folder that cannot be written keeps neither, with a warning.",
    )
    isolate_engine: bool = Field(
        False,
        description="run the engine in a process of its own; a worker always does, and so does `serve` with a "
        "`start_backend`. It is started again when it dies, hangs or loses its GPU.",
    )
    hang_s: float = Field(
        30.0,
        gt=0,
        description="least time an engine call is given before its process is ended. Six times the measured median "
        "where that is more.",
    )
    encode_threads: int = Field(2, ge=1, le=64, description="threads that encode PNG, JPEG and WebP")
    max_rows: int = Field(64, ge=10, description="images in the making at once, encoding included")

    # ---- addresses and clients
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port of its own for metrics and probes; of api and worker. An `api` then has its metrics "
        "there alone; a `worker` without one takes a free one and prints it.",
    )
    api_keys: Path | None = Field(
        None,
        description="file of API keys that `python -m server keys new` writes. "
        "See [security](security.md#api-keys).",
    )
    allow_anonymous: bool = Field(False, description="listen beyond loopback without API keys")
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="addresses or networks whose X-Forwarded-For and -Proto are believed"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="origins whose pages may call this API, or `*`"
    )
    max_body_bytes: int = Field(
        1024 * 1024,
        ge=1024,
        description="largest request body. 24 MiB where images come in JSON (jobs, `img2img`).",
    )
    max_header_bytes: int = Field(32 * 1024, ge=1024, description="largest sum of header names and values")
    header_timeout_s: float = Field(10.0, gt=0, description="time a client has to send its headers")
    body_timeout_s: float = Field(
        30.0, gt=0, description="time a client has to send its body, or to take in more of an answer"
    )

    # ---- how much is let in
    max_queue_s: float = Field(
        30.0,
        gt=0,
        description="predicted seconds of accepted work for each worker beyond which 503. It bounds the wait; "
        "`python -m server plan` shows what is refused.",
    )
    max_queued_rows: int = Field(
        2048, ge=10, description="accepted, unfinished images, of models that share workers, beyond which 503"
    )
    tenant_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="part of both that one tenant may fill where there are several; beyond it 429. Where keys know "
        "one tenant or none, it has all.",
    )
    rate_limit: str | None = Field(
        None,
        description="requests of a key that generate, such as 60/minute. Of each key without a rate of its own.",
    )
    quota: str | None = Field(
        None,
        description="images of a tenant, such as 1000/day. Of each tenant whose key has no quota of its own.",
    )

    # ---- jobs and their results
    redis: str = Field(
        "",
        description="URL of the job store, as redis://host:6379/0; of api and worker. Also `rediss://` and "
        "`unix://`. `serve` keeps jobs in memory.",
    )
    lease_s: float = Field(
        30.0,
        gt=3 * HEARTBEAT_S,
        description="silence after which a worker's job is given to another. More than three heartbeats of 1 s.",
    )
    result_ttl_s: float = Field(300.0, gt=0, description="how long a finished job nobody fetched is kept")
    result_store: str = Field(
        "",
        description="where files go whose addresses are asked for: a folder, or s3://bucket/prefix. See "
        "[files at an address](serving.md#files-at-an-address). Without one, `response_format` `url` is refused.",
    )
    secret: SecretStr = Field(
        SecretStr(""),
        description="shared by all processes: signs job ids, files and webhooks; empty draws one at the start. At "
        "least 24 characters. Webhooks need it, and so does an `api` whose result store is a folder. A process "
        "that drew its own takes jobs of other processes that are over for unknown ones.",
    )
    webhook_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="origins webhooks may go to, and networks they may have private addresses in. See "
        "[webhooks](serving.md#webhooks).",
    )
    safety_check: str = Field(
        "",
        pattern=r"^([A-Za-z_][\w.]*:[A-Za-z_][\w.]*)?$",
        description="what sees finished images and says which to withhold, as module:function. Of `serve` and "
        "`worker`; see [security](security.md#a-safety-check).",
    )
    safety_timeout_s: float = Field(
        10.0, gt=0, description="time that function has for one request. Beyond it the request fails."
    )

    # ---- process
    drain_timeout_s: float = Field(
        25.0,
        ge=4,
        description="time to end after SIGTERM, 3 s of it to send answers. See [shutdown](serving.md#shutdown).",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level logged. Logs are JSON lines on stderr."
    )
    traces_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="where traces go by OTLP, as http://host:4318/v1/traces. Nothing is sent without it; see "
        "[traces](serving.md#traces).",
    )

    @field_validator("rungs")
    @classmethod
    def _climb_from_1(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value != tuple(sorted({1, *value})):
            raise ValueError("batch sizes are ascending, begin with 1 and differ, such as 1,2,4")
        return value

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _no_cache(cls, value: Any) -> Any:
        return None if str(value) in ("none", "") else value

    @model_validator(mode="after")
    def _builds_are_kept(self) -> Self:
        if self.start_backend is not None and self.cache_dir is None:
            raise ValueError("start_backend needs a cache_dir: what is built beside it is handed over there")
        return self

    @model_validator(mode="after")
    def _webhooks_are_signed(self) -> Self:
        if self.webhook_allow and len(self.secret.get_secret_value()) < MIN_SECRET_CHARS:
            raise ValueError(f"webhooks are signed: set HALFSTEP_SECRET to at least {MIN_SECRET_CHARS} characters")
        return self

    @field_validator("secret")
    @classmethod
    def _is_no_short_secret(cls, value: SecretStr) -> SecretStr:
        if 0 < len(value.get_secret_value()) < MIN_SECRET_CHARS:
            raise ValueError(
                f"a secret has at least {MIN_SECRET_CHARS} characters, such as `openssl rand -hex 32` gives"
            )
        return value

    @field_validator("result_store")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        if value:
            is_folder(value)
        return value

    @field_validator("webhook_allow")
    @classmethod
    def _is_allowable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_allowed(entry) for entry in value)

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """What is none would be taken for a name, and no proxy ever be believed."""
        for entry in value:
            try:
                _ = entry == "*" or ipaddress.ip_network(entry)
            except ValueError as error:
                raise ValueError(f"{error}; give an address, or a network such as 10.0.0.0/8") from None
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Browsers send an origin without a path, and it is compared as it is."""
        for entry in value:
            if entry != "*" and not _ORIGIN.fullmatch(entry):
                raise ValueError(f"{entry} is no origin such as https://app.example, without a / at its end")
        return value

    @field_validator("rate_limit", "quota")
    @classmethod
    def _is_a_rate(cls, value: str | None) -> str | None:
        return None if value is None else check_rate(value)

    @field_validator("rungs", "trusted_proxies", "cors_origins", "webhook_allow", mode="before")
    @classmethod
    def _split_words(cls, value: Any) -> Any:
        """From the environment: words with commas between them."""
        return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value

    @field_validator("bundles", mode="before")
    @classmethod
    def _split_bundles(cls, value: Any) -> Any:
        """From the environment: a JSON list, or paths with the separator of PATH between them."""
        if not isinstance(value, str):
            return value
        if not value.lstrip().startswith("["):
            return [path for path in value.split(os.pathsep) if path]
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError("this is no JSON list; paths need no JSON") from None


def unknown_variables() -> list[str]:
    """Names in the environment that look like settings and are none: misspelt, or of another version."""
    known = {CLIENT_KEY, *(PREFIX + name.upper() for name in Settings.model_fields)}
    return sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)

"""Settings from the environment: what is accepted, and the one sentence for what is not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import typer
from structlog.testing import capture_logs
from typer.testing import CliRunner

from engines.backends.base import RUNGS
from engines.cache import DEFAULT_CACHE
from server.cli import app
from server.flags import read_settings
from server.loading import usable_cache
from server.settings import Settings
from server.stores.redis.connections import connect

SPELLINGS = [
    ("/a", ["/a"]),
    (os.pathsep.join(["/a", "/b c"]), ["/a", "/b c"]),
    ('["/a", "/b"]', ["/a", "/b"]),
]


@pytest.mark.parametrize(("text", "paths"), SPELLINGS)
def test_bundles_are_paths_or_json(text: str, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_BUNDLES", text)
    assert Settings().bundles == tuple(map(Path, paths))


WRONG = [
    ("HALFSTEP_BUNDLES", '["/a"'),
    ("HALFSTEP_BUNDLES", "[1]"),
    ("HALFSTEP_BUNDLES", "[]"),
    ("HALFSTEP_BUNDLES", ""),
    ("HALFSTEP_PORT", "many"),
    ("HALFSTEP_BACKEND", "cuda"),
    ("HALFSTEP_RUNGS", ""),
    ("HALFSTEP_RUNGS", "1,two"),
    ("HALFSTEP_RUNGS", "0,1"),
    ("HALFSTEP_RUNGS", "2,4"),
    ("HALFSTEP_RUNGS", "1,4,2"),
    ("HALFSTEP_RUNGS", "1,2,2"),
    ("HALFSTEP_TRUSTED_PROXIES", "10.0.0.0/33"),
    ("HALFSTEP_TRUSTED_PROXIES", "10.0.0.0/8, 10.0.0.5/8"),
    ("HALFSTEP_TRUSTED_PROXIES", "nginx"),
    ("HALFSTEP_CORS_ORIGINS", "app.example"),
    ("HALFSTEP_CORS_ORIGINS", "https://app.example/"),
    ("HALFSTEP_CORS_ORIGINS", "*, https://app.example/page"),
]


@pytest.mark.parametrize(("variable", "value"), WRONG)
def test_a_wrong_setting_is_one_sentence(variable: str, value: str) -> None:
    ended = CliRunner().invoke(app, ["serve"], env={variable: value, "COLUMNS": "500"})
    assert ended.exit_code == 1
    assert variable in ended.output
    assert ended.output.count("\n") == 1
    assert isinstance(ended.exception, SystemExit)


def test_rungs_are_batch_sizes_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().rungs == RUNGS
    monkeypatch.setenv("HALFSTEP_RUNGS", "1, 2,4")
    assert Settings().rungs == (1, 2, 4)
    assert read_settings(rungs="1,8").rungs == (1, 8)


def test_the_cache_is_the_one_the_engines_command_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().cache_dir == DEFAULT_CACHE
    assert usable_cache(Settings().cache_dir) == tmp_path / ".cache" / "halfstep"


def test_no_cache_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_CACHE_DIR", "none")
    assert Settings().cache_dir is None
    assert usable_cache(None) is None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with capture_logs() as logs:
        assert usable_cache(tmp_path / "file" / "cache") is None
    assert [entry["event"] for entry in logs] == ["cache_not_writable"]


@pytest.mark.parametrize("lease_s", ["1", "3"])
def test_a_lease_outlives_three_heartbeats(lease_s: str) -> None:
    ended = CliRunner().invoke(app, ["serve"], env={"HALFSTEP_LEASE_S": lease_s, "COLUMNS": "500"})
    assert ended.exit_code == 1
    assert "HALFSTEP_LEASE_S" in ended.output


@pytest.mark.parametrize("name", ["serve", "api", "worker"])
def test_help_names_the_variable_of_every_flag(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    flags = {"bundles" if flag.name == "bundle" else flag.name for flag in command.params}
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "400"}).output
    assert set(re.findall(r"HALFSTEP_(\w+)", shown)) == {flag.upper() for flag in flags}


def test_settings_that_do_not_go_together_are_one_sentence() -> None:
    environment = {"HALFSTEP_WEBHOOK_ALLOW": "https://hooks.example.com", "HALFSTEP_SECRET": "", "COLUMNS": "500"}
    ended = CliRunner().invoke(app, ["serve"], env=environment)
    assert ended.exit_code == 1
    assert ended.output.startswith("Error: The settings are wrong: webhooks are signed: set HALFSTEP_SECRET")


def test_a_misspelt_setting_is_told_and_not_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.cli.configure_logs", lambda _: None)
    environment = {"HALFSTEP_SECRETS": "canary", "HALFSTEP_REDIS": "", "HALFSTEP_API_KEY": "of a client"}
    with capture_logs() as logs:
        CliRunner().invoke(app, ["api"], env=environment)
    assert [(line["event"], line["variables"]) for line in logs] == [("settings_unknown", ["HALFSTEP_SECRETS"])]


PROXIES = ["10.0.0.0/8,192.168.1.7,fc00::/7", "*"]
ORIGINS = ["https://app.example,http://localhost:3000,capacitor://localhost", "*"]


@pytest.mark.parametrize(("proxies", "origins"), list(zip(PROXIES, ORIGINS, strict=True)))
def test_proxies_and_origins_stand_as_they_are(proxies: str, origins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_TRUSTED_PROXIES", proxies)
    monkeypatch.setenv("HALFSTEP_CORS_ORIGINS", origins)
    assert Settings().trusted_proxies == tuple(proxies.split(","))
    assert Settings().cors_origins == tuple(origins.split(","))


STRAY = ["canary/slash", "canary#hash", "canary?mark", "12/canary", "12#canary", "12?canary", "p@canary/slash"]


@pytest.mark.parametrize("password", STRAY)
def test_a_wrong_address_of_redis_tells_nothing_of_its_password(password: str) -> None:
    ended = CliRunner().invoke(app, ["api", "--redis", f"redis://:{password}@host:6379/0"], env={"COLUMNS": "500"})
    assert ended.exit_code == 1
    assert "percent-encoded" in ended.output
    assert "canary" not in ended.output


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://localhost:6379/0",
        "redis://:p%2F%40@h:6379/0",
        "redis://user:p@[::1]:6379/1?socket_keepalive=true",
        "rediss://h:6379/0?ssl_ca_certs=ca.pem",
        "unix:///run/redis.sock?db=1",
    ],
)
def test_addresses_of_redis(url: str) -> None:
    connect(url, 1.0)


@pytest.mark.parametrize(
    "url", ["h:6379", "http://h", "redis://h:6379/production", "redis://a:b:c", "redis://h:0x/0"]
)
def test_what_is_no_address_of_redis_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="percent-encoded"):
        connect(url, 1.0)

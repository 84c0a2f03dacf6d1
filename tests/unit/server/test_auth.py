"""API keys: what is kept of them, who gets in, with what scope, and how often."""

from __future__ import annotations

import base64
import itertools
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.testclient import TestClient
from structlog.testing import capture_logs
from typer.testing import CliRunner

from server.app import routers
from server.auth import KeyFile, KeyFileError, Keyring, Scope, check_rate, new_key, read_keys, write_keys
from server.cli import app
from server.errors import ApiError
from server.process import StartError, check_exposure
from server.settings import Settings
from server.signing import Signer
from tests.support.keys import bearer, write_key_file
from tests.support.offline import offline_client, offline_service

URL = "/v1/images/generations"
OPEN = {"/", "/livez", "/readyz", "/docs"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def keys(path: Path) -> dict[str, str]:
    return write_key_file(path)


@pytest.fixture
def client(toy_bundle: Path, path: Path, keys: dict[str, str]) -> TestClient:
    settings = Settings(result_store=str(path.parent / "results"))
    return offline_client(offline_service(toy_bundle, settings, Keyring(path)))


def code(client: TestClient, method: str, url: str, **headers: str) -> tuple[int, str]:
    response = client.request(method, url, headers=headers)
    assert len(response.content) <= 4096
    challenges = 'Basic realm="halfstep", Bearer' if url.startswith("/sdapi/") else "Bearer"
    assert response.headers.get("www-authenticate") == (challenges if response.status_code == 401 else None)
    error = response.json()["error"]
    return response.status_code, error if url.startswith("/sdapi/") else error["code"]


# ---- at rest


def test_the_file_holds_hashes_that_only_its_owner_reads(path: Path, keys: dict[str, str]) -> None:
    text = path.read_text()
    assert not [key for key in keys.values() if key in text or key.split("_", 2)[2] in text]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_new_key_works_and_a_revoked_one_stops_without_a_restart(path: Path) -> None:
    runner, made = CliRunner(), []
    for tenant in ("acme", "other"):
        ended = runner.invoke(app, ["keys", "new", "--tenant", tenant, "--api-keys", str(path)])
        assert ended.exit_code == 0
        made.append(ended.output.strip())
    keyring = Keyring(path)
    assert [keyring.caller(key).tenant for key in made] == ["acme", "other"]
    listed = runner.invoke(app, ["keys", "list"], env={"HALFSTEP_API_KEYS": str(path), "COLUMNS": "200"}).output
    assert "acme" in listed
    assert not [key for key in made if key in listed]
    key_id = made[0].split("_")[1]
    assert runner.invoke(app, ["keys", "revoke", key_id, "--api-keys", str(path)]).exit_code == 0
    with pytest.raises(ApiError, match="not valid"):
        keyring.caller(made[0])
    assert keyring.caller(made[1]).tenant == "other"


def test_a_file_that_breaks_later_leaves_the_keys_as_they_were(path: Path, keys: dict[str, str]) -> None:
    keyring = Keyring(path)
    path.write_text("{")
    with capture_logs() as logs:
        assert keyring.caller(keys["a"]).tenant == "a"
        assert keyring.caller(keys["b"]).tenant == "b"
    assert [entry["event"] for entry in logs] == ["api_keys_unusable"]


@pytest.mark.parametrize(
    ("text", "where"),
    [("{", "its JSON"), ('{"keys": [{"id": "x"}]}', "keys.0.id"), ('{"key": []}', "key")],
)
def test_an_unusable_file_is_one_sentence_that_says_where(path: Path, text: str, where: str) -> None:
    path.write_text(text)
    with pytest.raises(KeyFileError, match=where):
        Keyring(path)


def test_two_keys_of_one_id_cannot_be(path: Path, keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="id"):
        KeyFile(keys=(*read_keys(path).keys, read_keys(path).keys[0]))


def test_a_tenant_has_the_quota_of_its_newest_valid_key_that_has_one(path: Path) -> None:
    rows = [(9, "a", "5/day"), (5, "a", "9/day"), (1, "a", None), (2, "b", "1/day"), (3, "c", None)]
    made = []
    for age, tenant, quota in rows:
        key, kept = new_key(tenant, [Scope.GENERATE], quota=quota)
        made.append((key, kept.model_copy(update={"created": datetime.now(UTC) - timedelta(days=age)})))
    over = new_key("a", [Scope.GENERATE], datetime.now(UTC) - timedelta(days=1), quota="7/day")[1]
    write_keys(path, KeyFile(keys=(over, *(kept for _, kept in made))))
    keyring = Keyring(path)
    assert [keyring.caller(key).quota for key, _ in made] == ["9/day", "9/day", "9/day", "1/day", None]


def test_a_tenants_webhook_secret_is_its_own_and_opens_nothing_else(path: Path) -> None:
    secret, runner = "s" * 24, CliRunner()
    write_keys(path, KeyFile(keys=tuple(new_key(tenant, [Scope.GENERATE])[1] for tenant in ("default", "b"))))

    def told(*arguments: str, secret: str = secret, keys: Path | None = path) -> str:
        env = {"HALFSTEP_SECRET": secret, **({"HALFSTEP_API_KEYS": str(keys)} if keys else {})}
        ended = runner.invoke(app, ["keys", "webhook-secret", *arguments], env=env)
        return ended.output.strip() if ended.exit_code == 0 else f"{ended.exit_code}: {ended.output}"

    assert told() == told("--tenant", "default") == Signer(secret).webhook_secret("default")
    assert len({told(), told("--tenant", "b"), told(secret="t" * 24)}) == 3
    assert secret not in told()
    assert "HALFSTEP_SECRET" in told(secret="")
    assert told(keys=None) == told()
    assert "no tenant B in" in told("--tenant", "B")
    assert "b, default" in told("--tenant", "B")
    assert "no tenant b without a file of API keys" in told("--tenant", "b", keys=None)


def test_tenants_are_those_that_can_have_work_in_the_queue(path: Path) -> None:
    ago = datetime.now(UTC) - timedelta(days=1)
    rows = [
        ("a", Scope.GENERATE, None),
        ("b", Scope.READ, None),
        ("c", Scope.METRICS, None),
        ("d", Scope.GENERATE, ago),
    ]
    write_keys(path, KeyFile(keys=tuple(new_key(tenant, [scope], expires)[1] for tenant, scope, expires in rows)))
    assert Keyring(path).tenants == {"a"}


def test_wrong_commands_are_one_sentence(path: Path) -> None:
    for arguments in (["new", "--tenant", "a b"], ["new", "--tenant", "a", "--rate", "often"], ["revoke", "0"]):
        ended = CliRunner().invoke(app, ["keys", *arguments, "--api-keys", str(path)], env={"COLUMNS": "500"})
        assert (ended.exit_code, ended.output.count("\n")) == (1, 1)
    assert CliRunner().invoke(app, ["keys", "list"], env={"HALFSTEP_API_KEYS": ""}).exit_code == 1


@pytest.mark.parametrize("days", ["1e7", "1e9", "inf"])
def test_a_key_that_expires_beyond_the_calendar_is_refused(path: Path, days: str) -> None:
    arguments = ["keys", "new", "--tenant", "a", "--expires-days", days, "--api-keys", str(path)]
    ended = CliRunner().invoke(app, arguments)
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
    assert "--expires-days" in ended.stderr
    assert not path.exists()


def test_settings_that_do_not_go_together_are_told_by_keys_too() -> None:
    ended = CliRunner().invoke(app, ["keys", "list"], env={"HALFSTEP_WEBHOOK_ALLOW": "https://x.example"})
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
    assert "HALFSTEP_SECRET" in ended.stderr


# ---- who gets in


def test_every_route_but_the_open_ones_needs_a_key(toy_bundle: Path, path: Path, client: TestClient) -> None:
    routes = [(route.path, method) for route in all_routes(toy_bundle) for method in sorted(route.methods)]
    assert len(routes) > 12
    for route, method in routes:
        if method == "HEAD":  # has no body to say it
            opened = route in OPEN or route.startswith(("/static/", "/files/"))
            assert (client.head(route).status_code == 401) is not opened
        elif route in OPEN or route.startswith("/static/"):
            assert client.request(method, route).status_code not in (401, 403)
        elif route.startswith("/files/"):  # the address itself is what opens it
            assert code(client, method, f"{route}?expires=9999999999&signature=x") == (403, "invalid_signature")
        else:
            assert code(client, method, route) == (401, "missing_api_key")
    assert code(client, "GET", "/openapi.json") == (401, "missing_api_key")
    assert code(client, "GET", "/nothing") == (401, "missing_api_key")


def all_routes(bundle: Path) -> list[APIRoute]:
    routes = [route for router in routers(offline_service(bundle)) for route in router.routes]
    assert all(isinstance(route, APIRoute) for route in routes)
    return routes  # type: ignore[return-value]


WRONG = {
    "none": "",
    "no scheme": "hs_00000000_" + "a" * 43,
    "unknown": "Bearer hs_00000000_" + "a" * 43,
    "not ours": "Bearer sk-canary-4711",
    "empty": "Bearer ",
    "basic elsewhere": "Basic " + base64.b64encode(b"a:b").decode(),
    "long": "Bearer " + "a" * 10_000,
    "latin-1": "Bearer \xe4",
}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_what_is_no_key_is_401(client: TestClient, value: str) -> None:
    headers = {b"authorization": value.encode("latin-1")}
    response = client.get("/v1/models", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) in (
        (401, "missing_api_key"),
        (401, "invalid_api_key"),
    )
    assert "canary" not in response.text


def test_a_changed_secret_is_401(client: TestClient, keys: dict[str, str]) -> None:
    key = keys["a"]
    other = key[:-1] + ("A" if key[-1] != "A" else "B")
    assert code(client, "GET", "/v1/models", **bearer(other)) == (401, "invalid_api_key")


def test_an_expired_key_is_401(client: TestClient, keys: dict[str, str]) -> None:
    assert code(client, "GET", "/v1/models", **bearer(keys["expired"])) == (401, "expired_api_key")


def test_a_key_does_what_its_scopes_say(client: TestClient, keys: dict[str, str]) -> None:
    allowed = {
        "a": {"read", "generate"},
        "reader": {"read"},
        "maker": {"generate"},
        "scraper": {"metrics"},
    }
    asked = {"read": ("GET", "/v1/models"), "generate": ("POST", URL), "metrics": ("GET", "/metrics")}
    for (name, may), (scope, (method, url)) in itertools.product(allowed.items(), asked.items()):
        response = client.request(method, url, headers=bearer(keys[name]))
        if scope in may:
            assert response.status_code in (200, 415)
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (403, "insufficient_scope")


def test_automatic1111_clients_send_the_key_as_a_password(client: TestClient, keys: dict[str, str]) -> None:
    basic = base64.b64encode(f"anyone:{keys['a']}".encode()).decode()
    assert client.get("/sdapi/v1/options", headers={"authorization": f"Basic {basic}"}).status_code != 401
    for wrong in (base64.b64encode(b"anyone:x").decode(), "not base64", "/w=="):
        assert code(client, "GET", "/sdapi/v1/options", authorization=f"Basic {wrong}")[0] == 401


# ---- how often


def test_a_keys_rate_is_429_with_both_headers(client: TestClient, keys: dict[str, str]) -> None:
    for _ in range(3):
        assert client.post(URL, headers=bearer(keys["limited"])).status_code == 415
    response = client.post(URL, headers=bearer(keys["limited"]))
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limited")
    seconds, milliseconds = (int(response.headers[name]) for name in ("retry-after", "retry-after-ms"))
    assert 0 < milliseconds <= seconds * 1000 <= 3600 * 1000
    assert client.get("/v1/models", headers=bearer(keys["limited"])).status_code == 200
    assert client.post(URL, headers=bearer(keys["a"])).status_code == 415


def test_the_rate_of_all_keys_is_a_setting(toy_bundle: Path, path: Path, keys: dict[str, str]) -> None:
    client = offline_client(offline_service(toy_bundle, Settings(rate_limit="1/hour"), Keyring(path)))
    answers = [client.post(URL, headers=bearer(keys[name])).status_code for name in ("a", "a", "b")]
    assert answers == [415, 429, 415]


def test_a_quota_is_shared_by_the_keys_of_a_tenant_and_by_no_other(
    toy_bundle: Path, path: Path, keys: dict[str, str]
) -> None:
    client = offline_client(offline_service(toy_bundle, Settings(quota="3/day"), Keyring(path)))
    wish = {"prompt": "one", "n": 3}
    answers = [client.post("/v1/jobs", json=wish, headers=bearer(keys[name])) for name in ("a", "maker", "b")]
    assert [answer.status_code for answer in answers] == [202, 429, 202]


def test_cancelling_never_waits_for_a_rate(client: TestClient, keys: dict[str, str]) -> None:
    limited = bearer(keys["limited"])
    while client.post(URL, headers=limited).status_code != 429:
        pass
    assert code(client, "DELETE", "/v1/jobs/unknown", **limited) == (404, "job_not_found")
    assert client.post("/sdapi/v1/interrupt", headers=limited).status_code == 200


@pytest.mark.parametrize("rate", ["0/minute", "60/minute; 5/second", "often", ""])
def test_what_is_no_single_rate_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match="60/minute"):
        check_rate(rate)


def test_the_reference_says_how_a_key_is_sent(client: TestClient, keys: dict[str, str], toy_bundle: Path) -> None:
    told = client.get("/openapi.json", headers=bearer(keys["a"])).json()
    OpenAPIV31SpecValidator(told).validate()
    assert told["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert told["paths"][URL]["post"]["security"] == [{"key": []}]
    assert {"password": []} in told["paths"]["/sdapi/v1/txt2img"]["post"]["security"]
    assert "security" not in told["paths"]["/livez"]["get"]
    assert (
        "securitySchemes"
        not in offline_client(offline_service(toy_bundle)).get("/openapi.json").json()["components"]
    )


# ---- beyond loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_listening_beyond_loopback_needs_keys_or_a_word(host: str, path: Path) -> None:
    with pytest.raises(StartError, match="keys new"):
        check_exposure(Settings(host=host))
    check_exposure(Settings(host=host, api_keys=path))
    check_exposure(Settings(host=host, allow_anonymous=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    check_exposure(Settings(host=host))


# ---- pages of other origins


def test_pages_of_other_origins_are_let_in_by_name(toy_bundle: Path, path: Path, keys: dict[str, str]) -> None:
    settings = Settings(cors_origins=("https://app.example",))
    client = offline_client(offline_service(toy_bundle, settings, Keyring(path)))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = client.options(URL, headers={"origin": "https://app.example", **asked})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert client.options(URL, headers={"origin": "https://other.example", **asked}).status_code == 400
    refused = client.get("/v1/models", headers={"origin": "https://app.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://app.example")
    for sent, status in (({"content-encoding": "gzip"}, 415), ({"x-large": "a" * 90_000}, 431)):
        refused = client.get("/v1/models", headers={"origin": "https://app.example", **sent})
        told = refused.headers.get("access-control-allow-origin")
        assert (refused.status_code, told) == (status, "https://app.example")


@pytest.mark.parametrize(
    ("site", "origin", "named", "status"),
    [
        ("cross-site", "https://evil.example", (), 403),
        ("same-site", "http://127.0.0.1:3000", (), 403),
        ("cross-site", "null", ("https://app.example",), 403),
        ("cross-site", None, ("https://app.example",), 403),
        ("cross-site", "https://app.example", ("https://app.example",), 415),
        ("cross-site", "https://evil.example", ("*",), 415),
        ("same-origin", "http://testserver", (), 415),
        ("none", None, (), 415),
        (None, None, (), 415),
    ],
)
def test_a_form_of_a_foreign_page_is_refused(
    toy_bundle: Path, site: str | None, origin: str | None, named: tuple[str, ...], status: int
) -> None:
    """A browser sends it without asking; no key would keep it out of a server on loopback."""
    client = offline_client(offline_service(toy_bundle, Settings(cors_origins=named)))
    headers = {name: value for name, value in (("sec-fetch-site", site), ("origin", origin)) if value}
    sent = client.post("/v1/images/edits", data={"no_such": "field"}, headers=headers)
    assert sent.status_code == status
    assert sent.json()["error"]["code"] == ("origin_not_allowed" if status == 403 else "unsupported_media_type")
    assert client.get("/v1/models", headers=headers).status_code == 200


def test_without_the_setting_no_page_is_let_in(client: TestClient, keys: dict[str, str]) -> None:
    answer = client.get("/v1/models", headers={"origin": "https://app.example", **bearer(keys["a"])})
    assert "access-control-allow-origin" not in answer.headers


def test_write_keys_names_the_folder_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="cannot be written"):
        write_keys(tmp_path / "file" / "keys.json", KeyFile())

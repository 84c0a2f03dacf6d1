"""What one tenant made does not exist for another: every route of a job, own, foreign and made-up ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.keys import bearer, write_key_file
from tests.support.live import Live, live

TENANTS = ("a", "b", "c")
ROUTES = [("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("DELETE", "")]
HEX = "0123456789abcdef"


@pytest.fixture(scope="module")
def world(
    toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Live, dict[str, str], dict[str, str]]]:
    """A server, the tenants' keys, and a finished job of each."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = write_key_file(path)
    with live(toy_bundle, api_keys=path) as running, running.client() as client:
        jobs = {}
        for tenant in TENANTS:
            headers = {**bearer(keys[tenant]), "prefer": "wait=30", "idempotency-key": "the same for all"}
            jobs[tenant] = client.post("/v1/jobs", json={"prompt": "one"}, headers=headers).json()["id"]
        yield running, keys, jobs


def test_the_same_key_of_two_tenants_is_two_jobs(world: tuple[Live, dict[str, str], dict[str, str]]) -> None:
    assert len(set(world[2].values())) == len(TENANTS)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    who=st.sampled_from(TENANTS),
    route=st.sampled_from(ROUTES),
    made_up=st.text(HEX, min_size=32, max_size=32) | st.text(HEX + "xyz-_.", min_size=1, max_size=40),
)
def test_a_foreign_job_is_byte_for_byte_an_unknown_one(
    world: tuple[Live, dict[str, str], dict[str, str]], who: str, route: tuple[str, str], made_up: str
) -> None:
    running, keys, jobs = world
    method, tail = route
    with running.client(headers={**bearer(keys[who]), "x-request-id": "same"}) as client:
        unknown = client.request(
            method, f"/v1/jobs/{made_up}{tail}" if made_up not in (".", "..") else "/v1/jobs/-"
        )
        for owner in TENANTS:
            answer = client.request(method, f"/v1/jobs/{jobs[owner]}{tail}")
            if owner == who:
                assert answer.status_code == (409 if method == "DELETE" else 200)
            else:
                assert (answer.status_code, answer.content) == (404, unknown.content)
                told, expected = (dict(r.headers) | {"date": ""} for r in (answer, unknown))
                assert told == expected


def test_nobody_else_can_cancel(toy_bundle: Path, tmp_path: Path) -> None:
    keys = write_key_file(tmp_path / "keys.json")
    with live(toy_bundle, api_keys=tmp_path / "keys.json") as running, running.client() as client:
        running.bench.hold()
        job = client.post("/v1/jobs", json={"prompt": "one"}, headers=bearer(keys["a"])).json()
        for other, (method, tail) in itertools.product(("b", "c"), ROUTES):
            assert (
                client.request(method, f"/v1/jobs/{job['id']}{tail}", headers=bearer(keys[other])).status_code
                == 404
            )
        state = client.get(f"/v1/jobs/{job['id']}", headers=bearer(keys["a"])).json()
        assert state["status"] in ("queued", "running")


def test_a_quota_is_429_and_belongs_to_its_tenant(world: tuple[Live, dict[str, str], dict[str, str]]) -> None:
    running, keys, _ = world
    with running.client() as client:
        body = {"prompt": "one", "n": 3}
        answers = [client.post("/v1/jobs", json=body, headers=bearer(keys["metered"])) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [202, 429]
        assert answers[1].json()["error"]["code"] == "quota_exceeded"
        assert int(answers[1].headers["retry-after"]) > 0
        refused = client.post("/v1/jobs", json={"prompt": "one", "n": 10}, headers=bearer(keys["metered"]))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "quota_too_small")
        assert "retry-after" not in refused.headers
        assert client.post("/v1/jobs", json=body, headers=bearer(keys["a"])).status_code == 202

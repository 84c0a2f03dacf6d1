"""When there is room, and when to come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import OverloadedError, RateError
from server.jobs import Backlog
from server.request import DenoiseRequest
from server.settings import Settings
from tests.support.offline import ROW_STEP_S, offline_service


def request(n: int = 1) -> DenoiseRequest:
    return DenoiseRequest(
        model="toy-digits", prompt="one", n=n, seed=1, guidance_scale=2.0, steps=4, width=64, height=64
    )


def check(bundle: Path, backlog: Backlog, n: int = 1) -> None:
    settings = Settings(max_queue_s=2.0, max_queued_rows=100)
    offline_service(bundle, settings).admission.check(backlog, request(n))


def test_an_idle_server_takes_anything(toy_bundle: Path) -> None:
    check(toy_bundle, Backlog(jobs=0, rows=0, seconds=0.0), n=10)


def test_there_is_room_up_to_the_limit(toy_bundle: Path) -> None:
    check(toy_bundle, Backlog(jobs=1, rows=99, seconds=2.0 - 4 * ROW_STEP_S))


def test_too_many_seconds_say_when_they_will_be_gone(toy_bundle: Path) -> None:
    with pytest.raises(OverloadedError) as refused:
        check(toy_bundle, Backlog(jobs=5, rows=50, seconds=5.0))
    assert refused.value.headers["retry-after"] == "4"
    assert int(refused.value.headers["retry-after-ms"]) == pytest.approx(1000 * (3.0 + 4 * ROW_STEP_S), abs=1)


def test_every_worker_adds_to_what_is_let_in(toy_bundle: Path) -> None:
    admission = offline_service(toy_bundle, Settings(max_queue_s=2.0, max_queued_rows=100)).admission
    held = Backlog(jobs=5, rows=50, seconds=6.0 - 4 * ROW_STEP_S)
    admission.check(held, request(), workers=3)
    admission.check_share(Backlog(jobs=5, rows=49, seconds=3.0 - 4 * ROW_STEP_S), request(), workers=3)
    with pytest.raises(OverloadedError) as refused:
        admission.check(Backlog(jobs=5, rows=50, seconds=9.0), request(), workers=3)
    assert int(refused.value.headers["retry-after-ms"]) == pytest.approx(1000 + 4 * ROW_STEP_S / 3 * 1000, abs=1)
    with pytest.raises(OverloadedError):
        admission.check(held, request(), workers=0)
    with pytest.raises(OverloadedError) as refused:
        admission.check(Backlog(jobs=10, rows=100, seconds=1.5), request(n=10), workers=3)
    assert refused.value.headers["retry-after-ms"] == "50", "ten of a hundred images, by three"


def test_too_many_images_say_when_they_will_be_gone(toy_bundle: Path) -> None:
    with pytest.raises(OverloadedError) as refused:
        check(toy_bundle, Backlog(jobs=10, rows=100, seconds=1.0), n=10)
    assert refused.value.headers["retry-after-ms"] == "100"


def test_a_tenant_has_its_share_and_anything_beside_nothing(toy_bundle: Path) -> None:
    admission = offline_service(toy_bundle, Settings(max_queue_s=2.0, max_queued_rows=100)).admission
    admission.check_share(Backlog(jobs=1, rows=49, seconds=1.0 - 4 * ROW_STEP_S), request())
    admission.check_share(Backlog(jobs=0, rows=0, seconds=0.0), request(n=10))
    with pytest.raises(RateError) as refused:
        admission.check_share(Backlog(jobs=5, rows=50, seconds=0.5), request())
    assert (refused.value.code, refused.value.headers["retry-after-ms"]) == ("tenant_queue_full", "10")


def test_a_deadline_is_met_by_all_workers_together(toy_bundle: Path) -> None:
    admission = offline_service(toy_bundle, Settings(max_queue_s=20.0, max_queued_rows=100)).admission
    held = Backlog(jobs=3, rows=30, seconds=6.0)
    admission.check(held, request(), deadline_ms=2100, workers=3)
    with pytest.raises(OverloadedError) as refused:
        admission.check(held, request(), deadline_ms=1500, workers=3)
    assert refused.value.code == "deadline_unmeetable"
    assert int(refused.value.headers["retry-after-ms"]) == pytest.approx(500 + 4 * ROW_STEP_S * 1000, abs=1)
    admission.check(Backlog(), request(), deadline_ms=1)  # beside nothing it is tried


@pytest.mark.parametrize("refusal", [RateError, OverloadedError])
@pytest.mark.parametrize(
    ("wait_s", "seconds", "ms"), [(0.0, "1", "1"), (0.0101, "1", "11"), (1.0, "1", "1000"), (1.0001, "2", "1001")]
)
def test_waits_are_told_rounded_up(
    refusal: type[RateError | OverloadedError], wait_s: float, seconds: str, ms: str
) -> None:
    """Who comes a moment too early is refused again."""
    headers = refusal("code", "message", retry_after_s=wait_s).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == (seconds, ms)

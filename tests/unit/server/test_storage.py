"""Files in a folder: written once, read, signed for a time, and swept when that is over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from server.errors import ApiError, StartError
from server.links import FileLinks
from server.metrics import Metrics
from server.outage import ANEW_S
from server.settings import Settings
from server.signing import Signer
from server.storage import FileGoneError, ResultStore, ResultStoreError, expires_at

pytestmark = pytest.mark.anyio

TTL_S = 90.0


def replace_by_a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("")


def be_a_folder_again(place: Path) -> None:
    place.unlink()


class Clock:
    """Seconds since 1970, moved by hand."""

    now = 1_800_000_010.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def store(folder: Path, clock: Clock) -> ResultStore:
    made = ResultStore.open(str(folder), TTL_S, Metrics())
    made._clock = clock
    return made


async def test_what_is_written_is_read(store: ResultStore) -> None:
    key = await store.write("j", 1, 0, "png", b"abc")
    assert await store.read(key) == b"abc"


@pytest.mark.parametrize("second", [0, 1, 29, 30, 31, 59])
async def test_a_file_is_kept_for_its_time_and_less_than_a_minute_more(
    store: ResultStore, clock: Clock, second: int
) -> None:
    clock.now = 1_800_000_000.0 + second
    assert 0 <= expires_at(await store.write("j", 1, 0, "png", b"abc")) - (clock.now + TTL_S) < 60


async def test_a_later_attempt_changes_nothing_that_an_earlier_one_wrote(store: ResultStore) -> None:
    first = await store.write("j", 1, 0, "png", b"first")
    second = await store.write("j", 2, 0, "png", b"second")
    assert [await store.read(key) for key in (first, second)] == [b"first", b"second"]


async def test_a_sweep_takes_what_is_over_and_nothing_else(store: ResultStore, folder: Path, clock: Clock) -> None:
    """By another process than the one that wrote it, which may be gone."""
    old = await store.write("old", 1, 0, "png", b"x")
    clock.now = expires_at(old) - 1
    new = await store.write("new", 1, 0, "webp", b"y")
    (folder / "notes.txt").write_text("not ours")
    later = ResultStore.open(f"file://{folder}", TTL_S, Metrics())
    later._clock = clock
    assert await later.sweep() == 0
    clock.now = expires_at(old) + 1
    assert await later.sweep() == 1
    with pytest.raises(FileGoneError):
        await store.read(old)
    assert await store.read(new) == b"y"
    assert (folder / "notes.txt").exists()
    assert not (folder / str(expires_at(old))).exists()


async def test_sweeps_of_many_processes_do_not_disturb_each_other(store: ResultStore, clock: Clock) -> None:
    keys = [await store.write("j", 1, k, "png", b"x") for k in range(120)]
    clock.now = expires_at(keys[0]) + 1
    await asyncio.gather(*(store.sweep() for _ in range(3)))
    await store.sweep()
    for key in keys:
        with pytest.raises(FileGoneError):
            await store.read(key)


async def test_a_folder_that_went_away_is_told_and_counted(folder: Path, store: ResultStore) -> None:
    replace_by_a_file(folder)
    with pytest.raises(ResultStoreError):
        await store.write("j", 1, 0, "png", b"x")
    assert store._metrics.registry.get_sample_value("halfstep_result_store_failures_total", {"operation": "write"})


async def test_an_address_opens_its_file_until_it_expires(store: ResultStore, clock: Clock) -> None:
    links = FileLinks(store, Signer("s" * 24), clock)
    link = await links.link(await store.write("j", 1, 0, "png", b"abc"), "http://here")
    path, _, query = link.url.removeprefix("http://here/files/").partition("?")
    asked = dict(part.split("=") for part in query.split("&"))
    assert await FileLinks(store, Signer("s" * 24), clock).open(path, **asked) == b"abc"
    clock.now = link.expires_at + 1
    with pytest.raises(ApiError) as refused:
        await links.open(path, **asked)
    assert (refused.value.status, refused.value.code) == (403, "url_expired")


@pytest.mark.parametrize("change", ["key", "expires", "signature", "secret", "nothing signed", "not a number"])
async def test_a_changed_address_opens_nothing(store: ResultStore, clock: Clock, change: str) -> None:
    signer, key = Signer("s" * 24), await store.write("j", 1, 0, "png", b"abc")
    other = await store.write("k", 1, 0, "png", b"other")
    expires, signature = str(expires_at(key)), signer.sign_file(key, expires_at(key))
    asked = {
        "key": (other, expires, signature),
        "expires": (key, str(expires_at(key) + 60), signature),
        "signature": (key, expires, signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        "secret": (key, expires, Signer("t" * 24).sign_file(key, expires_at(key))),
        "nothing signed": (key, expires, ""),
        "not a number": (key, "soon", signature),
    }[change]
    with pytest.raises(ApiError) as refused:
        await FileLinks(store, signer, clock).open(*asked)
    assert (refused.value.status, refused.value.code) == (403, "invalid_signature")


async def test_a_sweep_that_fails_does_not_end_the_sweeping(
    store: ResultStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await store.write("j", 1, 0, "png", b"x")
    clock.now = expires_at(key) + 1
    sweep, sweeps, swept = store.sweep, 0, asyncio.Event()

    async def once_away() -> int:
        nonlocal sweeps
        sweeps += 1
        if sweeps == 1:
            raise ResultStoreError
        found = await sweep()
        swept.set()
        return found

    monkeypatch.setattr("server.storage.SWEEP_S", 0.0)
    monkeypatch.setattr(store, "sweep", once_away)
    sweeping = asyncio.create_task(store.keep_swept())
    await asyncio.wait_for(swept.wait(), 30)
    sweeping.cancel()
    with pytest.raises(FileGoneError):
        await store.read(key)


def test_a_folder_that_cannot_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="HALFSTEP_RESULT_STORE"):
        ResultStore.open(str(tmp_path / "file" / "below"), TTL_S, Metrics())


@pytest.mark.parametrize("place", ["ftp://host/x", "s3:///x", "http://bucket"])
def test_a_place_of_another_kind_is_a_wrong_setting(place: str) -> None:
    with pytest.raises(ValidationError, match="result_store"):
        Settings(result_store=place)


def test_a_short_secret_is_a_wrong_setting() -> None:
    with pytest.raises(ValidationError, match="24"):
        Settings(secret="short")


async def test_an_outage_is_logged_once_for_each_operation(store: ResultStore, folder: Path) -> None:
    key = await store.write("j", 1, 0, "png", b"x")
    (folder / key).unlink()
    (folder / key).parent.rmdir()
    with capture_logs() as logs:
        replace_by_a_file(folder)
        for _ in range(3):
            with pytest.raises(ResultStoreError):
                await store.write("j", 1, 0, "png", b"x")
        be_a_folder_again(folder)
        for _ in range(2):
            await store.write("j", 1, 0, "png", b"x")
    told = [(line["event"], line["operation"]) for line in logs]
    assert told == [("result_store_failed", "write"), ("result_store_back", "write")]


def test_calls_that_take_long_to_fail_are_of_one_outage(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]

    def fail_late() -> None:
        with store._noted("write"):
            now[0] += 2 * ANEW_S
            raise TimeoutError("no answer")

    monkeypatch.setattr("server.storage.time.monotonic", lambda: now[0])
    for _ in range(3):
        with pytest.raises(ResultStoreError):
            fail_late()
    assert store.outages["write"].lasts_s == 4 * ANEW_S

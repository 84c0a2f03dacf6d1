"""The safety check: what it flags reaches nobody by any way, and when it fails nothing does."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from typer.testing import CliRunner

from server import start
from server.cli import app
from server.errors import StartError
from server.settings import Settings
from tests.support import safety_hooks
from tests.support.live import Live, live
from tests.support.serving import until

GENERATIONS, JOBS, TXT2IMG = "/v1/images/generations", "/v1/jobs", "/sdapi/v1/txt2img"
HOOK = "tests.support.safety_hooks:check"


@pytest.fixture(scope="module")
def running(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("safety") / "results"
    with live(toy_bundle, safety_check=HOOK, result_store=str(folder)) as made:
        yield made


@pytest.fixture
def http(running: Live) -> Iterator[httpx.Client]:
    with running.client() as client:
        yield client


def job_of(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    return dict(http.post(JOBS, json=fields, headers={"prefer": "wait=60"}).json())


def test_what_passes_is_as_without_a_check(http: httpx.Client) -> None:
    (image,) = http.post(GENERATIONS, json={"prompt": "one"}).json()["data"]
    assert set(image) == {"b64_json", "seed"}


def test_the_sdk_learns_that_its_image_was_withheld(running: Live) -> None:
    with (
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as sdk,
        pytest.raises(openai.BadRequestError) as refused,
    ):
        sdk.images.generate(prompt="six")
    assert refused.value.code == "content_policy_violation"


@pytest.mark.parametrize("response_format", ["b64_json", "url"])
def test_of_several_images_only_the_flagged_are_withheld(http: httpx.Client, response_format: str) -> None:
    body = {"prompt": "seven", "n": 3, "seed": 5, "response_format": response_format}
    first, *others = http.post(GENERATIONS, json=body).json()["data"]
    assert first == {"seed": 5, "flagged": True}
    assert all(other[response_format] and "flagged" not in other for other in others)


def test_the_command_line_saves_what_was_not_withheld_and_says_how_many_were(running: Live, tmp_path: Path) -> None:
    asked = ["generate", "seven", "-n", "3", "--seed", "5", "--url", running.url, "-o", str(tmp_path / "out.png")]
    ended = CliRunner().invoke(app, asked)
    assert ended.exit_code == 0, ended.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-6.png", "out-7.png"]
    assert "withheld 1 of 3 images" in ended.stderr


def test_a_stream_shows_no_preview_of_a_flagged_image(http: httpx.Client) -> None:
    body = {"prompt": "six", "steps": 8, "stream": True, "partial_images": 3}
    lines = [line for line in http.post(GENERATIONS, json=body).text.splitlines() if line.startswith("data: ")]
    assert [json.loads(line[6:])["error"]["code"] for line in lines] == ["content_policy_violation"]


def test_a_job_says_which_image_is_flagged_and_keeps_it(http: httpx.Client) -> None:
    job = job_of(http, prompt="seven", n=2)
    flagged, shown = job["images"]
    assert (job["status"], flagged["flagged"], flagged["url"]) == ("succeeded", True, None)
    assert (shown["flagged"], http.get(shown["url"]).status_code) == (False, 200)
    refused = http.get(f"{job['status_url']}/images/0")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "content_policy_violation")


def test_automatic1111_clients_get_a_black_image(http: httpx.Client) -> None:
    answer = http.post(TXT2IMG, json={"prompt": "seven", "batch_size": 2}).json()
    black, shown = (Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["images"])
    assert black.getextrema() == ((0, 0), (0, 0), (0, 0))
    assert shown.getextrema() != black.getextrema()
    assert json.loads(answer["info"])["flagged"] == [True, False]


@pytest.mark.parametrize("prompt", ["three", "nine"], ids=["nonsense", "raises"])
def test_a_check_that_fails_withholds_everything(
    http: httpx.Client, prompt: str, capfd: pytest.CaptureFixture[str]
) -> None:
    failed = http.post(GENERATIONS, json={"prompt": prompt, "n": 2})
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "safety_check_failed")
    job = job_of(http, prompt=prompt)
    assert (job["status"], job["images"], job["error"]["code"]) == ("failed", [], "safety_check_failed")
    stream = http.post(GENERATIONS, json={"prompt": prompt, "steps": 8, "stream": True, "partial_images": 1})
    assert "b64_json" not in stream.text
    assert "safety_check_failed" in stream.text
    assert http.post(GENERATIONS, json={"prompt": "one"}).status_code == 200
    said = "".join(capfd.readouterr())
    assert "safety_check_failed" in said
    assert "no answer for" not in said


def test_a_check_that_hangs_withholds_everything_until_it_returns(toy_bundle: Path) -> None:
    safety_hooks.release.clear()
    with live(toy_bundle, safety_check=HOOK, safety_timeout_s=0.5) as running, running.client() as http:
        for prompt in ("eight", "eight", "one"):  # every thread is taken, so even the last is not checked
            failed = http.post(GENERATIONS, json={"prompt": prompt})
            assert (failed.status_code, failed.json()["error"]["code"]) == (500, "safety_check_failed")
        safety_hooks.release.set()
        until(lambda: http.post(GENERATIONS, json={"prompt": "one"}).status_code == 200, "the threads are back")


def test_images_are_counted_by_what_was_said_of_them(toy_bundle: Path) -> None:
    with live(toy_bundle, safety_check=HOOK) as running, running.client() as client:
        for prompt in ("one", "seven", "nine"):
            client.post(GENERATIONS, json={"prompt": prompt, "n": 2})

        def counted(outcome: str) -> float:
            return running.count("halfstep_safety_checks_total", model="toy-digits", outcome=outcome)

        assert [counted(outcome) for outcome in ("passed", "withheld", "failed")] == [3, 1, 2]


@pytest.mark.parametrize(
    "name",
    ["no.such.module:check", "tests.support.safety_hooks:nothing", "tests.support.safety_hooks:NOT_CALLABLE"],
)
@pytest.mark.parametrize("command", [start.serve, start.worker])
def test_a_check_that_cannot_be_had_stops_the_start(name: str, command: Any, toy_bundle: Path) -> None:
    settings = Settings(bundles=(toy_bundle,), port=0, redis="redis://127.0.0.1:1/0", safety_check=name)
    with pytest.raises(StartError, match="HALFSTEP_SAFETY_CHECK"):
        command(settings)

"""Secrets and what clients write, planted as canaries, are nowhere in a run's logs, metrics, traces and errors."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from tests.support.command import Command
from tests.support.keys import bearer, write_key_file
from tests.support.pictures import file_of, mask_file, photo
from tests.support.redis_server import RedisServer
from tests.support.serving import until
from tests.support.webhook_receiver import LOOPBACK, receiver

PROMPT = "the digit nine"
"""A prompt the model knows and nothing else says."""

UNKNOWN = "c4n4ry-prompt"
SECRET = "c4n4ry-secret-that-signs-webhooks"
REDIS_PASSWORD = "c4n4ry-redis"
WRONG_KEY = "hs_0badc0de_" + "c4n4ry" * 7 + "x"
REST = ("c4n4ry-user", "c4n4ry-header", "c4n4ry-query", "c4n4ry-path", "c4n4ry-once", "c4n4ry-hook", "c4n4ry-file")
USER, HEADER, QUERY, PATH, ONCE, HOOK, FILE = REST


@dataclass
class Run:
    """Everything that could hold a canary, by where it came from."""

    keys: dict[str, str]
    told: dict[str, bytes] = field(default_factory=dict)
    statuses: set[int] = field(default_factory=set)

    @property
    def canaries(self) -> tuple[str, ...]:
        whole = (*self.keys.values(), WRONG_KEY)
        return (PROMPT, UNKNOWN, SECRET, REDIS_PASSWORD, *REST, *whole, *(key.split("_", 2)[2] for key in whole))

    @property
    def leaks(self) -> set[tuple[str, str]]:
        """Canaries and where they turned up, as they are, quoted or in base64."""
        return {
            (canary, place)
            for place, text in self.told.items()
            for canary in self.canaries
            if any(form in text for form in forms(canary))
        }


def forms(canary: str) -> list[bytes]:
    text = canary.encode()
    return [text, quote(canary).encode(), base64.b64encode(text).rstrip(b"=")[:-1], text.hex().encode()]


@contextmanager
def running(bundle: Path, folder: Path, commands: tuple[str, ...], module: str = "server") -> Iterator[Any]:
    """A Redis with a password, processes that log all there is, and a receiver of traces and webhooks."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(""))
        redis.client.config_set("requirepass", REDIS_PASSWORD)
        origin, heard = stack.enter_context(receiver())
        run = Run(write_key_file(folder / "keys.json"))
        environment = {
            "HALFSTEP_API_KEYS": str(folder / "keys.json"),
            "HALFSTEP_SECRET": SECRET,
            "HALFSTEP_WEBHOOK_ALLOW": f"{origin},{LOOPBACK}",
            "HALFSTEP_TRACES_ENDPOINT": f"{origin}/v1/traces",
            "HALFSTEP_LOG_LEVEL": "debug",
        }
        log = stack.enter_context((folder / "log").open("w+"))
        url = redis.url.replace("unix://", f"unix://:{REDIS_PASSWORD}@")
        processes = []
        for command in commands:
            options: dict[str, Any] = {"environment": environment, "output": log, "module": module}
            processes.append(Command(command, url, bundle, folder, **options))
            stack.callback(processes[-1].end)
        for process in processes:
            process.wait_ready()
        yield run, redis, processes, origin
        until(lambda: any("protobuf" in headers["content-type"] for headers, _ in heard), "traces came", 60)
        if "worker" in commands:
            until(lambda: any("json" in headers["content-type"] for headers, _ in heard), "a webhook came", 60)
        scraper = bearer(run.keys["scraper"])
        for process, command in zip(processes, commands, strict=True):
            run.told[f"{command} metrics"] = httpx.get(
                f"{process.url}/metrics", headers=scraper, timeout=30
            ).content
        for process in processes:
            process.process.terminate()
        for process in processes:
            process.process.wait(60)
        run.told["logs"] = (folder / "log").read_bytes()
        traces = [body for headers, body in heard if "protobuf" in headers["content-type"]]
        run.told["traces"] = b"".join(traces)
        run.told["webhooks"] = b"".join(body for headers, body in heard if "json" in headers["content-type"])


def ask(run: Run, api: Command, origin: str) -> None:
    """All APIs, well and badly, with canaries wherever a client may write; refusals are kept."""
    key, image = run.keys["a"], file_of(photo(), pnginfo=None)
    headers = {**bearer(key), "x-note": HEADER, "user-agent": HEADER, "idempotency-key": ONCE}
    hook, coded = f"{origin}/{HOOK}?token={HOOK}", base64.b64encode(image).decode()
    form = {"prompt": PROMPT, "user": USER, "safety_identifier": USER}
    files = {"image": (f"{FILE}.png", image, "image/png"), "mask": (f"{FILE}.png", mask_file(), "image/png")}
    with httpx.Client(base_url=api.url, timeout=60, headers=headers, params={"note": QUERY}) as client:

        def post(path: str, **options: Any) -> httpx.Response:
            answer = client.post(path, **options)
            run.statuses.add(answer.status_code)
            if answer.status_code >= 400:
                run.told[f"error {len(run.told)}"] = answer.content
            return answer

        generations = "/v1/images/generations"
        for body in (
            {"prompt": PROMPT, "user": USER, "safety_identifier": USER},
            {"prompt": PROMPT, "stream": True, "partial_images": 2},
            {"prompt": UNKNOWN},
            {"prompt": PROMPT, "oddity": UNKNOWN},
            {"prompt": PROMPT, "size": UNKNOWN},
        ):
            post(generations, json=body)
        post(
            generations, content=json.dumps({"prompt": UNKNOWN})[:-2], headers={"content-type": "application/json"}
        )
        post(generations, json=form, headers=bearer(WRONG_KEY))
        post("/v1/images/edits", data=form, files=files)
        post("/v1/images/edits", data={**form, "strength": UNKNOWN}, files=files)
        post("/v1/images/edits", data=form, files={"image": (f"{FILE}.png", UNKNOWN.encode(), "image/png")})
        job = {"prompt": PROMPT, "task": "edit", "image": coded, "webhook_url": hook}
        post("/v1/jobs", json=job, headers={"prefer": "wait=30"}).raise_for_status()
        post("/v1/jobs", json={"prompt": PROMPT})
        post("/v1/jobs", json={"prompt": PROMPT, "webhook_url": f"http://{HOOK}.example/"})
        post("/sdapi/v1/txt2img", json={"prompt": PROMPT, "negative_prompt": ""})
        post("/sdapi/v1/txt2img", json={"prompt": UNKNOWN})
        post(f"/v1/{PATH}", json={})
        client.delete(f"/v1/jobs/{PATH}")


def test_a_run_keeps_what_it_was_told_to_itself(toy_bundle: Path, tmp_path: Path) -> None:
    with running(toy_bundle, tmp_path, ("worker", "api")) as (run, redis, processes, origin):
        _, api = processes
        ask(run, api, origin)
        redis.freeze()
        refused = httpx.post(
            f"{api.url}/v1/jobs", json={"prompt": PROMPT}, headers=bearer(run.keys["a"]), timeout=60
        )
        run.told["error of a store away"] = refused.content
        redis.thaw()
        for process in processes:
            process.wait_ready()
    assert run.statuses >= {200, 400, 401, 404, 422}
    assert refused.status_code == 503
    assert all(run.told.values()), "there is something to search everywhere"
    assert all(len(text) <= 4096 for place, text in run.told.items() if place.startswith("error"))
    assert not run.leaks


def test_a_planted_leak_is_seen(toy_bundle: Path, tmp_path: Path) -> None:
    with running(toy_bundle, tmp_path, ("api",), "tests.support.leaky_server") as (run, _, (api,), _):
        httpx.post(f"{api.url}/v1/jobs", json={"prompt": PROMPT}, headers=bearer(run.keys["a"]), timeout=60)
    assert {(run.keys["a"], "logs"), (PROMPT, "api metrics")} <= run.leaks

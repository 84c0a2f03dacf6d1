"""A real server under load: its engine and its bundle change, no request fails, every image is its engine's own."""

from __future__ import annotations

import base64
import io
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from engines.open import open_pipeline
from tests.support.serving import ServerProcess, serving, until
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

pytestmark = pytest.mark.long

LIMIT_S = 400.0
"""For a build, which has low priority: on a busy machine it takes minutes."""

PAUSE_S = 0.1
"""Between two requests of a client, to leave the build its time."""

SEEDS = (1, 2, 3)


@dataclass
class Load:
    """Requests one after another from several clients. answers: engine and (steps, seed, pixels) of each."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    answers: list[tuple[str, int, int, NDArray[np.uint8]]] = field(default_factory=list)

    def run(self, steps: int) -> None:
        with httpx.Client(base_url=self.url, timeout=LIMIT_S) as client:
            while not self.stop.wait(PAUSE_S):
                body = {"prompt": "seven", "n": len(SEEDS), "seed": SEEDS[0], "steps": steps}
                answer = client.post("/v1/images/generations", json=body)
                assert answer.status_code == 200, answer.text
                made = answer.json()
                for entry in made["data"]:
                    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))
                    self.answers.append((made["engine"].split()[0], steps, entry["seed"], pixels))

    def until_engine(self, name: str) -> None:
        """Wait for an answer made by it, of those that are still to come."""
        begin = len(self.answers)
        until(lambda: any(answer[0] == name for answer in self.answers[begin:]), f"{name} answered", LIMIT_S)


@contextmanager
def loaded(server: ServerProcess) -> Iterator[Load]:
    load = Load(server.url)
    with ThreadPoolExecutor(2) as pool:
        clients: list[Future[None]] = [pool.submit(load.run, steps) for steps in (1, 4)]
        try:
            yield load
        finally:
            load.stop.set()
        for client in clients:
            client.result()


def expected(bundle: Path, backend: str) -> dict[tuple[int, int], NDArray[np.uint8]]:
    """By steps and seed, alone and in this process."""
    pipeline = open_pipeline(bundle, backend, threads=1, warm=False)
    return {
        (steps, seed): pipeline.generate(["seven"], 2.0, [seed], steps)[0] for steps in (1, 4) for seed in SEEDS
    }


def engines_of(load: Load, **images: dict[str, dict[tuple[int, int], NDArray[np.uint8]]]) -> list[str]:
    """Which version and engine made each answer; each must be exactly what one of the versions gives there."""
    found = []
    for engine, steps, seed, pixels in load.answers:
        versions = [v for v, of in images.items() if np.array_equal(of[engine][steps, seed], pixels)]
        assert versions, f"no version makes this on {engine}: {steps} steps, seed {seed}"
        found.append(f"{versions[0]} on {engine}")
    return found


def metric(url: str, name: str, **labels: str) -> float:
    wanted = {f'{label}="{value}"' for label, value in labels.items()}
    for line in httpx.get(f"{url}/metrics", timeout=LIMIT_S).text.splitlines():
        if line.startswith(name) and all(label in line for label in wanted):
            return float(line.rpartition(" ")[2])
    return 0.0


def builders(server: ServerProcess) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "server.engine_build" in child.cmdline()]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A link to the first version, beside the second."""
    for name, seed in (("one", 0), ("two", 1)):
        make_toy_bundle(tmp_path / name, ToyOptions(steps=(1, 4), weights_seed=seed))
    (tmp_path / "current").symlink_to("one")
    return tmp_path


@contextmanager
def taking_up(place: Path) -> Iterator[ServerProcess]:
    flags = ["--backend", "openvino", "--start-backend", "onnxruntime", "--threads", "1"]
    flags += ["--cache-dir", str(place / "cache")]
    with serving([place / "current"], *flags, log=place / "stderr.log") as server:
        yield server


def point_to(place: Path, name: str) -> None:
    (place / "next").symlink_to(name)
    (place / "next").replace(place / "current")


def test_a_killed_build_is_tried_again_and_its_engine_taken_up_under_load(place: Path) -> None:
    with taking_up(place) as server, loaded(server) as load:
        (builder,) = until(lambda: builders(server), "the build began")
        builder.send_signal(signal.SIGKILL)
        refused = {"what": "engine", "outcome": "refused"}
        until(lambda: metric(server.url, "halfstep_takeovers_total", **refused), "it was noticed", LIMIT_S)
        assert "The build of the openvino engines was ended by signal 9" in (place / "stderr.log").read_text()
        load.until_engine("onnxruntime")
        server.process.send_signal(signal.SIGHUP)
        load.until_engine("openvino")
        load.until_engine("openvino")
        assert metric(server.url, "halfstep_engine_preferred") == 1
        assert metric(server.url, "halfstep_requests_total", status="failed") == 0
    one = {backend: expected(place / "one", backend) for backend in ("onnxruntime", "openvino")}
    assert set(engines_of(load, one=one)) == {"one on onnxruntime", "one on openvino"}


def test_a_new_bundle_is_taken_up_under_load_and_a_bad_one_is_not(place: Path) -> None:
    shutil.copytree(place / "two", place / "bad")
    graph = (place / "bad" / "decode.onnx").read_bytes()
    (place / "bad" / "decode.onnx").write_bytes(graph[:-1] + bytes([graph[-1] ^ 1]))
    refused: dict[str, Any] = {"what": "bundle", "outcome": "refused"}
    with taking_up(place) as server, loaded(server) as load:
        load.until_engine("openvino")
        point_to(place, "bad")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: metric(server.url, "halfstep_takeovers_total", **refused), "it was refused", LIMIT_S)
        assert "decode.onnx was altered" in (place / "stderr.log").read_text()
        load.until_engine("openvino")
        point_to(place, "two")
        server.process.send_signal(signal.SIGHUP)
        load.until_engine("onnxruntime")
        load.until_engine("openvino")
        load.until_engine("openvino")
        assert metric(server.url, "halfstep_requests_total", status="failed") == 0
    backends = ("onnxruntime", "openvino")
    one, two = ({backend: expected(place / name, backend) for backend in backends} for name in ("one", "two"))
    found = engines_of(load, one=one, two=two)
    assert found[-1] == "two on openvino"
    assert set(found) == {f"{version} on {backend}" for version in ("one", "two") for backend in backends}

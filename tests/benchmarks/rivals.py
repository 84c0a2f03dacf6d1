"""The same student behind other servers, as their own documentation would have it.

litserve: Lightning's dynamic batching over the same engine and pipeline; a batch is made to its end before the
next one starts. diffusers: FastAPI around stock diffusers in eager torch, one request at a time.
Run: python -m tests.benchmarks.rivals litserve BUNDLE PORT --batch 8 --wait-ms 5
     python -m tests.benchmarks.rivals diffusers BUNDLE PORT
"""

import threading
from pathlib import Path
from typing import Annotated, Any

import litserve
import typer
import uvicorn
from fastapi import FastAPI

from engines.open import open_pipeline
from tests.benchmarks.eager import EagerStudent
from tests.benchmarks.load import Pixels
from tests.benchmarks.together import make_together
from tests.benchmarks.wishes import RIVALS, Wish, answer

app = typer.Typer(add_completion=False)


class StudentAPI(litserve.LitAPI):
    """batching as LitServe does it: up to ``max_batch_size`` requests that came within ``batch_timeout``."""

    def __init__(self, bundle: Path, batch: int, wait_s: float) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=wait_s, api_path=RIVALS)
        self._bundle = bundle

    def setup(self, device: str) -> None:
        self._pipeline = open_pipeline(self._bundle)

    def decode_request(self, request: Wish) -> Wish:
        return request

    def batch(self, inputs: list[Wish]) -> list[Wish]:
        return inputs

    def predict(self, x: Wish | list[Wish]) -> Any:
        return make_together(self._pipeline, x) if isinstance(x, list) else make_together(self._pipeline, [x])[0]

    def unbatch(self, output: list[Pixels]) -> list[Pixels]:
        return output

    def encode_response(self, output: Pixels) -> dict[str, str]:
        return answer(output)


@app.command("litserve")
def serve_litserve(
    bundle: Path,
    port: int,
    batch: Annotated[int, typer.Option(min=1, help="Largest batch.")] = 8,
    wait_ms: Annotated[float, typer.Option(min=0, help="Longest wait for a batch to fill.")] = 5.0,
) -> None:
    """LitServe over the bundle's own engine."""
    api = StudentAPI(bundle, batch, wait_ms / 1000)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")


@app.command("diffusers")
def serve_diffusers(bundle: Path, port: int) -> None:
    """FastAPI around the stock network and scheduler of a random bundle."""
    uvicorn.run(_diffusers_app(bundle), host="127.0.0.1", port=port, log_level="warning")


def _diffusers_app(bundle: Path) -> FastAPI:
    student, lock, server = EagerStudent(bundle), threading.Lock(), FastAPI()

    @server.get("/health")
    def health() -> str:
        return "ok"

    @server.post(RIVALS)
    def make(wish: Wish) -> dict[str, str]:
        with lock:  # eager torch on all cores: two at once are slower than one by one
            pixels = student.make(wish)
        return answer(pixels)

    return server


if __name__ == "__main__":
    app()

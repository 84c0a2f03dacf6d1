"""``python -m server generate``: a prompt to files, by a running server or by the model in this process."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from engines.open import open_pipeline
from server.api.validation import validate
from server.catalogue import Catalogue, Model
from server.encoding import encode, encoding_of
from server.errors import ApiError
from server.finishing import with_known
from server.fitting import alpha_is_edit
from server.jobs import Job, Lease
from server.resolve import resolve, resolve_edit
from server.schemas import EditBody, GenerationBody
from server.stages import encode_images
from server.wish import GenerateError, Wish
from server.work import Work

Told = Callable[[int, int], None]
"""(done, of): steps here, previews and images of a server."""

RUNGS = (1, 2, 4, 8, 16)
TIMEOUT_S = 300.0


def draw_here(bundle: Path, wish: Wish, told: Told) -> list[tuple[int, bytes]]:
    """(seed, file) of each image, made in this process. Raises: GenerateError, BundleError, BackendError."""
    pipeline = open_pipeline(bundle, rungs=RUNGS, warm=False)
    catalogue = Catalogue([Model.of(pipeline.bundle, lambda _: 0.0)])
    try:
        if wish.image is None:
            request = resolve(validate(GenerationBody, wish.fields), catalogue)
        else:
            body = validate(EditBody, wish.fields)
            edit = resolve_edit(body, catalogue, masked=wish.mask is not None)
            request = edit.with_files(_read(wish.image), _maybe(wish.mask), alpha_is_edit)
    except ApiError as error:
        raise GenerateError(error.message) from None
    work = Work(Lease(job=Job(id="here", request=request, cost_s=0), worker="here", attempt=1, queued_ms=0), 0.0)
    conditions = dict(zip(request.prompts, pipeline.condition(request.prompts), strict=True))
    work.start_rows(pipeline, conditions, encode_images(pipeline, [work]).get(work.token))
    rows = [ticket.row.row for ticket in work.tickets]
    told(0, request.network_steps)
    while not rows[0].done:
        pipeline.step(rows)
        told(rows[0].position, request.network_steps)
    pixels = pipeline.decode([row.latent for row in rows])
    engine = pipeline.engine_name
    return [
        (seed, encode(with_known(request, drawn), encoding_of(request, seed, engine)))
        for seed, drawn in zip(request.seeds, pixels, strict=True)
    ]


def draw_there(url: str, key: str | None, wish: Wish, told: Told) -> list[tuple[int, bytes]]:
    """(seed, file) of each image, made by the server at ``url``, but for those its safety check withheld.

    key: an API key. Raises: GenerateError.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    images = int(wish.fields.get("n", 1))
    made: list[tuple[int, bytes]] = []
    withheld = 0
    told(0, images)
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S) as client:
            for event in _events(client, wish):
                if "error" in event:
                    raise GenerateError(str(event["error"]["message"]))
                if event["type"].endswith(".completed"):
                    if event.get("flagged"):
                        withheld += 1
                    else:
                        made.append((event["seed"], base64.b64decode(event["b64_json"])))
                    told(len(made) + withheld, images)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL):
        raise GenerateError(f"{url} is no address of a server; one is http://127.0.0.1:8000") from None
    except (httpx.HTTPError, ValueError, KeyError) as error:
        message = f"{url} gave no images ({type(error).__name__}); is a halfstep server running there?"
        raise GenerateError(message) from None
    if len(made) + withheld < images:
        raise GenerateError(f"{url} ended its answer before every image had come; try again")
    return made


def _events(client: httpx.Client, wish: Wish) -> Iterator[dict[str, Any]]:
    fields = {**wish.fields, "stream": True}
    with ExitStack() as stack:
        if wish.image is None:
            sent: dict[str, Any] = {"url": "/v1/images/generations", "json": fields}
        else:
            paths = {"image": wish.image} | ({} if wish.mask is None else {"mask": wish.mask})
            files = {name: (path.name, _read(path)) for name, path in paths.items()}
            texts = {name: str(value).lower() if value is True else str(value) for name, value in fields.items()}
            sent = {"url": "/v1/images/edits", "data": texts, "files": files}
        answer = stack.enter_context(client.stream("POST", **sent))
        if answer.status_code != httpx.codes.OK:
            yield json.loads(answer.read())
            return
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GenerateError(f"{path} cannot be read: {error.strerror}") from None


def _maybe(path: Path | None) -> bytes | None:
    return None if path is None else _read(path)

"""Every bad body has its status, code and field, in OpenAI's shape, and is never echoed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from engines.noise import MAX_SEED
from server.resolve import resolve
from server.schemas import GenerationBody
from tests.support.offline import offline_client, offline_service
from tests.support.pictures import file_of, photo
from tests.support.serving import ROOT

URL = "/v1/images/generations"
CANARY = "canary-4711"


@pytest.fixture(scope="module")
def client(toy_bundle: Path) -> TestClient:
    return offline_client(offline_service(toy_bundle))


def post(client: TestClient, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    sent = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    response = client.post(URL, content=body, headers=sent)
    assert response.headers["x-request-id"]
    assert len(response.content) <= 4096
    assert CANARY not in response.text, "the input was echoed"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error


def seven(**fields: Any) -> bytes:
    return json.dumps({"prompt": "seven", **fields}).encode()


RAW = [
    ("empty", b"", 400, "invalid_json"),
    ("truncated", b'{"prompt": "canary-4711', 400, "invalid_json"),
    ("trailing garbage", b'{"prompt": "seven"} canary-4711', 400, "invalid_json"),
    ("NaN", b'{"prompt": "seven", "guidance_scale": NaN}', 400, "invalid_json"),
    ("Infinity", b'{"prompt": "seven", "guidance_scale": Infinity}', 400, "invalid_json"),
    ("-Infinity", b'{"prompt": "seven", "guidance_scale": -Infinity}', 400, "invalid_json"),
    ("1e400", b'{"prompt": "seven", "guidance_scale": 1e400}', 400, "invalid_json"),
    ("duplicate key", b'{"prompt": "seven", "prompt": "canary-4711"}', 400, "duplicate_key"),
    ("100k deep", b"[" * 100_000 + b"]" * 100_000, 400, "too_deep"),
    ("100k deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, "too_deep"),
    ("many objects", b'{"prompt": [' + b"{}," * 20_000 + b"{}]}", 400, "too_many_values"),
    ("many numbers", b'{"prompt": [' + b"1," * 20_000 + b"1]}", 400, "too_many_values"),
    ("many nested", b'{"prompt": [' + (b"[" * 100 + b"]" * 100 + b",") * 500 + b"1]}", 400, "too_deep"),
    ("5,000 digits", b'{"prompt": "seven", "seed": ' + b"7" * 5000 + b"}", 400, "invalid_json"),
    ("bad UTF-8", b'{"prompt": "\xff\xfe"}', 400, "invalid_encoding"),
    ("overlong UTF-8", b'{"prompt": "\xc0\xaf"}', 400, "invalid_encoding"),
    ("BOM", b'\xef\xbb\xbf{"prompt": "seven"}', 400, "invalid_encoding"),
    ("UTF-16 with BOM", '{"prompt": "seven"}'.encode("utf-16"), 400, "invalid_encoding"),
    ("UTF-16 without", '{"prompt": "seven"}'.encode("utf-16-le"), 400, "invalid_encoding"),
    ("array", b"[]", 400, "invalid_type"),
    ("null", b"null", 400, "invalid_type"),
    ("string", b'"canary-4711"', 400, "invalid_type"),
    ("odd field name", b'{"prompt": "seven", "<canary-4711>": 1}', 400, "unknown_field"),
    ("surrogate field name", b'{"prompt": "seven", "\\ud800": 1}', 400, "unknown_field"),
    ("lone surrogate", b'{"prompt": "\\ud800"}', 400, "invalid_prompt"),
    ("no prompt", b"{}", 400, "missing_field"),
]


@pytest.mark.parametrize(("body", "status", "code"), [case[1:] for case in RAW], ids=[case[0] for case in RAW])
def test_raw_body(client: TestClient, body: bytes, status: int, code: str) -> None:
    assert (post(client, body)[0], post(client, body)[1]["code"]) == (status, code)


FIELDS = [
    # numbers
    ("seed", -1, "out_of_range"),
    ("seed", 2**64, "out_of_range"),
    ("seed", MAX_SEED + 1, "out_of_range"),
    ("seed", 1.5, "invalid_type"),
    ("seed", True, "invalid_type"),
    ("seed", "7", "invalid_type"),
    ("guidance_scale", -1, "out_of_range"),
    ("guidance_scale", 0.99, "out_of_range"),
    ("guidance_scale", 1e9, "out_of_range"),
    ("guidance_scale", "NaN", "invalid_type"),
    ("guidance_scale", True, "invalid_type"),
    ("n", 0, "out_of_range"),
    ("n", 11, "out_of_range"),
    ("n", 2**31, "out_of_range"),
    ("n", True, "invalid_type"),
    ("n", "2", "invalid_type"),
    ("steps", 0, "out_of_range"),
    ("steps", 3, "out_of_range"),
    ("steps", 9999, "out_of_range"),
    ("steps", 4.0, "invalid_type"),
    ("output_compression", 101, "out_of_range"),
    ("partial_images", 4, "out_of_range"),
    # prompts
    ("prompt", None, "invalid_type"),
    ("prompt", 7, "invalid_type"),
    ("prompt", ["seven"], "invalid_type"),
    ("prompt", "", "empty_prompt"),
    ("prompt", " \t\n", "empty_prompt"),
    ("prompt", "\u200b\ufeff\u2060", "empty_prompt"),
    ("prompt", "seven\x00", "invalid_prompt"),
    ("prompt", "se\x07ven", "invalid_prompt"),
    ("prompt", "seven " * 1000, "prompt_too_long"),
    ("prompt", ",[{" * 1333, "unknown_prompt"),
    ("prompt", "canary-4711", "unknown_prompt"),
    ("prompt", "שבע", "unknown_prompt"),
    ("prompt", "7️⃣ 🙂", "unknown_prompt"),
    ("prompt", "<|endoftext|>", "unknown_prompt"),
    # what is not offered
    ("size", "63x64", "out_of_range"),
    ("size", "-64x64", "out_of_range"),
    ("size", "1000000x1000000", "out_of_range"),
    ("size", "canary-4711", "out_of_range"),
    ("size", 64, "invalid_type"),
    ("quality", "hd", "unsupported_value"),
    ("style", "vivid", "unsupported_value"),
    ("background", "transparent", "unsupported_value"),
    ("moderation", "low", "unsupported_value"),
    ("output_format", "gif", "unsupported_value"),
    ("response_format", "url", "unsupported_value"),
    ("sampler", "canary-4711", "unsupported_value"),
    ("sampler", "stochastic", None),
    ("negative_prompt", "canary-4711", "unsupported_value"),
    ("stream", "true", "invalid_type"),
    ("user", "u" * 513, "out_of_range"),
    ("safety_identifier", "u" * 513, "out_of_range"),
    ("width", 64, "unknown_field"),
    ("cfg_scale", 2.0, "unknown_field"),
]


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [case for case in FIELDS if case[2]],
    ids=[f"{field}={str(value)[:12]!a}" for field, value, code in FIELDS if code],
)
def test_field(client: TestClient, field: str, value: Any, code: str) -> None:
    status, error = post(client, seven(**{field: value}))
    assert (status, error["code"], error["param"]) == (400, code, field)
    assert field in error["message"] or code == "unknown_prompt"


COMBINATIONS = [
    ({"steps": 4, "num_inference_steps": 8}, "conflicting_fields", "num_inference_steps"),
    ({"guidance": 2, "guidance_scale": 3}, "conflicting_fields", "guidance"),
    ({"guidance": 99}, "out_of_range", "guidance"),
    ({"num_inference_steps": 5}, "out_of_range", "num_inference_steps"),
    ({"sampler": "stochastic", "steps": 8}, "out_of_range", "sampler"),
    ({"output_compression": 50}, "unsupported_value", "output_compression"),
    ({"partial_images": 2}, "unsupported_value", "partial_images"),
    ({"seed": MAX_SEED, "n": 2}, "out_of_range", "seed"),
]


@pytest.mark.parametrize(("fields", "code", "param"), COMBINATIONS, ids=[str(case[0]) for case in COMBINATIONS])
def test_combination(client: TestClient, fields: dict[str, Any], code: str, param: str) -> None:
    status, error = post(client, seven(**fields))
    assert (status, error["code"], error["param"]) == (400, code, param)
    assert param in error["message"]


@pytest.mark.parametrize(
    "fields",
    [{"seed": MAX_SEED}, {"seed": MAX_SEED - 9, "n": 10}, {"guidance_scale": 1.0}, {"guidance_scale": 5.0}],
    ids=str,
)
def test_both_ends_of_a_range_belong_to_it(toy_bundle: Path, fields: dict[str, Any]) -> None:
    made = resolve(GenerationBody(prompt="seven", **fields), offline_service(toy_bundle).catalogue)
    assert fields.items() <= made.model_dump().items()


def test_allowed_values_are_named(client: TestClient) -> None:
    assert "1, 2, 4, 8" in post(client, seven(steps=3))[1]["message"]
    assert "1 to 5" in post(client, seven(guidance_scale=9))[1]["message"]
    assert "64x64" in post(client, seven(size="8x8"))[1]["message"]
    assert "1 to 10" in post(client, seven(n=0))[1]["message"]
    assert "zero, one, two" in post(client, seven(prompt="cat"))[1]["message"]
    assert "auto or standard" in post(client, seven(quality="high"))[1]["message"]
    assert "'png', 'jpeg' or 'webp'" in post(client, seven(output_format="gif"))[1]["message"]


@pytest.mark.parametrize(("param", "fields"), [("prompt", {}), ("source_prompt", {"prompt": "fox"})])
def test_a_prompt_of_too_many_tokens_is_called_by_its_name(param: str, fields: dict[str, str]) -> None:
    client = offline_client(offline_service(ROOT / "server" / "bundles" / "emoji"))
    sent = {"mode": "invert", "source_prompt": "fox", param: "fox " * 23, **fields}
    answer = client.post("/v1/images/edits", data=sent, files={"image": file_of(photo())})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "prompt_too_long", param)
    assert error["message"].startswith(f"{param} is ")


def test_an_unknown_model_is_404(client: TestClient) -> None:
    status, error = post(client, seven(model=CANARY))
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


CONTENT = [
    ({"content_type": "text/plain"}, "unsupported_media_type"),
    ({"content_type": ""}, "unsupported_media_type"),
    ({"content_type": "multipart/form-data; boundary=x"}, "unsupported_media_type"),
    ({"content_encoding": "gzip"}, "unsupported_encoding"),
    ({"content_encoding": "br"}, "unsupported_encoding"),
]


@pytest.mark.parametrize(("headers", "code"), CONTENT)
def test_content_headers(client: TestClient, headers: dict[str, str], code: str) -> None:
    status, error = post(client, gzip.compress(seven()), **headers)
    assert (status, error["code"]) == (415, code)


def test_a_large_body_is_413_declared_or_not(client: TestClient) -> None:
    large = seven(prompt=CANARY * 200_000)
    assert post(client, large)[0] == 413
    chunks = iter([large[:1000], large[1000:]])
    response = client.post(URL, content=chunks, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")


def test_too_many_or_too_large_headers_are_431(client: TestClient) -> None:
    assert post(client, seven(), x_large="a" * 90_000)[0] == 431
    many = {f"x_{i}": "a" for i in range(200)}
    assert post(client, seven(), **many)[1]["code"] == "headers_too_large"


PATHS = ["/v1/models/..%2f", "/v1/models/%00", "/v1/models/%0d%0aX: y", "/v1/models/" + "a" * 10_000, "/nothing"]


@pytest.mark.parametrize("path", PATHS, ids=[path[:20] for path in PATHS])
def test_unknown_paths_are_404(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] in {"not_found", "model_not_found"}
    assert len(response.content) < 500


def test_a_wrong_method_is_405_with_allow(client: TestClient) -> None:
    response = client.get(URL)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    response = client.post("/openapi.json")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
    assert response.json()["error"]["code"] == "method_not_allowed"


def test_whatever_answers_get_answers_head_but_events_and_metrics(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in (path for path, operations in paths.items() if "get" in operations):
        expected = 405 if path.endswith(("/events", "/metrics")) else client.get(path).status_code
        assert client.head(path).status_code == expected, path


WISHES = [
    ({"init_images": "canary-4711"}, "init_images must be a list."),
    ({"init_images": [5]}, "each of init_images must be a string."),
    ({"init_images": [], "override_settings": []}, "override_settings must be an object."),
]


@pytest.mark.parametrize(("fields", "message"), WISHES, ids=[str(case[0]) for case in WISHES])
def test_a_list_or_object_of_the_wrong_type_is_said_so(
    client: TestClient, fields: dict[str, Any], message: str
) -> None:
    error = client.post("/sdapi/v1/img2img", json={"prompt": "seven", **fields}).json()
    assert (error["error"], error["detail"]) == ("invalid_type", message)


def test_request_ids_are_the_clients_own_where_plain(client: TestClient) -> None:
    assert client.get("/livez", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = client.get("/livez", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
    assert made.startswith("req_")


def test_refusals_are_counted_by_reason(client: TestClient) -> None:
    post(client, seven(steps=3))
    metrics = client.get("/metrics").text
    assert 'halfstep_requests_rejected_total{reason="out_of_range"}' in metrics
    assert CANARY not in metrics

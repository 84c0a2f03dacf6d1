"""What the OpenAPI document says of the jobs API beyond what the code's types say."""

from __future__ import annotations

from typing import Any, get_args

from server.api.reference import GENERATION_RESPONSES, error_response, events_content
from server.job_schemas import EXAMPLES, EventName, JobBody, JobEventBody, JobStateBody

JOB_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": JobBody.model_json_schema(), "examples": EXAMPLES}},
    }
}


def _link(method: str, path: str) -> dict[str, Any]:
    place = path.replace("/", "~1")
    return {"operationRef": f"#/paths/{place}/{method}", "parameters": {"job_id": "$response.body#/id"}}


_LINKS = {
    "read": _link("get", "/v1/jobs/{job_id}"),
    "cancel": _link("delete", "/v1/jobs/{job_id}"),
    "follow": _link("get", "/v1/jobs/{job_id}/events"),
    "image": _link("get", "/v1/jobs/{job_id}/images/{index}"),
}

_SUBMITTED_HEADERS = {
    "Location": {"description": "As status_url.", "required": True, "schema": {"type": "string"}},
    "Preference-Applied": {"description": "wait=N, where Prefer asked for it.", "schema": {"type": "string"}},
}

SUBMITTED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": JobStateBody,
        "description": "Prefer: wait was sent, and the job ended in time",
        "headers": _SUBMITTED_HEADERS,
        "links": _LINKS,
    },
    202: {
        "description": "Accepted; the Location header and status_url say where to look. Without the fields of the "
        "request where the job could not be read again",
        "headers": _SUBMITTED_HEADERS,
        "links": _LINKS,
    },
}

JOB: dict[int | str, dict[str, Any]] = {200: {"description": "The job as of now"}}

REFUSED: dict[int | str, dict[str, Any]] = {
    400: error_response(
        "The body is not JSON, or a header is malformed", "invalid_json", "The body is not valid JSON."
    ),
    404: GENERATION_RESPONSES[404],
    408: GENERATION_RESPONSES[408],
    409: error_response("It has ended", "already_ended", "This job has succeeded; there is nothing to cancel."),
    413: GENERATION_RESPONSES[413],
    415: GENERATION_RESPONSES[415],
    422: error_response(
        "A field is unknown, malformed, or asks for what is not offered",
        "out_of_range",
        "steps must be one this model was distilled for: 1, 2, 4, 8.",
        "steps",
    ),
    429: error_response(
        "Too much for this key or tenant; Retry-After says when",
        "quota_exceeded",
        "The quota of this tenant is used up.",
    ),
    503: GENERATION_RESPONSES[503],
}
REFUSED_SUBMISSION = {status: response for status, response in REFUSED.items() if status != 409}

UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: error_response("There is no such job", "job_not_found", "There is no such job."),
    410: error_response("Its time is over", "gone", "This job has ended and its time is over."),
}

IMAGE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/png", "image/jpeg")
        }
        | {"image/webp": {"schema": {"type": "string", "format": "binary"}}},
    },
    403: error_response(
        "The safety check withheld it",
        "content_policy_violation",
        "The safety check of this server withheld the image.",
    ),
    409: error_response("There is no image yet, or never", "not_ready", "This job has not ended yet."),
}

FILE: dict[int | str, dict[str, Any]] = {
    200: IMAGE[200],
    403: error_response(
        "Not an address of ours, or its time is over", "url_expired", "The time of this address is over."
    ),
    404: error_response("The file is gone", "file_not_found", "This file is gone."),
    503: GENERATION_RESPONSES[503],
}

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events queued, running, step, and at the end completed, failed, cancelled or expired",
        "content": events_content(dict.fromkeys(get_args(EventName), JobEventBody)),
    },
    204: {"description": "The job has ended, and nothing comes after Last-Event-ID"},
    400: error_response(
        "Last-Event-ID is malformed", "invalid_event_id", "Last-Event-ID must be the id of an event."
    ),
}

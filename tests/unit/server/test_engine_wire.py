"""What an engine process tells its worker crosses the border between them unchanged."""

from __future__ import annotations

import json

import numpy as np

from server.engine_wire import HEAD, events_frame, events_from, sizes
from server.jobs import JobFailure
from server.work import Dropped, Failed, Made, Progress, Started, Stepped


def test_events_cross_the_border_unchanged() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    spans = {"steps": (1.0, 2.5)}
    events = [
        Started("t", 1.5, "fake 1 float32"),
        Stepped("m", "64x64", 4, 3, 0.25),
        Dropped("m", 2),
        Progress("t", 3, ((0, 1, pixels), (1, 1, pixels + 1))),
        Failed("t", JobFailure(code="c", message="m"), "steps", spans),
        Made("t", (pixels, pixels + 2), 1.0, 2.0, 3.0, 4.0, spans),
    ]
    data = events_frame(events)
    text, arrays = sizes(data[: HEAD.size])
    body = json.loads(data[HEAD.size : HEAD.size + text])
    back = events_from(body["events"], memoryview(data[len(data) - arrays :]))
    assert back[:3] == events[:3]
    assert back[4] == events[4]
    progress, made = back[3], back[5]
    assert isinstance(progress, Progress)
    assert isinstance(made, Made)
    assert [(image, index) for image, index, _ in progress.previews] == [(0, 1), (1, 1)]
    np.testing.assert_array_equal(progress.previews[1][2], pixels + 1)
    np.testing.assert_array_equal(made.pixels[1], pixels + 2)
    assert (made.queue_ms, made.decode_ms, made.spans) == (1.0, 4.0, spans)

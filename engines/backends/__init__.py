"""Engines that run a bundle's graphs: ONNX Runtime, OpenVINO, torch.

Importing openvino reports itself to Google Analytics through the package openvino_telemetry, and writes to the
home folder. openvino takes a silent stand-in where that package cannot be imported, so it is made to look absent
before any backend is imported: a service makes no connection of its own.
"""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

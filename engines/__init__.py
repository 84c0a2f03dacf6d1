"""What a distilled model is and how it runs: schedule, samplers, bundle format, backends, pipeline.

Importing this package first makes the engines' own libraries keep to themselves; a service makes no connection
of its own. openvino and nncf report their use to Google Analytics through the package openvino_telemetry and take a
silent stand-in where that cannot be imported, so it is made to look absent. ONNX Runtime uploads events to
Microsoft from inside its library; only this variable, set before it loads, stops all of it.
Source: microsoft/onnxruntime pull request 27379; openvino/tools/ovc/__init__.py.
"""

import os
import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

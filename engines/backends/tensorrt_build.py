"""From a bundle's ONNX graph to a TensorRT plan, with ``tensorrt`` or ``tensorrt_rtx``, whichever is installed.

Networks are strongly typed: they compute in the graph's own types, which is float32 without TF32 here, or the
graph with its products in 16 bits (``engines.backends.lowering``). One plan holds one optimisation profile a rung
and size of image, each of exactly those: dynamic profiles run 13 to 30 % slower. tensorrt_rtx builds without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from engines.backends.base import Precision
from engines.backends.cuda import Device
from engines.backends.graph_file import read_graph
from engines.backends.lowering import lower_products
from engines.calls import row_shapes
from engines.errors import BackendError
from engines.manifest import DType, GraphSpec, Size, TensorSpec

LIBRARIES = ("tensorrt", "tensorrt_rtx")
"""Preferred first: full TensorRT targets data-centre GPUs too and tunes for the very GPU."""

_DTYPES: dict[str, DType] = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "UINT8": "uint8"}


@dataclass(frozen=True)
class Built:
    """A plan, and what its builder learnt about this GPU; empty where the library keeps no such thing."""

    plan: bytes
    timings: bytes


def find_library() -> ModuleType:
    """The installed library. Raises: BackendError when there is none, or it does not load."""
    name = next((name for name in LIBRARIES if find_spec(name) is not None), None)
    if name is None:
        raise BackendError(
            "The tensorrt backend needs tensorrt or tensorrt_rtx; install one in the checkout: "
            "pip install -e '.[trt]' (data-centre GPUs) or pip install -e '.[rtx]' (GeForce and RTX)"
        )
    try:
        return import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(f"{name} is installed but does not load: {error}; install it again") from error


def library_name(trt: ModuleType) -> str:
    """The library and its version: ``tensorrt-rtx 1.7.1.116``."""
    return f"{trt.__name__.replace('_', '-')} {trt.__version__}"


def is_rtx(trt: ModuleType) -> bool:
    """Whether it compiles kernels when a plan is loaded, instead of choosing them when it is built."""
    return trt.__name__ == "tensorrt_rtx"


def check_target(trt: ModuleType, device: Device) -> None:
    """Raises: BackendError where the library makes nothing for this GPU."""
    major, minor = device.capability
    if is_rtx(trt) and not hasattr(trt.ComputeCapability, f"SM{major}{minor}"):
        raise BackendError(
            f"{library_name(trt)} makes no engines for {device.name} (sm_{major}{minor}); install full TensorRT: "
            "pip install -e '.[trt]' in the checkout, or use --backend torch-cuda."
        )


class Network:
    """A graph as the library parsed it, with the inputs and outputs the manifest describes.

    Raises: BackendError naming the file and what is wrong.
    """

    def __init__(self, trt: ModuleType, file: Path, spec: GraphSpec, precision: Precision = "float32") -> None:
        self._trt = trt
        self._file = file
        self._spec = spec
        self.log = logger(trt)
        self._builder = trt.Builder(self.log)
        self.definition = self._builder.create_network(_strongly_typed(trt))
        self._parser = trt.OnnxParser(self.definition, self.log)  # the network's weights are in its memory
        self._parse(precision)
        self._check_interface()

    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it takes, -1 for what the library does not know before it builds."""
        return tuple(_spec(self.definition.get_input(i)) for i in range(self.definition.num_inputs))

    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it gives, likewise."""
        return tuple(_spec(self.definition.get_output(i)) for i in range(self.definition.num_outputs))

    def build(
        self, rungs: Sequence[int], sizes: Sequence[Size] = (), *, for_this_gpu: bool, timings: bytes = b""
    ) -> Built:
        """Compile it, with a profile for every rung of each size in turn.

        sizes: of images, where the graph takes several. for_this_gpu: else for every GPU that tensorrt_rtx makes
        engines for, which needs none. timings: what an earlier build gave. Raises: BackendError with the library's
        own words.
        """
        trt, config = self._trt, self._builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        for shapes, rung in product(row_shapes(self._spec, sizes), rungs):
            profile = self._builder.create_optimization_profile()
            for tensor in self._spec.inputs:
                shape = (rung, *shapes[tensor.name])
                profile.set_shape(tensor.name, shape, shape, shape)
            config.add_optimization_profile(profile)
        if is_rtx(trt):
            if for_this_gpu:
                config.num_compute_capabilities = 1
                config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
        else:
            _use_timings(config, timings)
        self.log.errors.clear()
        plan = self._builder.build_serialized_network(self.definition, config)
        if plan is None:
            raise BackendError(f"{library_name(trt)} cannot build {self._file}: {self.log.reasons()}")
        return Built(bytes(plan), b"" if is_rtx(trt) else bytes(config.get_timing_cache().serialize()))

    def _parse(self, precision: Precision) -> None:
        self.log.errors.clear()
        if precision != "float32":
            model = read_graph(self._file)  # the parser finds the weights beside it by the file's path
            lower_products(model, precision)
            parsed = self._parser.parse(model.SerializeToString(), str(self._file))
        else:
            parsed = self._parser.parse_from_file(str(self._file))
        if not parsed:
            errors = [self._parser.get_error(i) for i in range(self._parser.num_errors)]
            found = [f"{error.node_operator()}: {error.desc()}".removeprefix(": ") for error in errors]
            reasons = "; ".join(found) or self.log.reasons()
            raise BackendError(f"{library_name(self._trt)} cannot parse {self._file}: {reasons}")

    def _check_interface(self) -> None:
        pairs = ((self.inputs(), self._spec.inputs), (self.outputs(), self._spec.outputs))
        for found, described in pairs:
            parsed = {tensor.name: tensor for tensor in found}
            if parsed.keys() != {tensor.name for tensor in described}:
                raise BackendError(f"{self._file}: parsed with {sorted(parsed)}, not as the manifest describes it")
            for tensor in described:
                if not _fits(parsed[tensor.name], tensor):
                    raise BackendError(f"{self._file}: parsed {parsed[tensor.name]}, the manifest says {tensor}")


@cache
def logger(trt: ModuleType) -> Any:
    """The one logger of a library in this process: keeps errors, to be quoted, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)

        def reasons(self) -> str:
            return "; ".join(self.errors[-3:]) or "it gives no reason"

    return Log()


def _use_timings(config: Any, timings: bytes) -> None:
    """Let the builder go by an earlier one's, or by none where the library finds that they are another GPU's."""
    for known in (timings, b""):
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return
    raise BackendError("the library takes no timing cache, not even an empty one")


def _strongly_typed(trt: ModuleType) -> int:
    """The flag, where typing is a choice still."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _spec(tensor: Any) -> TensorSpec:
    dtype = _DTYPES.get(tensor.dtype.name)
    if dtype is None:
        raise BackendError(f"{tensor.name} was parsed as {tensor.dtype.name}, which no bundle holds")
    return TensorSpec(name=tensor.name, dtype=dtype, shape=tuple(tensor.shape))


def _fits(parsed: TensorSpec, described: TensorSpec) -> bool:
    """Whether a parsed tensor is the described one, as far as the parser knows its shape."""
    if parsed.dtype != described.dtype or len(parsed.shape) != len(described.shape):
        return False
    return all(found in (-1, size) for found, size in zip(parsed.shape, described.shape, strict=True))

"""Which network can be exported to what; known without importing torch."""

import sys

from handlers.errors import BadSettings
from handlers.settings import Preprocess, Runtime

FASTER_RCNN = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
EXPORTS = {"yolov5": ("onnx", "openvino", "aoti", "tensorrt")} | dict.fromkeys(FASTER_RCNN, ("onnx", "openvino"))
ON_CPU = ("openvino", "aoti")
# Never run by us on the hardware that it is for.
UNTESTED = ("tensorrt",)


def warn_untested(runtime: Runtime) -> None:
    """A line on stderr for an engine that nobody here has run."""
    if runtime.backend in UNTESTED:
        print(
            f"untested: Marina's makers have not run {runtime.backend} on real hardware; compare its answers with those"
            " of torch before you rely on it",
            file=sys.stderr,
        )


def check_runtime(definition: str, runtime: Runtime, preprocess: Preprocess, device: str) -> None:
    """Raises BadSettings for a network or a shape that cannot be exported so, or a device that the engine has not."""
    backend = runtime.backend
    if backend == "torch":
        return
    if backend not in EXPORTS.get(definition, ()):
        able = [name for name, backends in EXPORTS.items() if backend in backends]
        raise BadSettings(
            f"runtime.backend is {backend}, but {definition} cannot be exported to it; these can: {', '.join(able)}"
        )
    if definition != "yolov5" and runtime.precision not in ("fp32", "bf16"):
        raise BadSettings(
            f"runtime.precision is {runtime.precision}, but {definition} is exported in fp32 and bf16 alone; take one"
            " of these, or yolov5"
        )
    if definition != "yolov5" and runtime.shape != "dynamic":
        raise BadSettings(
            f"runtime.shape is {runtime.shape}, but {definition} is exported for pictures of any size; leave shape out,"
            " or take yolov5"
        )
    if runtime.shape == "fixed" and preprocess.shape != "square":
        raise BadSettings(
            f"runtime.shape is fixed, but preprocess.shape is {preprocess.shape}, which gives pictures of many shapes;"
            " set preprocess.shape to square"
        )
    if (device == "gpu" and backend in ON_CPU) or (device == "cpu" and backend == "tensorrt"):
        raise BadSettings(f"serving.device is {device}, where {backend} does not run; choose another of the two")

"""Imports torchvision, and TorchServe's handler, without what they import and never use.

torchvision 0.27 imports the compiler `torch._dynamo`, and sympy with it, for one function that it calls only where its
own kernels are missing. TorchServe's VisionHandler imports captum for explanations, and, where OpenVINO is installed,
its part for the same compiler. Each worker would pay for that at every start and restart, with seconds and a
quarter of a gigabyte. Placeholders stand in meanwhile; a function among them brings the real one when it is called.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# Of other releases it is not known that this one function is all they want.
RELEASE = "0.27."


def _is_compile_supported(device_type: str) -> bool:
    return importlib.import_module("torch._dynamo.utils").is_compile_supported(device_type)


def _integrated_gradients(*arguments: Any) -> Any:
    return importlib.import_module("captum.attr").IntegratedGradients(*arguments)


def import_torchvision() -> None:
    """Import torchvision, without the compiler where that is known to work. A second call does nothing."""
    if "torchvision" in sys.modules or "torch._dynamo" in sys.modules:
        return
    if not importlib.metadata.version("torchvision").startswith(RELEASE):
        return
    import torch  # noqa: F401  # before the placeholders, or they would take the place of its own parts

    with _standing_in(_package("torch._dynamo", "utils", is_compile_supported=_is_compile_supported)):
        import torchvision.models.detection  # noqa: F401  # so that it is there


@contextmanager
def lean_vision_handler() -> Iterator[None]:
    """For the import of `ts.torch_handler.vision_handler`."""
    captum = _package("captum", "attr", IntegratedGradients=_integrated_gradients)
    # None is as if it were not installed.
    with _standing_in(captum | {"openvino.torch": None}):
        yield


def _package(name: str, part: str, **content: Any) -> dict[str, ModuleType | None]:
    package, module = ModuleType(name), ModuleType(f"{name}.{part}")
    package.__path__ = []
    vars(module).update(content)
    return {name: package, f"{name}.{part}": module}


@contextmanager
def _standing_in(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """What has been imported before stays itself."""
    placeholders = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(placeholders)  # type: ignore[arg-type]  # None is allowed, and means that there is none
    try:
        yield
    finally:
        for name in placeholders:
            del sys.modules[name]

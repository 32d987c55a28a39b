"""Imports torchvision in a tenth of the time.

torchvision 0.27 imports the compiler `torch._dynamo`, and sympy with it, for one function that it
calls only where its own kernels are missing. Each worker would pay seconds for that at every start
and restart. While torchvision is imported, a placeholder stands in, which brings the real function when
it is called.
"""

import importlib
import importlib.metadata
import sys
from types import ModuleType

# Of other releases it is not known that this one function is all they want.
RELEASE = "0.27."


def _is_compile_supported(device_type: str) -> bool:
    return importlib.import_module("torch._dynamo.utils").is_compile_supported(device_type)


def import_torchvision() -> None:
    """Import torchvision, without the compiler where that is known to work. A second call does nothing."""
    if "torchvision" in sys.modules or "torch._dynamo" in sys.modules:
        return
    if not importlib.metadata.version("torchvision").startswith(RELEASE):
        return
    import torch  # noqa: F401  # before the placeholders, or they would take the place of its own parts

    package, utils = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    package.__path__ = []
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]  # a module made here
    placeholders = {"torch._dynamo": package, "torch._dynamo.utils": utils}
    sys.modules.update(placeholders)
    try:
        import torchvision.models.detection  # noqa: F401
    finally:
        for name in placeholders:
            del sys.modules[name]

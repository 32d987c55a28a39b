"""The short ways in: everything is there, and what is not used only when it is asked for."""

import subprocess
import sys
import textwrap

import pytest


def run(repository, code):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_torchvision_comes_without_the_compiler_and_the_compiler_still_works(repository):
    found = run(
        repository,
        """
        import sys
        from handlers.lean_import import import_torchvision
        import_torchvision()
        import_torchvision()
        import torch, torchvision
        print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
        from torchvision.models.detection import fasterrcnn_resnet50_fpn
        from torchvision.ops import nms
        print(nms(torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]]), torch.tensor([0.5, 0.9]), 0.5).tolist())
        import torch._dynamo.utils
        print(torch._dynamo.utils.is_compile_supported("cpu") in (True, False))
        print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
        # torchvision keeps the placeholder that it found while it was imported; that brings the real function.
        from handlers.lean_import import _is_compile_supported
        print(_is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu"))
        """,
    )
    assert found == ["False", "False", "[1]", "True", "2.0", "True"]


def test_the_handler_comes_without_what_explains_and_compiles(repository):
    """Also where OpenVINO is installed, whose part for the compiler TorchServe would take; captum comes on demand."""
    found = run(
        repository,
        """
        import sys
        from handlers.detection_handler import DetectionHandler
        names = "captum", "captum.attr", "openvino", "openvino.torch", "torch._dynamo", "sympy"
        print([name for name in names if name in sys.modules])
        import torch
        from ts.torch_handler import vision_handler
        print(issubclass(DetectionHandler, vision_handler.VisionHandler))
        gradients = vision_handler.IntegratedGradients(torch.nn.Identity())
        from captum.attr import IntegratedGradients
        print(type(gradients) is IntegratedGradients)
        """,
    )
    assert found == ["[]", "True", "True"]


@pytest.mark.parametrize("version", ["0.26.1", "0.28.0", "1.0"])
def test_other_releases_are_left_alone(monkeypatch, version):
    from handlers import lean_import

    for name in ("torchvision", "torch._dynamo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(lean_import.importlib.metadata, "version", lambda name: version)
    lean_import.import_torchvision()
    assert "torchvision" not in sys.modules

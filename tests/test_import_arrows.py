"""Imports run one way: tools -> handlers -> model_defs. What an archive holds imports only what a server has."""

import ast
import subprocess
import sys

import pytest

SERVED = {"torch", "torchvision", "numpy", "PIL"}
ALLOWED = {
    "model_defs": SERVED | {"model_defs"},
    "handlers": SERVED | {"model_defs", "handlers"},
}
ENGINES = {"onnx": {"onnxruntime"}, "tensorrt": {"onnxruntime"}, "openvino": {"openvino"}}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_served_packages_import_only_what_a_server_has(repository, package):
    paths = sorted((repository / package).rglob("*.py"))
    assert len(paths) > 3
    for path in paths:
        allowed = ALLOWED[package] | sys.stdlib_module_names
        if path.name == "detection_handler.py":
            allowed = allowed | {"ts"}
        # The one place for an engine that a server may lack: the module of its backend.
        if path.parent.name == "runtimes":
            allowed = allowed | ENGINES.get(path.stem, set())
        for name in imports(path):
            assert name.split(".")[0] in allowed, f"{path.relative_to(repository)} imports {name}"


def test_no_module_hides_one_of_the_standard_library(repository):
    """TorchServe puts an archive's folder before everything else."""
    roots = {"handlers", "model_defs", "detection_handler"}
    assert not roots & sys.stdlib_module_names


def loaded_after(repository, code):
    """The top-level modules that a fresh process has loaded."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=True, timeout=120)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "module", ["tools.cli", "tools.archive.build", "model_defs", "handlers.settings", "handlers.labels"]
)
def test_torch_is_imported_only_where_it_is_needed(repository, module):
    assert not loaded_after(repository, f"import {module}") & {"torch", "torchvision", "ts"}


def test_yolov5_needs_no_torchvision(repository):
    code = "from model_defs import build\nbuild('yolov5', 3, size='n')"
    loaded = loaded_after(repository, code)
    assert "torch" in loaded
    assert not loaded & {"torchvision", "PIL", "handlers", "tools"}

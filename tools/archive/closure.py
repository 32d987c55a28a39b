"""Which of our modules an archive needs: what its entry module and its model import, and so on."""

import ast
from pathlib import Path

import handlers
from handlers.runtimes import PACKAGE as RUNTIMES
from model_defs import DEFINITIONS

SOURCE = Path(handlers.__file__).resolve().parent.parent
PACKAGES = ("handlers", "model_defs")
ENTRY = "handlers/detection_handler.py"


def modules_for(definition: str, backend: str) -> dict[str, Path]:
    """Names in the archive and where the files lie now. The entry module stands at the root, under the
    name that the manifest gives to TorchServe. Raises KeyError for an unknown definition."""
    found: dict[str, Path] = {}
    _collect(SOURCE / ENTRY, found)
    _collect_module(f"{RUNTIMES}.{backend}", found)
    if backend == "torch":
        # Other backends have the network in a file of their own.
        _collect_module(DEFINITIONS[definition], found)
    del found[ENTRY]
    return {Path(ENTRY).name: SOURCE / ENTRY} | dict(sorted(found.items()))


def _collect(path: Path, found: dict[str, Path]) -> None:
    name = path.relative_to(SOURCE).as_posix()
    if name in found:
        return
    found[name] = path
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _collect_module(alias.name, found)
        elif isinstance(node, ast.ImportFrom) and node.module:
            _collect_module(node.module, found)
            for alias in node.names:
                _collect_module(f"{node.module}.{alias.name}", found)


def _collect_module(dotted: str, found: dict[str, Path]) -> None:
    """A module of ours with the packages that hold it; nothing for a foreign one, or for a name in a module."""
    parts = dotted.split(".")
    if parts[0] not in PACKAGES:
        return
    for depth in range(1, len(parts) + 1):
        folder = SOURCE.joinpath(*parts[:depth])
        if (folder / "__init__.py").is_file():
            _collect(folder / "__init__.py", found)
        elif folder.with_suffix(".py").is_file():
            _collect(folder.with_suffix(".py"), found)

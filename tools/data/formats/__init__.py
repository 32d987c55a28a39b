"""Readers of labelled data sets.

    path -> unpack a zip -> look through a wrapping folder -> detect -> one reader -> Source

Every reader gives the same `Source`, and collects what is wrong in it instead of stopping at the first bad line.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tools.data.dataset import ANNOTATIONS
from tools.data.formats import coco, label_studio, voc, yolo
from tools.data.formats.source import SPLIT_NAMES, ReadOptions, Source, pictures_below
from tools.data.formats.zip_file import unpack
from tools.errors import ToolError

# Folders that are part of a layout, and so never a mere wrapping.
LAYOUT_FOLDERS = frozenset({"images", "labels", "annotations", "jpegimages", *SPLIT_NAMES})


def _read_open_images(path: Path, options: ReadOptions) -> Source:
    # Late, because that module imports this package.
    from tools.data.openimages import read

    return read(path, options)


FORMATS: dict[str, Callable[[Path, ReadOptions], Source]] = {
    "yolo": yolo.read,
    "coco": coco.read,
    "voc": voc.read,
    "open-images": _read_open_images,
    "label-studio": label_studio.read,
}


def read_source(path: Path, scratch: Path, format_name: str = "auto", options: ReadOptions | None = None) -> Source:
    """A data set in any of FORMATS: a folder, a zip file, a `data.yaml` or a JSON file.

    scratch: a folder that a zip is unpacked to; the pictures must be read before it goes. Raises ToolError when
    there is no set or it cannot be read at all.
    """
    options = options or ReadOptions()
    if not path.exists():
        raise ToolError(f"{path} is not there; give the folder or file of a data set")
    if path.suffix.lower() != ".zip" or not path.is_file():
        return _read(path, format_name, options)
    unpack(path, scratch)
    try:
        return _read(scratch, format_name, replace(options, inside=scratch))
    except ToolError as error:
        # Nobody knows the folder that it was unpacked to, and that is gone.
        raise ToolError(str(error).replace(str(scratch), str(path))) from error


def _read(path: Path, format_name: str, options: ReadOptions) -> Source:
    path = _unwrapped(path)
    name = detect(path) if format_name == "auto" else format_name
    if name != "open-images" and (options.limit_per_class or options.exclusions):
        raise ToolError(f"{path} is {name}; --limit-per-class and --exclusions are for Open Images alone")
    return FORMATS[name](path, options)


def detect(path: Path) -> str:
    """The format of a folder or file. Raises ToolError, naming the formats, for anything else."""
    if path.is_file():
        if path.suffix.lower() in (".yaml", ".yml"):
            return "yolo"
        if label_studio.looks_like_tasks(path):
            return "label-studio"
        if coco.looks_like_coco(path):
            return "coco"
    else:
        signs = (
            ("yolo", lambda: yolo.find_yaml(path)),
            ("coco", lambda: any(chain(path.glob(ANNOTATIONS), path.glob(f"*/{ANNOTATIONS}")))),
            ("voc", lambda: any(path.rglob("*.xml"))),
            ("open-images", lambda: any(path.rglob("*class-descriptions*.csv"))),
            ("label-studio", lambda: label_studio.find_file(path)),
            ("coco", lambda: coco.find_files(path)),
            ("yolo", lambda: any(path.rglob("*.txt")) and pictures_below(path)),
        )
        for name, found in signs:
            if found():
                return name
    fault = coco.first_fault(path)
    raise ToolError(
        f"{path} is no data set that is known; it may be {', '.join(FORMATS)}, or say which with --format"
        + (f"; {fault}" if fault else "")
    )


def _unwrapped(path: Path) -> Path:
    """The folder inside, while a folder holds nothing but one other."""
    while path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
        if len(entries) != 1 or not entries[0].is_dir() or entries[0].name.lower() in LAYOUT_FOLDERS:
            break
        path = entries[0]
    return path

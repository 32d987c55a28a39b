"""marina import-checkpoint: weights of other programs to safetensors, without running what they contain.

marina import-checkpoint yolov5s.pt
marina import-checkpoint last.ckpt --output detector.safetensors
"""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

from tools.checkpoint.reader import Checkpoint, open_checkpoint
from tools.checkpoint.safetensors_format import replacing, write_safetensors
from tools.errors import ToolError

LABELS_FILE = "index_to_name.json"
BUFFER_SUFFIXES = ("running_mean", "running_var", "num_batches_tracked", "anchors")
NAMES_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        help="official YOLOv5 .pt of release 6 or 7, state dict, Lightning checkpoint, or .safetensors",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.safetensors", help="default: beside the input, with this suffix"
    )
    parser.add_argument("--force", action="store_true", help=f"replace an {LABELS_FILE} that has other class names")


def run(args: argparse.Namespace) -> int:
    output = args.output or args.file.with_suffix(".safetensors")
    print(import_checkpoint(args.file, output, force=args.force))
    return 0


def import_checkpoint(source: Path, output: Path, *, force: bool = False) -> str:
    """Write `output`, and `index_to_name.json` beside it when the class names are known; return a report.

    Raises ToolError if the source cannot be taken, or if labels with other names are there and `force` is not given.
    """
    if output.exists() and source.exists() and output.samefile(source):
        raise ToolError(f"{source}: the output would replace it; name another file with --output")
    labels_file = output.with_name(LABELS_FILE)
    with open_checkpoint(source) as checkpoint:
        labels = None
        if checkpoint.names is not None:
            table = {str(index): name for index, name in enumerate(checkpoint.names)}
            labels = (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
            _check_labels(labels_file, table, force)
        try:
            digest = write_safetensors(output, checkpoint.tensors, checkpoint.metadata)
            if labels is not None:
                with replacing(labels_file) as file:
                    file.write(labels)
        except OSError as error:
            raise ToolError(f"{output}: cannot be written: {error.strerror}") from error
        except ToolError as error:
            raise type(error)(f"{source}: {error}") from error
        lines = _describe(checkpoint)
    lines["source"] = f"{source}  sha256 {_sha256(source)}"
    lines["output"] = f"{output}  sha256 {digest}"
    if labels is not None:
        lines["labels"] = str(labels_file)
    return "\n".join(f"{key:<11} {value}" for key, value in lines.items())


def _check_labels(path: Path, table: dict[str, str], force: bool) -> None:
    if force or not path.exists():
        return
    try:
        present = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolError(f"{path}: cannot be compared with the class names ({error}); --force replaces it") from error
    if present != table:
        raise ToolError(f"{path}: has other class names than the checkpoint; --force replaces it")


def _describe(checkpoint: Checkpoint) -> dict[str, str]:
    tensors = checkpoint.tensors
    lines = {"kind": checkpoint.kind + (f" (YOLOv5 size {checkpoint.size})" if checkpoint.size else "")}
    if checkpoint.names is not None:
        more = ", ..." if len(checkpoint.names) > NAMES_SHOWN else ""
        lines["classes"] = f"{len(checkpoint.names)}: {', '.join(checkpoint.names[:NAMES_SHOWN])}{more}"
    if checkpoint.strides and checkpoint.anchors:
        lines["strides"] = ", ".join(map(str, checkpoint.strides))
        levels = (" ".join(f"{w:g}x{h:g}" for w, h in level) for level in checkpoint.anchors)
        lines["anchors"] = f"{' | '.join(levels)} (pixels)"
    parameters = sum(tensor.numel for name, tensor in tensors.items() if not name.endswith(BUFFER_SUFFIXES))
    dtypes = Counter(tensor.dtype for tensor in tensors.values())
    lines["tensors"] = str(len(tensors))
    lines["parameters"] = f"{parameters:,}"
    lines["dtype"] = ", ".join(f"{dtype} ({count})" for dtype, count in dtypes.most_common())
    return lines


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

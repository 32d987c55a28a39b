"""marina detect-bulk SRC DST --archive MODEL.mar"""

import argparse
from pathlib import Path

from pydantic import Field

from tools.config import add_flags, settle
from tools.strict import Strict

SECTION = "detect-bulk"


class BulkSettings(Strict):
    """The section `detect-bulk` of a config file, and the flags of the command."""

    archive: Path = Field(description="the model, as `marina archive build` makes it")
    score_threshold: float | None = Field(None, description="least score, 0 to 1 (default: the archive's)")
    iou_threshold: float | None = Field(
        None, description="IoU from which boxes are suppressed, 0 to 1 (default: the archive's)"
    )
    max_detections: int | None = Field(None, description="in a picture at most (default: the archive's)")
    classes: str | None = Field(None, description="only these, names or indices, separated by commas")
    class_agnostic: bool | None = Field(None, description="suppress boxes across classes (default: the archive's)")
    workers: int | None = Field(
        None, ge=1, description="processes with a model each (default: one a GPU, else one a core)"
    )
    batch: int | None = Field(None, ge=1, description="pictures through the model at a time (default: the archive's)")
    address: str | None = Field(
        None, description="HOST:PORT of a Ray cluster that this machine belongs to (default: this machine alone)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Detect objects in all pictures of SRC. DST gets Parquet files in parts/, coco.json, failed.jsonl with the"
        " pictures that could not be answered, and summary.json. The same command again goes on after a kill, and adds"
        " pictures that are new in SRC; nothing is done twice."
    )
    parser.add_argument("source", metavar="SRC", help="a folder, with its subfolders, or s3://BUCKET/PREFIX")
    parser.add_argument("target", metavar="DST", help="a folder of its own, or s3://BUCKET/PREFIX")
    add_flags(parser, BulkSettings, SECTION)


def run(args: argparse.Namespace) -> int:
    """Returns 1 when no picture at all was answered; those that were not are told and listed."""
    settings = settle(args, BulkSettings, SECTION)
    from tools.bulk.run import detect_bulk

    return detect_bulk(args.source, args.target, settings)

"""`marina predict`: what a served model finds in pictures, videos and live sources."""

import argparse
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tools.config import add_flags, settle
from tools.errors import ToolError
from tools.strict import Strict

SECTION = "predict"


class PredictSettings(Strict):
    """The section `predict` of a config file, and the flags of `marina predict`."""

    url: str = Field(description="the server: http(s)://HOST:PORT, or grpc(s)://HOST:PORT")
    model: str = Field(description="the model to ask")
    model_version: str | None = Field(None, description="of the model (default: the server's choice)")
    protocol: Literal["rest", "grpc", "kserve"] = Field(
        "rest", description="TorchServe's REST or gRPC interface, or KServe v2 of Marina's gateway"
    )
    token_file: Path | None = Field(None, description="holds the token, where the server wants one")
    ca: Path | None = Field(None, description="PEM of the authority behind the server's certificate, if a private one")
    timeout: float = Field(30.0, gt=0, description="seconds for an answer, all attempts included")
    retries: int = Field(3, ge=0, description="further attempts at a server that is busy or not there")
    concurrency: int = Field(4, ge=1, description="requests under way at most")
    conf: float | None = Field(None, ge=0, le=1, description="least score (default: the model's)")
    iou: float | None = Field(
        None, ge=0, le=1, description="IoU from which boxes are suppressed (default: the model's)"
    )
    max_det: int | None = Field(None, ge=1, description="detections in a picture at most (default: the model's)")
    classes: str | None = Field(None, description="only these classes, names or indices, separated by commas")
    agnostic_nms: bool = Field(False, description="suppress boxes across classes")
    format: Literal["table", "jsonl", "coco", "yolo", "csv"] = Field(
        "table", description="of the results on stdout; yolo goes into DIR of --save, a text file a picture"
    )
    save: Path | None = Field(None, description="folder for pictures and videos with boxes")
    save_crops: bool = Field(False, description="what is in the boxes too, as pictures in DIR of --save")
    line_width: int = Field(2, ge=1, description="of the boxes, in pixels")
    hide_labels: bool = Field(False, description="draw no names of classes")
    hide_scores: bool = Field(False, description="draw no scores")
    vid_stride: int = Field(1, ge=1, description="ask about every Nth frame of a video only")
    track: bool = Field(False, description="number the objects of a video (ByteTrack)")
    view: bool = Field(False, description="show the results in a window")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="a picture, folder, glob, list (.txt), URL, video, rtsp:// stream, webcam (0) or screen[:x,y,w,h]",
    )
    add_flags(parser, PredictSettings, SECTION)


def run(args: argparse.Namespace) -> int:
    """Returns 0 when every picture was answered, 1 when one was not; the others are done then."""
    settings = settle(args, PredictSettings, SECTION)
    if settings.save is None and (settings.save_crops or settings.format == "yolo"):
        raise ToolError("--save-crops and --format yolo write files; say where with --save DIR")
    from tools.client.client import Client
    from tools.client.naming import check_folder
    from tools.client.run import Run
    from tools.client.sources import Shots, find_sources
    from tools.progress import Progress

    # A single source that is none is a mistake; of several the others go on.
    sources = list(find_sources(args.source if len(args.source) > 1 else args.source[0]))
    if settings.save is not None:
        check_folder(settings.save, [one.place for one in sources if isinstance(one.place, Path)])
    total = len(sources) if all(one.kind in ("picture", "none") for one in sources) else None
    with (
        Client(
            settings.url,
            settings.model,
            version=settings.model_version,
            protocol=settings.protocol,
            token=settings.token_file,
            timeout=settings.timeout,
            retries=settings.retries,
            concurrency=settings.concurrency,
            options=_options(settings),
            ca=settings.ca,
        ) as client,
        Progress("predict", total, "pictures") as progress,
    ):
        return Run(settings, progress).through(client.ask(Shots(sources, settings.vid_stride)))


def _options(settings: PredictSettings) -> dict[str, Any]:
    given = {
        "score_threshold": settings.conf,
        "iou_threshold": settings.iou,
        "max_detections": settings.max_det,
        "classes": settings.classes,
        "class_agnostic": settings.agnostic_nms or None,
    }
    return {name: value for name, value in given.items() if value is not None}

"""What a server found in a picture or in a frame of a video."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Detection:
    """box: xyxy in pixels of the upright picture. index: the model's number for the label. track: the number of an
    object that is followed through a video."""

    label: str
    index: int
    score: float
    box: tuple[float, float, float, float]
    track: int | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Detection":
        """Raises KeyError, TypeError or ValueError for anything else than `to_json` gives."""
        x1, y1, x2, y2 = map(float, content["box"])
        score = float(content["score"])
        if not all(map(math.isfinite, (x1, y1, x2, y2, score))):
            raise ValueError("a number is not finite")
        track = content.get("track")
        return cls(
            str(content["label"]), int(content["index"]), score, (x1, y1, x2, y2), None if track is None else int(track)
        )

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"label": self.label, "index": self.index, "score": self.score, "box": [*self.box]}
        return content if self.track is None else content | {"track": self.track}


@dataclass(frozen=True, slots=True)
class Answer:
    """source: the path, URL or name of what was asked about. width, height: of the upright picture in pixels.
    timing_ms: of the stages of serving. frame, seconds: the place in a video. error: why there is no answer; all else
    is empty then."""

    source: str
    model: str = ""
    version: str = ""
    width: int = 0
    height: int = 0
    detections: tuple[Detection, ...] = ()
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    frame: int | None = None
    seconds: float | None = None
    error: str | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Answer":
        """An answer in the server's format `detections`, or what `to_json` gives.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        source = str(content.get("source", ""))
        frame, seconds = content.get("frame"), content.get("seconds")
        if content.get("error") is not None:
            return cls(source, frame=frame, seconds=seconds, error=str(content["error"]))
        return cls(
            source,
            str(content["model"]),
            str(content["version"]),
            int(content["width"]),
            int(content["height"]),
            tuple(map(Detection.from_json, content["detections"])),
            dict(content.get("timing_ms", {})),
            frame,
            seconds,
        )

    def to_json(self) -> dict[str, Any]:
        place = {name: value for name in ("frame", "seconds") if (value := getattr(self, name)) is not None}
        if self.error is not None:
            return {"source": self.source, **place, "error": self.error}
        return {
            "source": self.source,
            **place,
            "model": self.model,
            "version": self.version,
            "width": self.width,
            "height": self.height,
            "detections": [detection.to_json() for detection in self.detections],
            "timing_ms": dict(self.timing_ms),
        }

"""Boxes with captions on frames, and which object is which from frame to frame; `supervision` draws.

Its ByteTrack has moved to its makers' package `trackers`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from handlers.drawing import class_colour, readable_on
from tools.errors import ToolError

if TYPE_CHECKING:
    import supervision
    import trackers

Detection = Mapping[str, Any]  # one of the format `detections`: label, index, score, box [x1, y1, x2, y2]

CAPTION_PADDING = 3
NO_NUMBER = -1  # what `trackers` gives to an object that it has seen once, or not clearly
LINE_HEIGHT = 24  # pixels of a line of text at scale 1, about
# ByteTrack's thresholds (Zhang et al., 2022) as supervision set them: the paper's own 0.6 and 0.7 would leave most of
# what a small network finds without a number, and what is not certain at all a server does not send.
FIRST_STAGE_SCORE, NEW_TRACK_SCORE = 0.25, 0.35


class Overlay:
    """Draws detections of one video on its frames, a colour a class, the same ones as the server's pictures.

    labels: the model's; they say which `classes` there are, empty where they are not known. line_width: in pixels;
    captions grow with it. classes: labels to draw, all when None. track: numbers objects by ByteTrack; the numbers are
    drawn too.

    Raises ToolError for a line width below 1 or a class that the model does not have.
    """

    def __init__(
        self,
        labels: Sequence[str],
        line_width: int = 2,
        hide_labels: bool = False,
        hide_scores: bool = False,
        classes: Collection[str] | None = None,
        track: bool = False,
    ):
        if line_width < 1:
            raise ToolError(f"a line width of {line_width} is not possible; give 1 or more")
        for name in classes or ():
            if labels and name not in labels:
                raise ToolError(f"there is no class {name!r}; the model knows {', '.join(labels)}")
        self.tracks = track
        self._line_width = line_width
        self._hide_labels = hide_labels
        self._hide_scores = hide_scores
        self._classes = None if classes is None else frozenset(classes)
        self._tracker = _tracker() if track else None

    def track(self, detections: Sequence[Detection], seconds: float | None = None) -> list[dict[str, Any]]:
        """The same, in their order, with "track": the object's number, None while it has none.

        seconds: the frame's time; without it, frames follow one another evenly.
        """
        if self._tracker is None:
            return [dict(detection) for detection in detections]
        found = _supervised(detections)
        found.data["place"] = np.arange(len(detections))
        followed = self._tracker.update(found, timestamp=seconds)
        numbers = np.full(len(detections), NO_NUMBER)
        if len(followed):
            numbers[followed.data["place"]] = followed.tracker_id
        return [
            dict(detection, track=None if number == NO_NUMBER else int(number))
            for detection, number in zip(detections, numbers, strict=True)
        ]

    def draw(self, pixels: np.ndarray, detections: Sequence[Detection]) -> np.ndarray:
        """A copy with the boxes drawn on it, the best ones on top.

        pixels: uint8 `[H, W, 3]`, RGB. Boxes outside the picture or without figures are left out, and those
        that reach out of it are cut.
        """
        import supervision

        scene = pixels.copy()
        height, width = pixels.shape[:2]
        corner = width - 1, height - 1
        drawn = [
            dict(found, box=np.clip(found["box"], 0, corner * 2))
            for found in detections
            if self._is_drawn(found, width, height)
        ]
        drawn.sort(key=lambda found: found["score"])
        if not drawn:
            return scene
        boxes = _supervised(drawn)
        colours = [class_colour(found["index"]) for found in drawn]
        # A palette a frame, so that any index has its colour. The scene is RGB where supervision expects BGR.
        palette = supervision.ColorPalette([supervision.Color.from_bgr_tuple(colour) for colour in colours])
        by_place = supervision.ColorLookup.INDEX
        supervision.BoxAnnotator(palette, self._line_width, by_place).annotate(scene, boxes)
        captions = [self._caption(found) for found in drawn]
        if any(captions):
            self._write(scene, boxes, captions, colours)
        return scene

    def _write(
        self,
        scene: np.ndarray,
        boxes: "supervision.Detections",
        captions: list[str],
        colours: list[tuple[int, int, int]],
    ) -> None:
        import supervision

        scale = self._line_width / 4
        ink = [
            supervision.Color.BLACK if readable_on(colour) == "black" else supervision.Color.WHITE for colour in colours
        ]
        writer = supervision.LabelAnnotator(
            color=supervision.ColorPalette([supervision.Color.from_bgr_tuple(colour) for colour in colours]),
            color_lookup=supervision.ColorLookup.INDEX,
            text_color=supervision.ColorPalette(ink),
            text_scale=scale,
            text_thickness=max(1, self._line_width // 2),
            text_padding=CAPTION_PADDING,
        )
        # A caption stands on its box's upper border, and moves into a picture that it would leave.
        room = round(LINE_HEIGHT * scale) + 2 * CAPTION_PADDING
        boxes.xyxy[:, 1] = np.maximum(boxes.xyxy[:, 1], room)
        writer.annotate(scene, boxes, labels=captions)

    def _caption(self, found: Detection) -> str:
        number = found.get("track")
        parts = (
            "" if self._hide_labels else found["label"],
            "" if number is None else f"#{number}",
            "" if self._hide_scores else f"{found['score']:.2f}",
        )
        return " ".join(part for part in parts if part)

    def _is_drawn(self, found: Detection, width: int, height: int) -> bool:
        x1, y1, x2, y2 = found["box"]
        inside = x1 < width and y1 < height and x2 >= 0 and y2 >= 0
        return inside and (self._classes is None or found["label"] in self._classes)


def _supervised(detections: Sequence[Detection]) -> "supervision.Detections":
    import supervision

    return supervision.Detections(
        xyxy=np.array([found["box"] for found in detections], np.float64).reshape(-1, 4),
        confidence=np.array([found["score"] for found in detections], np.float64),
        class_id=np.array([found["index"] for found in detections], np.int64),
    )


def _tracker() -> "trackers.ByteTrackTracker":
    import trackers

    return trackers.ByteTrackTracker(
        track_activation_threshold=NEW_TRACK_SCORE, high_conf_det_threshold=FIRST_STAGE_SCORE
    )

"""YOLOv5, written from the architecture."""

from model_defs.yolov5.network import VARIANTS, YOLOv5

__all__ = ["VARIANTS", "YOLOv5", "build"]


def build(definition: str, num_classes: int, size: str) -> YOLOv5:
    """A YOLOv5 of the given size; `definition` is always `yolov5`."""
    return YOLOv5(size, num_classes)

"""Letterbox: a picture scaled to fit and padded, and the way back for its boxes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from handlers.settings import Preprocess

PADDING = 114  # grey level, the one YOLOv5 is trained with


class Letterbox(NamedTuple):
    """Where a picture of `height x width` lies on its canvas; all in pixels.

    content_*: the scaled picture. left, top: its corner on the canvas. canvas_*: what the network sees.
    """

    height: int
    width: int
    content_height: int
    content_width: int
    top: int
    left: int
    canvas_height: int
    canvas_width: int


def plan_letterbox(height: int, width: int, preprocess: Preprocess, stride: int) -> Letterbox:
    """Scale so that the longer side is `size`, enlarging too; centre on the canvas."""
    scale = preprocess.size / max(height, width)
    content_height, content_width = max(1, round(height * scale)), max(1, round(width * scale))
    if preprocess.shape == "square":
        canvas_height = canvas_width = preprocess.size
    else:
        canvas_height, canvas_width = (-(-side // stride) * stride for side in (content_height, content_width))
    # An odd pixel of padding goes to the right and the bottom.
    top, left = (canvas_height - content_height) // 2, (canvas_width - content_width) // 2
    return Letterbox(height, width, content_height, content_width, top, left, canvas_height, canvas_width)


def letterbox(image: Tensor, plan: Letterbox) -> Tensor:
    """`[3, height, width]` uint8 to `[3, canvas_height, canvas_width]` uint8.

    Bilinear without antialiasing: what YOLOv5 is trained and evaluated with.
    """
    content = image
    if image.shape[1:] != (plan.content_height, plan.content_width):
        size = (plan.content_height, plan.content_width)
        content = interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    if content.shape[1:] == (plan.canvas_height, plan.canvas_width):
        return content
    canvas = torch.full((3, plan.canvas_height, plan.canvas_width), PADDING, dtype=torch.uint8)
    bottom, right = plan.top + plan.content_height, plan.left + plan.content_width
    canvas[:, plan.top : bottom, plan.left : right] = content
    return canvas


def unletterbox(boxes: Tensor, plan: Letterbox) -> Tensor:
    """`[N, 4]` xyxy in canvas pixels to xyxy in pixels of the picture.

    The scale before rounding, and padding counted in half pixels: up to half a canvas pixel beside where
    the content truly lies, but the very numbers that YOLOv5's own programs give.
    """
    scale = max(plan.content_height, plan.content_width) / max(plan.height, plan.width)
    left = (plan.canvas_width - plan.width * scale) / 2
    top = (plan.canvas_height - plan.height * scale) / 2
    return (boxes - boxes.new_tensor([left, top] * 2)) / scale


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes cut at the borders of a picture."""
    limit = boxes.new_tensor([width, height] * 2)
    return boxes.clamp(min=0).minimum(limit)

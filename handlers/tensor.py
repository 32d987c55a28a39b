"""Tensors in, tensors out: for clients that letterbox and suppress by themselves.

In: float32, little endian, C order, `[3, H, W]`, RGB in 0..1, letterboxed; the header Marina-Shape says `3,H,W`.
Out: the same way, `[N, 5 + classes]` as YOLOv5's head decodes it, level by level, anchor by anchor, row by row.
"""

import math
import os

import numpy as np
import torch
from torch import Tensor

from handlers.errors import EmptyBody, ImageTooLarge, InvalidImage, InvalidOption
from handlers.request import SHAPE_HEADER, TENSOR
from handlers.response import MAX_ANSWER_BYTES
from handlers.settings import ANSWER_VARIABLE, Limits

CHANNELS = 3
# Resampling may overshoot 1 a little; bytes lie far beyond.
BRIGHTEST = 2.0
FLOAT32 = np.dtype("<f4")


def read_tensor(body: bytes, shape: object, stride: int, limits: Limits) -> Tensor:
    """`[3, H, W]` float32. shape: what the header says.

    Raises EmptyBody, ImageTooLarge, InvalidImage or InvalidOption.
    """
    sides = str(shape).split(",")
    if len(sides) != CHANNELS or not all(side.strip().isascii() and side.strip().isdigit() for side in sides):
        raise InvalidOption(f"{SHAPE_HEADER} is {str(shape)[:40]!r}; send the shape as 3,H,W, such as 3,640,640")
    channels, height, width = (int(side) for side in sides)
    if channels != CHANNELS or not height or not width or height % stride or width % stride:
        raise InvalidOption(
            f"the tensor's shape is {str(shape)[:40]}; this model takes 3 channels, height and width multiples of"
            f" {stride}"
        )
    if height * width > limits.max_pixels:
        raise ImageTooLarge(f"the tensor is {width}x{height} pixels, more than the {limits.max_pixels} allowed")
    if not body:
        raise EmptyBody("no tensor arrived: the body is empty")
    wanted = math.prod((channels, height, width)) * FLOAT32.itemsize
    if len(body) != wanted:
        raise InvalidImage(f"the tensor has {len(body)} bytes, but float32 of {channels},{height},{width} has {wanted}")
    tensor = torch.from_numpy(np.frombuffer(body, FLOAT32).astype(np.float32).reshape(channels, height, width))
    if not torch.isfinite(tensor).all():
        raise InvalidImage("the tensor holds values that are no finite numbers; send RGB in 0..1")
    brightest = tensor.max().item()
    if brightest > BRIGHTEST:
        raise InvalidImage(f"the tensor holds values up to {brightest:g}; send RGB in 0..1, such as bytes / 255")
    return tensor


def tensor_answer(rows: Tensor) -> tuple[bytes, str]:
    """Raises InvalidOption when the server would not send so much."""
    body = rows.numpy().astype(FLOAT32, copy=False).tobytes()
    most = int(os.environ.get(ANSWER_VARIABLE, MAX_ANSWER_BYTES))
    if len(body) > most:
        raise InvalidOption(
            f"the answer would have {len(body)} bytes, more than the {most} that this server sends; send a smaller"
            f" tensor, or raise max_response_size in config.properties and {ANSWER_VARIABLE}"
        )
    return body, TENSOR

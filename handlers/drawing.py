"""Boxes with captions on pictures, the same in answers and in reports."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Colours that people of every colour vision tell apart (Okabe and Ito, "Color Universal Design", 2008).
OKABE_ITO = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def class_colour(index: int) -> tuple[int, int, int]:
    """RGB. The first seven are told apart by everybody; of the others, neighbours differ in hue and lightness."""
    if index < len(OKABE_ITO):
        return OKABE_ITO[index]
    # Hues a golden ratio apart never come near each other soon.
    red, green, blue = colorsys.hsv_to_rgb(
        index * 0.618034 % 1, (0.9, 0.45, 0.7)[index % 3], (0.95, 1.0, 0.65)[index % 3]
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    pixels: np.ndarray,
    boxes: Sequence[tuple[float, float, float, float]],
    captions: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
) -> Image.Image:
    """A copy of the picture with boxes drawn on it, the first ones on top.

    pixels: uint8 `[H, W, 3]`. boxes: xyxy in its pixels. captions: one a box, drawn over its upper border; an
    empty one is left out.
    """
    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image)
    line = max(2, round(sum(image.size) / 600))
    font = ImageFont.load_default(size=max(12, line * 6))
    for (x1, y1, x2, y2), caption, colour in reversed(list(zip(boxes, captions, colours, strict=True))):
        canvas.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=line)
        if caption:
            caption = " ".join(caption.split())  # Pillow sets only one line above a point
            left, top, right, bottom = canvas.textbbox((x1, y1), caption, font=font, anchor="lb")
            # A name that would leave the picture at its upper or right border moves into it.
            drop, back = max(0, -top), min(left, max(0, right - image.width))
            canvas.rectangle((left - back, top + drop, right - back, bottom + drop), fill=colour)
            canvas.text((x1 - back, y1 + drop), caption, fill=readable_on(colour), font=font, anchor="lb")
    return image


def readable_on(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever stands out more (luma of ITU-R BT.601)."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"

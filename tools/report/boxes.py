"""Pictures with boxes and captions on them, and many such pictures on one sheet."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Colours that people of every colour vision tell apart (Okabe and Ito, "Color Universal Design", 2008).
OKABE_ITO = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
PAPER = (255, 255, 255)
INK = (40, 44, 48)
GAP = 8  # pixels between the pictures of a sheet
CAPTION_SIZE = 14  # pixels


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
            canvas.text((x1 - back, y1 + drop), caption, fill=_readable_on(colour), font=font, anchor="lb")
    return image


def fit(picture: Image.Image, side: int) -> Image.Image:
    """Scaled up or down so that its longer side has `side` pixels."""
    scale = side / max(picture.size)
    return picture.resize([max(1, round(length * scale)) for length in picture.size])


def sheet(pictures: Sequence[tuple[Image.Image, str]], columns: int, cell: int) -> Image.Image:
    """Pictures with captions under them, row by row, each fitted into a square of `cell` pixels."""
    cells = [(fit(picture, cell), caption) for picture, caption in pictures]
    columns = max(1, min(columns, len(cells)))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    tall = [max(picture.height for picture, _ in row) + CAPTION_SIZE + 2 * GAP for row in rows]
    paper = Image.new("RGB", (columns * (cell + GAP) + GAP, sum(tall) + GAP), PAPER)
    canvas = ImageDraw.Draw(paper)
    font = ImageFont.load_default(size=CAPTION_SIZE)
    top = GAP
    for row, height in zip(rows, tall, strict=True):
        bottom = top + height - CAPTION_SIZE - 2 * GAP
        for column, (picture, caption) in enumerate(row):
            left = GAP + column * (cell + GAP)
            paper.paste(picture, (left + (cell - picture.width) // 2, bottom - picture.height))
            text = _shortened(caption, font, cell)
            canvas.text((left + cell / 2, bottom + GAP / 2), text, fill=INK, font=font, anchor="ma")
        top += height
    return paper


def _readable_on(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever stands out more (luma of ITU-R BT.601)."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """One line of at most `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"

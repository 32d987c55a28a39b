"""Many pictures on one sheet. Boxes are drawn on them as the server draws them."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from handlers.drawing import class_colour, draw_boxes

__all__ = ["class_colour", "draw_boxes", "fit", "sheet"]

PAPER = (255, 255, 255)
INK = (40, 44, 48)
GAP = 8  # pixels between the pictures of a sheet
CAPTION_SIZE = 14  # pixels


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


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """One line of at most `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"

"""How bright a picture is."""

from torch import Tensor

from handlers.geometry import Letterbox

# Of a picture's rows and columns, so many are looked at, up to twice as many.
GRID = 64
# Of red, green and blue in luma: ITU-R BT.601, 2.5.1.
RED, GREEN, BLUE = 0.299, 0.587, 0.114


def brightness(image: Tensor, plan: Letterbox | None) -> float:
    """The mean luma of a picture, from 0, all black, to 1, all white.

    image: `[3, h, w]` uint8, RGB. plan: how it was letterboxed, None where it was not; the padding does not count.
    """
    if plan is not None:
        bottom, right = plan.top + plan.content_height, plan.left + plan.content_width
        image = image[:, plan.top : bottom, plan.left : right]
    rows, columns = (max(1, side // GRID) for side in image.shape[1:])
    red, green, blue = image[:, ::rows, ::columns].float().mean(dim=(1, 2)).tolist()
    return float(RED * red + GREEN * green + BLUE * blue) / 255

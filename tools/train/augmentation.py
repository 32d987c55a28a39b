"""How much training pictures are changed; `augment.py` changes them."""

from pydantic import Field

from tools.strict import Strict


class Augmentation(Strict):
    """How much pictures are changed; the defaults are YOLOv5's for training on little data. 0 turns one off."""

    mosaic: float = Field(1.0, ge=0, le=1, description="probability of a mosaic of four pictures")
    mixup: float = Field(0.0, ge=0, le=1, description="probability that a mosaic is blended with another one")
    degrees: float = Field(0.0, ge=0, le=180, description="largest rotation, either way")
    translate: float = Field(0.1, ge=0, le=0.5, description="largest shift, as part of the picture's side")
    scale: float = Field(0.5, ge=0, le=0.9, description="largest change of size: 0.5 gives 0.5 to 1.5 times")
    shear: float = Field(0.0, ge=0, le=45, description="largest shear in degrees, either way, in x and in y")
    flip_lr: float = Field(0.5, ge=0, le=1, description="probability of left and right changed over")
    flip_ud: float = Field(0.0, ge=0, le=1, description="probability of up and down changed over")
    hsv_h: float = Field(0.015, ge=0, le=0.5, description="largest turn of the hue, as part of the colour circle")
    hsv_s: float = Field(0.7, ge=0, le=1, description="largest change of saturation: 0.7 gives 0.3 to 1.7 times")
    hsv_v: float = Field(0.4, ge=0, le=1, description="largest change of brightness: 0.4 gives 0.6 to 1.4 times")

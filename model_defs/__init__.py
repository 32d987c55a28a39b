"""Detector models: one contract, one way to build them. Building never downloads anything.

Importing this package does not import torch; building a model does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_defs.contract import Detector

__all__ = ["DEFINITIONS", "build"]

# Which module builds which definition. A module is imported when its definition is asked for, so that
# an archive needs to hold only its own.
DEFINITIONS = {
    "yolov5": "model_defs.yolov5",
    "fasterrcnn_resnet50_fpn": "model_defs.torchvision_detector",
    "fasterrcnn_resnet50_fpn_v2": "model_defs.torchvision_detector",
    "fasterrcnn_mobilenet_v3_large_fpn": "model_defs.torchvision_detector",
    "fasterrcnn_mobilenet_v3_large_320_fpn": "model_defs.torchvision_detector",
    "retinanet_resnet50_fpn": "model_defs.torchvision_detector",
    "retinanet_resnet50_fpn_v2": "model_defs.torchvision_detector",
    "fcos_resnet50_fpn": "model_defs.torchvision_detector",
    "ssd300_vgg16": "model_defs.torchvision_detector",
    "ssdlite320_mobilenet_v3_large": "model_defs.torchvision_detector",
}


def build(definition: str, num_classes: int, /, **arguments: Any) -> Detector:
    """An untrained detector on the current default device, in training mode.

    num_classes: how many labels it answers with; `__background__` counts where the model has one.
    Raises ValueError for an unknown definition or a wrong argument.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"unknown model definition {definition!r}; use one of {', '.join(DEFINITIONS)}")
    try:
        return import_module(DEFINITIONS[definition]).build(definition, num_classes, **arguments)
    except TypeError as error:
        raise ValueError(f"model definition {definition!r} does not take these arguments: {error}") from error

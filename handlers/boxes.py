"""From candidates to detections: threshold, class filter, non-maximum suppression, limit."""

import torch
from torchvision.ops import batched_nms, nms

from handlers.options import Options
from model_defs.contract import Detections

# Suppression compares candidates in pairs; the weakest beyond this many are not looked at.
MAX_CANDIDATES = 30_000


def select(candidates: Detections, options: Options) -> Detections:
    """The candidates that `options` leave over, best score first.

    A candidate goes when its score is not above the threshold, when its class is not asked for, or when
    its IoU with a better one that stays, of the same class unless `class_agnostic`, is above the threshold.
    """
    boxes, labels, scores = candidates
    keep = scores > options.score_threshold
    if options.classes is not None:
        keep &= torch.isin(labels, torch.tensor(sorted(options.classes), device=labels.device))
    boxes, labels, scores = boxes[keep], labels[keep], scores[keep]
    if len(scores) > MAX_CANDIDATES:
        best = scores.topk(MAX_CANDIDATES).indices
        boxes, labels, scores = boxes[best], labels[best], scores[best]
    if options.class_agnostic:
        order = nms(boxes, scores, options.iou_threshold)
    else:
        order = batched_nms(boxes, scores, labels, options.iou_threshold)
    order = order[: options.max_detections]
    return Detections(boxes[order], labels[order], scores[order])

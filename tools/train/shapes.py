"""Train a YOLOv5 on drawn shapes, from random weights, on the CPU.

    python -m tools.train.shapes --output runs/shapes --steps 2500

Writes `shapes.safetensors` (half precision, moving average of the weights) and `index_to_name.json` to the
output folder, the weights anew every few minutes, and ends with the precision on pictures it has not seen.
"""

import argparse
import copy
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator, default_rng
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import box_iou

import model_defs
from handlers.boxes import select
from handlers.errors import MarinaError
from handlers.geometry import clip, letterbox, plan_letterbox, unletterbox
from handlers.options import Options
from handlers.settings import Preprocess
from handlers.weights import load_state, read_safetensors
from model_defs.contract import Detections, Detector
from model_defs.yolov5 import YOLOv5
from tools.data.draw import CLASSES, draw_scene
from tools.errors import ToolError
from tools.train.loss import yolov5_loss

SIZES = (192, 256, 320)  # of the longer side, in pixels; drawn anew for each batch
PAD_VALUE = 114
WARM_UP_STEPS = 100
FINAL_RATE = 0.01  # of the learning rate, at the end of the cosine
WEIGHT_DECAY = 0.01
SAVE_EVERY_S = 120

SERVED = Preprocess(size=320, shape="rect")
HELD_OUT_SEED = 1_000_003  # of the pictures for evaluation; training seeds are small


def draw_batch(rng: Generator, count: int, stride: int) -> tuple[Tensor, Tensor]:
    """`[count, 3, H, W]` float in 0..1 of scenes padded to one shape, and `[T, 6]` targets as the loss wants them."""
    size = int(rng.choice(SIZES))
    short = math.ceil(size * rng.uniform(0.5, 1.0) / stride) * stride
    width, height = (size, short) if rng.random() < 0.5 else (short, size)
    images = torch.full((count, 3, height, width), PAD_VALUE, dtype=torch.uint8)
    targets = []
    for index in range(count):
        own = round(short * rng.uniform(0.7, 1.0))
        own_width, own_height = (width, own) if width > height else (own, height)
        pixels, boxes = draw_picture(rng, own_width, own_height)
        left, top = (width - own_width) // 2, (height - own_height) // 2
        images[index, :, top : top + own_height, left : left + own_width] = pixels
        centre = (boxes[:, 1:3] + boxes[:, 3:5]) / 2 + torch.tensor((left, top))
        rows = torch.cat((boxes[:, :1], centre, boxes[:, 3:5] - boxes[:, 1:3]), dim=1)
        targets.append(nn.functional.pad(rows, (1, 0), value=index))
    return images.float() / 255, torch.cat(targets)


def draw_picture(rng: Generator, width: int, height: int) -> tuple[Tensor, Tensor]:
    """`[3, height, width]` uint8 and `[T, 5]` label, x1, y1, x2, y2. Some pictures come from larger or smaller
    ones, resized as the server resizes, and some have been through JPEG."""
    scale = 2 ** rng.uniform(-1, 1) if rng.random() < 0.3 else 1.0
    picture, shapes = draw_scene(rng, round(width * scale), round(height * scale))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(40, 96)))
        picture = Image.open(buffer)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    boxes = torch.tensor([(CLASSES.index(shape.label), *shape.box) for shape in shapes], dtype=torch.float32)
    if scale != 1:
        resized = interpolate(pixels[None].float(), (height, width), mode="bilinear", align_corners=False)[0]
        boxes[:, 1:] *= torch.tensor((width / picture.width, height / picture.height)).repeat(2)
        pixels = resized.round().byte()
    return pixels, boxes


def train(output: Path, steps: int, batch: int, rate: float, seed: int, start: Path | None = None) -> None:
    """Train for `steps` steps, from `start` or from random weights, and leave the moving average in `output`.

    Raises ToolError where the loss is not finite.
    """
    torch.manual_seed(seed)
    rng = default_rng(seed)
    model = model_defs.build("yolov5", len(CLASSES), size="n")
    assert isinstance(model, YOLOv5)
    if start:
        load_state(model, read_safetensors(start))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    average = copy.deepcopy(model).eval()

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], lr=rate
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_at(step, steps))

    started = reported = saved = time.monotonic()
    for step in range(1, steps + 1):
        images, targets = draw_batch(rng, batch, model.stride)
        losses = yolov5_loss(model, model.raw(images.contiguous(memory_format=torch.channels_last)), targets)
        loss = losses.box + losses.objectness + losses.classes
        if not loss.isfinite():
            raise ToolError(f"the loss became {loss.item()} at step {step}; lower --rate, now {rate}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
        update_average(average, model, step)

        now = time.monotonic()
        if step % 20 == 0:
            parts = "  ".join(f"{name} {value.item():.4f}" for name, value in losses._asdict().items())
            speed = 20 * batch / (now - reported)
            print(f"step {step}/{steps}  {parts}  {speed:.1f} images/s  {now - started:.0f} s", flush=True)
            reported = now
        if step == steps or now - saved > SAVE_EVERY_S:
            save_weights(average, output / "shapes.safetensors")
            saved = now


def _rate_at(step: int, steps: int) -> float:
    """The factor on the learning rate: up in a line, then down half a cosine."""
    down = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min((step + 1) / WARM_UP_STEPS, 1.0) * (FINAL_RATE + (1 - FINAL_RATE) * down)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """An exponential moving average over the last thousand steps, over fewer at the start."""
    decay = min(0.999, step / (step + 10))
    current = model.state_dict()
    for key, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(current[key], 1 - decay)
        else:
            value.copy_(current[key])


def save_weights(model: nn.Module, path: Path) -> None:
    """The state dict in half precision, as safetensors."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    write_whole(path, save({key: value.contiguous() for key, value in state.items()}))


def write_whole(path: Path, content: bytes) -> None:
    """All of `content` or, where writing fails, what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@torch.inference_mode()
def detect(model: Detector, pixels: Tensor, score_threshold: float) -> Detections:
    """What the server would answer for a picture, `[3, H, W]` uint8."""
    _, height, width = pixels.shape
    plan = plan_letterbox(height, width, SERVED, model.stride)
    (candidates,) = model.candidates(letterbox(pixels, plan)[None].float() / 255, score_threshold)
    options = Options(score_threshold, 0.45, 300, class_agnostic=False, classes=None, format="detections")
    boxes, labels, scores = select(candidates, options)
    return Detections(clip(unletterbox(boxes, plan), height, width), labels, scores)


def evaluate(model: Detector, pictures: int) -> dict[str, float]:
    """Average precision at IoU 0.5 by class, their mean, and precision and recall at score 0.25, on held-out
    scenes of 200 to 1300 pixels a side."""
    rng = default_rng(HELD_OUT_SEED)
    rows: list[tuple[int, float, bool]] = []  # label, score, hit
    positives = np.zeros(len(CLASSES), dtype=int)
    for _ in range(pictures):
        width, height = (int(side) for side in rng.integers(200, 1300, 2))
        pixels, truth = draw_picture(rng, width, height)
        found = detect(model, pixels, 0.001)
        positives += np.bincount(truth[:, 0].long(), minlength=len(CLASSES))
        rows += zip(found.labels.tolist(), found.scores.tolist(), hits(found, truth), strict=True)
    labels, scores, hit = np.array(rows, dtype=float).reshape(-1, 3).T
    result = {
        name: average_precision(scores[labels == index], hit[labels == index], positives[index])
        for index, name in enumerate(CLASSES)
    }
    result["mAP50"] = float(np.nanmean(list(result.values())))
    right, shown = float(hit[scores > 0.25].sum()), int((scores > 0.25).sum())
    return result | {"precision": right / max(shown, 1), "recall": right / positives.sum()}


def hits(found: Detections, truth: Tensor) -> list[bool]:
    """Whether each detection, the best score first, finds an object of its class that no better one has found.

    truth: `[T, 5]` label, x1, y1, x2, y2. An object is found by an IoU of 0.5 or more.
    """
    iou = box_iou(truth[:, 1:], found.boxes)
    iou[truth[:, :1] != found.labels] = 0
    result = []
    for index in range(len(found.labels)):
        best = int(iou[:, index].argmax())
        result.append(bool(iou[best, index] >= 0.5))
        if result[-1]:
            iou[best] = 0
    return result


def average_precision(scores: np.ndarray, hit: np.ndarray, positives: int) -> float:
    """The area under precision over recall, precision being the best at that recall or above; NaN without objects.

    scores, hit: `[N]`, in any order. positives: how many objects there are to find.
    """
    if not positives:
        return math.nan
    hit = hit[np.argsort(-scores, kind="stable")].astype(bool)
    found = np.cumsum(hit)
    precision = found / np.arange(1, len(hit) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best_from_here[hit].sum() / positives)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train.shapes", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for weights and labels, made if absent")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate (AdamW)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights of an earlier run to go on from, instead of random ones")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--pictures", type=int, default=300, help="held-out pictures to evaluate on")
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except (MarinaError, OSError) as error:
        print(f"marina: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Train, then evaluate the weights as they have been written."""
    for name in ("steps", "batch", "threads", "pictures"):
        if getattr(arguments, name) < 1:
            raise ToolError(f"--{name} is {getattr(arguments, name)}; give a number from 1")
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    names = {str(index): name for index, name in enumerate(CLASSES)}
    write_whole(arguments.output / "index_to_name.json", (json.dumps(names, indent=2) + "\n").encode())
    train(arguments.output, arguments.steps, arguments.batch, arguments.rate, arguments.seed, arguments.start)

    model = model_defs.build("yolov5", len(CLASSES), size="n")
    load_state(model, read_safetensors(arguments.output / "shapes.safetensors"))
    for name, value in evaluate(model.eval(), arguments.pictures).items():
        print(f"{name:10} {value:.4f}")


if __name__ == "__main__":
    raise SystemExit(main())

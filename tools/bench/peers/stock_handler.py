"""TorchServe the way it is documented: a subclass of its BaseHandler, the network eager in fp32.

Nothing is tuned but the number of threads, where it is asked for.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.ops import batched_nms
from ts.torch_handler.base_handler import BaseHandler

from model_defs import build
from model_defs.candidates import from_rows

PADDING = (114, 114, 114)


class StockHandler(BaseHandler):
    def initialize(self, context: Any) -> None:
        folder = Path(context.system_properties["model_dir"])
        self.settings = json.loads((folder / "peer.json").read_text())
        if self.settings["threads"]:
            torch.set_num_threads(self.settings["threads"])
        self.model = build("yolov5", len(self.settings["labels"]), **self.settings["args"])
        self.model.load_state_dict(self.model.prepare_state(load_file(folder / "model.safetensors")), strict=False)
        self.model.eval()
        self.initialized = True

    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        self.places = []
        size = self.settings["size"]
        tensors = []
        for row in data:
            image = Image.open(io.BytesIO(row.get("data") or row.get("body") or b"")).convert("RGB")
            scale = size / max(image.size)
            resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
            left, top = (size - resized.width) // 2, (size - resized.height) // 2
            canvas = Image.new("RGB", (size, size), PADDING)
            canvas.paste(resized, (left, top))
            tensors.append(torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255)
            self.places.append((left, top, scale, image.size))
        return torch.stack(tensors)

    def inference(self, data: torch.Tensor) -> Any:
        found = []
        with torch.inference_mode():
            for rows in self.model(data):
                of_one = torch.zeros(len(rows), dtype=torch.int64)
                found += from_rows(rows, of_one, 1, self.settings["score_threshold"])
        return found

    def postprocess(self, data: Any) -> list[dict[str, Any]]:
        answers = []
        for (boxes, labels, scores), (left, top, scale, (width, height)) in zip(data, self.places, strict=True):
            chosen = batched_nms(boxes, scores, labels, self.settings["iou_threshold"])
            found = (boxes[chosen] - torch.tensor([left, top, left, top])) / scale
            found = found.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
            rows = zip(labels[chosen].tolist(), scores[chosen].tolist(), found.tolist(), strict=True)
            answers.append(
                {
                    "detections": [
                        {"label": self.settings["labels"][label], "score": score, "box": box}
                        for label, score, box in rows
                    ]
                }
            )
        return answers

"""What a training is made with: one schema for the flags, the `train` section of a YAML file and `config.yaml`."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from tools.checkpoint.safetensors_format import replacing
from tools.errors import ToolError
from tools.strict import parse, read_yaml
from tools.train.augmentation import Augmentation

SECTION = "train"
CONFIG = "config.yaml"

Definition = Literal[
    "yolov5",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
]
# Networks that are made for pictures of one size.
FIXED_SIZES = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
SIZE_MULTIPLE = 32  # of the sides that YOLOv5 takes; 64 with the sizes that end in 6

# Where torchvision's models are trained otherwise than YOLOv5, whose values the schema has.
TORCHVISION_DEFAULTS: dict[str, Any] = {
    "optimizer": "adamw",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "nominal_batch": 1,
    "warmup_epochs": 1.0,
    "warmup_momentum": 0.9,
    "warmup_bias_lr": 0.0,
    "mosaic": 0.0,
}
RATES = {
    ("yolov5", "sgd"): 0.01,
    ("yolov5", "adam"): 1e-3,
    ("yolov5", "adamw"): 1e-3,
    ("torchvision", "sgd"): 5e-3,
    ("torchvision", "adam"): 5e-4,
    ("torchvision", "adamw"): 5e-4,
}


class TrainSettings(Augmentation):
    """Fields that torchvision's models take other values for are in `TORCHVISION_DEFAULTS`."""

    data: Path = Field(description="folder that `marina data prepare` made")
    output: Path | None = Field(None, description="folder for the run, made here (default runs/DEFINITION-N)")
    name: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9._-]*$", description="of the model in the run's recipe")
    license: str = Field("unknown", description="of the weights, for the run's recipe; of weights started from, theirs")

    definition: Definition = Field("yolov5", description="which network")
    model_size: Literal["n", "s", "m", "l", "x", "n6", "s6", "m6", "l6", "x6"] = Field("n", description="of YOLOv5")
    weights: Path | None = Field(None, description="to start from: .pt, .safetensors or state dict; random without")
    freeze: int = Field(0, ge=0, description="layers kept as they are, counted from the picture")
    freeze_norms: bool = Field(
        False, description="keep every batch normalisation as it is; torchvision's models do when given --weights"
    )

    epochs: int = Field(100, ge=1, le=100_000, description="rounds over the training pictures")
    batch: int = Field(16, ge=0, le=65_536, description="pictures a step over all processes; 0 finds one that fits")
    size: int = Field(640, ge=32, le=8192, description="pixels of the longer side")
    seed: int = Field(0, ge=0, lt=2**31, description="of all that is drawn at random")
    patience: int = Field(100, ge=0, description="epochs without a better fitness before training stops; 0 never")
    save_period: int = Field(0, ge=0, description="also keep the weights of every so many epochs; 0 none")
    fast_dev_run: bool = Field(False, description="two steps and one batch of validation, to see that all is well")

    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="torchvision's models: adamw")
    lr: float | None = Field(None, gt=0, description="learning rate; by default as definition and optimiser need")
    lr_final: float = Field(0.01, gt=0, le=1, description="learning rate at the end, as a share of that")
    cosine: bool = Field(False, description="let the rate fall along a cosine, not a line")
    momentum: float = Field(0.937, ge=0, lt=1, description="of Adam the first beta")
    weight_decay: float = Field(0.0005, ge=0, description="of kernels alone")
    nominal_batch: int = Field(64, ge=1, description="smaller batches are gathered up to so many pictures")
    warmup_epochs: float = Field(3.0, ge=0, description="at least 100 steps, at most a third of all; 0 none")
    warmup_momentum: float = Field(0.8, ge=0, lt=1, description="at the first step")
    warmup_bias_lr: float = Field(0.1, ge=0, description="learning rate of biases at the first step")
    box_gain: float = Field(0.05, ge=0, description="weight of the boxes in YOLOv5's loss")
    objectness_gain: float = Field(1.0, ge=0, description="weight of the objectness in YOLOv5's loss")
    class_gain: float = Field(0.5, ge=0, description="weight of the classes in YOLOv5's loss")
    # 64 as Fast R-CNN has them (arXiv:1504.08083, section 2.3): 512, torchvision's own, take most of the time.
    proposals: int = Field(64, ge=2, description="of a picture, for Faster R-CNN's second stage; at most half objects")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the classes in YOLOv5's loss")

    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the forward pass; fp16 on GPUs only")
    devices: str = Field("auto", pattern=r"^(auto|cpu|\d+(,\d+)*)$", description="auto, cpu or GPUs as 0,1")
    processes: int = Field(1, ge=1, le=1024, description="on the CPU; on GPUs there is one for each")
    workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="processes that read pictures for each that trains (default 1, for a GPU up to 8)",
    )
    cache: Literal["none", "ram", "disk"] = Field("ram", description="where decoded pictures are kept")
    cache_gb: float = Field(2.0, gt=0, description="most that the cache in RAM takes for each process, in GB")
    wandb: bool = Field(False, description="log to Weights & Biases as well; WANDB_MODE=offline is heeded")
    mlflow: bool = Field(False, description="log to MLflow as well, at MLFLOW_TRACKING_URI or in the run's folder")

    @model_validator(mode="after")
    def _size_fits(self) -> "TrainSettings":
        fixed = FIXED_SIZES.get(self.definition)
        if fixed and "size" in self.model_fields_set and self.size != fixed:
            raise ValueError(f"size is {self.size}, but {self.definition} is made for {fixed}; leave it out")
        multiple = SIZE_MULTIPLE * (2 if self.model_size.endswith("6") else 1)
        if self.definition == "yolov5" and self.size % multiple:
            raise ValueError(f"size is {self.size}; YOLOv5{self.model_size} takes multiples of {multiple}")
        if self.processes > 1 and self.devices not in ("auto", "cpu"):
            raise ValueError(f"processes is {self.processes} with GPUs {self.devices}; there is one process for each")
        processes = max(self.processes, len(self.gpus))
        if self.batch % processes:
            raise ValueError(f"batch is {self.batch}, which {processes} processes cannot share evenly")
        return self

    @property
    def family(self) -> Literal["yolov5", "torchvision"]:
        return "yolov5" if self.definition == "yolov5" else "torchvision"

    @property
    def rate(self) -> float:
        """The learning rate that holds where none is given, else the one given."""
        return RATES[self.family, self.optimizer] if self.lr is None else self.lr

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments of the model's builder, for training, serving and the recipe alike."""
        if self.definition == "yolov5":
            return {"size": self.model_size}
        if self.definition in FIXED_SIZES:
            return {}
        # Both: the longer side becomes `size`, as it does with a letterbox.
        return {"min_size": self.size, "max_size": self.size}

    @property
    def gpus(self) -> list[int]:
        """The GPUs asked for by number."""
        return [] if self.devices in ("auto", "cpu") else [int(part) for part in self.devices.split(",")]

    def resolved(self) -> "TrainSettings":
        """With the defaults of the definition, and paths that hold anywhere."""
        chosen: dict[str, Any] = {"data": self.data.resolve()}
        if self.weights is not None:
            chosen["weights"] = self.weights.resolve()
        if self.family == "torchvision":
            defaults = TORCHVISION_DEFAULTS | {"freeze_norms": self.weights is not None}
            chosen |= {name: value for name, value in defaults.items() if name not in self.model_fields_set}
        if self.definition in FIXED_SIZES:
            chosen["size"] = FIXED_SIZES[self.definition]
        if self.fast_dev_run:
            chosen["epochs"] = 1
        settings = self.model_copy(update=chosen)
        return settings.model_copy(update={"lr": settings.rate})


def write_config(settings: TrainSettings, path: Path) -> None:
    """As a file for `--config`; the output folder is left out, for the next run needs another."""
    content = settings.model_dump(mode="json", exclude={"output"}, exclude_none=True)
    with replacing(path) as file:
        file.write(yaml.safe_dump({SECTION: content}, sort_keys=False).encode())


def read_config(run: Path) -> TrainSettings:
    """The settings of a run. Raises ToolError where the folder is none."""
    try:
        return parse(TrainSettings, read_yaml(run / CONFIG, "config").get(SECTION) or {})
    except ValueError as error:
        raise ToolError(f"{run} is no run that can go on: {error}") from error

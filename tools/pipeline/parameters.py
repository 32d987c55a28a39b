"""What a pipeline is run with: one schema for the local runner, the step scripts and the Tekton Pipeline.

Each parameter of the flyingthings pipeline `train-model`, by its name there, and what stands for it here:

    GIT_URL, GIT_REVISION              tools_image: the code is in the image, which is pinned by its digest
    IMAGE_REGISTRY, UBI_IMAGE          tools_image
    MODEL_IMAGE                        `images` in docker/k8s/base/kustomization.yaml
    NAMESPACE                          the namespace that the PipelineRun is created in; nothing else depends on it
    GPU_TIMEOUT                        gpu_timeout
    BATCH_SIZE                         batch; 0 finds one that fits
    NUM_EPOCHS                         epochs, on the CPU too
    IMG_RESIZE, MAX_WIDTH              max_side; without it no picture is made smaller
    MODEL_BASE                         definition, model_size, weights
    MODEL_WEIGHTS, MODEL_NAME          model_name
    MINIO_ENDPOINT, MINIO_BUCKET       s3_endpoint, store
    MINIO_ACCESSKEY, MINIO_SECRETKEY   s3_secret: the name of a Secret; here they come from the environment
    DATASET_ZIP                        dataset
    DEPLOY                             deploy
    DEPLOY_ARTIFACTS                   demo_pictures
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from tools.errors import ToolError
from tools.evaluate.gates import parse_gates
from tools.strict import Strict, parse, read_yaml
from tools.train.config import Definition, TrainSettings

PREFIX = "MARINA_"
# Only a server whose model store is a folder of this machine can be told directly; those of a cluster follow the tag.
HERE_ONLY = ("server_management", "server_inference", "server_token_file", "server_store_dir")

TARGET = r"^[A-Za-z0-9][A-Za-z0-9._-]*(@[a-z]+)?$"
PINNED = r"^[^@\s]+@sha256:[0-9a-f]{64}$"
FRACTION = r"(0|1|0?\.[0-9]+|0\.[0-9]+|1\.0+)"


class Parameters(Strict):
    store: str = Field(description="s3://BUCKET/PREFIX, or a folder: where data sets, runs and archives lie")
    s3_endpoint: str | None = Field(None, description="URL of an S3 server other than AWS")
    s3_secret: str = Field(
        "marina-store",
        pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$",
        description="in a cluster: name of the Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    )
    tools_image: str | None = Field(
        None, pattern=PINNED, description="in a cluster: the image of Marina's tools, as NAME@sha256:DIGEST"
    )

    dataset: str = Field(pattern=TARGET, description="data set in the store: an id, NAME (its newest) or NAME@TAG")
    demo_pictures: int = Field(
        0, ge=0, le=100_000, description="draw so many pictures and push them as the data set first"
    )
    max_side: int | None = Field(
        None, ge=32, le=100_000, description="make larger pictures smaller, to this longest side in pixels"
    )
    split: str | None = Field(
        None,
        pattern=rf"^{FRACTION} {FRACTION} {FRACTION}$",
        description="shares of train, valid and test, as 0.8 0.1 0.1; without it, the data set's own splits",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of the split and the training")

    device: Literal["auto", "gpu", "cpu"] = Field(
        "auto", description="what trains; auto: a GPU if one comes in time, else the CPU, which the log says"
    )
    gpu_timeout: str = Field(
        "12m", pattern=r"^[1-9][0-9]*[smh]$", description="how long to wait for a GPU: 90s, 12m or 1h"
    )

    model_name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="of the archive that is served: a-z, 0-9, ., _ and -"
    )
    model_version: str | None = Field(
        None,
        pattern=r"^[0-9]+(\.[0-9]+)*$",
        description="of the archive: digits and dots; without it, the time of this run",
    )
    license: str = Field("unknown", min_length=1, description="of the trained weights")
    definition: Definition = Field("yolov5", description="which network")
    model_size: Literal["n", "s", "m", "l", "x", "n6", "s6", "m6", "l6", "x6"] = Field("s", description="of YOLOv5")
    weights: str | None = Field(
        None, pattern=TARGET, description="weights in the store to start from, as `dataset`; random without"
    )
    live: str | None = Field(
        None,
        pattern=TARGET,
        description="the run that serves now, as NAME@production: what to start from, and not to be worse than",
    )
    live_drop: str = Field(
        "0.02",
        pattern=rf"^{FRACTION}$",
        description="how much lower the mAP50 of the classes that `live` knows may be on the same pictures",
    )
    epochs: int = Field(100, ge=1, le=100_000, description="rounds over the training pictures, on any device")
    batch: int = Field(16, ge=0, le=65_536, description="pictures a step; 0 finds the largest that fits")
    size: int | None = Field(
        None, ge=32, le=8192, description="pixels of the longer side; without it, as the network needs"
    )
    patience: int = Field(100, ge=0, description="epochs without a better fitness before training stops; 0 never")

    require: str = Field(
        min_length=1, description="the gate: figures that must be reached, with commas between, as map50=0.8,f2=0.75"
    )
    backend: Literal["torch", "onnx", "openvino"] = Field(
        "torch", description="what executes the network in the archive; others than torch are exported too"
    )
    deploy: bool = Field(True, description="promote the archive to production, which servers follow")
    server_management: str | None = Field(None, description="URL of a TorchServe's management API, to deploy to")
    server_inference: str | None = Field(None, description="URL where that server takes pictures")
    server_token_file: str | None = Field(None, description="that server's key_file.json")
    server_store_dir: str | None = Field(None, description="that server's model store")

    @field_validator("s3_endpoint", "store", "server_management", "server_inference")
    @classmethod
    def _holds_no_password(cls, value: str | None) -> str | None:
        """They are shown."""
        if value and re.match(r"[a-z0-9]+://[^/]*@", value):
            raise ValueError("a URL with a password; credentials come from the environment, or a Secret")
        return value

    @field_validator("require")
    @classmethod
    def _is_gates(cls, value: str) -> str:
        texts = value.split(",")
        # Which classes there are is known when the data set is read.
        classes = [text.rpartition("=")[0].partition(":")[2] for text in texts]
        try:
            parse_gates(texts, classes)
        except ToolError as error:
            raise ValueError(str(error).removeprefix("--require ").partition("; classes are")[0]) from error
        return value

    @model_validator(mode="after")
    def _can_train(self) -> "Parameters":
        """Told before anything is fetched."""
        given = {name: getattr(self, name) for name in ("definition", "model_size", "epochs", "batch", "seed")}
        parse(TrainSettings, {"data": Path("data")} | given | ({"size": self.size} if self.size else {}))
        return self

    @model_validator(mode="after")
    def _one_beginning(self) -> "Parameters":
        if self.weights and self.live:
            raise ValueError("weights and live are both what training starts from; give one")
        return self

    @model_validator(mode="after")
    def _whole_server(self) -> "Parameters":
        given = [self.server_management, self.server_inference, self.server_store_dir]
        if any(given) and not all(given):
            raise ValueError("server_management, server_inference and server_store_dir go together; give all, or none")
        return self

    @field_validator("*")
    @classmethod
    def _is_one_line(cls, value: Any) -> Any:
        """A list of names and values is read line by line."""
        if isinstance(value, str) and not (value and value.isprintable()):
            raise ValueError("must be one line of text; leave it out to have none")
        return value


def read_parameters(path: Path, changes: list[str]) -> Parameters:
    """Of a YAML file, with `name=value` in place of what it says. Raises ToolError with one line."""
    try:
        content = read_yaml(path, "pipeline")
        for change in changes:
            name, equals, text = change.partition("=")
            if not equals:
                raise ValueError(f"--set {change}: give NAME=VALUE")
            content[name] = _value(name, text)
        return parse(Parameters, content)
    except ValueError as error:
        raise ToolError(f"{path}: {error}") from error


def from_environment(environment: Mapping[str, str]) -> Parameters:
    """Of the variables that a step sees. Raises ToolError with one line."""
    given = {name: environment[variable(name)] for name in Parameters.model_fields if variable(name) in environment}
    try:
        return parse(Parameters, {name: _value(name, text) for name, text in given.items()})
    except ValueError as error:
        raise ToolError(f"parameters: {error}") from error


def variable(name: str) -> str:
    return PREFIX + name.upper()


def as_text(value: Any) -> str:
    """As the environment and Tekton have it: nothing is an empty text."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(name: str, text: str) -> Any:
    """The opposite of `as_text`; what it cannot be is left to the schema to refuse."""
    field = Parameters.model_fields.get(name)
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    if text == "" and type(None) in kinds:
        return None
    if bool in kinds:
        return {"true": True, "false": False}.get(text, text)
    if int in kinds and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    return text


def check(environment: Mapping[str, str] = os.environ) -> str:
    """The parameters that a step sees, a line each. Raises ToolError when one is wrong."""
    parameters = from_environment(environment)
    return "\n".join(f"{name}={as_text(getattr(parameters, name))}" for name in Parameters.model_fields)

"""What `marina gateway` can be told: the section `gateway` of a YAML file, and flags over it."""

import re
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from handlers.settings import check_destination
from tools.strict import Strict


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an address such as http://127.0.0.1:8080")
    return url.rstrip("/")


Address = Annotated[str, AfterValidator(_address)]


class Server(Strict):
    """One TorchServe and the models that it offers here; nothing else of it can be reached."""

    url: Address
    token_file: Path | None = None
    models: list[str] = Field(min_length=1)
    timeout_s: float = Field(130, gt=0, description="how long one answer may take; TorchServe itself gives up at 120")


class Oidc(Strict):
    """Whose bearer tokens are taken: signed by a key of `jwks_url`, from `issuer`, meant for `audience`."""

    issuer: str
    audience: str
    jwks_url: str


class Limits(Strict):
    """What one caller, and all of them together, may ask for."""

    max_bytes: int = Field(20_000_000, gt=0, description="of a request's body")
    max_tensor_bytes: int = Field(
        100_000_000, gt=0, description="of a KServe v2 request's body: a tensor of 640 x 640 is 25 MB as JSON"
    )
    requests_per_second: float = Field(100, gt=0, description="of one caller, on average; twice as many in a burst")
    concurrency: int = Field(64, gt=0, description="requests under way at once, of all callers")
    body_timeout_s: float = Field(20, gt=0, description="until a body must flow at 64 kB/s or more")


class Video(Strict):
    """Jobs of annotated videos."""

    folder: Path = Path("marina-jobs")
    max_bytes: int = Field(500_000_000, gt=0)
    queue: int = Field(8, gt=0, description="jobs that wait or run")
    concurrency: int = Field(8, gt=0, description="frames under way at once")
    ttl_s: int = Field(86_400, gt=0, description="how long a finished job is kept")


class Bounds(Strict):
    """What a candidate may do otherwise than the live model and still be promoted. Shares are judged by their 95 %
    intervals."""

    min_pictures: int = Field(500, gt=0, description="before which nothing is decided")
    max_lost: float = Field(0.1, gt=0, le=1, description="of the live model's detections")
    max_gained: float = Field(0.1, gt=0, le=1, description="of the candidate's detections")
    max_moved: float = Field(0.3, gt=0, le=1, description="of the detections of both")
    max_class: float = Field(0.3, gt=0, le=1, description="lost, or gained, of any one class")
    max_failed: float = Field(0.01, gt=0, le=1, description="of the pictures that the candidate was asked about")
    max_latency: float = Field(1.5, gt=0, description="times what the live model takes")


class Shadow(Strict):
    """A candidate that sees a share of a model's traffic, behind the answers, and is compared with it.

    Callers cannot ask it, so it stands in no list of `models`. Requests that name a version of their own are left out.
    """

    model: str = Field(description="the live one")
    candidate: str = Field(description="NAME or NAME/VERSION")
    url: Address | None = Field(None, description="the TorchServe that serves it; without it that of the live model")
    token_file: Path | None = Field(None, description="the token of `url`")
    share: float = Field(0.1, ge=0, le=1, description="of the pictures, by chance")
    queue: int = Field(32, gt=0, description="pictures that wait; what finds no room is left out")
    queue_bytes: int = Field(64_000_000, gt=0, description="of those that wait")
    concurrency: int = Field(1, gt=0, description="pictures that it is asked about at once")
    timeout_s: float = Field(30, gt=0, description="after which an answer comes too late")
    iou: float = Field(0.5, gt=0, le=1, description="from which on two boxes of a class are one object")
    moved_iou: float = Field(0.9, gt=0, le=1, description="below which a box has moved")
    score_change: float = Field(0.1, ge=0, le=1, description="above which a score is another")
    bounds: Bounds = Bounds()
    capture: str | None = Field(
        None, description="where pictures with a difference are kept, unblurred: an absolute folder or s3://bucket"
    )
    capture_per_hour: int = Field(100, gt=0, le=100_000)

    @field_validator("candidate")
    @classmethod
    def _is_name(cls, candidate: str) -> str:
        if not re.fullmatch(r"[^/]+(/[A-Za-z0-9][A-Za-z0-9._+-]{0,99})?", candidate):
            raise ValueError("must be a model's NAME or NAME/VERSION")
        return candidate

    @field_validator("capture")
    @classmethod
    def _is_destination(cls, capture: str | None) -> str | None:
        if capture is not None:
            check_destination(capture)
        return capture

    @model_validator(mode="after")
    def _is_another(self) -> Self:
        if self.candidate == self.model and self.url is None:
            raise ValueError(f"the candidate {self.candidate!r} is the live model itself; give another, or a version")
        return self


class Flags(Strict):
    """The settings that have a flag of their own."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="of HTTP")
    grpc_port: int | None = Field(None, ge=0, le=65535, description="of KServe v2 over gRPC; none without it")
    tls_certificate: Path | None = Field(None, description="PEM, with its chain: HTTPS, and TLS for gRPC")
    tls_key: Path | None = Field(None, description="PEM without a password, of that certificate")
    keys_file: Path | None = Field(None, description="API keys, hashed, as `--new-key` makes them; read at the start")
    storage: str = Field("marina-uploads", description="where uploads lie: a folder, or s3://bucket/prefix")
    upload_ttl_s: int = Field(86_400, gt=0, description="how long an upload is kept, seconds")
    cors_origins: list[str] = Field([], description="web pages of which origins may call, such as https://example.org")
    label_studio_url: str | None = Field(
        None, description="the Label Studio that this is an ML backend of, at /label-studio; none without it"
    )
    label_studio_token_file: Path | None = Field(None, description="a token of it, to fetch pictures with")
    label_studio_model: str | None = Field(
        None, description="the model that annotators are helped by; may be left out where only one is served"
    )


class Settings(Flags):
    backends: list[Server] = Field(
        min_length=1, description="TorchServes to stand before; one by --backend URL, several in the file of --config"
    )
    oidc: Oidc | None = None
    no_auth: bool = Field(False, description="answer callers that show no key")
    limits: Limits = Limits()
    video: Video = Video()
    shadows: list[Shadow] = Field([], description="one a model at most")
    shadow_folder: Path = Field(Path("marina-shadows"), description="their counts, of this gateway alone")

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; give both, or none")
        return self

    @model_validator(mode="after")
    def _whole_label_studio(self) -> Self:
        if (self.label_studio_url is None) != (self.label_studio_token_file is None):
            raise ValueError("label_studio_url and label_studio_token_file go together; give both, or none")
        served = [name for server in self.backends for name in server.models]
        if self.label_studio_model is not None and self.label_studio_model not in served:
            raise ValueError(f"label_studio_model is none of the models: {', '.join(served)}")
        return self

    @model_validator(mode="after")
    def _shadows_of_models(self) -> Self:
        served = [name for server in self.backends for name in server.models]
        shadowed = [shadow.model for shadow in self.shadows]
        for name in shadowed:
            if name not in served:
                raise ValueError(f"shadows: {name!r} is none of the models: {', '.join(served)}")
            if shadowed.count(name) > 1:
                raise ValueError(f"shadows: model {name!r} has several; give it one")
        return self

    @model_validator(mode="after")
    def _one_way_to_authenticate(self) -> Self:
        if [self.keys_file is not None, self.oidc is not None, self.no_auth].count(True) != 1:
            raise ValueError(
                "say who may call, in one way: keys_file (make a key with `marina gateway --new-key NAME`), oidc,"
                " or no_auth"
            )
        return self

"""What `marina gateway` can be told: the section `gateway` of a YAML file, and flags over it."""

from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from tools.strict import Strict


class Server(Strict):
    """One TorchServe and the models that it offers here; nothing else of it can be reached."""

    url: str
    token_file: Path | None = None
    models: list[str] = Field(min_length=1)
    timeout_s: float = Field(130, gt=0, description="how long one answer may take; TorchServe itself gives up at 120")

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address such as http://127.0.0.1:8080")
        return url.rstrip("/")


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


class Flags(Strict):
    """The settings that have a flag of their own."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="of HTTP")
    grpc_port: int | None = Field(None, ge=0, le=65535, description="of KServe v2 over gRPC; none without it")
    tls_certificate: Path | None = Field(None, description="PEM, with its chain: HTTPS, and TLS for gRPC")
    tls_key: Path | None = Field(None, description="PEM without a password, of that certificate")
    keys_file: Path | None = Field(None, description="API keys, hashed, as `--new-key` makes them")
    storage: str = Field("marina-uploads", description="where uploads lie: a folder, or s3://bucket/prefix")
    upload_ttl_s: int = Field(86_400, gt=0, description="how long an upload is kept, seconds")
    cors_origins: list[str] = Field([], description="web pages of which origins may call, such as https://example.org")


class Settings(Flags):
    backends: list[Server] = Field(min_length=1)
    oidc: Oidc | None = None
    no_auth: bool = Field(False, description="answer callers that show no key")
    limits: Limits = Limits()
    video: Video = Video()

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; give both, or none")
        return self

    @model_validator(mode="after")
    def _one_way_to_authenticate(self) -> Self:
        if [self.keys_file is not None, self.oidc is not None, self.no_auth].count(True) != 1:
            raise ValueError(
                "say who may call, in one way: keys_file (make a key with `marina gateway --new-key NAME`), oidc,"
                " or no_auth"
            )
        return self

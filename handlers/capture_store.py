"""Where captured pictures are kept: a folder, or a bucket of an S3 server. Needs Python's own library alone.

YYYY-MM-DD/<id>.jpg     written first
YYYY-MM-DD/<id>.json    written last: where it is, the item is whole
"""

import contextlib
import hashlib
import hmac
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_OURS = re.compile(r"\.?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.(jpg|png|webp|json)(\.part)?")
_MEDIA_TYPES = {".jpg": "image/jpeg", ".png": "image/png", ".webp": "image/webp", ".json": "application/json"}
_TIMEOUT_S = 15.0
# Seconds to wait before each further try.
_WAITS_S = (1.0, 4.0)
# What a server answers that may take the same request later: RequestTimeout, SlowDown and their like.
_PASSING = (408, 429, 500, 502, 503, 504)
_EMPTY_QUERY = ""


class StoreError(Exception):
    """Something could not be kept; one line that says why, without a secret."""


class Store:
    """put: content under a name, whole or not at all; raises StoreError. expire: remove the items of days before that
    one, as YYYY-MM-DD."""

    def put(self, name: str, content: bytes) -> None:
        raise NotImplementedError

    def expire(self, before: str) -> None:
        raise NotImplementedError


def open_store(to: str) -> Store:
    """to: as `handlers.settings.check_destination` takes it. Nothing is written or asked yet."""
    return Bucket(to, os.environ) if to.startswith("s3://") else Folder(Path(to))


def write_item(store: Store, when: float, picture: bytes, suffix: str, record: Mapping[str, Any]) -> str:
    """Keep a picture with what is known of it; its id comes back. Raises StoreError.

    when: seconds since 1970. suffix: of the picture's file, as `.jpg`. record: the JSON without id, time and image.
    """
    item = new_id(when)
    moment = datetime.fromtimestamp(when, UTC)
    place = f"{moment:%Y-%m-%d}/{item}"
    known = {"id": item, "time": moment.isoformat(timespec="milliseconds"), "image": item + suffix}
    store.put(place + suffix, picture)
    store.put(place + ".json", json.dumps(known | dict(record), ensure_ascii=False).encode())
    return item


def new_id(when: float) -> str:
    """A UUID of version 7 (RFC 9562, section 5.7): in the order of time, and for the rest by chance."""
    value = int(when * 1000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 7 << 76
    return str(uuid.UUID(int=value & ~(3 << 62) | 2 << 62))


class Folder(Store):
    """Files that their owner alone can read."""

    def __init__(self, path: Path):
        self._path = path

    def put(self, name: str, content: bytes) -> None:
        target = self._path / name
        partial = target.with_name(f".{target.name}.part")
        try:
            self._path.mkdir(0o700, parents=True, exist_ok=True)
            target.parent.mkdir(0o700, exist_ok=True)
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
                sink.write(content)
                sink.flush()
                os.fsync(sink.fileno())
            partial.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise StoreError(f"{error.filename or target}: {error.strerror or error}") from error

    def expire(self, before: str) -> None:
        """Touches nothing but what lies where an item would and is called as one."""
        try:
            for day in _entries(self._path):
                if not (_DAY.fullmatch(day.name) and day.name < before and day.is_dir(follow_symlinks=False)):
                    continue
                files = [entry.name for entry in _entries(Path(day.path)) if _OURS.fullmatch(entry.name)]
                # What says that an item is whole goes before its picture.
                for name in sorted(files, key=lambda name: not name.endswith(".json")):
                    Path(day.path, name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    Path(day.path).rmdir()
        except OSError as error:
            raise StoreError(f"{error.filename or self._path}: {error.strerror or error}") from error


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from entries


class Keys(NamedTuple):
    key_id: str
    secret: str
    token: str | None


class Bucket(Store):
    """Objects of an S3 server, by its address, region and credentials in the environment.

    Credentials that are fetched from elsewhere, such as those of an instance's role, are not known here.
    """

    def __init__(self, to: str, environment: Mapping[str, str]):
        self._name, _, prefix = to.removeprefix("s3://").partition("/")
        self._prefix = prefix.strip("/")
        self._region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
        endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
        self._endpoint = (endpoint or f"https://s3.{self._region}.amazonaws.com").rstrip("/")
        key_id, secret = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
        self._keys = Keys(key_id, secret, environment.get("AWS_SESSION_TOKEN")) if key_id and secret else None

    def put(self, name: str, content: bytes) -> None:
        key = f"{self._prefix}/{name}".lstrip("/")
        what = f"s3://{self._name}/{key}"
        if self._keys is None:
            raise StoreError(f"{what}: AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY is not set")
        if not self._endpoint.startswith(("https://", "http://")):
            raise StoreError(f"{what}: AWS_ENDPOINT_URL is {self._endpoint!r}, no http:// or https:// address")
        url = f"{self._endpoint}/{quote(f'{self._name}/{key}', safe='/-_.~')}"
        for wait in (*_WAITS_S, None):
            problem = self._try(url, content, _MEDIA_TYPES[Path(name).suffix], self._keys)
            if problem is None:
                return
            text, passing = problem
            if wait is None or not passing:
                raise StoreError(f"{what}: {text}")
            time.sleep(wait)

    def _try(self, url: str, content: bytes, media_type: str, keys: Keys) -> tuple[str, bool] | None:
        """What went wrong, and whether another try may help; None if nothing did."""
        headers = {"Content-Type": media_type}
        headers |= signed("PUT", url, headers, content, keys, self._region, datetime.now(UTC))
        request = Request(url, content, headers, method="PUT")  # noqa: S310  # an http address, as checked above
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310  # see above
                answer.read(1)
        except HTTPError as error:
            with error:
                code = re.search(rb"<Code>(\w+)</Code>", error.read(4096))
            return f"the server says {error.code} {code[1].decode() if code else error.reason}", error.code in _PASSING
        except OSError as error:
            return f"{self._endpoint} cannot be reached ({getattr(error, 'reason', error)})", True
        return None

    def expire(self, before: str) -> None:
        """Left to the lifecycle rules of the bucket."""


def signed(
    method: str, url: str, headers: Mapping[str, str], content: bytes, keys: Keys, region: str, now: datetime
) -> dict[str, str]:
    """The headers to send beside `headers`, all of which are signed: AWS Signature Version 4 for S3, from its
    documentation, "Authenticating Requests: Using the Authorization Header". url: encoded as it is sent, no query."""
    parts = urlsplit(url)
    digest, stamp = hashlib.sha256(content).hexdigest(), f"{now:%Y%m%dT%H%M%SZ}"
    added = {"x-amz-content-sha256": digest, "x-amz-date": stamp}
    if keys.token:
        added["x-amz-security-token"] = keys.token
    to_sign = {name.lower(): value.strip() for name, value in headers.items()} | added | {"host": parts.netloc}
    names = ";".join(sorted(to_sign))
    lines = [f"{name}:{to_sign[name]}" for name in sorted(to_sign)]
    canonical = "\n".join([method, parts.path, _EMPTY_QUERY, *lines, "", names, digest])
    scope = f"{now:%Y%m%d}/{region}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{keys.secret}".encode()
    for part in scope.split("/"):
        key = _hmac(key, part)
    authorization = f"AWS4-HMAC-SHA256 Credential={keys.key_id}/{scope}, SignedHeaders={names}, "
    return added | {"Authorization": authorization + f"Signature={_hmac(key, text).hex()}"}


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()

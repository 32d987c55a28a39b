"""Objects in a bucket of any S3 server, by way of s3fs; endpoint, region and credentials are those of the environment.

Only what every server knows is used: Content-MD5 on what goes up (the server compares), parts, ranges. A file of one
part goes up at once. The parts of a larger one stay on the server until the last of them is there, and an upload that
was cut off is found again by its key, which is the checksum of the whole file.
"""

import base64
import random
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import s3fs
from botocore import exceptions as boto

from tools.errors import ToolError
from tools.store.manifest import new_id, time_of
from tools.store.objects import PART, PROBES, Advance, Entry, LocalFile, Missing, md5

# A request is tried this often, by botocore and around it by s3fs, which sees connections cut off in the middle.
TRIES = 3
ROUNDS = 2
CONNECT_S, READ_S = 10, 60
# All tries together: nothing else ends a write to a line that is half closed.
REQUEST_S = 300
# Of a create-only write that the server could not decide because of another at the same moment.
CONFLICT_TRIES = 20
UPLOAD_TRIES = 3

MISSING = {"NoSuchKey", "NoSuchUpload", "404"}
EXISTS = {"PreconditionFailed", "412"}
CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
NOT_KNOWN = {"NotImplemented", "501"}
WRONG_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401"}
DENIED = {"AccessDenied", "403", "AllAccessDisabled"}
FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "507"}


class Refused(Exception):
    """The server answers with an error. code: S3's name of it."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class S3Objects:
    """See `Objects`. Raises ToolError when the server or the bucket is not there, or the credentials are wrong."""

    def __init__(self, bucket: str, prefix: str):
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._exclusive = False
        self._files = s3fs.S3FileSystem(
            config_kwargs={
                "connect_timeout": CONNECT_S,
                "read_timeout": READ_S,
                "retries": {"total_max_attempts": TRIES, "mode": "standard"},
                # Not every server knows the checksums that botocore would add; Content-MD5 all do.
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "signature_version": "s3v4",
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        self._files.retries = ROUNDS
        self._call("list_objects_v2", MaxKeys=1, Prefix=self.prefix)

    def names(self, prefix: str) -> list[Entry]:
        found = [
            Entry(each["Key"].removeprefix(self.prefix), each["Size"])
            for page in self._pages("list_objects_v2", ("ContinuationToken",), Prefix=self.prefix + prefix)
            for each in page.get("Contents", [])
        ]
        return sorted(found)

    def read(self, name: str) -> bytes:
        return b"".join(self.chunks(name, 0, 0))

    def create(self, name: str, data: bytes) -> bool:
        for _ in range(CONFLICT_TRIES):
            try:
                self._call("put_object", Key=name, Body=data, ContentMD5=_base64(md5(data)), IfNoneMatch="*")
            except Refused as refused:
                if refused.code in EXISTS:
                    # When the answer to our own write was lost, the write was sent again, and met itself.
                    return self.read(name) == data
                if refused.code in CONFLICT:
                    time.sleep(random.uniform(0.05, 0.5))  # noqa: S311  # not a secret
                    continue
                raise self._problem(refused) from refused
            return True
        raise ToolError(f"store {self.url}: {name} could not be written for other writers; try again")

    def delete(self, name: str) -> None:
        self._do("delete_object", Key=name)

    def holds(self, name: str, file: LocalFile) -> bool:
        """By the ETag, which is made of the MD5 of content or parts; where a server encrypts, it is not, and the file
        goes up again."""
        try:
            head = self._do("head_object", Key=name)
        except Missing:
            return False
        return bool(head["ContentLength"] == file.size and head["ETag"].strip('"') == _etag(file.parts))

    def upload(self, name: str, file: LocalFile, advance: Advance) -> None:
        if len(file.parts) == 1:
            self._put(name, file)
            advance(file.size)
            return
        for _ in range(UPLOAD_TRIES):
            try:
                self._upload_parts(name, file, advance)
            except (Missing, ToolError) as error:
                # Another push of the same file may have finished the upload that both worked on; not every server says
                # so in the same words.
                if self.holds(name, file):
                    return
                if isinstance(error, ToolError):
                    raise
                continue
            return
        raise ToolError(f"store {self.url}: the upload of {file.path} was removed again and again; does `gc` run?")

    def chunks(self, name: str, start: int, size: int) -> Iterator[bytes]:
        path = f"{self.bucket}/{self.prefix}{name}"
        for begin in range(start, max(size, start + 1), PART):
            limits = {"start": begin, "end": min(begin + PART, size)} if size else {}
            try:
                data = _asked(self._files.cat_file, path, **limits)
            except FileNotFoundError as error:
                raise Missing(name) from error
            except Refused as refused:
                raise (Missing(name) if refused.code in MISSING else self._problem(refused)) from refused
            except (OSError, boto.BotoCoreError) as error:
                raise self._unreachable(error) from error
            yield data

    def check_exclusive(self) -> None:
        if self._exclusive:
            return
        name = f"{PROBES}{new_id()}"
        try:
            kept = self.create(name, b"first") and not self.create(name, b"second")
        except ToolError as error:
            if not (isinstance(error.__cause__, Refused) and error.__cause__.code in NOT_KNOWN):
                raise
            kept = False
        finally:
            self.delete(name)
        if not kept:
            raise ToolError(
                f"store {self.url}: its server overwrites what `If-None-Match: *` forbids to, so tags cannot be moved"
                " safely on it, nor anything removed; AWS S3, MinIO, Ceph radosgw and moto keep it (radosgw not in a"
                " bucket with versioning), `rclone serve s3` does not"
            )
        self._exclusive = True

    def clean(self, before: float) -> int:
        removed = 0
        for upload in self._uploads(""):
            if upload["Initiated"].timestamp() < before:
                self._drop(upload["Key"].removeprefix(self.prefix), upload["UploadId"])
                removed += 1
        for probe in self.names(PROBES):
            if time_of(probe.name.removeprefix(PROBES)).timestamp() < before:
                self.delete(probe.name)
        return removed

    def _put(self, name: str, file: LocalFile) -> None:
        answer = self._do("put_object", Key=name, Body=file.part(0), ContentMD5=_base64(file.parts[0]))
        self._check_arrival(answer, file.parts[0], file)

    def _upload_parts(self, name: str, file: LocalFile, advance: Advance) -> None:
        """Raises Missing when the upload is gone meanwhile."""
        upload, there = self._begun(name)
        for number, digest in enumerate(file.parts):
            data = file.part(number)
            if there.get(number + 1) != digest:
                answer = self._do(
                    "upload_part",
                    Key=name,
                    UploadId=upload,
                    PartNumber=number + 1,
                    Body=data,
                    ContentMD5=_base64(digest),
                )
                self._check_arrival(answer, digest, file)
            advance(len(data))
        parts = self._parts(name, upload)
        listed = [{"PartNumber": number, "ETag": f'"{parts[number]}"'} for number in sorted(parts)]
        if len(listed) != len(file.parts):
            raise ToolError(f"store {self.url} has lost parts of {file.path}; push it again")
        self._do("complete_multipart_upload", Key=name, UploadId=upload, MultipartUpload={"Parts": listed})
        if self._do("head_object", Key=name)["ContentLength"] != file.size:
            raise ToolError(f"store {self.url} has put {file.path} together wrongly; push it again")

    def _begun(self, name: str) -> tuple[str, Mapping[int, str]]:
        """An upload of this object and the ETags of its parts: one that was cut off, or a new one."""
        for upload in self._uploads(name):
            if upload["Key"] == self.prefix + name:
                return upload["UploadId"], self._parts(name, upload["UploadId"])
        return self._do("create_multipart_upload", Key=name)["UploadId"], {}

    def _uploads(self, prefix: str) -> Iterator[dict[str, Any]]:
        """Those that were begun and not finished."""
        try:
            for page in self._pages(
                "list_multipart_uploads", ("KeyMarker", "UploadIdMarker"), Prefix=self.prefix + prefix
            ):
                yield from page.get("Uploads", [])
        except Missing:
            return  # rclone's answer when there are none

    def _parts(self, name: str, upload: str) -> dict[int, str]:
        pages = self._pages("list_parts", ("PartNumberMarker",), Key=name, UploadId=upload)
        return {part["PartNumber"]: part["ETag"].strip('"') for page in pages for part in page.get("Parts", [])}

    def _drop(self, name: str, upload: str) -> None:
        try:
            self._do("abort_multipart_upload", Key=name, UploadId=upload)
        except Missing:
            return

    def _check_arrival(self, answer: Mapping[str, Any], digest: str, file: LocalFile) -> None:
        """For servers that do not compare Content-MD5 by themselves."""
        encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
        if not encrypted and answer["ETag"].strip('"') != digest:
            raise ToolError(f"{file.path} arrived damaged at store {self.url}; nothing was pushed, push it again")

    def _pages(self, method: str, markers: tuple[str, ...], **arguments: Any) -> Iterator[dict[str, Any]]:
        """The pages of a listing; `markers` are the arguments that say where the next one begins."""
        marks: dict[str, Any] = {}
        while True:
            page = self._do(method, **arguments, **marks)
            yield page
            if not page.get("IsTruncated"):
                return
            marks = {marker: page[f"Next{marker}"] for marker in markers}

    def _do(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Raises Missing, or ToolError for everything else that is refused."""
        try:
            return self._call(method, **arguments)
        except Refused as refused:
            if refused.code in MISSING:
                raise Missing(arguments.get("Key", method)) from refused
            raise self._problem(refused) from refused

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Raises Refused for an answer that is an error, ToolError without an answer. Keys come without the prefix."""
        if "Key" in arguments:
            arguments["Key"] = self.prefix + arguments["Key"]
        try:
            answer: dict[str, Any] = _asked(self._files.call_s3, method, Bucket=self.bucket, **arguments)
        except Refused as refused:
            if refused.code == "NoSuchBucket":
                raise ToolError(
                    f"store {self.url}: there is no bucket {self.bucket!r}; make it, or correct the URL"
                ) from None
            if refused.code in WRONG_CREDENTIALS:
                raise ToolError(
                    f"store {self.url}: the server refuses the credentials ({refused.code}); correct AWS_ACCESS_KEY_ID"
                    " and AWS_SECRET_ACCESS_KEY, or the AWS profile"
                ) from None
            raise
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound) as error:
            raise ToolError(
                f"store {self.url}: no credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an"
                " AWS profile"
            ) from error
        # ValueError: of an endpoint that is no URL.
        except (OSError, boto.BotoCoreError, ValueError) as error:
            raise self._unreachable(error) from error
        return answer

    def _problem(self, refused: Refused) -> ToolError:
        if refused.code in DENIED:
            return ToolError(f"store {self.url}: these credentials may not do that ({refused.code}: {refused})")
        if refused.code in FULL:
            return ToolError(f"store {self.url}: the server's disk or the quota is full ({refused.code})")
        if refused.code == "BadDigest":
            return ToolError(f"store {self.url}: what was sent arrived damaged (BadDigest); push it again")
        return ToolError(f"store {self.url}: the server answers {refused.code}: {refused}")

    def _unreachable(self, error: Exception) -> ToolError:
        # An address may bring a password with it.
        why = re.sub(r"//[^/@\s]*@", "//", str(error)) or type(error).__name__
        return ToolError(
            f"store {self.url} cannot be reached, or the transfer was cut off ({why}); is AWS_ENDPOINT_URL right? The"
            " same command goes on where this one stopped"
        )


def _asked(ask: Any, *arguments: Any, **options: Any) -> Any:
    """Raises Refused where the server answers with an error."""
    try:
        return ask(*arguments, **options, timeout=REQUEST_S)
    except boto.ClientError as error:
        raise _refused(error) from error
    except OSError as error:
        if isinstance(error.__cause__, boto.ClientError):
            raise _refused(error.__cause__) from error
        raise


def _refused(error: boto.ClientError) -> Refused:
    said = error.response.get("Error", {})
    return Refused(str(said.get("Code", "")), str(said.get("Message", error)))


def _etag(parts: tuple[str, ...]) -> str:
    """As S3 makes it: the MD5 of a whole, or that of the MD5s of parts with their number."""
    if len(parts) == 1:
        return parts[0]
    return f"{md5(b''.join(map(bytes.fromhex, parts)))}-{len(parts)}"


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()

"""Label Studio's REST API, as far as Marina needs it; every failure is one line."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from tools.errors import ToolError
from tools.labelstudio.access import Access, picture_url

URL_VARIABLE, TOKEN_VARIABLE = "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"
TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 10.0
PAGE = 200
MOST_TEXT = 500


class NoPicture(Exception):
    """The picture of a task cannot be had; the text says why."""


class LabelStudio:
    """Use in a `with` block. Every method raises ToolError where Label Studio does not answer or refuses."""

    def __init__(self, url: str, token: str):
        self.url = origin_and_path(url)
        self._client = httpx.Client(
            base_url=self.url,
            auth=Access(self.url, token),
            timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of the answer, None for an empty one. options: as httpx takes them."""
        answer = self._answer(method, path, **options)
        if not answer.is_success:
            raise ToolError(f"Label Studio refuses {method} {path}: {answer.status_code} {reason_of(answer)}")
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise ToolError(f"{self.url} answers {method} {path} without JSON; is it Label Studio?") from None

    def picture(self, address: object) -> bytes:
        """Of a task, by the address in its data. Raises NoPicture."""
        url = picture_url(self.url, address)
        if url is None:
            raise NoPicture(f"its address {str(address)[:MOST_TEXT]!r} is not at this Label Studio")
        answer = self._answer("GET", url)
        # Of a file that it does not have, it says so by 500.
        if answer.status_code != 200:
            raise NoPicture(f"Label Studio does not give it ({answer.status_code}); is it there still?")
        return answer.content

    def project(self, title: str) -> dict[str, Any] | None:
        """None where there is none."""
        found = [
            project
            for project in self._pages("/api/projects/", {"title": title, "include": "id,title"}, "results", "count")
            if project["title"] == title
        ]
        if len(found) > 1:
            ids = ", ".join(str(project["id"]) for project in found)
            raise ToolError(f"Label Studio has {len(found)} projects {title!r} (ids {ids}); rename all but one there")
        if not found:
            return None
        project: dict[str, Any] = self.call("GET", f"/api/projects/{found[0]['id']}/")
        return project

    def needed_project(self, title: str) -> dict[str, Any]:
        project = self.project(title)
        if project is None:
            raise ToolError(f"Label Studio has no project {title!r}; make it with: marina label setup")
        return project

    def tasks(self, project: int, fields: str) -> Iterator[dict[str, Any]]:
        """All of them, by their ids. fields: names, of tasks and of what is in them, separated by commas."""
        # Otherwise links to cloud storage come in place of what stands in the task.
        query = {"project": project, "fields": "all", "include": fields, "resolve_uri": "false"}
        return self._pages("/api/tasks/", query, "tasks", "total")

    def _pages(self, path: str, query: dict[str, Any], key: str, total: str) -> Iterator[dict[str, Any]]:
        seen, page = 0, 1
        while True:
            content = self.call("GET", path, params=query | {"page": page, "page_size": PAGE})
            try:
                found, count = content[key], int(content[total])
            except (TypeError, KeyError, ValueError):
                raise ToolError(f"{self.url} answers GET {path} in an unknown form; is it Label Studio?") from None
            yield from found
            seen, page = seen + len(found), page + 1
            if seen >= count or not found:
                return

    def _answer(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._client.request(method, path, **options)
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            raise ToolError(
                f"Label Studio at {self.url} does not answer ({why}); is it up, and the URL right?"
            ) from None
        if answer.status_code == 401:
            raise ToolError(
                f"Label Studio at {self.url} does not take the token ({reason_of(answer)}); copy another from its"
                " page Account & Settings, a personal access token or a legacy one, as its organisation allows"
            )
        if answer.is_redirect:
            raise ToolError(f"{self.url} sends on to {answer.headers.get('Location', '')[:MOST_TEXT]}; give that URL")
        return answer


def connect(url: str | None, token_file: Path | None) -> LabelStudio:
    """url: None for LABEL_STUDIO_URL. token_file: None for LABEL_STUDIO_API_KEY. Raises ToolError."""
    url = url or os.environ.get(URL_VARIABLE)
    if not url:
        raise ToolError(f"say where Label Studio is: --url, or {URL_VARIABLE} in the environment")
    return LabelStudio(url, read_token(token_file) if token_file else _token_of_environment())


def read_token(path: Path) -> str:
    """Raises ToolError."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"token file {path} cannot be read ({error})") from error


def _token_of_environment() -> str:
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise ToolError(f"no token of Label Studio; give --token-file, or {TOKEN_VARIABLE} in the environment")
    return token


def origin_and_path(url: str) -> str:
    """`url` without a slash at its end. Raises ToolError for what is no address, or holds a password."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ToolError(f"{url!r} is no address of Label Studio; give one such as http://127.0.0.1:8085")
    if parts.username is not None:
        raise ToolError("the URL of Label Studio holds no credentials; give a token with --token-file")
    return url.rstrip("/")


def reason_of(answer: httpx.Response) -> str:
    """What Label Studio says of a refusal, on one line and without the links in it."""
    try:
        content = answer.json()
        found = content.get("validation_errors") or content.get("detail") or answer.reason_phrase
        # Of each field a list of lines; most are of no field.
        values = found.values() if isinstance(found, dict) else [found]
        text = "; ".join(str(line) for value in values for line in (value if isinstance(value, list) else [value]))
    except (ValueError, AttributeError):
        text = answer.reason_phrase
    return " ".join(re.sub("<[^>]*>", "", text).split())[:MOST_TEXT]

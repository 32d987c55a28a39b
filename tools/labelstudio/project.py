"""The project that annotators work in: made, or found and completed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.labels import BACKGROUND
from tools.errors import ToolError
from tools.labelstudio.client import LabelStudio
from tools.labelstudio.config import Control, extend_config, make_config, read_config

# Of the ML backend in Label Studio, and as whose predictions the project shows them.
BACKEND_TITLE = "marina"


@dataclass(frozen=True)
class Backend:
    """url: of the gateway's `/label-studio`, as Label Studio reaches it. key: of the gateway; None for --no-auth."""

    url: str
    key: str | None


@dataclass(frozen=True)
class Setup:
    """url: of the project's page. made: whether it is new. added: labels that it did not have."""

    url: str
    made: bool
    added: tuple[str, ...]
    labels: tuple[str, ...]


def set_up(studio: LabelStudio, title: str, classes: Sequence[str], backend: Backend | None = None) -> Setup:
    """The project has a label for each of `classes` afterwards; what it has already is kept. Raises ToolError."""
    if not 3 <= len(title) <= 50:
        raise ToolError(f"project title {title!r} has {len(title)} characters; Label Studio takes 3 to 50")
    # Before anything is written: a project with a label that is none can no longer be read.
    for name in classes:
        if not name.strip() or name != name.strip():
            raise ToolError(f"class {name!r} is empty, or has spaces around it; give another name")
    classes = list(dict.fromkeys(classes))
    project = studio.project(title)
    made = project is None
    if project is None:
        # Empty annotations are background: pictures on which there is nothing to find.
        content = {"title": title, "label_config": make_config(classes), "enable_empty_annotation": True}
        project = studio.call("POST", "/api/projects/", json=content)
        known: tuple[str, ...] = ()
    else:
        known = control_of(project).labels
        config = extend_config(project["label_config"], classes)
        if config != project["label_config"]:
            project = studio.call("PATCH", f"/api/projects/{project['id']}/", json={"label_config": config})
    if backend is not None:
        _connect(studio, project["id"], backend)
    labels = control_of(project).labels
    added = tuple(label for label in labels if label not in known)
    return Setup(f"{studio.url}/projects/{project['id']}", made, added, labels)


def control_of(project: dict[str, Any]) -> Control:
    """Raises ToolError for a labelling configuration that is not one of rectangles on a picture."""
    try:
        return read_config(project["label_config"])
    except ValueError as error:
        raise ToolError(
            f"the labelling configuration of project {project['title']!r} does not fit: {error}; take another project,"
            " or change it in Label Studio"
        ) from error


def classes_of(source: Path) -> list[str]:
    """Of a .mar, or of a prepared data set's folder. Raises ToolError."""
    from tools.data.dataset import read_dataset

    if source.is_dir():
        return list(read_dataset(source).classes)
    from tools.archive.inspect import inspect_archive

    labels = inspect_archive(source)["labels"]
    if not labels:
        raise ToolError(f"{source} names no classes; give an archive that Marina built, or a prepared data set")
    return [labels[index] for index in sorted(labels, key=int) if labels[index] != BACKGROUND]


def _connect(studio: LabelStudio, project: int, backend: Backend) -> None:
    """The gateway as the project's ML backend, which Label Studio asks for health and setup right now."""
    content: dict[str, Any] = {"project": project, "url": backend.url, "title": BACKEND_TITLE, "auth_method": "NONE"}
    if backend.key is not None:
        content |= {"auth_method": "BASIC_AUTH", "basic_auth_user": BACKEND_TITLE, "basic_auth_pass": backend.key}
    # By its title: of several, Label Studio would ask the first alone, also where the gateway is there no longer.
    found = studio.call("GET", "/api/ml/", params={"project": project})
    ours = next((entry for entry in found if entry["title"] == BACKEND_TITLE), None)
    if ours is None:
        studio.call("POST", "/api/ml/", json=content)
    else:
        studio.call("PATCH", f"/api/ml/{ours['id']}", json=content)
    # Live predictions are shown, also where older ones were pushed.
    shown = {"show_collab_predictions": True, "model_version": BACKEND_TITLE}
    studio.call("PATCH", f"/api/projects/{project}/", json=shown)
    # Label Studio would send it every annotation, and wait for it, without the key.
    for webhook in studio.call("GET", "/api/webhooks/", params={"project": project}):
        if webhook["url"] == f"{backend.url.rstrip('/')}/webhook":
            studio.call("DELETE", f"/api/webhooks/{webhook['id']}/")

"""What came from where: `history.json` beside the data set that `marina label pull` makes.

{"url", "project", "pictures": {"<split>/<file>": Origin}, "pulls": [{"time", "added", "changed", "removed", …}]}
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tools.data.write import write_json
from tools.errors import ToolError
from tools.strict import Strict

FILE = "history.json"


class Origin(Strict):
    """Of one picture. item: id of the capture; "" for a picture that was not pushed by Marina. model, version: what
    captured it. annotator: id of the user in Label Studio. time: when the annotation was last changed, ISO 8601."""

    item: str
    model: str
    version: str
    task: int
    annotation: int
    annotator: int | None
    time: str


class History(Strict):
    """url, project: of the Label Studio that it all came from. pictures: by split and file name. pulls: their sums."""

    url: str
    project: int
    pictures: dict[str, Origin]
    pulls: list[dict[str, Any]]


def read_history(folder: Path) -> History | None:
    """None where there is no folder, or an empty one. Raises ToolError for one that no pull has made."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        return History.model_validate_json((folder / FILE).read_bytes())
    except OSError as error:
        raise ToolError(
            f"{folder} holds no {FILE}, so it is not from `marina label pull`; choose another folder"
        ) from error
    except ValidationError as error:
        raise ToolError(f"{folder / FILE} is not as Marina writes it ({error.errors()[0]['msg']})") from error


def write_history(folder: Path, history: History) -> None:
    write_json(folder / FILE, history.model_dump())

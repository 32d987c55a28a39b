"""What a pipeline has to say in the recipe of the run that it trained."""

from pathlib import Path

import yaml

from tools.archive.recipe import load_recipe
from tools.checkpoint.safetensors_format import replacing
from tools.errors import ToolError


def change_recipe(run: Path, version: str | None, backend: str | None) -> None:
    """Put another version or engine into a run's recipe. Raises ToolError or BadSettings where that makes it wrong."""
    recipe = load_recipe(run)
    content = yaml.safe_load(recipe.path.read_text(encoding="utf-8"))
    if version is not None:
        content["version"] = version
    if backend is not None:
        content["runtime"] = {"backend": backend}
    try:
        with replacing(recipe.path) as file:
            file.write(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
    except OSError as error:
        raise ToolError(f"recipe {recipe.path} cannot be written ({error.strerror})") from error
    load_recipe(run)

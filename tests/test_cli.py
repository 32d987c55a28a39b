"""The `marina` command: what it costs to ask for help, and what it says without the extras."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.cli import COMMANDS, main

HEAVY = ("torch", "matplotlib", "pytorch_lightning", "optuna", "faster_coco_eval")


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command: str) -> None:
    done = python(
        f"import sys\nfrom tools.cli import main\n"
        f"try: main([{command!r}, '--help'])\n"
        f"finally: sys.exit(','.join(set({HEAVY}) & set(sys.modules)))"
    )
    assert done.stdout.startswith("usage: marina") and done.stderr == "\n"


def test_a_package_of_an_extra_that_is_missing_is_named(tmp_path: Path) -> None:
    assert main(["data", "draw", "--output", str(tmp_path / "set"), "--pictures", "1", "1", "1"]) == 0
    done = python(
        "import sys\nfrom tools.cli import main\nsys.modules['matplotlib'] = None\n"
        f"sys.exit(main(['data', 'show', {str(tmp_path / 'set')!r}]))"
    )
    assert done.returncode == 1
    assert done.stderr == "marina: data needs matplotlib; pip install '.[train]'\n"

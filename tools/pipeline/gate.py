"""Whether a run may be pushed: by the very evidence that the store will record with it."""

from pathlib import Path

from tools.errors import ToolError
from tools.store.contents import read_contents
from tools.store.evidence import read_evidence
from tools.store.manifest import Evidence


def check_gate(run: Path, evaluation: Path, require: str) -> Evidence:
    """require: gates with commas between. Raises ToolError when one is not passed, or says nothing."""
    evidence = read_evidence(evaluation, require.split(","), read_contents(run, None))
    if evidence.failed():
        raise ToolError(f"the gate is not passed: {evidence.line()}")
    return evidence

"""The network that an archive answers with, and the torch network in fp32 that it has to answer like."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from handlers.pipeline import Pipeline
from handlers.runtimes.torch import TorchNetwork
from handlers.settings import Runtime, Settings
from tools.checkpoint import Checkpoint, write_safetensors
from tools.export.calibration import Calibration, Letterboxed
from tools.export.network import export_network


@dataclass(frozen=True)
class Pair:
    """settings: of the archive's handler. files: the network's, by their names in the archive; none for torch.

    reference: torch in fp32 with the same weights.
    """

    settings: Settings
    files: Mapping[str, Path]
    reference: Pipeline


def make_pair(
    settings: Settings, parts: Mapping[str, bytes], checkpoint: Checkpoint, calibration: Calibration, folder: Path
) -> Pair:
    """Load the weights into torch and export them for `settings.runtime`.

    settings: of an archive with the weights themselves. parts: its labels, golden pictures and the answers that they
    must get, by their names in it. folder: an empty one to work in. Raises BadSettings, BadArchive or ToolError.
    """
    reference = _load_reference(settings, parts, checkpoint, folder / "torch")
    if settings.runtime.backend == "torch":
        return Pair(settings, {}, reference)
    assert isinstance(reference.network, TorchNetwork)
    target = folder / "exported"
    target.mkdir()
    pictures = Letterboxed(reference, calibration.fitted)
    name, exported = export_network(reference.network.detector, settings, target, pictures)
    files = {path.name: path for path in sorted(target.iterdir())}
    return Pair(replace(settings, weights=name, exported=exported), files, reference)


def _load_reference(settings: Settings, parts: Mapping[str, bytes], checkpoint: Checkpoint, folder: Path) -> Pipeline:
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_safetensors(folder / settings.weights, checkpoint.tensors, checkpoint.metadata)
    plain = asdict(replace(settings, runtime=Runtime()))
    reference = Pipeline.load(folder, {"maxWorkers": 1, "handler": plain})
    reference.check_golden(folder, record=True)
    return reference

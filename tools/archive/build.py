"""Recipe to archive.

recipe -> code, settings, labels, pictures -> draft .mar -> extracted -> clean process: golden answers
          weights, checked -> safetensors --/                         -> compared with torch in fp32, if not that itself
                           -> exported -----/                         -> provenance -> verified -> renamed
"""

import json
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from handlers.baseline import BASELINE
from handlers.errors import BadSettings
from handlers.labels import check_capture, load_labels
from handlers.settings import Golden, Runtime, Settings
from model_defs import DEFINITIONS
from tools.archive.closure import SOURCE, modules_for
from tools.archive.dryload import CleanProcess
from tools.archive.reader import MANIFEST, PROVENANCE, open_archive
from tools.archive.recipe import Recipe
from tools.archive.sources import find_weights, sha256_of
from tools.archive.verify import check_digests, check_entries
from tools.archive.writer import ArchiveWriter, timestamp, write_archive
from tools.checkpoint import Checkpoint, open_checkpoint, safetensors_parts
from tools.errors import ToolError
from tools.export.calibration import Calibration, digest_of, read_calibration
from tools.export.support import check_runtime
from tools.watch.baseline import baseline_json, find_baseline_pictures, shortage, take_baseline

if TYPE_CHECKING:
    from tools.export.pair import Pair
    from tools.export.parity import Report

WEIGHTS = "model.safetensors"
# Last parts of the names of what a state dict holds beside parameters.
BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked", "anchors"})
LABELS = "index_to_name.json"
CONFIG = "model-config.yaml"
HANDLER = "detection_handler.py"
# Seconds for a worker to load, check its golden pictures and warm up; failures end it at once.
STARTUP_TIMEOUT = 300
GPU_BATCH = 8
# Recorded answers are about as coarse as they are compared, so that a recipe gives the same bytes again.
BOX_DIGITS = 1
SCORE_DIGITS = 3


@dataclass(frozen=True)
class Built:
    """path: the archive. size: its bytes. answers: what it finds on its golden pictures. notes: for a person. beyond:
    how its answers are out of the bounds of parity, where it was built all the same."""

    path: Path
    size: int
    answers: list[dict[str, Any]]
    notes: list[str]
    beyond: str | None = None


def build_archive(
    recipe: Recipe,
    output: Path,
    weights: Path | None = None,
    process: CleanProcess | None = None,
    calibration: Path | None = None,
    even_beyond: bool = False,
    baseline: Path | None = None,
) -> Built:
    """Build and verify the archive of a recipe; `output` is replaced at the very end, or not touched at all.

    weights: the file to take instead of the recipe's. process: one that was started before, to save time. calibration:
    a folder of pictures or a data set, for what is not torch in fp32. even_beyond: build one, too, that does not answer
    as torch does, to measure it. baseline: a folder of pictures or a data set, such as the one that it is evaluated on,
    whose distributions go into the archive. Raises BadSettings, BadArchive or ToolError with one line.
    """
    try:
        return _build(recipe, output, weights, process, calibration, even_beyond, baseline)
    except OSError as error:
        raise ToolError(
            f"{error.filename or output}: {error.strerror or error}; write the archive elsewhere with --output, or set"
            " TMPDIR to a folder with room"
        ) from error


def _build(
    recipe: Recipe,
    output: Path,
    weights: Path | None,
    process: CleanProcess | None,
    calibration: Path | None,
    even_beyond: bool,
    baseline: Path | None,
) -> Built:
    labels = check_recipe(recipe)
    samples = read_calibration(calibration, recipe.runtime)
    pictures = find_baseline_pictures(baseline) if baseline else []
    source = find_weights(recipe, weights)
    modules = {
        name: path.read_bytes() for name, path in modules_for(recipe.model.definition, recipe.runtime.backend).items()
    }
    digests: dict[str, dict[str, int | str]] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="marina-") as scratch,
        tempfile.TemporaryDirectory(prefix="marina-") as work,
        tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as beside,
        open_checkpoint(source) as checkpoint,
    ):
        folder, draft = Path(scratch), Path(beside) / output.name
        _write(folder, modules)
        with process or CleanProcess() as process:
            process.import_code(folder)
            notes = check_weights(recipe, checkpoint, labels)
            pair = _pair(recipe, checkpoint, samples, Path(work))
            settings = pair.settings if pair else settings_of(recipe)
            config = model_config(recipe, settings)
            with write_archive(draft, digests) as writer:
                _add_parts(writer, recipe, settings, config, modules)
                _add_network(writer, pair, checkpoint)
            with open_archive(draft) as archive:
                archive.extract(folder)
                process.load(config)
                # In the meantime: the large entries now, so that the last check need not wait for them.
                check_digests(archive, digests)
            checked = set(digests)
            provenance = _provenance(recipe, source, checkpoint, samples)
            beyond: str | None = None
            if pair:
                report, beyond = _compare(recipe, pair, folder, config, samples)
                if beyond and not even_beyond:
                    raise ToolError(beyond)
                notes.append(report.line())
                provenance["parity"] = report.document()
            dry = process.result()
        with write_archive(draft, digests) as writer:
            if pictures:
                notes += _add_baseline(writer, provenance, folder, config, pictures)
            for golden, answer in zip(settings.golden, dry.answers, strict=True):
                if golden.detections not in digests:
                    writer.add(golden.detections, _json(_coarse(answer)))
            entries = {name: digests[name] for name in sorted(digests)}
            writer.add(PROVENANCE, _json(provenance | {"verified_with": dry.versions, "entries": entries}))
        check_entries(draft, checked)
        draft.replace(output)
    return Built(output, output.stat().st_size, dry.answers, notes, beyond)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _pair(recipe: Recipe, checkpoint: Checkpoint, samples: Calibration, folder: Path) -> "Pair | None":
    """What runs and what it is compared with; None for torch in fp32, which is what others are compared with."""
    if recipe.runtime == Runtime():
        return None
    # Not before: it imports torch, which a plain archive needs in the clean process alone.
    from tools.export.pair import make_pair

    settings = settings_of(recipe)
    return make_pair(settings, golden_parts(recipe, settings) | label_parts(recipe), checkpoint, samples, folder)


def _compare(
    recipe: Recipe, pair: "Pair", folder: Path, config: dict[str, Any], samples: Calibration
) -> tuple["Report", str | None]:
    """The extracted archive against torch in fp32, and how it is out of bounds, where it is."""
    from handlers.pipeline import Pipeline
    from tools.export import parity

    other = Pipeline.load(folder, config)
    bounds = parity.bounds_of(recipe.runtime.precision, recipe.parity)
    report = parity.prove(pair.reference, other, folder, samples, bounds)
    return report, parity.beyond(report, bounds)


def _add_baseline(
    writer: ArchiveWriter, provenance: dict[str, Any], folder: Path, config: dict[str, Any], pictures: Sequence[Path]
) -> list[str]:
    """Of the pictures as the extracted archive answers them; what there is to say about it."""
    from handlers.pipeline import Pipeline

    baseline = take_baseline(Pipeline.load(folder, config), pictures)
    writer.add(BASELINE, baseline_json(baseline))
    provenance["baseline"] = digest_of(pictures)
    return shortage(baseline)


def check_recipe(recipe: Recipe) -> list[str]:
    """What can be known before anything is written; the labels come back."""
    if recipe.model.definition not in DEFINITIONS:
        raise BadSettings(
            f"model.definition is {recipe.model.definition!r}; known definitions: {', '.join(DEFINITIONS)}"
        )
    check_runtime(recipe.model.definition, recipe.runtime, recipe.preprocess, recipe.serving.device)
    labels = load_labels(recipe.beside(recipe.labels))
    if recipe.response.format == "torchserve" and "score" in labels:
        raise BadSettings("a class named 'score' cannot be told from the score in format torchserve; rename one")
    if recipe.capture:
        check_capture(recipe.capture, labels)
    stems = Counter(Path(golden.image).stem for golden in recipe.golden)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise BadSettings(f"two golden pictures are named {twice[0]!r}; rename one")
    return labels


def check_weights(recipe: Recipe, checkpoint: Checkpoint, labels: list[str]) -> list[str]:
    """What there is to say about them. Raises BadSettings for those of another size of the network."""
    wanted = recipe.model.args.get("size")
    if recipe.model.definition == "yolov5" and checkpoint.size and wanted and checkpoint.size != wanted:
        raise BadSettings(f"model.args.size is {wanted!r}, but the weights are of YOLOv5{checkpoint.size}; correct one")
    if checkpoint.names and checkpoint.names != labels and len(checkpoint.names) == len(labels):
        index = next(i for i, name in enumerate(labels) if name != checkpoint.names[i])
        return [f"label {index} is {labels[index]!r}; the weights call it {checkpoint.names[index]!r}"]
    return []


def settings_of(recipe: Recipe) -> Settings:
    """What the handler of the recipe's archive is told."""
    return Settings(
        name=recipe.name,
        version=recipe.version,
        model=recipe.model,
        weights=WEIGHTS,
        labels=LABELS,
        preprocess=recipe.preprocess,
        postprocess=recipe.postprocess,
        limits=recipe.limits,
        response=recipe.response,
        runtime=recipe.runtime,
        device=recipe.serving.device,
        golden=tuple(
            Golden(f"golden/{Path(golden.image).name}", f"golden/{Path(golden.image).stem}.json")
            for golden in recipe.golden
        ),
        capture=recipe.capture,
    )


def model_config(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """The content of model-config.yaml: TorchServe's serving keys, and our settings, which it ignores."""
    serving = recipe.serving
    config: dict[str, Any] = {
        "minWorkers": serving.min_workers,
        "maxWorkers": serving.max_workers,
        "batchSize": serving.batch_size or (GPU_BATCH if serving.device == "gpu" else 1),
        "maxBatchDelay": serving.max_batch_delay_ms,
        "responseTimeout": serving.response_timeout_s,
        "startupTimeout": STARTUP_TIMEOUT,
    }
    if serving.device != "auto":
        config["deviceType"] = serving.device
    # By way of JSON: YAML has no tuples.
    return config | {"handler": json.loads(json.dumps(asdict(settings)))}


def _add_parts(
    writer: ArchiveWriter, recipe: Recipe, settings: Settings, config: dict[str, Any], modules: Mapping[str, bytes]
) -> None:
    """Everything that is known before the archive has run, the network apart."""
    parts = dict(modules) | label_parts(recipe)
    parts[MANIFEST] = _json(_manifest(recipe, settings))
    parts[CONFIG] = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()
    for name, content in golden_parts(recipe, settings).items():
        # Answers stand in the recipe for fp32; another precision rounds its own way, and parity says how far.
        if recipe.runtime.precision == "fp32" or not name.endswith(".json"):
            parts[name] = content
    for name in sorted(parts):
        writer.add(name, parts[name])


def _add_network(writer: ArchiveWriter, pair: "Pair | None", checkpoint: Checkpoint) -> None:
    if pair is None or not pair.files:
        with writer.open(WEIGHTS) as sink:
            for part in safetensors_parts(checkpoint.tensors, checkpoint.metadata):
                sink.write(part)
        return
    for name, path in pair.files.items():
        with writer.open(name) as sink, path.open("rb") as source:
            shutil.copyfileobj(source, sink)


def label_parts(recipe: Recipe) -> dict[str, bytes]:
    return {LABELS: recipe.beside(recipe.labels).read_bytes()}


def golden_parts(recipe: Recipe, settings: Settings) -> dict[str, bytes]:
    """Golden pictures, and the answers that the recipe gives, by their names in the archive."""
    parts = {}
    for golden, packed in zip(recipe.golden, settings.golden, strict=True):
        parts[packed.image] = recipe.beside(golden.image).read_bytes()
        if golden.detections:
            parts[packed.detections] = recipe.beside(golden.detections).read_bytes()
    return parts


def _manifest(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    year, month, day, hour, minute, second = timestamp()
    return {
        "createdOn": f"{day:02}/{month:02}/{year} {hour:02}:{minute:02}:{second:02}",
        "runtime": "python",
        "model": {
            "modelName": recipe.name,
            "modelVersion": recipe.version,
            "handler": HANDLER,
            "serializedFile": settings.weights,
            "configFile": CONFIG,
        },
        "archiverVersion": f"marina {metadata.version('marina')}",
    }


def _provenance(recipe: Recipe, source: Path, checkpoint: Checkpoint, samples: Calibration) -> dict[str, Any]:
    """What is known before the archive has run."""
    fitted = samples.document() if recipe.runtime.precision == "int8" else {}
    return fitted | {
        "recipe": recipe.model_dump(mode="json"),
        "weights": {
            "file": source.name,
            "sha256": sha256_of(source),
            "kind": checkpoint.kind,
            "parameters": sum(
                tensor.numel for name, tensor in checkpoint.tensors.items() if name.rpartition(".")[2] not in BUFFERS
            ),
        },
        "marina": {"version": metadata.version("marina"), "revision": _revision()},
    }


def _revision() -> str | None:
    """The commit of Marina's source, when it runs from a checkout; marked where the source was changed since."""
    command = ["git", "-C", str(SOURCE), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _coarse(answer: dict[str, Any]) -> dict[str, Any]:
    detections = [
        found | {"score": round(found["score"], SCORE_DIGITS), "box": [round(v, BOX_DIGITS) for v in found["box"]]}
        for found in answer["detections"]
    ]
    return {"width": answer["width"], "height": answer["height"], "detections": detections}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()

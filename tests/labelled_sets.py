"""Small labelled sets in the layouts of other programs, for the tests of `marina data`."""

import json

from numpy.random import default_rng
from PIL import Image

WIDTH, HEIGHT = 64, 48
TWO_BOXES = "0 0.5 0.5 0.25 0.25\n1 0.25 0.25 0.125 0.125\n"


def picture(path, seed=0, size=(WIDTH, HEIGHT), **options):
    """Noise in blocks, so that every seed gives a picture of its own, also as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = default_rng(seed).integers(0, 256, (6, 8, 3), dtype="uint8")
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path, **options)
    return path


def yolo_set(folder, counts=None, names="[cat, dog]", labels=TWO_BOXES, split_first=False, first_seed=0):
    """`images/train` and `labels/train`, or `train/images` and `train/labels`, with a data.yaml."""
    seed = first_seed
    lines = [f"names: {names}"]
    for split, count in (counts or {"train": 3, "val": 1}).items():
        images, texts = (
            (f"{split}/images", f"{split}/labels") if split_first else (f"images/{split}", f"labels/{split}")
        )
        (folder / images).mkdir(parents=True, exist_ok=True)
        (folder / texts).mkdir(parents=True, exist_ok=True)
        lines.append(f"{split}: {images}")
        for number in range(count):
            picture(folder / images / f"{split}{number}.jpg", seed := seed + 1)
            (folder / texts / f"{split}{number}.txt").write_text(labels)
    (folder / "data.yaml").write_text("\n".join(lines) + "\n")
    return folder


def coco_set(folder, categories, annotations, count=2, file="_annotations.coco.json", seed=0):
    """annotations: (image id from 1, category id, bbox), or whole entries."""
    for number in range(1, count + 1):
        picture(folder / f"p{number}.jpg", seed + number)
    content = {
        "images": [
            {"id": number, "file_name": f"p{number}.jpg", "width": WIDTH, "height": HEIGHT}
            for number in range(1, count + 1)
        ],
        "categories": categories,
        "annotations": [
            entry
            if isinstance(entry, dict)
            else {"id": number, "image_id": entry[0], "category_id": entry[1], "bbox": entry[2]}
            for number, entry in enumerate(annotations, start=1)
        ],
    }
    (folder / file).write_text(json.dumps(content))
    return folder


def voc_xml(*objects, filename="p.jpg", size=(WIDTH, HEIGHT)):
    """objects: name and four corners."""
    text = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
        "</object>"
        for name, a, b, c, d in objects
    )
    sizes = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename}</filename>{sizes}{text}</annotation>"


def voc_set(folder, splits, objects=(("cat", 8, 8, 24, 24),)):
    """splits: name of a list in ImageSets/Main to the number of its pictures."""
    seed = 0
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets/Main").mkdir(parents=True)
    for split, count in splits.items():
        stems = [f"{split}{number}" for number in range(count)]
        for stem in stems:
            picture(folder / f"JPEGImages/{stem}.jpg", seed := seed + 1)
            (folder / f"Annotations/{stem}.xml").write_text(voc_xml(*objects, filename=f"{stem}.jpg"))
        (folder / f"ImageSets/Main/{split}.txt").write_bytes("\r\n".join(stems).encode())
    return folder


def files_of(folder):
    """Every file below, by name, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

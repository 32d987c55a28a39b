"""What went into a data set, what did not, and why."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.data.dataset import Picture
from tools.data.formats.source import Effect, Problem
from tools.data.write import write_json

REPORT_JSON, REPORT_TEXT = "report.json", "report.txt"
EFFECTS: tuple[Effect, ...] = ("dropped", "left out", "merged", "changed")
TABLE_ROWS = 20


@dataclass(frozen=True)
class Report:
    """pictures, boxes: in the source, the bad ones too. splits: what was kept."""

    pictures: int
    boxes: int
    classes: Sequence[str]
    splits: Mapping[str, Sequence[Picture]]
    problems: Sequence[Problem]
    notes: Sequence[str]

    def count(self, effect: Effect) -> tuple[int, int]:
        """How many pictures and boxes a kind of problem befell."""
        found = [problem for problem in self.problems if problem.effect == effect]
        return sum(problem.pictures for problem in found), sum(problem.boxes for problem in found)

    def bad_share(self) -> float:
        """Of the pictures, or of the boxes, whichever lost more: 0 to 1."""
        pictures, boxes = self.count("dropped")
        return max(pictures / max(self.pictures, 1), boxes / max(self.boxes, 1))

    def table(self, rows: int | None = TABLE_ROWS) -> str:
        """Pictures and boxes by split; the classes with the most boxes, or all where `rows` is None."""
        by_class = {
            split: Counter(self.classes[box.label] for picture in pictures for box in picture.boxes)
            for split, pictures in self.splits.items()
        }
        total = sum(by_class.values(), Counter())
        lines = [
            ["pictures", *(len(pictures) for pictures in self.splits.values())],
            ["background", *(sum(not picture.boxes for picture in found) for found in self.splits.values())],
            ["boxes", *(counts.total() for counts in by_class.values())],
        ]
        shown = sorted(self.classes, key=lambda name: -total[name])[:rows]
        lines += [[f"  {name}", *(counts[name] for counts in by_class.values())] for name in shown]
        width = max(len(str(line[0])) for line in lines)
        head = " " * width + "".join(f"{split:>10}" for split in self.splits)
        body = [f"{line[0]:<{width}}" + "".join(f"{count:>10,}" for count in line[1:]) for line in lines]
        if len(shown) < len(self.classes):
            body.append(f"  and {len(self.classes) - len(shown)} more classes")
        return "\n".join([head, *body])

    def write(self, json_file: Path, text_file: Path) -> None:
        content: dict[str, Any] = {
            "before": {"pictures": self.pictures, "boxes": self.boxes},
            "after": {
                "pictures": sum(len(pictures) for pictures in self.splits.values()),
                "boxes": sum(len(picture.boxes) for pictures in self.splits.values() for picture in pictures),
            },
            **{effect: dict(zip(("pictures", "boxes"), self.count(effect), strict=True)) for effect in EFFECTS},
        }
        lines = [
            f"{name:<10}{count['pictures']:>10,} pictures{count['boxes']:>12,} boxes" for name, count in content.items()
        ]
        lines += ["", self.table(rows=None), "", *self.notes, ""]
        lines += [f"{problem.effect}: {problem.where}: {problem.reason}" for problem in self.problems]
        # Names of files need not be text in the encoding of the report.
        text_file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8", errors="backslashreplace")
        content |= {"notes": list(self.notes), "problems": [asdict(problem) for problem in self.problems]}
        write_json(json_file, content)

"""The figures of an evaluation as lines of text."""

from typing import Any

from tools.evaluate.evaluation import PER_CLASS, RATES, Evaluation, document

HEADER = ("class", "pictures", "boxes", *PER_CLASS)


def as_table(evaluation: Evaluation) -> str:
    """The figures in lines of text."""
    content = document(evaluation)
    data, rows = content["data"], rows_of(content)
    width = max(len(str(row[0])) for row in (HEADER, *rows))
    lines = [
        f"{content['model']} on {data['pictures']} pictures of split {data['split']}",
        "",
        f"{HEADER[0]:<{width}}" + "".join(f"{name:>10}" for name in HEADER[1:]),
        *(f"{row[0]:<{width}}" + "".join(f"{_figure(cell):>10}" for cell in row[1:]) for row in rows),
        "",
        *sentences(content),
    ]
    return "\n".join(lines)


def rows_of(content: dict[str, Any]) -> list[list[Any]]:
    """A row a class, then all classes together."""
    overall = content["overall"] | {"ap50": content["overall"]["map50"], "ap": content["overall"]["map50_95"]}
    rows = [[entry[name] for name in ("name", *HEADER[1:])] for entry in content["per_class"]]
    return [*rows, ["all", content["data"]["pictures"], content["data"]["boxes"], *(overall[key] for key in PER_CLASS)]]


def _figure(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def sentences(content: dict[str, Any]) -> list[str]:
    """What the table cannot say."""
    overall = content["overall"]
    sizes = ", ".join(f"{size} {_figure(overall[size])}" for size in ("small", "medium", "large"))
    best = "; ".join(f"{name} {_figure(at['value'])} at {at['threshold']:.3f}" for name, at in content["best"].items())
    lines = [
        f"ap50, ap (IoU 0.5 to 0.95): {content['setting']}",
        f"{', '.join(RATES)} (summed counts, IoU 0.5): {content['serving']}",
        f"map75 {_figure(overall['map75'])}; map50_95 of truths by size: {sizes}",
        f"best over all score thresholds: {best}",
    ]
    if content["speed_ms"]:
        stages = ", ".join(f"{stage} {value:.1f}" for stage, value in content["speed_ms"].items())
        lines.append(f"median ms a picture: {stages}")
    return lines + [f"note: {note}" for note in content["notes"]]

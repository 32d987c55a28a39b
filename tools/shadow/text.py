"""A report for people."""

from tools.shadow.report import ClassReport, Report

HEADINGS = ("live", "candidate", "lost", "gained", "moved", "rescored", "score")


def as_text(report: Report) -> str:
    """Shares stand in per cent, with the bounds of their 95 % intervals."""
    return "\n".join([*_head(report), "", *_table([report.overall, *report.classes]), "", *_end(report)])


def _head(report: Report) -> list[str]:
    live, candidate = report.model, f"{report.shadow} (not seen yet)"
    if report.live and report.candidate:
        live, candidate = (f"{model.name} {model.version}" for model in (report.live, report.candidate))
    lines = [
        f"{candidate} in the shadow of {live}, since {report.since:%Y-%m-%d %H:%M} UTC, share {report.share:g}",
        f"pictures: {report.compared} compared, {report.agreed} agree wholly; {report.failed.count} failed,"
        f" {report.unreachable} without an answer, {report.dropped} dropped, {report.waiting} waiting",
    ]
    if report.captured or report.not_captured:
        lines.append(f"captured: {report.captured}, {report.not_captured} could not be")
    if report.latency:
        latency = report.latency
        lines.append(
            f"latency: {latency.candidate_ms:.1f} ms, live {latency.live_ms:.1f} ms: {latency.ratio:.2f} times"
        )
    return lines


def _table(rows: list[ClassReport]) -> list[str]:
    cells = [("class", *HEADINGS), *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]


def _cells(row: ClassReport) -> tuple[str, ...]:
    shares = (str(share) for share in (row.lost, row.gained, row.moved, row.rescored))
    return row.label, str(row.live), str(row.candidate), *shares, f"{row.score_drift:+.3f}"


def _end(report: Report) -> list[str]:
    verdict = report.verdict
    more = f"; about {verdict.more_pictures} more pictures decide it" if verdict.more_pictures is not None else ""
    return [f"verdict: {verdict.verdict}{more}", *(f"  {reason}" for reason in verdict.reasons), report.note]

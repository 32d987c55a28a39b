"""One HTML page that stands alone: pictures inside, no script, nothing fetched from elsewhere."""

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path

from handlers.image import sniff
from tools.checkpoint.safetensors_format import replacing

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --line: #d5d9de; --faint: #5d6670; --band: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --paper: #16191d; --line: #3a4048; --faint: #9aa3ad; --band: #1f242a }
}
* { box-sizing: border-box }
body { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line) }
p { max-width: 48rem }
.table { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .3rem .9rem .3rem .4rem; text-align: left; border-bottom: 1px solid var(--line) }
th { color: var(--faint); font-weight: 600 }
tbody tr:nth-child(even) { background: var(--band) }
.number { text-align: right }
figure { margin: 1.25rem 0 }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #fff }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .4rem }
"""


class Page:
    """Parts in the order they are added; every text is taken as text, whatever it holds."""

    def __init__(self, title: str):
        self.title = html.escape(title)
        self.parts: list[str] = []

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str | float | int]]) -> None:
        """Floats are shown with three decimals, NaN as a dash; a column of numbers is set to the right."""
        numeric = [
            bool(rows) and all(isinstance(row[column], float | int) for row in rows) for column in range(len(header))
        ]

        def line(cells: Sequence[str | float | int], tag: str) -> str:
            return "".join(
                f"<{tag}{' class=number' if right else ''}>{html.escape(_shown(cell))}</{tag}>"
                for cell, right in zip(cells, numeric, strict=True)
            )

        body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
        self.parts.append(
            f"<div class=table><table><thead><tr>{line(header, 'th')}</tr></thead>\n<tbody>{body}</tbody></table></div>"
        )

    def picture(self, content: bytes, caption: str) -> None:
        """content: the bytes of a PNG or JPEG file."""
        kind = (sniff(content) or "").lower()
        assert kind in ("png", "jpeg"), content[:8]
        data = base64.b64encode(content).decode()
        self.parts.append(
            f'<figure><img src="data:image/{kind};base64,{data}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def write(self, path: Path) -> None:
        body = "\n".join(self.parts)
        text = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{self.title}</title><style>{STYLE}</style></head>\n"
            f"<body><h1>{self.title}</h1>\n{body}\n</body></html>\n"
        )
        with replacing(path) as file:
            # A lone surrogate, from a file name that is no UTF-8, cannot be written as it is.
            file.write(text.encode("utf-8", "replace"))


def _shown(cell: str | float | int) -> str:
    if isinstance(cell, float):
        return "–" if math.isnan(cell) else f"{cell:.3f}"
    return f"{cell:,}" if isinstance(cell, int) else cell

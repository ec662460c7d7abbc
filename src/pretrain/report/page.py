"""Parts of a self-contained HTML page: style, tables, tiles. No scripts or remote resources; all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pretrain.errors import DataError
from pretrain.utils.files import replace_file

__all__ = ["CSS", "page", "show", "table", "tile_row", "write_page"]

CSS = """
:root{color-scheme:light dark;--ink:#16181d;--soft:#5d6470;--line:#dfe1e6;--card:#fff;--page:#f6f7f9;--code:#eef0f3}
@media (prefers-color-scheme:dark){:root{--ink:#eceef2;--soft:#a2a9b5;--line:#31353e;--card:#16181d;--page:#0e0f13;
--code:#22252c}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:980px;margin:0 auto;padding:28px 20px 60px}h1{font-size:25px;margin:0 0 2px;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 10px}.soft{color:var(--soft)}.card{background:var(--card);border:1px solid var(--line);
border-radius:10px;padding:14px 16px;margin:12px 0;overflow-x:auto}.tiles{display:flex;flex-wrap:wrap;gap:10px;
margin:18px 0}.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:9px 15px;
min-width:118px}.tile b{display:block;font-size:20px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);
font-size:13px}table{border-collapse:collapse;width:100%;font-size:14px}th{text-align:left;color:var(--soft);
font-weight:500}th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}.num{text-align:right;font-variant-numeric:tabular-nums}
pre,code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}pre{background:var(--code);
border-radius:8px;padding:10px 12px;margin:8px 0;white-space:pre-wrap;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(400px,100%),1fr));gap:12px}.pair>div{margin:0}svg{display:block;width:100%;
height:auto}.wide svg{min-width:560px}details summary{cursor:pointer;color:var(--soft)}
"""


def page(title: str, sections: Iterable[str], style: str = "") -> str:
    """Return the whole page as HTML: ``sections`` are HTML, ``title`` is text, ``style`` is appended to ``CSS``."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{style}</style></head><body><main>"
    )
    return head + "".join(sections) + "</main></body></html>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Return an HTML table; the columns after the first ``left`` are aligned as numbers."""
    kinds = ["" if i < left else ' class="num"' for i in range(len(head))]
    names = zip(head, kinds, strict=True)
    top = "".join(f"<th{kind}>{escape(text)}</th>" for text, kind in names) if any(head) else ""
    body = ""
    for row in rows:
        cells = zip(row, kinds, strict=True)
        body += (
            "<tr>" + "".join(f"<td{k}>{escape(show(value))}</td>" for value, k in cells) + "</tr>"
        )
    return f'<div class="card"><table>{top and f"<tr>{top}</tr>"}{body}</table></div>'


def show(value: Any) -> str:
    """Format a value for display: grouped thousands, five significant digits, an empty string for None."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return (
            f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 and value.is_integer() else f"{value:.5g}"
        )
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(show, value))
    return str(value)


def tile_row(tiles: Iterable[tuple[str, str]]) -> str:
    """Return a row of tiles as HTML, from (label, value) pairs; an empty string if there are none."""
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for label, value in tiles
    )
    return f'<div class="tiles">{shown}</div>' if shown else ""


def write_page(path: Path, text: str) -> Path:
    """Write ``text`` atomically and return ``path``.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        replace_file(path, text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise DataError(
            f"Cannot write the report {path}: {error.strerror or error}. Name another place, or make room there."
        ) from error
    return path

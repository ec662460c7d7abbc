"""HTML of reports and notebook views: one stylesheet, pages, tables, tiles. No scripts or remote resources."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pretrain.utils.directories import keep_foreign
from pretrain.utils.files import write_shown

__all__ = [
    "Html",
    "Page",
    "bullets",
    "card",
    "chart",
    "details",
    "figure",
    "notebook_view",
    "page",
    "pre",
    "section",
    "show",
    "table",
    "tile_row",
    "write_page",
]

# ":nth-child(n)" matches every element and outweighs the rules of notebooks for tables.
_STYLE = """
.pt{color-scheme:light dark;--ink:#16181d;--soft:#5d6470;--line:#dfe1e6;--card:#fff;--page:#f6f7f9;--well:#eef0f3;
--a:#2a6fd6;--b:#d9480f;--c:#0f8a63;--mark:#d9efdf;--on:#0b3d1c;color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
@media (prefers-color-scheme:dark){.pt{--ink:#eceef2;--soft:#a2a9b5;--line:#31353e;--card:#16181d;--page:#0e0f13;
--well:#22252c;--a:#6ea8fe;--b:#ff9554;--c:#4cc99b;--mark:#1f4d33;--on:#c9f5d6}}
.pt *{box-sizing:border-box}body.pt{margin:0;background:var(--page)}
.pt main{max-width:980px;margin:0 auto;padding:28px 20px 60px}
.pt h1{font-size:25px;margin:0 0 2px;overflow-wrap:anywhere}.pt h2{font-size:17px;margin:34px 0 10px}
.pt .soft{color:var(--soft)}.pt .card{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:14px 16px;margin:12px 0;overflow-x:auto}.pt ul{margin:0;padding-left:20px;overflow-wrap:anywhere}
.pt .tiles{display:flex;flex-wrap:wrap;gap:10px;margin:18px 0}.pt .tile{background:var(--card);
border:1px solid var(--line);border-radius:10px;padding:9px 15px;min-width:118px}
.pt .tile b{display:block;font-size:20px;font-variant-numeric:tabular-nums}
.pt .tile span{color:var(--soft);font-size:13px}
.pt table.t:nth-child(n){border-collapse:collapse;border:0;margin:0;width:100%;font-size:13px;color:inherit}
.pt .t tr:nth-child(n){background:none;border:0}.pt .t th:nth-child(n),.pt .t td:nth-child(n){text-align:left;
padding:5px 14px 5px 0;border:0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
.pt .t th:nth-child(n){color:var(--soft);font-weight:500}.pt .t tr:last-child td{border-bottom:0}
.pt .t .num:nth-child(n){text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.pt .t .short:nth-child(n){white-space:nowrap}.pt .t .long:nth-child(n){min-width:220px}
.pt .t tr.best:nth-child(n){background:var(--mark);color:var(--on);font-weight:600}
.pt pre:nth-child(n),.pt code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.pt pre:nth-child(n){background:var(--well);color:inherit;border-radius:8px;padding:10px 12px;margin:8px 0;
white-space:pre-wrap;overflow-wrap:anywhere;word-break:normal}
.pt pre.plain:nth-child(n){white-space:pre;overflow-x:auto}
.pt .pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(360px,100%),1fr));gap:12px}
.pt .pair>div{margin:0}.pt svg{display:block;width:100%;height:auto}.pt .narrow{display:none}
@media (max-width:600px){.pt .wide{display:none}.pt .narrow{display:block}.pt main{padding:16px 10px 40px}}
.pt details summary{cursor:pointer;color:var(--soft)}
.pt .bar{height:7px;border-radius:4px;background:var(--a);margin:3px 0;min-width:1px}.pt .f1{background:var(--b)}
.pt .f2{background:var(--c)}.pt .well{background:var(--well);border-radius:4px;margin:7px 0 10px;overflow:hidden}
.pt .bars{width:36vw;min-width:120px;max-width:460px}.pt .heat{display:block;border-radius:4px;padding:0 6px}
.pt .on{background:var(--mark);color:var(--on);border-radius:2px}
.pt .token{box-shadow:inset -1px 0 0 var(--line);unicode-bidi:isolate}
.pt.view{background:var(--card);max-width:920px;padding:12px 16px;border:1px solid var(--line);border-radius:10px}
.pt.view .card{border:0;padding:0;margin:6px 0;background:none}.pt.view h2{font-size:14px;margin:14px 0 4px}
.pt.view p{margin:4px 0}.pt.view table.t:nth-child(n){width:auto}
""".replace("\n", "")


_SHORT = 16  # characters of a cell that is never broken over lines
_NARROW = 360  # pixels of a chart for narrow pages
_PATH: Any = type(Path())


class Page(_PATH):  # type: ignore[misc] # the class of paths on this system
    """Path of a page that was written; a notebook shows the page itself."""

    def _repr_html_(self) -> str | None:
        if not self.is_file():  # such as the parent directory, which has this class too
            return None
        text = escape(self.read_text(encoding="utf-8"))
        frame = (
            f'<iframe sandbox srcdoc="{text}" style="width:100%;height:640px;border:0"></iframe>'
        )
        return f"<p><code>{escape(str(self))}</code></p>{frame}"


class Html(str):
    """HTML that is put into a page as it is; all other text is escaped."""

    __slots__ = ()


def page(title: str, sections: Iterable[str]) -> str:
    """Return a whole page of HTML sections; ``title`` is text."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{escape(title)}</title><style>{_STYLE}</style></head><body class="pt"><main>'
    )
    return f"{head}{''.join(sections)}</main></body></html>\n"


def notebook_view(kind: str, *parts: str) -> str:
    """Return HTML for the output of a notebook cell, which brings its own style; ``kind`` is a CSS class."""
    return f'<div class="pt view {kind}"><style>{_STYLE}</style>{"".join(parts)}</div>'


def section(title: str, *parts: str) -> str:
    """Return parts under a heading; an empty string if all parts are empty."""
    return f"<h2>{escape(title)}</h2>{''.join(parts)}" if any(parts) else ""


def card(*parts: str) -> str:
    """Return a box around HTML."""
    return f'<div class="card">{"".join(parts)}</div>'


def chart(draw: Callable[[int, int], str], width: int, height: int) -> str:
    """Return a chart in a box, drawn twice: for wide pages and, with the same size of text, for narrow ones.

    Args:
        draw: returns the SVG text for a width and a height in pixels.
        width: width on a wide page.
        height: height on a wide page.
    """
    narrow = draw(_NARROW, min(height, 260))
    return card(f'<div class="wide">{draw(width, height)}</div><div class="narrow">{narrow}</div>')


def pre(text: str) -> str:
    """Return preformatted text."""
    return f"<pre>{escape(text)}</pre>"


def details(summary: str, *parts: str, shown: bool = False) -> str:
    """Return parts that a click on ``summary`` shows or hides."""
    return (
        f"<details{' open' * shown}><summary>{escape(summary)}</summary>{''.join(parts)}</details>"
    )


def bullets(lines: Iterable[str]) -> str:
    """Return a list of lines of text; an empty string if there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return items and card(f"<ul>{items}</ul>")


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1, best: Collection[int] = ()
) -> str:
    """Return a table.

    Args:
        head: names of the columns; no heading if all are empty.
        rows: values, formatted by `show`, numbers in the columns of numbers by `figure`; ``Html`` is taken as it is.
        left: number of columns that hold text; the others are aligned as numbers.
        best: indices of highlighted rows.
    """

    def cells(tag: str, values: Sequence[Any]) -> str:
        made = ""
        for i, value in enumerate(values):
            shown = figure(value) if i >= left and isinstance(value, float) else show(value)
            text = value if isinstance(value, Html) else escape(shown)
            kind = "num" if i >= left else "long" if len(text) > 80 else ""
            kind = kind or "short" * (len(shown) <= _SHORT)
            attribute = kind and f' class="{kind}"'
            made += f"<{tag}{attribute}>{text}</{tag}>"
        return made

    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if any(head) else ""
    marks = ("", ' class="best"')
    body = "".join(f"<tr{marks[i in best]}>{cells('td', row)}</tr>" for i, row in enumerate(rows))
    return card(f'<table class="t">{top}<tbody>{body}</tbody></table>')


def show(value: Any) -> str:
    """Format a value for display: grouped thousands, five significant digits, an empty string for None."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        whole = 1e4 <= abs(value) < 1e15 and value.is_integer()
        return f"{value:,.0f}" if whole else f"{value:.5g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(show, value))
    return str(value)


def figure(value: float) -> str:
    """Format a metric: four decimals wherever they are of use, so that figures beside each other can be compared."""
    if value.is_integer() and abs(value) >= 10:  # a count
        return f"{value:,.0f}"
    return f"{value:,.4f}" if value == 0 or 1e-3 <= abs(value) < 1000 else show(value)


def tile_row(tiles: Iterable[tuple[str, str]]) -> str:
    """Return a row of tiles, from (label, value) pairs; an empty string if there are none."""
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for label, value in tiles
    )
    return shown and f'<div class="tiles">{shown}</div>'


def write_page(path: Path, text: str, mark: bytes = b'<body class="pt"') -> Path:
    """Write ``text`` atomically and return its path, which a notebook shows as the page.

    A file without ``mark``, which was not written here, is kept under another name.

    Raises:
        DataError: the file cannot be written.
    """
    keep_foreign(path, mark)
    write_shown(path, text, "report")
    written: Path = Page(path)
    return written

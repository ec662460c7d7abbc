"""Preview of fine-tuning data: class balance, lengths in tokens, and the tokens that the loss is computed on.

An :class:`Overview` only renders counts, which the caller, who knows the task and the tokenizer, has computed.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from pretrain.utils.curves import nice_ticks
from pretrain.utils.files import printable

__all__ = ["Overview"]

Pieces = list[tuple[str, bool]]

_BLOCKS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_ON, _OFF = "\x1b[1;32m", "\x1b[0m"
_TEXT_CLASSES, _HTML_CLASSES = 12, 24
_HEAD, _TAIL = 60, 30  # tokens shown at the start and the end of a longer run of the same kind
_STYLE = """
.ptd{font:14px/1.45 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;color:#0b0b0b;background:#fff;
max-width:920px;padding:14px 18px;border:1px solid #e4e3df;border-radius:10px;--soft:#52514e;--line:#d6d5d0;
--a:#2a6fd6;--b:#d9480f;--on:#cfe9d6;--ink:#0b3d1c;--well:#f6f6f4;--cut:#c3c2bc}
.ptd h3{font-size:17px;margin:0 0 2px}.ptd h4{font-size:13px;margin:18px 0 6px}.ptd .soft{color:var(--soft)}
.ptd p{margin:4px 0}.ptd ul{margin:6px 0;padding-left:20px}
.ptd .bars{display:grid;grid-template-columns:minmax(60px,max-content) 1fr repeat(var(--n),max-content);
gap:3px 12px;align-items:center;font-variant-numeric:tabular-nums}
.ptd .name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;max-width:320px}
.ptd .num{text-align:right}.ptd .head{font-size:12px;color:var(--soft)}
.ptd .bar{height:7px;border-radius:3px;margin:1px 0;min-width:1px}
.ptd .s0{background:var(--a)}.ptd .s1{background:var(--b)}.ptd .s2{background:#0f8a63}
.ptd .key{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px}
.ptd svg{display:block;width:100%;height:auto}.ptd svg text{fill:var(--soft);font-size:12px}
.ptd .in{fill:var(--a)}.ptd .over{fill:var(--b)}.ptd .axis{stroke:var(--line)}
.ptd .limit{stroke:var(--b);stroke-width:1.5;stroke-dasharray:5 4}
.ptd .row{background:var(--well);border-radius:8px;padding:8px 10px;margin:6px 0;white-space:pre-wrap;
overflow-wrap:anywhere;font:13px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.ptd .t{box-shadow:inset -1px 0 0 var(--cut);unicode-bidi:isolate}
.ptd .on{background:var(--on);color:var(--ink);border-radius:2px;padding:1px 0}
.ptd .more{color:var(--soft);font-style:italic}
@media (prefers-color-scheme:dark){.ptd{color:#f2f3f5;background:#16181d;border-color:#2b2f37;--soft:#b9bdc6;
--line:#3a404a;--a:#6ea8fe;--b:#ff9554;--on:#1f4d33;--ink:#c9f5d6;--well:#1f232a;--cut:#4a505b}
.ptd .s2{background:#4cc99b}}
""".replace("\n", "")


@dataclass(repr=False)
class Overview:
    """A summary of the data of a fine-tuning run, as text in a terminal or as HTML in a notebook.

    Args:
        name: the source: ``reviews.csv``.
        task: name of the task.
        tokenizer: origin of the tokenizer.
        rows: number of rows by split, training first.
        classes: number of rows by class, by split; empty for tasks without classes.
        lengths: tokens of each row, special tokens included, before truncation.
        max_length: the maximum row length of the model, in tokens.
        cut: number of rows that exceed it.
        beyond: how these rows are treated: ``cut``, ``dropped``, ``split into windows``.
        notes: further remarks for the user, one sentence each.
        examples: rows as pieces of text, one per token, with whether the loss is computed on the token; the pieces of a
            row concatenate to its text.
    """

    name: str
    task: str = ""
    tokenizer: str = ""
    rows: dict[str, int] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    max_length: int | None = None
    cut: int = 0
    beyond: str = "cut"
    notes: list[str] = field(default_factory=list)
    examples: list[Pieces] = field(default_factory=list)

    # ------------------------------------------------------------------------------------------- text lines

    @property
    def title(self) -> str:
        """Number of rows by split."""
        counts = [f"{count:,} {split}" for split, count in self.rows.items()]
        return f"{', '.join(counts)} rows" if counts else ""

    @property
    def subtitle(self) -> str:
        """Task and tokenizer."""
        parts = [
            f"task {self.task}" if self.task else "",
            self.tokenizer and f"tokens of {self.tokenizer}",
        ]
        return " · ".join(part for part in parts if part)

    @property
    def length_line(self) -> str:
        """Median, 95th percentile and maximum of the lengths in tokens."""
        if not self.lengths:
            return ""
        order = sorted(self.lengths)
        middle, most = order[(len(order) - 1) // 2], order[(len(order) - 1) * 95 // 100]
        return f"median {middle:,} tokens, 95 % of rows up to {most:,}, longest {order[-1]:,}"

    @property
    def cut_line(self) -> str:
        """Number of rows that exceed the maximum length, and how they are treated."""
        if self.max_length is None or not self.lengths:
            return ""
        if not self.cut:
            return f"no row exceeds {self.max_length:,} tokens"
        verb = "exceeds" if self.cut == 1 else "exceed"
        total = len(self.lengths)
        return (
            f"{self.cut:,} of {total:,} rows ({_percent(self.cut, total)}) {verb} {self.max_length:,} tokens: "
            f"{self.beyond}"
        )

    def _ranked(self, most: int) -> tuple[list[str], str]:
        """Return the ``most`` largest classes, by falling count, and a line about those that are not shown."""
        labels = list(dict.fromkeys(label for counts in self.classes.values() for label in counts))
        total = {
            label: sum(counts.get(label, 0) for counts in self.classes.values()) for label in labels
        }
        labels.sort(key=lambda label: -total[label])
        if len(labels) <= most:
            return labels, ""
        rest = [total[label] for label in labels[most:]]
        span = f"{min(rest):,}" if min(rest) == max(rest) else f"{min(rest):,} to {max(rest):,}"
        return labels[:most], f"and {len(rest):,} more classes of {span} rows each"

    # ------------------------------------------------------------------------------------------------ text

    def __repr__(self) -> str:
        """Return the overview as text; tokens in the loss are coloured on a terminal, and otherwise set in «»."""
        colour = _colours()
        lines = [_one_line(text) for text in (self.name, self.title, self.subtitle)]
        if self.classes:
            lines += ["", "classes", *self._text_bars()]
        if self.lengths:
            lines += ["", f"lengths: {self.length_line}", *_text_histogram(self.lengths)]
            lines += [_one_line(self.cut_line)]
        if self.notes:
            lines += ["", *(f"- {_one_line(text)}" for text in self.notes)]
        if self.examples:
            how = "coloured" if colour else "in «»"
            lines += ["", f"examples (what the loss is computed on is {how})"]
            lines += [
                f"  {k}  {_text_example(row, colour)}" for k, row in enumerate(self.examples, 1)
            ]
        kept = [text for k, text in enumerate(lines) if text or (k and lines[k - 1])]
        return "\n".join(kept).rstrip()

    def _text_bars(self) -> list[str]:
        labels, more = self._ranked(_TEXT_CLASSES)
        shown = {label: _fitted(_one_line(label), 28) for label in labels}
        width = max(_cells(text) for text in shown.values())
        first = next(iter(self.classes.values()))
        highest = max([first.get(label, 0) for label in labels] + [1])
        lines = []
        for label in labels:
            bar = _bar(first.get(label, 0) / highest, 30)
            numbers = [
                f"{count.get(label, 0):>7,} {_one_line(split)} ({_percent(count.get(label, 0), sum(count.values()))})"
                for split, count in self.classes.items()
            ]
            pad = " " * (width - _cells(shown[label]))
            lines.append(f"  {shown[label]}{pad}  {bar}  {'  '.join(numbers)}")
        return [*lines, f"  {more}"] if more else lines

    # ------------------------------------------------------------------------------------------------ HTML

    def _repr_html_(self) -> str:
        """Return the overview as self-contained HTML that follows the light or dark mode of the reader's system."""
        parts = [f"<h3>{escape(self.name)}</h3>"]
        parts += [
            f'<p class="soft">{escape(line)}</p>' for line in (self.title, self.subtitle) if line
        ]
        if self.classes:
            parts += ["<h4>Classes</h4>", self._html_bars()]
        if self.lengths:
            limit = self.max_length
            parts += ["<h4>Lengths</h4>", f'<p class="soft">{escape(self.length_line)}</p>']
            parts += [_svg_histogram(self.lengths, limit)]
            parts += [f"<p>{escape(self.cut_line)}</p>" if self.cut_line else ""]
        if self.notes:
            items = "".join(f"<li>{escape(text)}</li>" for text in self.notes)
            parts += [f"<h4>Notes</h4><ul>{items}</ul>"]
        if self.examples:
            key = '<span class="on">&nbsp;so&nbsp;</span>'
            parts += [
                f'<h4>Examples <span class="soft">(the loss is computed on tokens marked {key})</span></h4>'
            ]
            parts += [_html_example(row) for row in self.examples]
        return f'<div class="ptd"><style>{_STYLE}</style>{"".join(parts)}</div>'

    def _html_bars(self) -> str:
        labels, more = self._ranked(_HTML_CLASSES)
        shares = {
            split: {label: counts.get(label, 0) / max(1, sum(counts.values())) for label in labels}
            for split, counts in self.classes.items()
        }
        highest = max([share for part in shares.values() for share in part.values()] + [1e-9])
        cells = ["<span></span><span></span>"]
        cells += [
            f'<span class="num head"><i class="key s{k % 3}"></i>{escape(split)}</span>'
            for k, split in enumerate(self.classes)
        ]
        for label in labels:
            bars = "".join(
                f'<div class="bar s{k % 3}" style="width:{100 * part[label] / highest:.1f}%"></div>'
                for k, part in enumerate(shares.values())
            )
            cells.append(
                f'<span class="name" title="{escape(label)}">{escape(label)}</span><div>{bars}</div>'
            )
            for counts in self.classes.values():
                count = counts.get(label, 0)
                share = _percent(count, sum(counts.values()))
                cells.append(
                    f'<span class="num">{count:,} <span class="soft">{share}</span></span>'
                )
        rest = f'<p class="soft">{escape(more)}</p>' if more else ""
        return f'<div class="bars" style="--n:{len(self.classes)}">{"".join(cells)}</div>{rest}'


# --------------------------------------------------------------------------------------------------- parts


def _percent(count: int, total: int) -> str:
    share = 100 * count / total if total else 0.0
    if 0 < share < 0.01:
        return "<0.01 %"
    digits = 0 if share >= 10 or share == 0 else 1 if share >= 1 else 2
    return f"{share:.{digits}f} %"


def _colours() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def _one_line(text: str) -> str:
    return printable(text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " "))


def _cells(text: str) -> int:
    """Return the terminal columns of a text: wide characters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _fitted(text: str, width: int) -> str:
    if _cells(text) <= width:
        return text
    while _cells(text) > width - 1:
        text = text[:-1]
    return text + "…"


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    whole, rest = divmod(eighths, 8)
    return (_EIGHTHS[-1] * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _histogram(
    lengths: Sequence[int], bins: int, limit: int | None = None
) -> tuple[int, list[int]]:
    """Return (bin width, counts): bin k counts lengths from k x width up; the last bin includes all longer ones.

    A few very long rows should not squeeze all others into one bin, so the scale ends at the 99.5th percentile, or a
    little above the limit if rows exceed it.
    """
    order = sorted(lengths)
    top = order[(len(order) - 1) * 995 // 1000]
    if limit is not None and order[-1] > limit:
        top = max(top, min(order[-1], limit + max(1, limit // 8)))
    width = max(1, -(-(top + 1) // bins))
    counts = [0] * (top // width + 1)
    for length in order:
        counts[min(length // width, len(counts) - 1)] += 1
    return width, counts


def _text_histogram(lengths: Sequence[int]) -> list[str]:
    width, counts = _histogram(lengths, 60)
    highest = max(counts)
    bars = "".join(_BLOCKS[-(-count * 8 // highest)] for count in counts)
    last = width * (len(counts) - 1)
    tail = f"{last:,} or more" if max(lengths) >= last + width else f"{width * len(counts) - 1:,}"
    return [f"  {bars}", f"  0{tail:>{max(len(counts) - 1, len(tail) + 1)}}"]


def _svg_histogram(lengths: Sequence[int], limit: int | None) -> str:
    width, counts = _histogram(lengths, 60, limit)
    wide, high, base = 880.0, 130.0, 104.0
    step, highest = wide / len(counts), max(counts)
    longest = max(lengths)
    parts = []
    for k, count in enumerate(counts):
        if not count:
            continue
        tall = max(1.5, 88 * count / highest)
        over = limit is not None and k * width > limit
        ends = (
            "or more"
            if k == len(counts) - 1 and longest >= (k + 1) * width
            else f"to {(k + 1) * width - 1:,}"
        )
        span = f"{k:,}" if width == 1 and ends != "or more" else f"{k * width:,} {ends}"
        parts.append(
            f'<rect class="{"over" if over else "in"}" x="{k * step + 0.5:.1f}" y="{base - tall:.1f}" '
            f'width="{max(1.0, step - 1):.1f}" height="{tall:.1f}"><title>{span} tokens: {count:,} rows</title></rect>'
        )
    end = width * len(counts)
    parts.append(f'<line class="axis" x1="0" x2="{wide:.0f}" y1="{base:.1f}" y2="{base:.1f}"/>')
    room = wide - 8
    if longest >= end:
        room = wide - 120
        text = f"{end - width:,} or more"
        parts.append(f'<text x="{wide:.0f}" y="{base + 17:.1f}" text-anchor="end">{text}</text>')
    for tick in nice_ticks(0, end, 8):
        x = wide * tick / end
        if 0 <= x <= room:
            anchor = "start" if x < 8 else "middle"
            parts.append(
                f'<text x="{x:.1f}" y="{base + 17:.1f}" text-anchor="{anchor}">{tick:,.0f}</text>'
            )
    if limit is not None and limit < end:
        x = wide * (limit + 1) / end
        left = x > wide * 0.8
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{base:.1f}"/>')
        parts.append(
            f'<text x="{x + (-6 if left else 6):.1f}" y="12" text-anchor="{"end" if left else "start"}">'
            f"limit {limit:,}</text>"
        )
    return (
        f'<svg viewBox="0 0 {wide:.0f} {high:.0f}" role="img" aria-label="Histogram of row lengths in tokens">'
        f"{''.join(parts)}</svg>"
    )


def _runs(row: Pieces) -> list[tuple[list[str], int, list[str], bool]]:
    """Group consecutive tokens of the same kind: (first tokens, number omitted, last tokens, whether in the loss)."""
    groups: list[tuple[list[str], bool]] = []
    for text, trained in row:
        if groups and groups[-1][1] == trained:
            groups[-1][0].append(text)
        else:
            groups.append(([text], trained))
    runs = []
    for texts, trained in groups:
        hidden = len(texts) - _HEAD - _TAIL
        if hidden > 0:
            runs.append((texts[:_HEAD], hidden, texts[-_TAIL:], trained))
        else:
            runs.append((texts, 0, [], trained))
    return runs


def _text_example(row: Pieces, colour: bool) -> str:
    before, after = (_ON, _OFF) if colour else ("«", "»")
    parts = []
    for head, hidden, tail, trained in _runs(row):
        text = _one_line("".join(head))
        if hidden:
            text += f" … {hidden:,} more tokens … " + _one_line("".join(tail))
        parts.append(f"{before}{text}{after}" if trained else text)
    return "".join(parts)


def _html_example(row: Pieces) -> str:
    parts = []
    for head, hidden, tail, trained in _runs(row):
        kind = "t on" if trained else "t"
        parts += [f'<span class="{kind}">{_visible(text)}</span>' for text in head]
        if hidden:
            parts.append(f'<span class="more"> … {hidden:,} more tokens … </span>')
        parts += [f'<span class="{kind}">{_visible(text)}</span>' for text in tail]
    return f'<div class="row" dir="auto">{"".join(parts)}</div>'


def _visible(text: str) -> str:
    shown = text.replace("\r\n", "\n").replace("\n", "⏎\n")
    return escape("".join(c if c.isprintable() or c in "\n\t" else "�" for c in shown))

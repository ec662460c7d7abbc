"""Make the tables of all settings and of their other names from `pretrain.config`: pages cannot drift from the code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from pretrain.config import RunConfig, fields
from pretrain.config.aliases import NAMES, VALUES, Advice


def table() -> str:
    """All sections as Markdown."""
    parts = []
    for name, section in RunConfig.SECTIONS.items():
        parts += [f"## {name}", "", (section.__doc__ or "").strip(), ""]
        parts += ["| key | type | default | meaning |", "|---|---|---|---|"]
        kinds = {
            spec.name: str(spec.type).replace("Literal", "") for spec in dataclasses.fields(section)
        }
        for field in fields(section):
            value = field.default
            shown = "not given" if value is None else '`""`' if value == "" else f"`{value}`"
            cells = [f"`{name}.{field.name}`", f"`{kinds[field.name]}`", shown, field.help]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def names() -> str:
    """Names that other libraries use, as Markdown: accepted ones, answered ones, and those of values."""
    parts = ["| name | setting | value |", "|---|---|---|"]
    for entry in NAMES:
        if not entry.advice:
            parts.append(f"| {_listed(entry.names)} | `{entry.setting}` | {entry.means} |")
    parts += ["", "These mean something else, and are answered with the setting that does it:", ""]
    parts += ["| name | answer |", "|---|---|"]
    for entry in NAMES:
        if entry.advice:
            text = entry.advice.format(value="...")
            parts.append(f"| {_listed(entry.names)} | {text[0].upper()}{text[1:]} |")
    parts += ["", "Names of values:", "", "| setting | name | value or answer |", "|---|---|---|"]
    for setting, words in VALUES.items():
        means = {
            name: value.text if isinstance(value, Advice) else f"`{value}`"
            for name, value in words.items()
        }
        for value in dict.fromkeys(means.values()):
            of = [name for name in means if means[name] == value]
            parts.append(f"| `{setting}` | {_listed(of)} | {value} |")
    return "\n".join([*parts, ""])


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def write(folder: Path) -> None:
    """Write the tables where configuration.md includes them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.md").write_text(table(), encoding="utf-8")
    (folder / "names.md").write_text(names(), encoding="utf-8")


if __name__ == "__main__":
    print(table(), names(), sep="\n")

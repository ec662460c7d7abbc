"""Make the table of all settings from the dataclasses of `pretrain.config`: the page cannot drift from the code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pretrain.config import RunConfig, fields


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


def write(path: Path) -> None:
    """Write the table where configuration.md includes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    print(table())

"""Make the table of all settings from the dataclasses of config.py, so that the page cannot drift from the code."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path

from pretrain.config import RunConfig


def field_docs(section: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source."""
    node = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(node, ast.ClassDef)
    found, last = {}, ""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            last = statement.target.id
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and last:
            found[last] = " ".join(str(statement.value.value).split())
            last = ""
    return found


def default(field: dataclasses.Field[object]) -> object:
    """The default value of a field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def table() -> str:
    """All sections as Markdown."""
    parts = []
    for name, section in RunConfig.SECTIONS.items():
        docs = field_docs(section)
        parts += [f"## {name}", "", (section.__doc__ or "").strip(), ""]
        parts += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(section):
            value = default(field)
            shown = "not given" if value is None else '`""`' if value == "" else f"`{value}`"
            kind = str(field.type).replace("Literal", "")
            cells = [f"`{name}.{field.name}`", f"`{kind}`", shown, docs.get(field.name, "")]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def write(path: Path) -> None:
    """Write the table where configuration.md includes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    print(table())

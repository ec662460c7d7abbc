"""Sphinx settings. Build with: sphinx-build -W -b html docs docs/_build/html"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

import settings_table

import pretrain

project = "pretrain"
author = "the pretrain authors"
copyright = author  # Sphinx reads the settings by these names
release = version = pretrain.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"pretrain {release}"
html_static_path: list[str] = []

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [
    (name, "params_style") for name in ("Class attributes", "Class attributes of a family")
]
# Docstrings are written to be read in the source, with `name` for code as in Markdown.
default_role = "code"

settings_table.write(HERE / "_generated")

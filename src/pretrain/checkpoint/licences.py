"""Licences and languages in the front matter of model cards, by the identifiers of the Hugging Face hub.

The list is that of github.com/huggingface/hub-docs, docs/hub/repositories-licenses.md. The hub refuses other
identifiers: such a licence is ``other``, with ``license_name`` and ``license_link``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pretrain.config.strict_yaml import parse
from pretrain.errors import ConfigError

__all__ = ["HUB_LICENCES", "TERMS", "card_terms", "licence_fields"]

TERMS = ("license", "license_name", "license_link", "language")
_HUB = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""
HUB_LICENCES = frozenset(_HUB.split())
_LINKS = {"psf-2.0": "https://docs.python.org/3/license.html"}
_HEAD = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.S | re.M)
_LIMIT = 200  # characters of a value


def card_terms(card: str) -> dict[str, Any]:
    """Return licence and languages from the front matter of a model card; a value of another form is left out."""
    head = _HEAD.match(card)
    try:
        fields = parse(head[1], "the model card")[0] if head else None
    except ConfigError:  # a card can use more of YAML than is read here
        return {}
    if not isinstance(fields, dict):
        return {}
    return {key: fields[key] for key in TERMS if _plain(fields.get(key), lists=key == "language")}


def _plain(value: Any, *, lists: bool) -> bool:
    if lists and isinstance(value, list):
        return 0 < len(value) <= _LIMIT and all(_plain(item, lists=False) for item in value)
    return isinstance(value, str) and 0 < len(value) <= _LIMIT and value.isprintable()


def licence_fields(terms: Mapping[str, Any]) -> dict[str, str]:
    """Return the licence fields of a front matter, which the hub accepts.

    Args:
        terms: ``license``, an identifier of the hub or of SPDX or a name, and perhaps ``license_name`` and
            ``license_link``.
    """
    licence = terms.get("license")
    if not isinstance(licence, str) or not licence.strip():
        return {}
    name = licence.strip().lower()
    if name in HUB_LICENCES and name != "other":
        return {"license": name}
    name = str(terms.get("license_name") or name)
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
    link = terms.get("license_link") or _LINKS.get(slug)
    fields = {"license": "other", "license_name": slug, "license_link": link}
    return {key: value for key, value in fields.items() if isinstance(value, str) and value}

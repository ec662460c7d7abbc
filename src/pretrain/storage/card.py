"""The model card of a checkpoint: README.md with the head that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["PIPELINES", "model_card"]

# kind of head -> pipeline of the hub
PIPELINES = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    None: "feature-extraction",
}
# families whose tokenizer transformers 5 builds anew, whatever `tokenizer_class` says
_OWN_TOKENIZER = {
    "qwen2": "In transformers 5 `AutoTokenizer` gives every qwen2 directory the text splitting of Qwen's own "
    "tokenizer. Open the one beside these weights with `PreTrainedTokenizerFast.from_pretrained`."
}


def model_card(config: Mapping[str, Any], head_kind: str | None, parameters: int) -> bytes:
    """Write README.md from what `config.json` says.

    Args:
        config: the Hugging Face configuration with its "pretrain" block.
        head_kind: key of `PIPELINES`.
        parameters: number of them.

    Returns:
        UTF-8 text. Every value of the head is a JSON scalar, which YAML reads as it is meant.
    """
    block = config.get("pretrain") or {}
    family = str(config.get("model_type", "transformer"))
    sources = [source for source in block.get("sources") or [] if isinstance(source, Mapping)]
    licences = [
        str(source[key]) for source in sources for key in ("license", "licence") if source.get(key)
    ]
    pipeline = PIPELINES.get(head_kind, "feature-extraction")
    head = ["---", "library_name: transformers", f"pipeline_tag: {pipeline}"]
    if len(set(licences)) == 1 and len(licences) == len(sources):
        head.append(f"license: {_scalar(licences[0])}")
    head += ["tags:", "- pretrain", f"- {_scalar(family)}", "---"]
    title = f"# {_text(family)}, {parameters / 1e6:,.1f} M parameters"
    lines = [
        *head,
        "",
        title,
        "",
        "Trained with `pretrain`; opens in `transformers` and in `pretrain.load`.",
        "",
    ]
    if family in _OWN_TOKENIZER:
        lines[-1:] = ["", _OWN_TOKENIZER[family], ""]
    for label, value in _facts(block).items():
        lines.append(f"- {label}: {_text(value)}")
    if sources:
        lines += ["", "| source | licence | tokens |", "|---|---|---:|"]
    for source in sources:
        licence = source.get("license") or source.get("licence") or "not stated"
        tokens = source.get("tokens")
        count = f"{tokens:,}" if isinstance(tokens, int) else "not counted"
        lines.append(f"| {_text(source.get('name', 'unnamed'))} | {_text(licence)} | {count} |")
    return ("\n".join(lines).rstrip() + "\n").encode("utf-8")


def _facts(block: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    objective = objective_name(block)
    if objective:
        facts["objective"] = objective
    for key, label in (("tokens_seen", "tokens seen"), ("step", "optimizer steps")):
        if isinstance(block.get(key), int):
            facts[label] = f"{block[key]:,}"
    metrics = block.get("metrics")
    for key, value in (metrics if isinstance(metrics, Mapping) else {}).items():
        if isinstance(value, int | float):
            facts[f"held-out {key}"] = f"{value:.4g}"
    if block.get("parent"):
        facts["started from"] = block["parent"]
    return facts


def objective_name(block: Mapping[str, Any]) -> str | None:
    """Name of the objective in a "pretrain" block, which holds a text or a mapping with a name."""
    objective = block.get("objective")
    if isinstance(objective, Mapping):
        objective = objective.get("name") or objective.get("class_path")
    return str(objective) if objective else None


def _scalar(value: str) -> str:
    return json.dumps(value, ensure_ascii=True)


def _text(value: Any) -> str:
    """One line of Markdown that a name of a stranger's file cannot break out of."""
    line = "".join(c if c.isprintable() else " " for c in str(value))[:500]
    return "".join("\\" + c if c in "|[]<>`*_#\\" else c for c in line)

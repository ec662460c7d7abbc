"""Model card of a fine-tuned model: README.md with the YAML metadata that the Hugging Face hub reads.

The metadata follows the hub's format (github.com/huggingface/hub-docs, modelcard.md): ``model-index`` holds the
metrics. All text in it is quoted and escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.model_card import PIPELINES, one_line, yaml_scalar

if TYPE_CHECKING:
    from pretrain.finetuning.result import Finetuned

__all__ = ["baselines", "example_input", "model_card"]

# Tasks whose pipeline is not that of their head.
_PIPELINES = {"embedding": "sentence-similarity", "chat": "text-generation"}
# Metric -> metric id of the hub, if it has one, and display name.
_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "macro_f1": ("f1", "Macro F1"),
    "micro_f1": ("f1", "Micro F1"),
    "f1": ("f1", "F1"),
    "mcc": ("matthews_correlation", "Matthews correlation"),
    "precision": ("precision", "Precision"),
    "recall": ("recall", "Recall"),
    "pearson": ("pearsonr", "Pearson correlation"),
    "spearman": ("spearmanr", "Spearman correlation"),
    "mse": ("mse", "Mean squared error"),
    "exact_match": ("exact_match", "Exact match"),
    "perplexity": ("perplexity", "Perplexity"),
    "loss": ("loss", "Loss"),
}
_COUNTS = ("targets", "examples", "rows", "tokens")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_MOST_LABELS = 60
_READS = """\
```python
import pretrain

model = pretrain.load("{path}")
model.predict({example})
```
"""
_TRANSFORMERS = """
The same directory opens in `transformers`:

```python
from transformers import pipeline

answer = pipeline("{pipeline}", model="{path}"{options})
answer({example})
```
"""
_PEFT = """
The directory holds an adapter, and opens with `peft` beside its base model:

```python
from peft import {kind}

model = {kind}.from_pretrained("{path}")
```
"""
_PEFT_CLASSES = {
    "sequence-classification": "AutoPeftModelForSequenceClassification",
    "token-classification": "AutoPeftModelForTokenClassification",
    "question-answering": "AutoPeftModelForQuestionAnswering",
    "causal-lm": "AutoPeftModelForCausalLM",
}


def model_card(result: Finetuned) -> str:
    """Return README.md of a fine-tuned model.

    A license is named only if the checkpoint records one, and languages and data sets never, as they are not known.

    Args:
        result: result of ``pretrain.finetune``.
    """
    model, task = result.model, result.task
    name = result.run.path.resolve().name if result.run is not None else task.name
    family = model.backbone.model_type
    base = base_model(result.settings.model.checkpoint)
    train = one_line(result.sources.get("train", "rows in memory"))
    lines = [
        *_head(result, name, base),
        f"# {one_line(name)}",
        "",
        f"A {one_line(family)} with {model.num_parameters():,} parameters, fine-tuned for {task.name} on {train}"
        + (f", from {one_line(base)}" if base else "")
        + ". Made with `pretrain`.",
        "",
        "## Use",
        "",
        _use(result),
        "## Figures",
        "",
        *_figures(result),
        "",
        *(f"- {one_line(line)}" for line in result.remarks),
        *([""] if result.remarks else []),
        *_labels(result),
        "## Data",
        "",
        "| part | source | rows |",
        "|---|---|---:|",
        *(
            f"| {part} | {one_line(result.sources.get(part, ''))} | {count:,} |"
            for part, count in result.counts.items()
            if count
        ),
        "",
        f"Fingerprint of the rows (SHA-256): `{one_line(result.fingerprint)}`",
        "",
        *(f"- {one_line(line)}" for line in result.notes),
        *([""] if result.notes else []),
        "## Limits",
        "",
        *_limits(result),
    ]
    return "\n".join(lines).rstrip() + "\n"


def base_model(checkpoint: str) -> str | None:
    """Name of the model that was fine-tuned: its hub id if it is in the hub's cache, else that of its directory."""
    if not checkpoint or checkpoint.startswith("a "):
        return None
    found = _SNAPSHOT.search(checkpoint)
    if found:
        return f"{found[1]}/{found[2]}"
    path = Path(checkpoint)
    inside = path.name.startswith("checkpoint-") and path.parent.name
    return path.parent.name if inside else path.name or None


# ------------------------------------------------------------------------------------------------ head


def _pipeline(result: Finetuned) -> str:
    pipeline = _PIPELINES.get(result.task.name)
    return pipeline or PIPELINES.get(result.model.head_kind, "feature-extraction")


def _head(result: Finetuned, name: str, base: str | None) -> list[str]:
    """The YAML metadata, including the fences."""
    adapted = getattr(result.model, "adapter", None) is not None
    lines = ["---", f"library_name: {'peft' if adapted else 'transformers'}"]
    lines.append(f"pipeline_tag: {_pipeline(result)}")
    if licence := _licence(result):
        lines.append(f"license: {yaml_scalar(licence)}")
    if base:
        lines.append(f"base_model: {yaml_scalar(base)}")
    tags = ["pretrain", result.model.backbone.model_type, result.task.name]
    lines += ["tags:", *(f"- {yaml_scalar(tag)}" for tag in dict.fromkeys(tags))]
    part, figures = _measured(result)
    known = [key for key in figures if key != "loss"]
    if not known:
        return [*lines, "---", ""]
    types = dict.fromkeys(_METRICS.get(key, (key, key))[0] for key in known)
    lines += ["metrics:", *(f"- {yaml_scalar(kind)}" for kind in types)]
    data = result.sources.get("test" if part == "test" else "train", "rows in memory")
    lines += [
        "model-index:",
        f"- name: {yaml_scalar(name)}",
        "  results:",
        "  - task:",
        f"      type: {_pipeline(result)}",
        f"      name: {yaml_scalar(result.task.name)}",
        "    dataset:",
        f"      type: {yaml_scalar(Path(data).stem)}",
        f"      name: {yaml_scalar(data)}",
        f"      split: {'test' if part == 'test' else 'validation'}",
        "    metrics:",
    ]
    for key in known:
        kind, called = _METRICS.get(key, (key, key.replace("_", " ")))
        lines.append(f"    - type: {yaml_scalar(kind)}")
        lines.append(f"      value: {figures[key]!r}")
        lines.append(f"      name: {yaml_scalar(called)}")
    return [*lines, "---", ""]


def _measured(result: Finetuned) -> tuple[str, dict[str, float]]:
    """Metrics for the metadata: those of the test rows if there are any, else of the held-out rows."""
    part, figures = (
        ("test", result.test_metrics) if result.test_metrics else ("held", result.metrics)
    )
    plain = {key: float(value) for key, value in figures.items() if key not in _COUNTS}
    return part, {key: value for key, value in plain.items() if math.isfinite(value)}


def _licence(result: Finetuned) -> str | None:
    block = result.model.extra_config.get("pretrain")
    licence = block.get("license") if isinstance(block, Mapping) else None
    return licence if isinstance(licence, str) and licence else None


# ------------------------------------------------------------------------------------------------ body


def example_input(result: Finetuned) -> str:
    """An example input of the task, as Python code."""
    read = _read(result)
    return '"..."' if len(read) < 2 else "{" + ", ".join(f'"{role}": "..."' for role in read) + "}"


def _read(result: Finetuned) -> list[str]:
    """Roles of the inputs that the rows of this run have, without the targets."""
    from pretrain.inference.predict import roles_read

    data: Any = getattr(result, "data", None)
    present = data.train.names if data is not None else None
    roles = roles_read(type(result.task))
    used = [r.name for r in roles if (r.required if present is None else r.name in present)]
    return used or [roles[0].name]


def _use(result: Finetuned) -> str:
    example = example_input(result)
    path, kind = "path/to/this/directory", result.model.head_kind
    text = _READS.format(path=path, example=example)
    if getattr(result.model, "adapter", None) is not None:
        if kind in _PEFT_CLASSES:
            text += _PEFT.format(kind=_PEFT_CLASSES[kind], path=path)
        return text
    if result.task.name in ("classification", "regression") and kind == "sequence-classification":
        several = result.model.extra_config.get("problem_type") == "multi_label_classification"
        options = ', function_to_apply="none"' if result.task.name == "regression" else ""
        options += ", top_k=None" if several else ""
        example = '{"text": "...", "text_pair": "..."}' if len(_read(result)) > 1 else '"..."'
    elif kind == "token-classification":
        options, example = ', aggregation_strategy="first"', '"..."'
    elif kind == "question-answering":
        options, example = "", 'question="...", context="..."'
    else:
        return text
    return text + _TRANSFORMERS.format(
        pipeline=PIPELINES[kind], path=path, options=options, example=example
    )


def baselines(result: Finetuned) -> list[tuple[str, Mapping[str, float]]]:
    """Name and metrics of the trivial baseline, on the held-out rows and on the test rows."""
    name, parts = (
        result.task.trivial_name,
        (("validation", result.trivial), ("test", result.trivial_test)),
    )
    if not result.trivial_test:
        return [(name, result.trivial)] if result.trivial else []
    return [(f"{name}, {part}", figures) for part, figures in parts if figures]


def _figures(result: Finetuned) -> list[str]:
    parts: list[tuple[str, Mapping[str, float]]] = [("validation", result.metrics)]
    if result.test_metrics:
        parts.append(("test", result.test_metrics))
    parts += baselines(result)
    keys = [k for k in dict.fromkeys(k for _, f in parts for k in f) if k not in _COUNTS]
    if not keys:
        return ["None were measured: no rows were held out."]
    lines = [
        "| | " + " | ".join(name for name, _ in parts) + " |",
        "|---|" + "---:|" * len(parts),
    ]
    for key in keys:
        cells = [f"{float(f[key]):.4g}" if key in f else "" for _, f in parts]
        called = _METRICS.get(key, ("", key.replace("_", " ")))[1]
        lines.append(f"| {one_line(called)} | {' | '.join(cells)} |")
    return lines


def _labels(result: Finetuned) -> list[str]:
    labels = result.labels or ()
    if len(labels) < 2:
        return []
    shown = ", ".join(one_line(label) for label in labels[:_MOST_LABELS])
    more = f" and {len(labels) - _MOST_LABELS:,} more" if len(labels) > _MOST_LABELS else ""
    return ["## Labels", "", f"{shown}{more}", ""]


def _limits(result: Finetuned) -> list[str]:
    counts, monitor = result.counts, result.settings.train.monitor or result.task.metric
    lines = []
    if result.test_metrics:
        lines.append(
            f"- The test figures come from {counts.get('test', 0):,} rows that were looked at once."
        )
    elif result.metrics:
        lines.append(
            f"- The best evaluation was chosen by {one_line(monitor)} on the same {counts.get('valid', 0):,} rows that "
            "the figures come from, so they are a little too good."
        )
    lines.append(f"- A text is cut after {result.task.max_length:,} tokens.")
    if len(result.labels or ()) > 1:
        lines.append("- It knows no other labels, and names one of them for any text.")
    lines.append(
        "- It was measured on rows like those it learned from; on other sources, languages or times it was not."
    )
    return lines

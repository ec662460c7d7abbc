"""Model card of a fine-tuned model: README.md with the YAML metadata that the Hugging Face hub reads.

The metadata follows the hub's format (github.com/huggingface/hub-docs, modelcard.md): ``model-index`` holds the
metrics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.model_card import HERE, PIPELINES, front_matter, markdown_table, one_line
from pretrain.utils.hub_names import hub_name

if TYPE_CHECKING:
    from pretrain.finetuning.result import Finetuned

__all__ = ["COUNTS", "example_input", "measured_parts", "model_card"]

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
COUNTS = ("targets", "examples", "rows", "tokens")  # metrics that are counts and not scores
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
    rows = [
        (part, result.sources.get(part, ""), f"{count:,}")
        for part, count in result.counts.items()
        if count
    ]
    parts = [
        f"{_head(result, name, base)}# {one_line(name)}",
        f"A {one_line(family)} with {model.num_parameters():,} parameters, fine-tuned for {task.name} on {train}"
        + (f", from {one_line(base)}" if base else "")
        + ". Made with `pretrain`.",
        "## Use",
        _use(result).rstrip(),
        "## Figures",
        _figures(result),
        _bullets(map(one_line, result.remarks)),
        _labels(result.labels or ()),
        "## Data",
        "\n".join(markdown_table(("part", "source", "rows"), rows, left=2)),
        f"Fingerprint of the rows (SHA-256): `{one_line(result.fingerprint)}`",
        _bullets(map(one_line, result.notes)),
        "## Limits",
        _bullets(_limits(result)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def base_model(checkpoint: str) -> str | None:
    """Name of the model that was fine-tuned: its hub id if it is in the hub's cache, else that of its directory."""
    if not checkpoint or checkpoint.startswith("a "):
        return None
    if checkpoint.startswith("hub:") and (name := hub_name(checkpoint)) is not None:
        return name.repository
    found = _SNAPSHOT.search(checkpoint)
    if found:
        return f"{found[1]}/{found[2]}"
    path = Path(checkpoint)
    inside = path.name.startswith("checkpoint-") and path.parent.name
    return path.parent.name if inside else path.name or None


def _pipeline(result: Finetuned) -> str:
    pipeline = _PIPELINES.get(result.task.name)
    return pipeline or PIPELINES.get(result.model.head_kind, "feature-extraction")


def _head(result: Finetuned, name: str, base: str | None) -> str:
    """The YAML metadata, including the fences."""
    model, block = result.model, result.model.extra_config.get("pretrain")
    licence = block.get("license") if isinstance(block, Mapping) else None
    tags = ["pretrain", model.backbone.model_type, result.task.name]
    fields: dict[str, Any] = {
        "library_name": "transformers" if getattr(model, "adapter", None) is None else "peft",
        "pipeline_tag": _pipeline(result),
        "license": licence if isinstance(licence, str) and licence else None,
        "base_model": base,
        "tags": list(dict.fromkeys(tags)),
    }
    part, figures = _measured(result)
    metrics = [
        {"type": kind, "value": value, "name": called}
        for key, value in figures.items()
        for kind, called in [_METRICS.get(key, (key, key.replace("_", " ")))]
        if key != "loss"
    ]
    if metrics:
        data = result.sources.get("test" if part == "test" else "train", "rows in memory")
        found = {
            "task": {"type": _pipeline(result), "name": result.task.name},
            "dataset": {"type": Path(data).stem, "name": data, "split": part},
            "metrics": metrics,
        }
        fields["metrics"] = list(dict.fromkeys(metric["type"] for metric in metrics))
        fields["model-index"] = [{"name": name, "results": [found]}]
    return front_matter(fields)


def _measured(result: Finetuned) -> tuple[str, dict[str, float]]:
    """Metrics for the metadata: those of the test rows if there are any, else of the held-out rows."""
    tested = result.test_metrics
    plain = {k: float(v) for k, v in (tested or result.metrics).items() if k not in COUNTS}
    finite = {key: value for key, value in plain.items() if math.isfinite(value)}
    return "test" if tested else "validation", finite


def example_input(result: Finetuned) -> str:
    """An example input of the task, as Python code."""
    read = _read(result)
    if read in (["image"], ["audio"]):
        return '"photo.jpg"' if read == ["image"] else '"recording.wav"'
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
    path, kind = HERE, result.model.head_kind
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
    elif kind in ("image-classification", "audio-classification"):
        options = ", top_k=None" if not result.task.single else ""
    elif kind == "token-classification":
        options, example = ', aggregation_strategy="first"', '"..."'
    elif kind == "question-answering":
        options, example = "", 'question="...", context="..."'
    else:
        return text
    return text + _TRANSFORMERS.format(
        pipeline=PIPELINES[kind], path=path, options=options, example=example
    )


def measured_parts(result: Finetuned) -> list[tuple[str, Mapping[str, float]]]:
    """Name and metrics of each part that was evaluated, and of the trivial baseline on the same rows."""
    name = result.task.trivial_name
    both = bool(result.trivial_test)
    parts = [
        ("validation", result.metrics),
        ("test", result.test_metrics or {}),
        (f"{name}, validation" if both else name, result.trivial),
        (f"{name}, test", result.trivial_test),
    ]
    return [(part, figures) for part, figures in parts if figures]


def _figures(result: Finetuned) -> str:
    parts = measured_parts(result)
    keys = [k for k in dict.fromkeys(k for _, f in parts for k in f) if k not in COUNTS]
    if not keys:
        return "None were measured: no rows were held out."
    rows = [
        (
            _METRICS.get(key, ("", key.replace("_", " ")))[1],
            *(f"{float(figures[key]):.4g}" if key in figures else "" for _, figures in parts),
        )
        for key in keys
    ]
    return "\n".join(markdown_table(("", *(name for name, _ in parts)), rows))


def _labels(labels: Sequence[str]) -> str:
    if len(labels) < 2:
        return ""
    shown = ", ".join(one_line(label) for label in labels[:_MOST_LABELS])
    more = f" and {len(labels) - _MOST_LABELS:,} more" if len(labels) > _MOST_LABELS else ""
    return f"## Labels\n\n{shown}{more}"


def _limits(result: Finetuned) -> list[str]:
    counts, lines = result.counts, []
    if result.test_metrics:
        lines.append(
            f"The test figures come from {counts.get('test', 0):,} rows that were looked at once."
        )
    elif result.metrics:
        lines.append(
            f"The best evaluation was chosen by {one_line(result.monitor)} on the same {counts.get('valid', 0):,} rows "
            "that the figures come from, so they are a little too good."
        )
    lines += result.task.limits
    lines.append(
        "It was measured on rows like those it learned from; on other sources, languages or times it was not."
    )
    return lines

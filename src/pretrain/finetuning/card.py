"""Model card of a fine-tuned model: README.md with the YAML metadata that the Hugging Face hub reads.

The metadata follows the hub's format (github.com/huggingface/hub-docs, modelcard.md): ``model-index`` holds the
metrics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.licences import licence_fields
from pretrain.checkpoint.model_card import (
    COUNTS,
    EXAMPLE,
    HERE,
    PIPELINES,
    base_model,
    front_matter,
    markdown_table,
    one_line,
)
from pretrain.checkpoint.resolve import run_by_name
from pretrain.data.labelled import printed_messages
from pretrain.finetuning.settings import from_memory
from pretrain.inference.columns import roles_read

if TYPE_CHECKING:
    from pretrain.finetuning.result import Finetuned

__all__ = ["example_call", "example_input", "measured_parts", "model_card"]

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
_MOST_LABELS = 60
_FILES = {"image": "photo.jpg", "audio": "recording.wav"}  # inputs that are no texts
_MOST_CHARACTERS, _MOST_WORDS = 80, 12  # of an example input
_TRANSFORMERS = """
The same directory opens in `transformers`:

```python
from transformers import pipeline

answer = pipeline("{pipeline}", model="{path}"{options})
print(answer({example}))
```
"""
# transformers 5 has no pipeline that marks answers in a context.
_SPANS = """
The same directory opens in `transformers`:

```python
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForQuestionAnswering.from_pretrained("{path}")
inputs = tokenizer({example}, return_tensors="pt")
answer = model(**inputs)
print(int(answer.start_logits.argmax()), int(answer.end_logits.argmax()))  # tokens of the answer
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

    Licence and languages are those that the card of the base model names, and data sets are not named, as they are not
    known. The example reads the beginning of a row of the run.
    """
    model, task = result.model, result.task
    name = result.run.path.resolve().name
    family = model.backbone.model_type
    checkpoint = result.settings.model.checkpoint
    base = base_model(checkpoint) or _directory_name(checkpoint)
    train = one_line(result.sources.get("train", "rows in memory"))
    rows = [
        (part, result.sources.get(part, ""), f"{count:,}")
        for part, count in result.counts.items()
        if count
    ]
    parts = [
        f"{_head(result, name, base_model(checkpoint))}# {one_line(name)}",
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


def _directory_name(checkpoint: str) -> str | None:
    """Return the name of the directory of a model or a run; None if the model was an object in memory."""
    if not checkpoint or from_memory(checkpoint):
        return None
    return run_by_name(Path(checkpoint)).name


def _pipeline(result: Finetuned) -> str:
    pipeline = _PIPELINES.get(result.task.name)
    return pipeline or PIPELINES.get(result.model.head_kind, "feature-extraction")


def _head(result: Finetuned, name: str, base: str | None) -> str:
    """The YAML metadata, including the fences."""
    model, known = result.model, result.model.provenance
    tags = ["pretrain", model.backbone.model_type, result.task.name]
    fields: dict[str, Any] = {
        "library_name": "transformers" if model.adapter is None else "peft",
        "pipeline_tag": _pipeline(result),
        **licence_fields(known),
        "language": known.get("language"),
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


def example_call(result: Finetuned) -> str:
    """Return a call of the method of the model that answers for the task, as Python code, with a row of the run."""
    task, model = result.task.name, result.model
    if task in ("chat", "preference"):
        message = {"role": "user", "content": _question(_row(result)) or "Hello"}
        return f"chat([{_code(message)}])"
    if task in ("embedding", "language-modelling"):
        text = str(_row(result).get("anchor" if task == "embedding" else "text", "..."))
        if task == "embedding":
            return f"embed([{_code(text)}])"
        if model.head_kind == "causal-lm":
            return f"generate({_code(text)}, max_new_tokens=40)"
        return f"fill_mask({_code(f'{_short(text)} [MASK]')})"
    return f"predict({example_input(result)})"


def example_input(result: Finetuned) -> str:
    """Return an example input of ``predict`` as Python code: the texts of a row of the run, or names of files."""
    read = _read(result)
    row = {**_row(result), **_FILES}
    inputs = {role: row.get(role, "...") for role in read}
    return _code(inputs if len(read) > 1 else inputs[read[0]])


def _row(result: Finetuned) -> dict[str, Any]:
    """Return a held-out row, else a training row."""
    tables = (result.data.valid, result.data.train)
    return next((table.row(0) for table in tables if len(table)), {})


def _question(row: Mapping[str, Any]) -> str | None:
    """Return the first text of the user in a row of conversations."""
    messages = row.get("messages")
    messages = printed_messages(messages) if isinstance(messages, str) else messages
    for value in (messages, row.get("prompt"), row.get("chosen")):
        if isinstance(value, str) and value is not row.get("chosen"):
            return value
        for message in value if isinstance(value, list) else ():
            text = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(text, str) and message.get("role") == "user":
                return text
    return None


def _code(value: Any) -> str:
    """Return texts, and lists and mappings of them, as Python code; long ones are shortened."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_code(key)}: {_code(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_code, value[:_MOST_WORDS]))}]"
    return json.dumps(_short(str(value)), ensure_ascii=False)


def _short(text: str) -> str:
    """Return the beginning of a text in one line, cut between words where there are any."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) > _MOST_CHARACTERS:
        line = line[:_MOST_CHARACTERS].rpartition(" ")[0] or line[:_MOST_CHARACTERS]
    return line or "..."


def _read(result: Finetuned) -> list[str]:
    """Roles of the inputs that the rows of this run have and an answer needs, without the targets.

    Others are what a reader says of single rows, such as the size of an image; see ``Role.constant``.
    """
    roles = roles_read(type(result.task))
    needed = [role for role in roles if role.required or role.constant]
    used = [role.name for role in needed if role.name in result.data.train.names]
    return used or [roles[0].name]


def _use(result: Finetuned) -> str:
    path, kind = HERE, result.model.head_kind
    text = EXAMPLE.format(path=path, call=example_call(result))
    if result.model.adapter is not None:
        if kind in _PEFT_CLASSES:
            text += _PEFT.format(kind=_PEFT_CLASSES[kind], path=path)
        return text
    row = _row(result)
    if result.task.name in ("classification", "regression") and kind == "sequence-classification":
        several = result.model.extra_config.get("problem_type") == "multi_label_classification"
        options = ', function_to_apply="none"' if result.task.name == "regression" else ""
        options += ", top_k=None" if several else ""
        example = _code(row.get("text", "..."))
        if len(_read(result)) > 1:
            example = f'{{"text": {example}, "text_pair": {_code(row.get("pair", "..."))}}}'
    elif kind in ("image-classification", "audio-classification"):
        options, example = ", top_k=None" if not result.task.single else "", example_input(result)
    elif kind == "token-classification":
        tokens = row.get("tokens", "...")
        words = tokens if isinstance(tokens, str) else " ".join(map(str, tokens))
        options, example = ', aggregation_strategy="first"', _code(words)
    elif kind == "question-answering":
        example = ", ".join(_code(row.get(role, "...")) for role in ("question", "context"))
        return text + _SPANS.format(path=path, example=example)
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

"""Model cards: README.md with the YAML front matter of the Hugging Face hub; all text in it is quoted and escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain.checkpoint.licences import card_terms, licence_fields
from pretrain.config.strict_yaml import dump
from pretrain.utils.hub_names import hub_name

__all__ = [
    "COUNTS",
    "EXAMPLE",
    "HERE",
    "PIPELINES",
    "auto_class",
    "base_model",
    "front_matter",
    "markdown_table",
    "model_card",
    "objective_name",
    "one_line",
    "readme",
]

HERE = "path/to/this/directory"  # in the examples of a card, until the model has a name on the hub
COUNTS = ("targets", "examples", "rows", "tokens")  # metrics that are counts and not scores
# kind of head -> pipeline tag of the hub
PIPELINES = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "image-classification": "image-classification",
    "segmentation": "image-segmentation",
    "object-detection": "object-detection",
    "audio-classification": "audio-classification",
    None: "feature-extraction",
}
# Families whose models without a head have a pipeline of their own.
_OWN_PIPELINE = dict.fromkeys(("clip", "siglip"), "zero-shot-image-classification")
EXAMPLE = """\
```python
import pretrain

model = pretrain.load("{path}")
print(model.{call})
```
"""
# Kind of head, or of the inputs of a model without a head -> call of the method that uses it.
_CALLS = {
    "causal-lm": 'generate("Once upon a time", max_new_tokens=40)',
    "masked-lm": 'fill_mask("The [MASK] of the day.")',
    "image-classification": 'predict("photo.jpg")',
    "audio-classification": 'predict("recording.wav")',
    "texts": 'embed(["A first text.", "A second text."])',
    "pairs": 'predict("photo.jpg", labels=["cat", "dog"])',
}
# Directory of a model in the cache of the hub.
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
# Families whose tokenizer transformers 5 rebuilds, ignoring `tokenizer_class`.
_OWN_TOKENIZER = {
    "qwen2": "In transformers 5 `AutoTokenizer` gives every qwen2 directory the text splitting of Qwen's own "
    "tokenizer. Open the one beside these weights with `PreTrainedTokenizerFast.from_pretrained`."
}


def readme(
    config: Mapping[str, Any],
    head_kind: str | None,
    parameters: int,
    written: str | None = None,
    repository: str | None = None,
) -> bytes:
    """Return the README.md of a model: the card that was written for it, else one made from `config.json`.

    A written card is used only if it describes this model: it came with a model that has no block of this package in
    `config.json`, or contains the data fingerprint recorded there, which the card of an earlier fine-tuning does not.
    Of another written card, licence and languages are kept. Its examples open ``repository``, if it is given.
    """
    block = config.get("pretrain")
    known = block if isinstance(block, Mapping) else {}
    fingerprint = known.get("fingerprint")
    of_these_rows = isinstance(fingerprint, str) and fingerprint and fingerprint in (written or "")
    if written and (block is None or of_these_rows):
        card = written.encode("utf-8", "replace")
    else:
        stated = {**known, **card_terms(written or "")}
        card = model_card({**config, "pretrain": stated}, head_kind, parameters)
    return card.replace(HERE.encode(), (repository or HERE).encode())


def auto_class(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that opens a directory with this `config.json`, with its head."""
    architecture = str(next(iter(config.get("architectures") or ()), ""))
    head = re.search(r"For([A-Z]\w+)$", architecture.replace("LMHeadModel", "ForCausalLM"))
    return f"AutoModelFor{head[1]}" if head else "AutoModel"


def _pipeline(family: str, head_kind: str | None) -> str:
    own = _OWN_PIPELINE.get(family) if head_kind is None else None
    return own or PIPELINES.get(head_kind, "feature-extraction")


def model_card(config: Mapping[str, Any], head_kind: str | None, parameters: int) -> bytes:
    """Return the content of README.md, generated from `config.json`.

    Args:
        config: the Hugging Face configuration with its "pretrain" block.
        head_kind: key of `PIPELINES`.
        parameters: number of parameters.

    Returns:
        UTF-8 text. Every value from ``config`` in the front matter is a double-quoted YAML string.
    """
    block = config.get("pretrain") or {}
    family = str(config.get("model_type", "transformer"))
    sources = [source for source in block.get("sources") or [] if isinstance(source, Mapping)]
    licences = [
        str(source[key]) for source in sources for key in ("license", "licence") if source.get(key)
    ]
    stated = len(licences) == len(sources)
    if block.get("license"):  # the licence of the model from which training started
        licences.append(str(block["license"]))
        stated = True
    made = "Trained with `pretrain`; opens" if objective_name(block) else "Opens"
    library = "peft" if isinstance(block.get("adapter"), Mapping) else "transformers"
    one_licence = stated and len({licence.lower() for licence in licences}) == 1
    fields = {
        "library_name": library,
        "pipeline_tag": _pipeline(family, head_kind),
        **(licence_fields({**block, "license": licences[0]}) if one_licence else {}),
        "language": block.get("language"),
        "base_model": base_model(str(block.get("parent") or "")),
        "tags": ["pretrain", family],
    }
    lines = [
        front_matter(fields),
        f"# {one_line(family)}, {parameters / 1e6:,.1f} M parameters",
        "",
        f"{made} in `{library}` and in `pretrain.load`.",
        "",
    ]
    if family in _OWN_TOKENIZER:
        lines[-1:] = ["", _OWN_TOKENIZER[family], ""]
    lines += _use(config, head_kind)
    lines += [f"- {label}: {one_line(value)}" for label, value in _facts(block).items()]
    rows, unit = [], _unit(block)
    for source in sources:
        licence = source.get("license") or source.get("licence") or "not stated"
        counted = source.get(unit)
        count = f"{counted:,}" if isinstance(counted, int) else "not counted"
        rows.append((source.get("name", "unnamed"), licence, count))
    if rows:
        lines += ["", *markdown_table(("source", "licence", unit), rows, left=2)]
    return ("\n".join(lines).rstrip() + "\n").encode("utf-8")


def _use(config: Mapping[str, Any], head_kind: str | None) -> list[str]:
    """Return an example that uses the model; no lines if no method of it answers inputs of its kind."""
    call = _CALLS.get(str(head_kind))
    if head_kind is None:
        call = _CALLS["pairs" if config.get("model_type") in _OWN_PIPELINE else "texts"]
        call = call if "text_config" in config or config.get("vocab_size") else None
    return [*EXAMPLE.format(path=HERE, call=call).splitlines(), ""] if call else []


def _facts(block: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    objective = objective_name(block)
    if objective:
        facts["objective"] = objective
    for key, label in (("tokens_seen", f"{_unit(block)} seen"), ("step", "optimizer steps")):
        if isinstance(block.get(key), int):
            facts[label] = f"{block[key]:,}"
    for part, name in (("metrics", "held-out"), ("test_metrics", "test")):
        metrics = block.get(part)
        for key, value in (metrics if isinstance(metrics, Mapping) else {}).items():
            if isinstance(value, int | float):
                facts[f"{name} {key}"] = f"{value:,.0f}" if key in COUNTS else f"{value:.4g}"
    for key, name in (("unigram_nats", "unigram"), ("kneser_ney_nats", "Kneser-Ney, order 3")):
        if "kneser_ney_nats" in block and isinstance(block.get(key), int | float):
            facts[f"held-out loss of a baseline ({name})"] = f"{block[key]:.4g}"
    if block.get("parent"):
        facts["started from"] = block["parent"]
    return facts


def _unit(block: Mapping[str, Any]) -> str:
    """Return what the data were counted in; tokens unless the objective of the run says otherwise."""
    return str(block.get("unit") or "tokens")


def objective_name(block: Mapping[str, Any]) -> str | None:
    """Return the name of the objective in a "pretrain" block, which holds a string or a mapping with a name."""
    objective = block.get("objective")
    if isinstance(objective, Mapping):
        objective = objective.get("name") or objective.get("class_path")
    return str(objective) if objective else None


def base_model(checkpoint: str) -> str | None:
    """Return the name on the Hub of the model that was fine-tuned; None for a directory of this machine."""
    name = hub_name(checkpoint) if checkpoint.startswith("hub:") else None
    if name is not None:
        return name.repository
    cached = _SNAPSHOT.search(checkpoint)
    return f"{cached[1]}/{cached[2]}" if cached else None


def front_matter(fields: Mapping[str, Any]) -> str:
    """Return plain data as YAML between fences; None and [] are left out, lone surrogates are replaced."""
    kept = {key: value for key, value in fields.items() if value not in (None, [])}
    encodable = json.dumps(kept, ensure_ascii=False).encode("utf-8", "replace")
    return f"---\n{dump(json.loads(encodable))}---\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> list[str]:
    """Return the lines of a table with escaped cells; the columns after the first ``left`` are aligned as numbers."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    lines = [f"| {' | '.join(map(one_line, row))} |" for row in (head, *rows)]
    return [lines[0], rule, *lines[1:]]


def one_line(value: Any) -> str:
    """Return a value as one line of escaped Markdown, safe for names from untrusted files."""
    line = "".join(c if c.isprintable() else " " for c in str(value))[:500]
    return "".join("\\" + c if c in "|[]<>`*_#\\" else c for c in line)

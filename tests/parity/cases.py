"""Every family and head that transformers has too, at a tiny size, and the comparison with it.

Weights are random everywhere (norms and biases too), so that no term can hide behind a zero or a one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.models.base import Model
from pretrain.models.names import to_disk

VOCAB = 97
LABELS = 3
DECODER = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
LLAMA = DECODER | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
BERT = ENCODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODERN = ENCODER | {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Case:
    """One architecture of transformers with one configuration."""

    label: str
    config: str
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.label.split("/")[0]

    @property
    def head(self) -> str:
        return self.label.split("/")[1]


def _cases() -> list[Case]:
    cases = []
    gpt2 = DECODER | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    gpt2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    classes = {
        "gpt2": ("GPT2", gpt2),
        "llama": ("Llama", LLAMA),
        "mistral": ("Mistral", LLAMA | {"sliding_window": 5}),
        "qwen2": (
            "Qwen2",
            LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        ),
        "qwen3": ("Qwen3", LLAMA | {"head_dim": 24}),
        "bert": ("Bert", BERT),
        "roberta": ("Roberta", BERT),
        "modernbert": ("ModernBert", MODERN),
    }
    encoders = ("bert", "roberta", "modernbert")
    for family, (name, options) in classes.items():
        if family in encoders:
            cases.append(Case(f"{family}/masked-lm", name, f"{name}ForMaskedLM", options))
        else:
            lm = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
            cases.append(Case(f"{family}/causal-lm", name, name + lm, options))
        cases.append(Case(f"{family}/none", name, f"{name}Model", options))
        for kind in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
            head = {
                "S": "sequence-classification",
                "T": "token-classification",
                "Q": "question-answering",
            }[kind[0]]
            cases.append(Case(f"{family}/{head}", name, f"{name}For{kind}", options))
    lm = [
        ("llama/causal-lm/tied", "Llama", {"tie_word_embeddings": True}),
        ("llama/causal-lm/biases", "Llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama/causal-lm/one-kv-head", "Llama", {"num_key_value_heads": 1}),
        (
            "llama/causal-lm/rope-linear",
            "Llama",
            {"rope_parameters": {**YARN, "rope_type": "linear"}},
        ),
        ("llama/causal-lm/rope-llama3", "Llama", {"rope_parameters": LLAMA3}),
        ("llama/causal-lm/rope-yarn", "Llama", {"rope_parameters": YARN}),
        (
            "llama/causal-lm/rope-yarn-mscale",
            "Llama",
            {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1}},
        ),
        (
            "llama/causal-lm/rope-dynamic",
            "Llama",
            {
                "max_position_embeddings": 8,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            },
        ),
        ("mistral/causal-lm/full", "Mistral", {"sliding_window": None}),
        (
            "qwen3/causal-lm/tied-relu2",
            "Qwen3",
            {"tie_word_embeddings": True, "hidden_act": "relu2"},
        ),
        (
            "qwen3/causal-lm/sliding",
            "Qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
    ]
    for label, name, extra in lm:
        options = {
            k: v for k, v in (LLAMA | extra).items() if not (k == "rope_parameters" and v is None)
        }
        if "rope-linear" in label:
            options["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
        cases.append(Case(label, name, f"{name}ForCausalLM", options))
    biased = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
    cases += [
        Case(
            "gpt2/causal-lm/untied",
            "GPT2",
            "GPT2LMHeadModel",
            gpt2 | {"tie_word_embeddings": False, "n_inner": 80},
        ),
        Case(
            "bert/masked-lm/untied",
            "Bert",
            "BertForMaskedLM",
            BERT | {"tie_word_embeddings": False},
        ),
        Case("bert/masked-lm/relu", "Bert", "BertForMaskedLM", BERT | {"hidden_act": "relu"}),
        Case(
            "roberta/masked-lm/untied",
            "Roberta",
            "RobertaForMaskedLM",
            BERT | {"tie_word_embeddings": False},
        ),
        Case("modernbert/masked-lm/biases", "ModernBert", "ModernBertForMaskedLM", MODERN | biased),
        Case(
            "modernbert/masked-lm/untied",
            "ModernBert",
            "ModernBertForMaskedLM",
            MODERN | {"tie_word_embeddings": False},
        ),
        Case(
            "modernbert/sequence-classification/mean",
            "ModernBert",
            "ModernBertForSequenceClassification",
            MODERN | {"classifier_pooling": "mean"},
        ),
    ]
    return cases


CASES = _cases()


def build_theirs(case: Case, seed: int = 0) -> Any:
    """A model of transformers with random weights in every tensor."""
    import transformers

    torch.manual_seed(seed)
    labels = {"num_labels": 2 if case.head == "question-answering" else LABELS}
    config = getattr(transformers, f"{case.config}Config")(**case.options, **labels)
    model = getattr(transformers, case.architecture)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def open_ours(directory: Path) -> tuple[Model, Any]:
    """Our model from config.json and model.safetensors, and the load report."""
    config = json.loads((directory / "config.json").read_text())
    model = Model.from_hf_config(config)
    report = model.load_disk_state(load_file(directory / "model.safetensors"))
    return model.eval(), report


def save_ours(model: Model, directory: Path) -> None:
    """Write our model where transformers can open it."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(model.disk_state(), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(model.hf_config()))


def batch_of(case: Case, rows: int = 3, tokens: int = 20) -> dict[str, Tensor]:
    """Rows of unequal length, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, tokens - 6 * row :] = 0
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def theirs_forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of transformers in our shape."""
    out = model(**batch)
    if "start_logits" in out:
        return torch.stack((out.start_logits, out.end_logits), -1)
    return out.logits if "logits" in out else out.last_hidden_state


def relative(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest value of the reference ``b``."""
    return float((a - b).abs().max() / max(float(b.abs().max()), floor, 1e-30))


def compare(theirs: Any, ours: Model, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Largest relative error of the logits of real tokens, and of the gradient of any tensor.

    A gradient that is zero in exact arithmetic (a bias on the keys) is measured against the largest of all.
    """
    real = batch["attention_mask"].bool()

    def masked(logits: Tensor) -> Tensor:
        return logits if logits.shape[:2] != real.shape else logits[real]

    a, b = masked(theirs_forward(theirs, batch)), masked(ours(batch))
    return difference(theirs, a, ours, b)


def difference(
    theirs: Any,
    wanted: Tensor,
    ours: Model,
    found: Tensor,
    on_disk: Callable[[str], str] = lambda name: name,
) -> tuple[float, float]:
    """Largest relative error of our outputs, and of the gradient of any tensor in one random direction of them.

    Args:
        theirs: the model of transformers.
        wanted: its outputs.
        ours: our model.
        found: its outputs.
        on_disk: returns the name in files of a parameter of theirs.
    """
    backward_in_one_direction((theirs, wanted), (ours, found))
    gradients = {on_disk(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    return relative(found.detach(), wanted.detach()), gradient_error(ours, gradients)


def backward_in_one_direction(*runs: tuple[Any, Tensor]) -> None:
    """Compute the gradients of models from their outputs, which have one shape, in one random direction of them."""
    direction = torch.randn(runs[0][1].shape, generator=torch.Generator().manual_seed(2))
    for model, outputs in runs:
        model.zero_grad()
        (outputs * direction).sum().backward()


def gradient_error(ours: Model, wanted: Mapping[str, Tensor]) -> float:
    """Largest relative error of the gradient of any tensor, by its name on disk; others must have none."""
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in ours.named_parameters()
    }
    found = {e.disk: to_disk(e, grads) for e in ours.entries() if e.memory[0] in grads}
    assert set(wanted) <= set(found), sorted(set(wanted) - set(found))
    assert not any(bool(found[name].any()) for name in set(found) - set(wanted))
    floor = 1e-3 * max(float(g.abs().max()) for g in wanted.values())
    return max(relative(found[name], grad, floor) for name, grad in wanted.items())

"""Sentence embeddings: pooling, and the settings in the files of a sentence-transformers directory.

The settings are pooling of token vectors, normalisation, length, case and prompts (Sentence-BERT, arXiv 1908.10084; the
weighted mean is that of SGPT, 2202.08904). Letters: B texts, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.errors import ConfigError, did_you_mean
from pretrain.models.config import drop_code

__all__ = ["POOLINGS", "SentenceSettings", "pool", "pooling_named"]

# Names in 1_Pooling/config.json -> keys of older files, in the order in which several poolings are concatenated.
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_OTHER_NAMES = {"first": "cls", "last": "lasttoken", "mean_sqrt_len": "mean_sqrt_len_tokens"}
_MODULE = "sentence_transformers.models."
# sentence_NAME_config.json: the first file that there is counts.
_TRANSFORMER_FILES = (
    "bert",
    "roberta",
    "distilbert",
    "camembert",
    "albert",
    "xlm-roberta",
    "xlnet",
)
# Settings of the module Transformer that change vectors -> values that leave them as they are. The arguments of older
# files that follow are those of from_pretrained, of which the keys listed leave the vectors as they are.
_FEATURES = [
    {"method": "forward", "method_output_name": name}
    for name in ("last_hidden_state", ["last_hidden_state"])
]
_NEUTRAL = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
}
_LOADING = {"trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "use_cache"}
_PLACING = {"attn_implementation", "dtype", "torch_dtype", "device_map", "low_cpu_mem_usage"}
_OUTPUTS = {"output_hidden_states", "output_attentions"}  # beside the last hidden states
_ARGUMENTS = {
    "tokenizer_args": {
        "use_fast",
        "padding_side",
        "clean_up_tokenization_spaces",
        "model_max_length",
    },
    "model_args": {*_PLACING, *_OUTPUTS, "use_safetensors", "add_pooling_layer"},
    "config_args": _PLACING | _OUTPUTS,
}
_RENAMED = {"tokenizer_args": "processor_kwargs"} | {
    f"{name}_args": f"{name}_kwargs" for name in ("model", "config")
}


def pooling_named(value: Any) -> tuple[str, ...]:
    """Return one or several poolings by their names in this package (``first``, ``last``) or sentence-transformers.

    Raises:
        ConfigError: there is no such pooling.
    """
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ConfigError(f"pooling is {value!r}; it must be one of {', '.join(POOLINGS)}.")
    modes = tuple(_OTHER_NAMES.get(name, name) if isinstance(name, str) else "" for name in names)
    for name, mode in zip(names, modes, strict=True):
        if mode not in POOLINGS:
            known = [*POOLINGS, *_OTHER_NAMES]
            raise ConfigError(
                f"pooling is {name!r}, which is not known." + did_you_mean(str(name), known)
            )
    return modes


def pool(hidden: Tensor, real: Tensor | None, modes: Sequence[str], skip: int = 0) -> Tensor:
    """Pool token vectors into one vector per text.

    Args:
        hidden: (B, T, D); texts begin in the first column.
        real: (B, T) 1 for tokens and 0 for padding on the right; None if there is no padding.
        modes: names of ``POOLINGS``; their vectors are concatenated.
        skip: number of tokens at the start, those of a prompt, that are not pooled.

    Returns:
        (B, D times the number of modes).
    """
    if real is None:
        real = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    weight = (real.bool() & (places > skip)).to(hidden.dtype)  # (B, T)
    rows = torch.arange(len(hidden), device=hidden.device)
    makers: dict[str, Callable[[], Tensor]] = {
        "cls": lambda: hidden[rows, weight.argmax(1)],
        "max": lambda: hidden.masked_fill(weight[..., None] == 0, -torch.inf).amax(1),
        "mean": lambda: _mean(hidden, weight),
        "mean_sqrt_len_tokens": lambda: _mean(hidden, weight) * weight.sum(1, keepdim=True).sqrt(),
        "weightedmean": lambda: _mean(hidden, weight * places),
        "lasttoken": lambda: hidden[rows, real.sum(1) - 1],
    }
    return torch.cat([makers[mode]() for mode in modes], dim=-1)


def _mean(hidden: Tensor, weight: Tensor) -> Tensor:
    total = (hidden * weight[..., None]).sum(1)
    return total / weight.sum(1, keepdim=True).clamp(min=1e-9)


class JsonFiles(Protocol):
    """A directory of JSON files, such as ``pretrain.checkpoint.model_directory.ModelDirectory``."""

    def has(self, name: str) -> bool:
        """Return whether there is a file of that name."""
        ...

    def json(self, name: str) -> dict[str, Any]:
        """Return the object in a file."""
        ...

    def json_list(self, name: str) -> list[Any]:
        """Return the list in a file."""
        ...


# The names that sentence-transformers gives to every model; the prompts are empty where a directory has none.
_NO_PROMPTS = {"query": "", "document": ""}


@dataclass(frozen=True)
class SentenceSettings:
    """Settings in modules.json and the files that it refers to.

    Attributes:
        pooling: names of ``POOLINGS``.
        include_prompt: pool the tokens of a prompt as well.
        normalize: scale vectors to length one.
        max_length: maximum number of tokens of a text; None is the tokenizer's limit.
        lower_case: lower-case texts before tokenization.
        config: content of config_sentence_transformers.json, with ``prompts``, ``default_prompt_name`` and
            ``truncate_dim``.
        missing: features of the directory that are not implemented, as named in the error that ``embed`` raises.
    """

    pooling: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    normalize: bool = False
    max_length: int | None = None
    lower_case: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def cased(self, text: str) -> str:
        """Return the text, lower-cased if the settings ask for it, each character by itself as in a tokenizer."""
        return "".join(char.lower() for char in text) if self.lower_case else text

    @property
    def prompts(self) -> Mapping[str, Any]:
        """The prompts of the directory by their names."""
        stored = self.config.get("prompts")
        return stored if isinstance(stored, Mapping) else {}

    def prompt(self, prompt: str | None, name: str | None) -> str:
        """Return the prefix of every text: the given prompt, the one of that name, or the default of the directory.

        Raises:
            ConfigError: there is no prompt of that name.
        """
        if prompt is not None:
            return prompt
        prompts = {**_NO_PROMPTS, **self.prompts}
        if name is not None and name not in prompts:
            raise ConfigError(
                f"There is no prompt {name!r}; the prompts of this model: {', '.join(prompts)}."
            )
        default = self.config.get("default_prompt_name")
        name = default if name is None and isinstance(default, str) else name
        return str(prompts.get(name) or "") if name is not None else ""

    def finish(self, vectors: Tensor, normalize: bool | None = None) -> Tensor:
        """Scale pooled vectors (N, D) to length one and cut them to ``truncate_dim``, as sentence-transformers does.

        Vectors that the directory normalises are cut afterwards, so that they are shorter than one.

        Args:
            vectors: (N, D).
            normalize: True scales what was cut, False scales nothing; None does as the directory says.
        """
        if self.normalize and normalize is not False:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        vectors = vectors[:, : self.config.get("truncate_dim")]
        return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    @classmethod
    def read(cls, directory: JsonFiles) -> SentenceSettings | None:
        """Read the settings of a directory; None if it has no modules.json."""
        if not directory.has("modules.json"):
            return None
        modules = directory.json_list("modules.json")

        def read(name: str) -> dict[str, Any] | None:
            return drop_code(directory.json(name)) if directory.has(name) else None

        missing: list[str] = []
        chain = [_module(item, missing) for item in modules if isinstance(item, Mapping)]
        names = [name for name, _ in chain]
        if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
            missing.append(f"the modules {', '.join(names) or 'none'}")
        files = (f"sentence_{name}_config.json" for name in _TRANSFORMER_FILES)
        transformer = next(filter(None, map(read, files)), {})
        missing += _unread(transformer, read("tokenizer_config.json") or {})
        path = next((path for name, path in chain if name == "Pooling"), "")
        pooling = read(f"{path}/config.json") if path else {}
        if pooling is None:
            missing.append(f"the pooling in {path}/config.json (the file is missing)")
        modes: Any = (pooling or {}).get("pooling_mode")
        if modes is None:
            modes = [mode for mode, key in POOLINGS.items() if (pooling or {}).get(key) is True]
        try:
            modes = pooling_named(modes or "mean")
        except ConfigError:
            missing.append(f"the pooling {modes!r}")
            modes = ("mean",)
        config = dict(read("config_sentence_transformers.json") or {})
        cut = config.get("truncate_dim")
        if cut is not None and (type(cut) is not int or cut < 1):
            missing.append(f"the truncate_dim {cut!r}")
            del config["truncate_dim"]
        length = transformer.get("max_seq_length")
        length = _arguments(transformer, "tokenizer_args").get("model_max_length", length)
        return cls(
            modes,
            (pooling or {}).get("include_prompt") is not False,
            "Normalize" in names,
            length if type(length) is int and length > 0 else None,
            transformer.get("do_lower_case") is True,
            config,
            tuple(missing),
        )

    def files(self, hidden_size: int) -> dict[str, Any]:
        """Return name -> content of the files of sentence-transformers; empty if a feature is not implemented."""
        if self.missing:
            return {}
        paths = {"Transformer": "", "Pooling": "1_Pooling"}
        paths |= {"Normalize": "2_Normalize"} if self.normalize else {}
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": _MODULE + kind}
            for i, (kind, path) in enumerate(paths.items())
        ]
        pooling: dict[str, Any] = {"word_embedding_dimension": hidden_size}
        if self.pooling == tuple(mode for mode in POOLINGS if mode in self.pooling):
            pooling |= {key: mode in self.pooling for mode, key in POOLINGS.items()}
        else:  # an order that the older flags cannot say
            pooling["pooling_mode"] = list(self.pooling)
        defaults: dict[str, Any] = {
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        }
        return {
            "modules.json": modules,
            "1_Pooling/config.json": pooling | {"include_prompt": self.include_prompt},
            "sentence_bert_config.json": {
                "max_seq_length": self.max_length,
                "do_lower_case": self.lower_case,
            },
            "config_sentence_transformers.json": {**defaults, **self.config},
        }


def _module(item: Mapping[str, Any], missing: list[str]) -> tuple[str, str]:
    """Return class and folder of an entry of modules.json; only plain subfolders are accepted."""
    name, path = str(item.get("type")), item.get("path")
    # A class of the same name in another package computes something else.
    if name.startswith("sentence_transformers."):
        name = name.rpartition(".")[2]
    plain = isinstance(path, str) and path.replace("_", "").replace("-", "").isalnum()
    if name == "Pooling" and not plain:
        missing.append(f"the folder {path!r} of {name}")
    return name, path if isinstance(path, str) and plain else ""


def _arguments(transformer: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the arguments under a key of the settings of Transformer, which has another name in newer files."""
    found = transformer.get(name) or transformer.get(_RENAMED[name])
    return found if isinstance(found, Mapping) else {}


def _unread(transformer: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> list[str]:
    """Return the settings of the module Transformer that are not implemented and change the vectors."""
    found = {k: transformer[k] for k, v in _NEUTRAL.items() if transformer.get(k) not in (None, v)}
    for name, neutral in _ARGUMENTS.items():
        given = _arguments(transformer, name)
        found |= {key: given[key] for key in given.keys() - neutral - _LOADING}
    if found.get("truncation_side") == tokenizer.get("truncation_side", "right"):
        found.pop("truncation_side", None)  # as texts are cut anyway
    calls = transformer.get("processing_kwargs")
    if isinstance(calls, Mapping):  # a chat template renders messages, and no texts
        calls = {key: value for key, value in calls.items() if key != "chat_template" and value}
    if calls:
        found["processing_kwargs"] = calls
    modes = transformer.get("modality_config")
    if isinstance(modes, Mapping) and modes.get("text") not in _FEATURES:
        found["modality_config"] = modes
    return [f"the setting {key}={value!r} of Transformer" for key, value in sorted(found.items())]

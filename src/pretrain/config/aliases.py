"""Table of the names that other libraries use for settings, objectives and tasks.

A name that means exactly one of our settings is accepted in YAML, in Python and on the command line; the settings that
a run writes carry our names. A name with another meaning is an error that says which setting does it. The table is
applied where all settings are checked (`pretrain.config.check`), and the documentation prints it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError

__all__ = [
    "NAMES",
    "VALUES",
    "Advice",
    "SettingAlias",
    "find",
    "main_setting",
    "section_value",
    "use_value",
]


@dataclass(frozen=True)
class SettingAlias:
    """Names of other libraries for one setting.

    Attributes:
        names: the names.
        setting: our setting, or an item of a setting that is a mapping: ``model.overrides.num_layers``.
        type: type of the value, if it is not that of the setting.
        convert: turns the value into ours; raises a ``ConfigError`` for values without a counterpart.
        means: the conversion in words, for the documentation.
        advice: set if the names are not accepted because they mean something else: what to write instead, in settings;
            ``{value}`` is the value that was given.
    """

    names: tuple[str, ...]
    setting: str
    type: Any = None
    convert: Callable[[Any], Any] | None = None
    means: str = ""
    advice: str = ""

    @property
    def settings(self) -> list[str]:
        """All settings that an answer names."""
        return [self.setting, *re.findall(r"\b[a-z]+\.[a-z_]+\b(?!\()", self.advice)]

    def fits(self, fields: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether a command has all of these settings; ``fields`` holds the fields of each of its sections."""
        parts = [setting.split(".") for setting in self.settings]
        return all(part[0] in fields and part[1] in fields[part[0]] for part in parts)


@dataclass(frozen=True)
class Advice:
    """Answer to a value that has no exact counterpart."""

    text: str


def _steps(value: int) -> str:
    return f"{value} steps"


def _share(value: float) -> float:
    if not 0 <= value < 1:
        raise ConfigError(
            f"warmup_ratio is {value:g}; it is a share of the steps, below 1. A number of steps is optim.warmup too: "
            "optim.warmup 100."
        )
    return value


def _same(setting: str, names: str) -> SettingAlias:
    return SettingAlias(tuple(names.split()), setting)


def _other(setting: str, names: str, advice: str) -> SettingAlias:
    return SettingAlias(tuple(names.split()), setting, advice=advice)


def _as_steps(setting: str, names: str) -> SettingAlias:
    return SettingAlias(tuple(names.split()), setting, int, _steps, "`N steps`")


_ROWS = (
    "rows of one optimizer step over all devices are train.batch_rows, those of one forward pass train.micro_rows "
    "(0 chooses it by the memory)."
)
_RESUMED = (
    "the same command, with the same train.out, resumes its run by itself. To start a new run from the weights of a "
    "checkpoint, name that: model.checkpoint."
)

# Several entries may hold the same name: the first whose settings the command has is used.
NAMES: tuple[SettingAlias, ...] = (
    # ---- optimizer
    _same("optim.lr", "learning_rate max_lr peak_lr"),
    _same("optim.name", "optimizer optimizer_name"),
    _same("optim.weight_decay", "wd"),
    _same("optim.clip", "max_grad_norm max_norm grad_clip clip_grad_norm gradient_clip_val"),
    _same("optim.eps", "adam_epsilon adam_eps"),
    _same("optim.schedule", "lr_scheduler_type lr_scheduler scheduler lr_schedule"),
    _same("optim.layer_decay", "layerwise_lr_decay llrd layer_wise_lr_decay"),
    _same("optim.ema", "ema_decay"),
    SettingAlias(("warmup_ratio", "warmup_fraction"), "optim.warmup", float, _share, "a share below 1"),
    SettingAlias(("warmup_steps", "num_warmup_steps", "warmup_iters"), "optim.warmup", int, float, "steps"),
    _other(
        "optim.betas", "adam_beta1 adam_beta2 beta1 beta2",
        "both decay rates of AdamW are one setting: optim.betas [0.9, 0.95].",
    ),
    _other(
        "optim.min_lr", "min_learning_rate lr_min learning_rate_min",
        "the final learning rate is optim.min_lr, as a fraction of the peak optim.lr.",
    ),
    # ---- length of the run
    _same("train.epochs", "epochs num_train_epochs num_epochs n_epochs max_epochs"),
    SettingAlias(
        ("epochs", "num_train_epochs", "num_epochs", "n_epochs", "max_epochs"),
        "train.limit", float, lambda value: f"{value:g} epochs", "`N epochs`",
    ),
    _as_steps(
        "train.limit", "max_steps steps num_steps total_steps max_iters num_train_steps n_steps num_training_steps"
    ),
    SettingAlias(
        ("max_tokens", "num_tokens", "total_tokens"),
        "train.limit", float, lambda value: f"{value:g} tokens" if value % 1 else f"{int(value)} tokens",
        "`N tokens`",
    ),
    # ---- batches
    _same(
        "train.batch_rows", "batch_size train_batch_size global_batch_size total_batch_size effective_batch_size bs"
    ),
    _same("train.micro_rows", "micro_batch_size"),
    _other(
        "train.micro_rows", "per_device_train_batch_size per_device_batch_size device_batch_size",
        f"{_ROWS} On one device without accumulation {{value}} is train.batch_rows {{value}}.",
    ),
    _other(
        "train.micro_rows", "gradient_accumulation_steps accumulate_grad_batches grad_accum accumulation_steps",
        "gradients are accumulated over train.batch_rows / train.micro_rows micro-batches (per device): keep "
        "train.batch_rows as the rows of a whole step, and set train.micro_rows to that divided by {value}.",
    ),
    _other("train.micro_rows", "per_device_eval_batch_size eval_batch_size", f"evaluation uses the same: {_ROWS}"),
    # ---- evaluation, checkpoints, logging
    _as_steps("train.eval_every", "eval_steps eval_interval eval_freq evaluation_steps val_interval"),
    _as_steps("train.save_every", "save_steps save_interval save_freq checkpoint_interval checkpoint_every"),
    _same("train.log_every", "logging_steps log_interval log_every_n_steps log_steps"),
    _same("train.keep", "save_total_limit"),
    _same("train.patience", "early_stopping_patience early_stopping"),
    SettingAlias(
        ("metric_for_best_model",), "train.monitor", str, lambda value: value.removeprefix("eval_"),
        "without `eval_`",
    ),
    _same("train.best", "load_best_model_at_end"),
    _other("train.monitor", "load_best_model_at_end", "the best evaluation by train.monitor is always restored."),
    _other(
        "train.monitor", "greater_is_better",
        "the direction of train.monitor is known: lower is better for losses, higher for all others.",
    ),
    _other(
        "train.save_every", "save_strategy", 'write an amount: train.save_every "500 steps", "1 epochs" or "10%".'
    ),
    _other(
        "train.eval_every", "eval_strategy evaluation_strategy do_eval",
        'write an amount: train.eval_every "500 steps", "1 epochs" or "5%" ("0 steps" is only at the end).',
    ),
    _other(
        "train.eval_every", "save_steps save_interval save_freq save_total_limit save_strategy",
        "fine-tuning saves at every quarter of the run, and the best evaluation: see train.eval_every.",
    ),
    _other("train.log_every", "logging_strategy", "the log has a line every train.log_every steps."),
    _other("train.eval_rows", "eval_iters max_eval_samples", "held-out rows per evaluation are train.eval_rows."),
    SettingAlias(
        ("report_to", "logger"), "train.loggers", str | list[str],
        lambda value: [] if value == "none" else [value] if isinstance(value, str) else value, "a list",
    ),
    _other(
        "train.loggers", "use_wandb wandb wandb_project tensorboard",
        "loggers are a list: train.loggers [wandb] (or tensorboard, trackio).",
    ),
    _same("train.out", "output_dir out_dir save_dir output"),
    _other("train.out", "run_name experiment_name exp_name name", "a run is named by its directory: train.out."),
    _other(
        "train.out", "overwrite_output_dir overwrite",
        "a run is never overwritten: name a new directory (train.out), or delete the old one.",
    ),
    _other("train.out", "resume resume_from_checkpoint resume_training continue_training", _RESUMED),
    # ---- precision and machine
    SettingAlias(("bf16",), "train.precision", bool, lambda on: "bf16" if on else "fp32", "`bf16` or `fp32`"),
    SettingAlias(("fp16",), "train.precision", bool, lambda on: "fp16" if on else "fp32", "`fp16` or `fp32`"),
    SettingAlias(("fp8",), "train.precision", bool, lambda on: "fp8" if on else "auto", "`fp8` or `auto`"),
    _same("train.precision", "mixed_precision amp"),
    _other(
        "train.precision", "dtype torch_dtype",
        "weights are always fp32, and train.precision is the type of the computation: bf16, fp16, fp32 or fp8.",
    ),
    _same("train.seed", "random_seed random_state manual_seed"),
    _same("parallel.compile", "torch_compile"),
    _same("parallel.activation_checkpointing", "gradient_checkpointing"),
    _same("parallel.tp", "tensor_parallel_size tp_size tensor_parallel"),
    _other(
        "parallel.strategy", "fsdp deepspeed ddp zero_stage zero distributed_strategy",
        "how a model is spread over devices is parallel.strategy: auto, ddp or fsdp.",
    ),
    _same("parallel.threads", "num_threads"),
    _other(
        "parallel.device", "device_map accelerator no_cuda use_cpu",
        "the device is parallel.device: auto, cpu, cuda or mps.",
    ),
    # ---- data
    _same(
        "data.train", "dataset train_data train_file training_file data_path data_dir train_dataset dataset_path "
        "training_data",
    ),
    _other(
        "data.train", "dataset_name hf_dataset hub_dataset",
        'a data set of the Hugging Face Hub is a source like any other: data.train "hub:{value}".',
    ),
    _same("data.valid", "validation_file val_file validation_split val_split validation_data eval_file valid_data"),
    _same("data.test", "test_file test_data"),
    _same("data.max_length", "max_length max_seq_length max_seq_len max_len"),
    _same(
        "data.row_length", "max_seq_length max_seq_len max_len max_length block_size context_length context_size "
        "seq_length seq_len sequence_length sequence_len n_ctx",
    ),
    _same("data.tokenizer", "tokenizer_name tokenizer_path"),
    _same("data.vocab_size", "n_vocab"),
    _same("data.columns.text", "text_column text_column_name text_field dataset_text_field"),
    _same("data.text", "text_column text_column_name text_field dataset_text_field"),
    _same("data.columns.label", "label_column label_column_name"),
    _same("data.workers", "preprocessing_num_workers num_proc"),
    _other(
        "data.workers", "num_workers dataloader_num_workers",
        "training reads prepared rows without workers; the processes that prepare them are data.workers.",
    ),
    # ---- model
    _same(
        "model.checkpoint", "model_name_or_path base_model pretrained_model_name_or_path model_name init_from "
        "pretrained_model checkpoint_dir model_id",
    ),
    _same("model.family", "model_type arch architecture"),
    _same("model.size", "model_size preset"),
    _same("model.overrides.num_layers", "num_layers num_hidden_layers n_layer n_layers depth"),
    _same("model.overrides.hidden_size", "hidden_size n_embd d_model dim embed_dim width"),
    _same("model.overrides.num_heads", "num_heads num_attention_heads n_head n_heads"),
    _same("model.overrides.intermediate_size", "intermediate_size n_inner ffn_dim"),
    _same("model.overrides.max_positions", "max_positions max_position_embeddings n_positions"),
    _same("model.overrides.dropout", "dropout"),
    # ---- objective, task and method
    _same("objective.init_args.rate", "mlm_probability mlm_prob mask_probability mask_prob masking_ratio mask_ratio"),
    _other(
        "objective.class_path", "mlm",
        "the objective is objective.class_path: NextToken, or MaskedLM with objective.init_args {{rate: 0.15}}.",
    ),
    _same("task.options.label_smoothing", "label_smoothing_factor"),
    _other(
        "task.options", "num_labels n_classes num_classes",
        "the labels are counted in the rows; to fix their order, task.options {{labels: [a, b]}}.",
    ),
    _same("method.lora", "lora_r lora_rank rank"),
    _same("method.alpha", "lora_alpha"),
    _same("method.targets", "target_modules lora_target_modules lora_targets"),
    _same("method.dora", "use_dora"),
    _other("method.lora", "use_lora peft use_peft", "an adapter is asked for by its rank: method.lora 16."),
    _other(
        "method.lora", "load_in_4bit load_in_8bit quantization quantize",
        "weights are not quantised; an adapter of rank method.lora trains with little memory.",
    ),
    _other(
        "method.freeze", "freeze_backbone freeze_encoder freeze_layers freeze_base",
        "a part is frozen by method.freeze: backbone, embeddings, or a number of blocks.",
    ),
)  # fmt: skip

_GENERATED = (
    "A {0} is an answer to a text: take the task chat, a decoder (gpt2, llama, mistral, qwen2, qwen3) and rows with "
    "the columns prompt (the text) and response (the {0})."
)
_COMPARED = (
    "Pairs of texts with a score are the task regression; vectors that are compared, as a search needs them, are the "
    "task embedding."
)


def _values(**names: str) -> dict[str, str | Advice]:
    """Return name -> our value, from our value (with _ for -) -> names."""
    return {name: value.replace("_", "-") for value, of in names.items() for name in of.split()}


# Setting -> other names of its values.
VALUES: dict[str, dict[str, str | Advice]] = {
    "objective.class_path": _values(
        NextToken="next-token next_token causal-lm clm language-modeling language-modelling text-generation lm",
        MaskedLM="masked-lm masked_lm mlm masked-language-modeling masked-language-modelling fill-mask",
    ),
    "optim.name": _values(adamw="adamw_torch adamw_torch_fused AdamW"),
    "optim.schedule": _values(
        constant="constant_with_warmup", wsd="warmup_stable_decay", cosine="cosine_with_min_lr"
    ),
    "train.precision": _values(
        bf16="bfloat16 bf16-mixed", fp16="float16 16-mixed", fp32="float32 32-true no", fp8="float8"
    ),
    "parallel.device": _values(cuda="gpu"),
    "task.name": _values(
        classification="sentiment-analysis sentiment text-classification sequence-classification "
        "intent-classification topic-classification multi-label-classification nli textual-entailment",
        token_classification="ner named-entity-recognition pos pos-tagging tagging sequence-labeling chunking",
        question_answering="squad qa extractive-qa extractive-question-answering reading-comprehension",
        regression="sts stsb sts-b text-regression scoring",
        chat="sft instruction-tuning instruct instruction conversational chatbot supervised-fine-tuning",
        embedding="embeddings sentence-embedding sentence-embeddings retrieval contrastive feature-extraction "
        "semantic-search sentence-transformers",
        preference="dpo preferences preference-optimization",
        segmentation="semantic-segmentation image-segmentation pixel-classification",
        object_detection="detection detect bounding-boxes",
        language_modelling="language-modeling causal-lm masked-lm text-generation fill-mask clm mlm "
        "continued-pretraining domain-adaptation",
    )
    | dict.fromkeys(
        ("similarity", "sentence-similarity", "semantic-similarity", "text-similarity"),
        Advice(_COMPARED),
    )
    | dict.fromkeys(("summarization", "summarisation"), Advice(_GENERATED.format("summary")))
    | {"translation": Advice(_GENERATED.format("translation"))}
    | dict.fromkeys(
        ("rlhf", "ppo", "orpo", "kto", "grpo"),
        Advice("Pairs of a better and a worse answer are the task preference (DPO)."),
    ),
}

# What a section means that is one value: `model: gpt2:small`, `--data books.txt`.
_MAIN = {
    "data": "train",
    "model": "checkpoint",
    "objective": "class_path",
    "task": "name",
    "optim": "name",
}


def find(
    word: str, fields: Mapping[str, Mapping[str, Any]]
) -> tuple[str, SettingAlias | None] | None:
    """Return the setting that a name without a section stands for, and the entry of the table if it is in there.

    Args:
        word: a name of the table, or that of a setting that only one section has; an item of a mapping may follow
            after a dot.
        fields: section -> its fields.
    """
    for entry in NAMES:
        if word in entry.names and entry.fits(fields):
            return entry.setting, entry
    name = word.partition(".")[0]
    homes = [section for section, names in fields.items() if name in names]
    return (f"{homes[0]}.{word}", None) if len(homes) == 1 and name not in fields else None


def use_value(setting: str, value: Any) -> Any:
    """Return the value of a setting under our name.

    Raises:
        ConfigError: the value has no counterpart; the message says what to use.
    """
    found = VALUES.get(setting, {}).get(value, value) if isinstance(value, str) else value
    if isinstance(found, Advice):
        raise ConfigError(f"{setting}: there is no {value!r}. {found.text}")
    return found


def main_setting(section: str) -> str | None:
    """Return the setting that a section given as a single value stands for, or None."""
    return _MAIN.get(section)


def section_value(section: str, value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a section given as a single value stands for.

    The model of a pre-training run is a checkpoint (a path, or a directory with a model) or ``FAMILY``,
    ``FAMILY:SIZE`` and ``package.module:Class``.

    Args:
        section: a section that has a main setting.
        value: the value.
        fields: fields of the section.
    """
    if section != "model" or "size" not in fields or not isinstance(value, str):
        return {_MAIN[section]: value}
    path = Path(value)
    if (
        re.search(r"[/\\]|^\.", value)
        or os.path.isfile(path / "config.json")
        or os.path.isfile(path / "run.yaml")
    ):
        return {"checkpoint": value}
    family, _, size = value.rpartition(":")
    own = "." in family and ":" not in family  # package.module:Class
    named = {"family": family, "size": size} if family and not own else {"family": value}
    return {**named, "checkpoint": None}

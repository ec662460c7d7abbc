"""LoRA (arXiv 2106.09685) and DoRA (2402.09353): small trainable matrices beside frozen weights, in PEFT's format.

    model = apply_lora(pretrain.load("base"), LoraConfig(r=16))
    ...train...
    save_adapter(model, "adapter")           # opens in peft
    model = merge(load_adapter("adapter"))   # an ordinary model

The directory of an adapter holds the path of its base, but not the weights of the base.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config.spelling import option
from pretrain.errors import CheckpointError, ModelError
from pretrain.hub import function
from pretrain.lora.attach import attach, choose_full, choose_sites, draw, merge, unload
from pretrain.lora.config import LoraConfig

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "LoraConfig",
    "apply_lora",
    "load_adapter",
    "merge",
    "merge_to",
    "save_adapter",
    "unload",
]


def apply_lora(model: Model, config: LoraConfig | None = None, seed: int = 0) -> Model:
    """Freeze the model and add an adapter; the outputs do not change until training begins.

    A classification or question-answering head, with the pooler or dense layer that belongs to it, stays trainable and
    is stored with the adapter. A language-model head is frozen unless ``modules_to_save`` names it.

    Args:
        model: changed in place, and returned.
        config: settings; None uses the defaults.
        seed: seed of the A matrices; each is drawn from the seed and its own name. B is initialised to zero.

    Raises:
        ConfigError: a target or module does not exist in this family; the nearest name is suggested.
        ModelError: the model has an adapter already.
    """
    config = config or LoraConfig()
    if model.adapter is not None:
        raise ModelError(
            "The model has an adapter already. Merge it (pretrain.lora.merge) or remove it (unload) first."
        )
    full = choose_full(model, config)
    saved = {entry.disk.rpartition(".")[0] for entry in full}
    sites = {
        name: (site, config.r, config.full_alpha)
        for name, site in choose_sites(model, config).items()
        if name not in saved
    }
    attach(model, config, sites, full)
    draw(model, seed)
    return model


def save_adapter(model: Model, directory: str | Path) -> Path:
    """Write the adapter, config.json with the labels, the tokenizer and a card; see ``pretrain.checkpoint.save_model``.

    Raises:
        ModelError: the model has no adapter.
        CheckpointError: the directory cannot be written, or is that of the base.
    """
    if model.adapter is None:
        raise ModelError("The model has no adapter to save. Add one with apply_lora.")
    path: Path = function("save_model")(model, directory)
    return path


def merge_to(adapter: str | Path, out: str | Path, base: Model | str | Path | None = None) -> Path:
    """Merge an adapter into its base and write the whole model, which transformers opens without peft.

    The largest difference between the outputs of a probe batch before and after merging is printed.

    Args:
        adapter: directory of an adapter, or a run that trained one.
        out: directory to write.
        base: see ``load_adapter``.

    Raises:
        ModelError: the directory holds no adapter, or a merged weight is not finite.
        CheckpointError: see ``load_adapter``; or ``out`` cannot be written, or holds the adapter's base or an adapter.
    """
    model = load_adapter(adapter, base)
    _refuse_sources(model, Path(out))
    path: Path = function("save_model")(merge(model), out)
    return path


def _refuse_sources(model: Model, out: Path) -> None:
    """Refuse to write a merged model over the base of the adapter, or over an adapter.

    An adapter that peft wrote would open on the merged weights, and so be added to them a second time.
    """
    bases = {
        name for name in (model.adapter.base, model.adapter.named_base) if name and "\0" not in name
    }
    if os.path.realpath(out) in map(os.path.realpath, bases):
        lost = "is the base of this adapter, to which the adapter would be added once more when it is opened"
    elif os.path.lexists(out / "adapter_config.json"):
        lost = "holds an adapter, which would be lost"
    else:
        return
    raise CheckpointError(
        f"{out} {lost}. Choose another directory for the merged model: {option('out', 'DIR')}."
    )


def load_adapter(directory: str | Path, base: Model | str | Path | None = None) -> Model:
    """Load an adapter, written by this package or by peft, on its base; ``pretrain.load`` does the same.

    Args:
        directory: a directory with adapter_config.json and adapter_model.safetensors, or a run that trained an adapter.
        base: a model, which is copied, or a directory; None uses the one named in adapter_config.json.

    Returns:
        The adapted model on the CPU in evaluation mode; only the adapter and the fully trained modules are trainable.

    Raises:
        ModelError: the directory holds a whole model, not an adapter.
        CheckpointError: the directory holds no model, the base is missing or a different one, or the adapter uses
            settings that this package does not implement.
        CheckpointCorrupt: a file is damaged.
    """
    model: Model = function("load")(directory, base=base)
    # A run has no such file, but its checkpoint may hold an adapter.
    if model.adapter is None:
        raise ModelError(
            f"{directory} holds a whole model, not an adapter, so there is nothing to merge."
        )
    return model

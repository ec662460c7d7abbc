"""Placement of adapters in a model: finding the sites, and attaching, merging and removing adapters in place.

A site is one matrix on disk and the linear layers in memory that hold it, found through the name table of the family.
PEFT's files use the names on disk, where for example the queries, keys and values of GPT-2 are one matrix.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError, ModelError, did_you_mean
from pretrain.lora.config import LoraConfig
from pretrain.lora.layer import LoraLinear
from pretrain.models.backbone import named_generator
from pretrain.models.heads import LABELLED
from pretrain.models.names import Entry, to_disk
from pretrain.models.state import copies_of, tied_embedding, untie
from pretrain.nn.buffers import changing_buffers, stored_tensors
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["Adapter", "Site", "attach", "base_sample", "fingerprint", "merge", "sites_of", "unload"]

_SAMPLED = 64  # elements per parameter


@dataclass(frozen=True)
class Site:
    """A matrix on disk, the unit that is adapted.

    Attributes:
        module: module name on disk.
        bare: module name on disk without the prefix of the body.
        layers: names of the linear layers that hold its output rows.
        transpose: the matrix is stored transposed on disk.
        in_blocks: the layers belong to the transformer blocks.
        body: the matrix belongs to the body, not to the head.
    """

    module: str
    bare: str
    layers: tuple[str, ...]
    transpose: bool
    in_blocks: bool
    body: bool


@dataclass
class Adapter:
    """Description of the adapter of a model, stored in ``model.adapter``.

    Attributes:
        config: settings.
        sites: module name on disk -> site, rank and alpha.
        full: names on disk of the tensors that are fully trained.
        base: absolute path of the base directory, or its name on the hub; None if the base was not loaded from one.
        base_sample: hash of a few values of every base tensor, see ``base_sample``.
        named_base: the base that the file of a stored adapter names, also where another one was given.
    """

    config: LoraConfig
    sites: dict[str, tuple[Site, int, float]] = field(default_factory=dict)
    full: tuple[str, ...] = ()
    base: str | None = None
    base_sample: str = ""
    named_base: str | None = None

    def __repr__(self) -> str:
        kind = "DoRA" if self.config.dora else "LoRA"
        return f"{kind} r={self.config.r} on {len(self.sites)} matrices"


def sites_of(model: Model) -> dict[str, Site]:
    """Return all linear layers of the model by their module names on disk; a fused matrix is one site."""
    blocks = {
        f"{name}."
        for name, module in model.named_modules()
        if any(module is b for b in model.backbone.blocks())
    }
    found = {}
    for entry in model.entries():
        owners = [name.removesuffix(".weight") for name in entry.memory]
        if not entry.disk.endswith(".weight") or not all(
            isinstance(_module(model, owner), nn.Linear) for owner in owners
        ):
            continue
        site = Site(
            entry.disk.removesuffix(".weight"),
            entry.bare.removesuffix(".weight"),
            tuple(owners),
            entry.transpose,
            any(owners[0].startswith(block) for block in blocks),
            entry.body,
        )
        found[site.module] = site
    return found


def _module(model: Model, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # the parameter does not belong to a layer of its own
        return None


def matches(module: str, wanted: Iterable[str]) -> bool:
    """Whether a module name is one of ``wanted``, or ends with one at a dot."""
    return any(module == name or module.endswith("." + name) for name in wanted)


def within(tensor: str, wanted: Iterable[str]) -> bool:
    """Whether a tensor belongs to a module named by one of ``wanted``, or to a submodule of one."""
    path = f".{tensor.rpartition('.')[0]}."
    return any(f".{name}." in path for name in wanted)


def choose_sites(model: Model, config: LoraConfig) -> dict[str, Site]:
    """Return the sites selected by the settings.

    Raises:
        ConfigError: a target matches no linear layer of the blocks.
        ModelError: the blocks have no linear layers.
    """
    inside = {name: site for name, site in sites_of(model).items() if site.in_blocks}
    if not inside:
        raise ModelError(
            f"The blocks of this {model.backbone.model_type} model have no linear layer, so no adapter can be added. "
            "Train all weights instead."
        )
    if config.targets is None:
        return inside
    for target in config.targets:
        if not any(matches(name, [target]) for name in inside):
            known = {name.rsplit(".", 1)[-1] for name in inside}
            raise ConfigError(
                f"targets of the adapter name {target!r}, but no linear layer in the blocks of a "
                f"{model.backbone.model_type} model has that name." + did_you_mean(target, known)
            )
    return {name: site for name, site in inside.items() if matches(name, config.targets)}


def choose_full(model: Model, config: LoraConfig) -> list[Entry]:
    """Return the tensors to train fully: classification and question-answering heads, and ``modules_to_save``.

    Naming ``lm_head`` unties the head of a causal language model.

    Raises:
        ConfigError: a module does not exist, or is a token embedding tied to the head (or, except in a causal language
            model, the tied head).
    """
    names = list(config.modules_to_save)
    if (embedding := tied_embedding(model)) is not None:
        shared = {disk for disk, memory in copies_of(model).items() if memory == embedding}
        shared |= {entry.disk for entry in model.entries() if embedding in entry.memory}
        for name in names:
            if not any(within(disk, [name]) for disk in shared):
                continue
            if name != "lm_head" or model.head_kind != "causal-lm":
                raise ConfigError(
                    f"modules_to_save of the adapter name {name!r}, but the token embedding and the vocabulary head "
                    "of this model are one matrix, and PEFT would train a copy of it. Leave it out, or untie the head "
                    "first (model.head.untie())."
                )
            untie(model)
    entries = model.entries()
    for name in names:
        if not any(within(entry.disk, [name]) for entry in entries):
            known = {entry.disk.rsplit(".", 2)[-2] for entry in entries if "." in entry.disk}
            raise ConfigError(
                f"modules_to_save of the adapter name {name!r}, but no module of this {model.backbone.model_type} "
                "model has that name on disk." + did_you_mean(name, known)
            )
    new_head = model.head_kind in (*LABELLED, "question-answering")
    return [
        entry
        for entry in entries
        if (new_head and entry.memory[0].startswith("head.")) or within(entry.disk, names)
    ]


def attach(
    model: Model,
    config: LoraConfig,
    sites: Mapping[str, tuple[Site, int, float]],
    full: Iterable[Entry],
) -> Model:
    """Freeze a model without an adapter and attach one, with A and B zero; see ``pretrain.lora.apply_lora``.

    The base may be on the meta device, but not for DoRA, whose magnitudes are initialised to the norms of its rows.

    Raises:
        ModelError: the model has running statistics, or a row of zeros, which DoRA cannot use.
    """
    if statistics := changing_buffers(model):
        raise ModelError(
            f"An adapter is stored without its base, but training would change {next(iter(statistics))!r} of the base, "
            f"a running statistic. Train all of this {model.backbone.model_type} model, or use a norm without "
            "running statistics."
        )
    # If the weights of the base are not loaded yet, their loader (load_slices) computes the sample.
    later = any(parameter.is_meta for parameter in model.parameters())
    sample = "" if later else base_sample(model)
    adapter = Adapter(config, dict(sites), base=_found_anywhere(model.source), base_sample=sample)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = dict(model.named_parameters())
    trained = list(full)
    for entry in trained:
        for name in entry.memory:
            parameters[name].requires_grad_(True)
    adapter.full = tuple(entry.disk for entry in trained)
    for site, r, alpha in sites.values():
        first: LoraLinear | None = None
        for name in site.layers:
            linear: Any = model.get_submodule(name)
            layer = LoraLinear(
                linear, r, config.scale(r, alpha), config.dropout, dora=config.dora, first=first
            )
            if layer.lora_magnitude is not None and not bool((layer.lora_magnitude > 0).all()):
                _restore(model, adapter)
                raise ModelError(
                    f"The weight of {site.module!r} has a row of zeros, which DoRA cannot split into magnitude and "
                    "direction (was the model built with zero_init_outputs and not trained yet?). Use LoRA "
                    "(dora=False)."
                )
            first = first or layer
            _put(model, name, layer)
    model.adapter = adapter
    return model


def _found_anywhere(base: str | None) -> str | None:
    """Return the name of a base that is valid in any working directory: an absolute path, or a name on the hub."""
    return os.path.abspath(base) if base is not None and os.path.isdir(base) else base


def draw(model: Model, seed: int) -> None:
    """Initialise every A from ``seed`` and its name: uniform within 1/sqrt(I) (Kaiming uniform with a = sqrt(5))."""
    for name, (site, r, _) in model.adapter.sites.items():
        layer: Any = model.get_submodule(site.layers[0])
        generator = named_generator(seed, f"{name}.lora_A")
        value = torch.empty(r, layer.in_features)
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            layer.lora_A.copy_(value)


def _put(model: Model, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def _restore(model: Model, adapter: Adapter) -> None:
    """Replace the adapted layers by plain ones and make all parameters trainable."""
    for site, _, _ in adapter.sites.values():
        for name in site.layers:
            layer = model.get_submodule(name)
            if isinstance(layer, LoraLinear):
                _put(model, name, layer.plain())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.adapter = None
    block = model.extra_config.get("pretrain")
    if isinstance(block, dict):
        model.extra_config["pretrain"] = {k: v for k, v in block.items() if k != "adapter"}
        if block.get("fingerprint"):
            model.card = None  # it described the adapter


def unload(model: Model) -> Model:
    """Remove the adapter without merging it; fully trained tensors (such as a head) keep their values.

    Raises:
        ModelError: the model has no adapter.
    """
    _restore(model, _adapter(model))
    return model


def merge(model: Model, check: bool = True) -> Model:
    """Merge the adapter into the weights (in fp32) and remove it: the result is an ordinary, equivalent model.

    Args:
        model: changed in place, and returned.
        check: run a probe batch before and after, print the largest difference and keep it in ``model.merge_gap``.

    Raises:
        ModelError: the model has no adapter, or a merged weight is not finite (then nothing is changed).
    """
    adapter = _adapter(model)
    before = probe(model) if check else None
    merged = {}
    for site, _, _ in adapter.sites.values():
        for name in site.layers:
            layer: Any = model.get_submodule(name)
            merged[name] = layer.merged_weight()
            if not bool(torch.isfinite(merged[name]).all()):
                raise ModelError(
                    f"The merged weight of {site.module!r} has NaN or infinity, so the adapter is not merged."
                )
    with torch.no_grad():
        for name, weight in merged.items():
            layer = model.get_submodule(name)
            layer.weight.copy_(weight)
    _restore(model, adapter)
    # Without a block, the model card of a base of somebody else would be written for other weights.
    model.extra_config.setdefault("pretrain", {})
    model.merge_gap = None
    if before is not None:
        after = probe(model)
        model.merge_gap = float((after - before).abs().max())
        note(
            f"merged {adapter}: outputs differ by at most {model.merge_gap:.2g} "
            f"(the largest output is {float(before.abs().max()):.3g})"
        )
    return model


def _adapter(model: Model) -> Adapter:
    if model.adapter is None:
        raise ModelError("The model has no adapter. Add one with pretrain.lora.apply_lora.")
    found: Adapter = model.adapter
    return found


@torch.no_grad()
def probe(model: Model) -> Tensor:
    """Return the outputs of the model in evaluation mode for two fixed random rows."""
    batch = model.backbone.random_batch(torch.Generator().manual_seed(0))
    training = model.training
    model.eval()
    try:
        found: Tensor = model({key: value.to(model.device) for key, value in batch.items()})
    finally:
        model.train(training)
    return found.float()


# ------------------------------------------------------------------------------------------------ which base


def body_shapes(
    model: Model, parameters: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return name on disk without prefix -> shape of every tensor of the body, independent of the head.

    ``parameters`` holds the whole parameters (the meta device suffices) if the parameters of the model are sharded.
    """
    parameters = stored_tensors(model) if parameters is None else parameters
    return {
        entry.bare: tuple(to_disk(entry, parameters, "meta").shape)
        for entry in model.entries()
        if entry.body and not entry.memory[0].startswith("head.")
    }


def fingerprint(model: Model, parameters: Mapping[str, Tensor] | None = None) -> str:
    """Return the SHA-256 of the names and shapes of the body; ``parameters`` as in ``body_shapes``."""
    shapes = body_shapes(model, parameters)
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@torch.no_grad()
def base_sample(model: Model, first: Callable[[Entry, str, int], Tensor] | None = None) -> str:
    """Return the SHA-256 of the first values of every parameter of the body, in fp32.

    It distinguishes two bases with the same shapes.

    Args:
        model: the model with the base.
        first: called with an entry, the name of a parameter and a count; returns at least that many first values of
            the parameter. None if the model itself holds the whole parameters.
    """
    digest = hashlib.sha256()
    parameters = stored_tensors(model)
    for entry in sorted(model.entries(), key=lambda e: e.bare):
        if entry.body and not entry.memory[0].startswith("head."):
            for name in entry.memory:
                values = (
                    parameters[name].detach() if first is None else first(entry, name, _SAMPLED)
                )
                digest.update(
                    values.reshape(-1)[:_SAMPLED].to("cpu", torch.float32).numpy().tobytes()
                )
    return digest.hexdigest()

"""GGUF version 3, the format of llama.cpp: one file with metadata, tokenizer and weights.

Names of keys and tensors are those that llama.cpp reads for the architectures gpt2, llama, qwen2 and qwen3; mistral is
llama there. Letters: V vocabulary, D hidden, H heads, d size of a head.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.errors import ConfigError, ModelError
from pretrain.exporting.gguf_tokenizer import tokenizer_fields
from pretrain.nn.positions import RotaryTable
from pretrain.utils.files import HashingFile, note
from pretrain.utils.tensors import LazyTensors

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["DTYPES", "metadata", "write"]

_ALIGNMENT = 32
_BLOCK = 32  # numbers that share one scale in Q8_0
_ARCHITECTURES = {
    "gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
}  # fmt: skip
_TOP = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip
_LAYER = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class _Type:
    """A type of tensors: its number in a GGUF file, the file type that is named after it, and its bytes."""

    number: int
    file: int
    block: int  # elements
    size: int  # bytes of a block
    encode: Callable[[Tensor], NDArray[Any]]
    largest: float  # number


def _q8(tensor: Tensor) -> NDArray[Any]:
    """Blocks of 32 numbers as one fp16 scale and 32 signed bytes."""
    rows = tensor.numpy().reshape(-1, _BLOCK)
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = rows * inverse
    whole = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return np.concatenate([scale.astype(np.float16).view(np.int8), whole], axis=1)


_FULL, _HALF, _SHORT = (
    torch.finfo(dtype).max for dtype in (torch.float32, torch.float16, torch.bfloat16)
)
DTYPES = {
    "f32": _Type(0, 0, 1, 4, lambda tensor: tensor.numpy(), _FULL),
    "f16": _Type(1, 1, 1, 2, lambda tensor: tensor.half().numpy(), _HALF),
    "bf16": _Type(30, 32, 1, 2, lambda tensor: tensor.bfloat16().view(torch.int16).numpy(), _SHORT),
    "q8_0": _Type(8, 7, _BLOCK, 34, _q8, 127 * _HALF),
}


def metadata(model: Model, name: str) -> dict[str, Any]:
    """Return the metadata of a model's file, if llama.cpp can compute what the model computes.

    Programs show ``name`` as its name.

    Raises:
        ModelError: another family or head, or an option that llama.cpp has not for it.
        TokenizerError: see ``tokenizer_fields``.
    """
    family, config = model.backbone.model_type, model.backbone.config
    if family not in _ARCHITECTURES:
        raise ModelError(
            f"A {family} model cannot be exported to GGUF, which is written for decoders that llama.cpp knows: "
            f"{', '.join(_ARCHITECTURES)}."
        )
    if model.head_kind != "causal-lm":
        raise ModelError(
            f"GGUF is for models that continue texts, and this one has the head {model.head_kind!r}, which llama.cpp "
            "has not. Export it to onnx."
        )
    refused = _differences(config, family)
    if refused:
        raise ModelError(
            f"llama.cpp would not compute what this {family} model does, which has {' and '.join(refused)}, so it is "
            "not exported to GGUF."
        )
    return {**_fields(model, name), **tokenizer_fields(model)}


def _differences(config: Any, family: str) -> list[str]:
    """Return the options of a model that llama.cpp does not implement for its architecture."""
    found = []
    if family == "gpt2":
        if config.activation not in ("gelu_new", "gelu_tanh"):
            found.append(f"the activation {config.activation}")
        return found
    if config.activation != "silu":
        found.append(f"the activation {config.activation}")
    windows = [config.window_of(i) for i in range(config.num_layers)]
    if any(window is not None and window < config.max_positions - 1 for window in windows):
        found.append("a sliding window that is shorter than its rows")
    if family in ("qwen2", "qwen3") and config.attention_bias:
        found.append("biases in its attention")
    if family == "qwen2" and config.num_heads * config.head_dim != config.hidden_size:
        found.append("heads that do not divide its width")
    kind = config.rope["rope_type"]
    if kind not in ("default", "linear", "llama3") or (kind == "llama3" and family != "llama"):
        found.append(f"the rope scaling {kind}")
    return found


def write(model: Model, fields: Mapping[str, Any], path: Path, dtype: str) -> None:
    """Write a model as a GGUF file.

    Vectors and learned positions stay fp32, as in llama.cpp's own files; a matrix whose rows are no multiple of 32 is
    f16 in a q8_0 file.

    ``dtype``, a key of `DTYPES`, is the type of the matrices.

    Raises:
        ConfigError: a weight is too large for the type.
    """
    tensors = _tensors(model)
    fields = {**fields, "general.file_type": DTYPES[dtype].file}
    types = {key: _type_of(key, tensors.layout[key], dtype) for key in tensors}
    other = [key for key, kind in types.items() if dtype == "q8_0" and kind is DTYPES["f16"]]
    if other:
        note(f"{len(other)} matrices with rows that are no multiple of {_BLOCK} are f16, not q8_0")
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(types), len(fields)))
    for key, value in fields.items():
        header += _string(key) + _value(value)
    offset = 0
    for key, kind in types.items():
        shape = list(tensors.layout[key].shape)[::-1]
        header += _string(key) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", kind.number, offset)
        offset += _padded(tensors.layout[key].numel() // kind.block * kind.size)
    with HashingFile(path) as file:
        file.write(bytes(header.ljust(_padded(len(header)), b"\0")))
        for key, kind in types.items():
            tensor = tensors[key]
            if (largest := float(tensor.abs().max())) > kind.largest:
                name = next(name for name, known in DTYPES.items() if known is kind)
                wider = "f32" if name == "bf16" else "bf16 or f32"
                raise ConfigError(
                    f"{key} has a weight of {largest:.3g}, too large for {name}. Choose the dtype {wider}."
                )
            data = kind.encode(tensor).tobytes()
            file.write(data.ljust(_padded(len(data)), b"\0"))
        file.finish()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _type_of(name: str, tensor: Tensor, dtype: str) -> _Type:
    if tensor.ndim < 2 or name.startswith("position_embd"):
        return DTYPES["f32"]
    return DTYPES["f16" if dtype == "q8_0" and tensor.shape[-1] % _BLOCK else dtype]


# ------------------------------------------------------------------------------------------------ metadata


def _fields(model: Model, name: str) -> dict[str, Any]:
    """Return the metadata of the architecture."""
    config = model.backbone.config
    arch = _ARCHITECTURES[model.backbone.model_type]
    found: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": 2,
        f"{arch}.context_length": config.max_positions,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
    }
    if arch == "gpt2":
        return found | {"gpt2.attention.layer_norm_epsilon": float(config.norm_eps)}
    rope = config.rope
    found |= {
        f"{arch}.vocab_size": len(model.tokenizer or ()),
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        found |= {
            f"{arch}.rope.scaling.type": "linear",
            f"{arch}.rope.scaling.factor": float(rope["factor"]),
        }
    return found


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


# Type of a value in the metadata -> its number and its packing.
_KINDS: dict[type, tuple[int, Callable[[Any], bytes]]] = {
    bool: (7, lambda value: struct.pack("<B", value)),
    int: (4, lambda value: struct.pack("<I", value)),
    float: (6, lambda value: struct.pack("<f", value)),
    str: (8, _string),
}
_ARRAY, _SIGNED = 9, 5


def _value(value: Any) -> bytes:
    """Return a value of the metadata with its type; whole numbers are uint32, in lists int32."""
    if not isinstance(value, list):
        number, pack = _KINDS[type(value)]
        return struct.pack("<I", number) + pack(value)
    number, pack = _KINDS[type(value[0]) if value else str]
    if number == _KINDS[int][0]:
        data = struct.pack(f"<{len(value)}i", *value)
        number = _SIGNED
    else:
        data = b"".join(map(pack, value))
    return struct.pack("<IIQ", _ARRAY, number, len(value)) + data


# ------------------------------------------------------------------------------------------------ tensors


def _tensors(model: Model) -> LazyTensors:
    """Return the weights under their names in llama.cpp, fp32 and contiguous."""
    disk = model.disk_view()
    config, family = model.backbone.config, model.backbone.model_type
    names = {_renamed(name): name for name in disk}
    permuted = _ARCHITECTURES[family] == "llama"
    tokens = len(model.tokenizer or ())

    def changed(name: str, tensor: Tensor) -> Tensor:
        """GPT-2's matrices are (in, out) in its files; llama.cpp rotates neighbours, not the halves of a head."""
        if name in ("token_embd.weight", "output.weight"):
            return tensor[:tokens]  # later rows belong to no token, and must never be chosen
        if names[name].endswith(_TRANSPOSED):
            return tensor.T
        if permuted and ".attn_q." in name:
            return _neighbours(tensor, config.num_heads)
        if permuted and ".attn_k." in name:
            return _neighbours(tensor, config.num_kv_heads)
        return tensor

    extra = _rope_factors(model)

    def make(name: str) -> Tensor:
        if name in extra:
            return extra[name]
        return changed(name, disk[names[name]]).detach().to("cpu", torch.float32).contiguous()

    layout = {name: changed(name, disk.layout[old]) for name, old in names.items()}
    return LazyTensors({**layout, **extra}, make)


def _renamed(name: str) -> str:
    """Return llama.cpp's name of a tensor of a Hugging Face file."""
    module, _, leaf = name.removeprefix("model.").removeprefix("transformer.").rpartition(".")
    place, _, rest = module.partition(".")
    if place not in ("layers", "h"):
        return f"{_TOP[module]}.{leaf}"
    layer, _, inner = rest.partition(".")
    return f"blk.{layer}.{_LAYER[inner]}.{leaf}"


def _neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the outputs of each head so that the halves that rotate together become neighbours."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _rope_factors(model: Model) -> dict[str, Tensor]:
    """Return the divisors of the frequencies of llama3's scaling, (d / 2); nothing for other models."""
    config = model.backbone.config
    rope: Mapping[str, Any] = getattr(config, "rope", None) or {}
    if rope.get("rope_type") != "llama3":
        return {}
    tables = [
        RotaryTable(config.head_dim, parameters, config.max_positions)
        for parameters in ({"rope_theta": rope["rope_theta"], "rope_type": "default"}, rope)
    ]
    plain, scaled = (table.frequencies(0, torch.device("cpu"))[0] for table in tables)
    return {"rope_freqs.weight": plain / scaled}

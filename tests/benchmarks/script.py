"""The clean script that we have to beat: a GPT-2 of plain modules, as one would write it for one model and one machine.

Its parameters have the names and layouts of GPT-2 in a Hugging Face directory but for the transposed matrices, which
``read`` turns round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, T, d) each


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Script(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, length: int, vocab: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, ids: Tensor, labels: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.wte(ids) + self.wpe(positions)
        for block in self.h:
            x = block(x, attend)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a GPT-2 directory."""
        names = {"attn.c_attn": "qkv", "attn.c_proj": "out", "mlp.c_fc": "up", "mlp.c_proj": "down"}
        state = {}
        for name, tensor in tensors.items():
            name = name.removeprefix("transformer.")
            turned = any(old in name for old in names) and name.endswith("weight")
            for old, new in names.items():
                name = name.replace(old, new)
            if name != "lm_head.weight":
                state[name] = tensor.T if turned else tensor
        self.load_state_dict(state)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to all earlier tokens of the row."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(mask: Tensor) -> Attend:
    """Attention where a dense mask (B, 1, T, T) is True."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_document(documents: Tensor) -> Attend:
    """Causal attention inside documents (B, T), without padding, by the variable-length kernel of CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = torch.cat([torch.bincount(row)[1:] for row in documents]).to(torch.int32)
    ends, longest = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), int(lengths.max())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, t, d = q.shape
        flat = (x.transpose(1, 2).reshape(-1, h, d) for x in (q, k, v))
        y = varlen_attn(*flat, ends, ends, longest, longest, window_size=(-1, 0))
        return y.view(b, t, h, d).transpose(1, 2)

    return attend

"""Row 10: greedy generation beside transformers, logits and tokens equal."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from .harness import Case, Contender, Settings, Tolerance, Work, timed
from .pretraining import Shape

Made = tuple[Callable[[], float], Work]
SMALL, LARGE, TINY = (
    Shape(6, 320, 5, 512, 1, 8192), Shape(12, 768, 12, 1024, 1, 50257), Shape(2, 64, 2, 64, 1, 96),
)  # fmt: skip


class Prompts:
    """One GPT-2 and prompts of one length."""

    def __init__(
        self, settings: Settings, shape: Shape, prompts: int, prompt: int, new: int
    ) -> None:
        self.settings, self.new = settings, new
        torch.manual_seed(0)
        self.model = shape.model("gpt2").to(settings.device).eval()
        self.folder = tempfile.TemporaryDirectory()
        self.model.save(self.folder.name)
        self.ids = torch.randint(5, shape.vocab, (prompts, prompt)).to(settings.device)

    def work(self, ids: torch.Tensor, logits: torch.Tensor) -> Work:
        """The tokens to the last one, and the logits of the prompt through their mean and norm."""
        figures = [float(logits.double().logsumexp(-1).mean()), float(logits.double().norm())]
        return Work(
            self.ids.shape[0] * self.new,
            figures,
            others={"ids": ids[:, self.ids.shape[1] :].tolist()},
        )

    def ours(self, *, cache: bool = True) -> Made:
        answer = functools.partial(
            self.model.generate, self.ids, max_new_tokens=self.new, temperature=0, use_cache=cache
        )
        with torch.no_grad():
            logits = self.model({"input_ids": self.ids})
        return timed(answer, self.settings), self.work(answer(), logits)

    def transformers(self, **options: Any) -> Made:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder.name, attn_implementation="sdpa", dtype=torch.float32
        )
        model.to(self.settings.device).eval()
        answer = functools.partial(
            model.generate, self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=self.new,
            do_sample=False, pad_token_id=0, eos_token_id=None, **options,
        )  # fmt: skip
        with torch.no_grad():
            logits = model(self.ids).logits
        return timed(answer, self.settings), self.work(answer(), logits)


def generate(settings: Settings) -> list[Callable[[], Case]]:
    """Row 10: 10 M parameters, and 124 M with --long or on a GPU."""
    shapes = [(TINY, 1.0)] if settings.tiny else [(SMALL, 2.5)]
    if not settings.tiny and (settings.long or settings.device.type == "cuda"):
        shapes.append((LARGE, 5.0 if settings.device.type == "cuda" else 1.0))

    def case(shape: Shape, bar: float, prompts: int) -> Case:
        p = Prompts(
            settings, shape, prompts, 8 if settings.tiny else 32, 4 if settings.tiny else 64
        )
        contenders = [
            Contender("pretrain", "ours", p.ours),
            Contender("transformers generate", "default", p.transformers, "transformers"),
        ]
        if settings.device.type == "cuda":
            static = functools.partial(p.transformers, cache_implementation="static")
            contenders.append(
                Contender("transformers, static cache, compiled", "best", static, "transformers")
            )
        return Case(
            f"GPT-2 L{shape.layers} d{shape.width} V{shape.vocab}, {prompts} x {p.ids.shape[1]} and {p.new} tokens",
            f"{settings.unit} in all", contenders, {"default": bar if prompts == 1 else min(bar, 1.3)},
            Tolerance(1e-5, 1e-5, 1e-5),
        )  # fmt: skip

    return [functools.partial(case, *shape, prompts) for shape in shapes for prompts in (1, 8)]

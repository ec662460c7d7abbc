"""The language model of lm-evaluation-harness, so that its tasks measure checkpoints of this package.

The extra ``harness`` has it. Importing this module makes it known as ``pretrain``; from the command line
``python -m pretrain.evaluation.harness`` is the harness's own command with the model known. Texts are cut, framed and
scored as by the harness's adapter for transformers, so that the figures are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pretrain.checkpoint import load
from pretrain.data.chat import ChatTemplate
from pretrain.data.task_rows import batches_by_length
from pretrain.errors import ConfigError, ModelError
from pretrain.inference.generate import generate
from pretrain.inference.likelihood import Scored, rows_without_end, score_continuations
from pretrain.inference.prompts import tokenizer_of
from pretrain.nn.device import tokens_at_once
from pretrain.training.precision import choose_device, choose_precision

try:
    # The harness lists its own models only if no model is known before.
    import lm_eval.models  # noqa: F401
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ConfigError(
        f"The tasks of lm-evaluation-harness need its package: pip install lm_eval. ({error})"
    ) from error

__all__ = ["HarnessModel"]

_ROWS = 64  # maximum rows of a forward pass with batch_size=auto
_NEW_TOKENS = 256  # of an answer, if the task names no number


@register_model("pretrain")
class HarnessModel(TemplateLM):  # type: ignore[misc]  # its package has no types
    """A causal model of this package for lm-evaluation-harness.

    Args:
        path: a run, a checkpoint, an adapter, any Hugging Face directory of a known family, or a ``Model``.
        batch_size: maximum rows in one forward pass; those of similar length are taken together, and a batch has at
            most 8,192 tokens on a CPU and 65,536 on a GPU, padding included. ``auto``: 64.
        max_batch_size: maximum of ``batch_size``.
        device: auto, cpu, cuda or mps; None is auto.
        precision: compute type: fp32, bf16, fp16; auto is fp32, whatever the type of the stored weights, and
            log-probabilities are always fp32.
        max_length: maximum tokens of a row; None: the model's positions. Longer contexts are cut from the left.
        add_bos_token: put the frame of special tokens before a text; None: yes, if the tokenizer has one.

    Raises:
        ModelError: the model is not a causal language model or has no tokenizer.
    """

    def __init__(
        self,
        path: Any,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        precision: str = "auto",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        model = load(path, quiet=True) if isinstance(path, str) else path
        if model.head_kind != "causal-lm":
            raise ModelError(
                f"lm-evaluation-harness measures causal language models, and {path} has the head {model.head_kind!r}."
            )
        self._device = choose_device(device or "auto")
        self.precision = choose_precision(
            "fp32" if precision == "auto" else precision, self._device
        )
        self.model = model.to(self._device)
        self.tokenizer = tokenizer_of(model, "read text")
        self.max_length = min(max_length or model.backbone.max_length, model.backbone.max_length)
        rows = _ROWS if str(batch_size).startswith("auto") else int(batch_size or 1)
        self.batch_size = min(rows, max_batch_size or rows)
        self.add_bos_token = add_bos_token

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        ends = self.model.end_ids(self.tokenizer.eos_id)
        if not ends:
            raise ModelError(
                "The tokenizer has no token that ends a text, which the harness needs."
            )
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that the first token of a text is given: bos, or else eos."""
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness stores requests of this tokenizer."""
        return f"pretrain-{self.tokenizer.fingerprint[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others: Any
    ) -> list[int]:
        """Return the ids of a text; special tokens stand before it, never after it.

        Args:
            string: the text.
            add_special_tokens: whether the frame of the tokenizer stands before it; None: ``add_bos_token``, and not if
                the text already spells the token.
            **others: not used.
        """
        framed = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None:
            bos = self.tokenizer.decode([self.prefix_token_id], skip_special=False)
            framed = False if bos and string.startswith(bos) else framed
        if framed is False:
            return self.tokenizer.encode(string)
        ids = rows_without_end(self.tokenizer, [string])[0]
        return ids or list(self.tokenizer.prefix)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **others: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations; the context is cut from the left to what the model can read."""
        rows = [[*context, *new] for _, context, new in requests]
        for i, (_, context, new) in enumerate(requests):
            if not context or not 0 < len(new) <= self.max_length:
                raise ModelError(
                    f"Request {i} has {len(context)} tokens of context and {len(new)} to score; at least one is needed "
                    f"of each, and the model has {self.max_length} positions."
                )
        cut = [row[-(self.max_length + 1) :] for row in rows]
        scored = self._score(cut, [len(new) for _, _, new in requests], disable_tqdm)
        answers = [(one.total, one.greedy) for one in scored]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _score(self, rows: list[list[int]], counts: list[int], quiet: bool) -> list[Scored]:
        with self.precision.autocast():
            return score_continuations(
                self.model, rows, counts, self.batch_size, progress=not quiet
            )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts; long ones are read in windows, which predict each token once.

        As with the adapter for transformers, the bos that a tokenizer puts before texts is itself a token that is
        predicted; ``add_bos_token=False`` leaves it out.
        """
        rows, counts, owners = [], [], []
        for i, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, new in map(utils.make_disjoint_window, windows):
                rows.append([*context, *new])
                counts.append(len(new))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, one in zip(owners, self._score(rows, counts, disable_tqdm), strict=True):
            totals[i] += one.total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return the continuations of texts up to a stop text; contexts are cut from the left to leave room."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(i)
        for group in alike.values():
            options = _options(requests[group[0]].args[1])
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                raise ConfigError(
                    f"{options['max_new_tokens']} new tokens leave no room for a context in {self.max_length} "
                    "positions. Ask for fewer: --gen_kwargs max_gen_toks=32."
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in group]
            lengths = [len(prompt) + options["max_new_tokens"] for prompt in prompts]
            most = tokens_at_once(self._device)
            for chosen in batches_by_length(lengths, self.batch_size, most):
                some = [prompts[k] for k in chosen]
                with self.precision.autocast():
                    whole = generate(self.model, some, **options)
                for k, prompt, ids in zip(chosen, some, whole, strict=True):
                    text = self.tokenizer.continuation(prompt, ids[len(prompt) :])
                    for stop in options["stop"] or ():
                        text = text.split(stop)[0]
                    answers[group[k]] = text
        for request, text in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, by the chat template of the model's tokenizer."""
        template = ChatTemplate.of(self.tokenizer, None)
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``generate`` for those of a task; greedy unless it asks for sampling."""
    options = dict(given)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    counts = [options.pop(name) for name in names if options.get(name) is not None]
    stop = options.pop("until", None) or []
    heat = float(options.pop("temperature", None) or 0.0)
    sampled = options.pop("do_sample", None)
    options["temperature"] = heat if sampled or (sampled is None and heat > 0) else 0
    if sampled and not heat:
        options["temperature"] = 1.0
    stops = [stop] if isinstance(stop, str) else list(stop)
    return options | {
        "max_new_tokens": int(counts[0]) if counts else _NEW_TOKENS,
        "stop": [text for text in stops if text] or None,
    }


def main() -> None:
    """Run the harness's own command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

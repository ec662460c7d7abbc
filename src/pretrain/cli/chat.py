"""The command ``chat``: a conversation in the terminal, or the server of one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.arguments import DEVICE, Option, checkpoint, sampling
from pretrain.cli.streams import text_of
from pretrain.errors import ConfigError, DataError, Interrupted, ModelError, PretrainError
from pretrain.printing import printable_pieces
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.inference.generate import Stream
    from pretrain.models.base import Model

__all__ = ["OPTIONS", "chat", "show_pieces"]

_NEW_TOKENS = 512
_HELP = """\
/reset         begin a new conversation
/system TEXT   set what the model is told at the beginning; without TEXT, nothing
/help          show this
/exit          leave
A line that ends with a backslash goes on in the next one.
Ctrl-C stops an answer. Ctrl-C or Ctrl-D at the prompt leaves."""


OPTIONS: tuple[Option, ...] = (
    *checkpoint(),
    ("--system", str, "what the model is told before the conversation", ""),
    *sampling(_NEW_TOKENS),
    DEVICE,
    ("--raw", None,
     "continue every line as it stands, without a template: for models that were not trained on conversations"),
    ("--web", None, "serve a page for a browser, and the chat-completions protocol of OpenAI, on this machine"),
    ("--port", int, "port of --web; 0 takes a free one", 8080),
)  # fmt: skip


def chat(args: Any) -> None:
    """Load the model, and talk or serve."""
    if args.raw and (args.web or args.system):
        raise ConfigError("--raw has no conversations, so it takes neither --web nor --system.")
    from pretrain.checkpoint import load
    from pretrain.inference.generate import Stream
    from pretrain.inference.serve import listen, serve
    from pretrain.objectives.instruction import answer_length
    from pretrain.training.precision import choose_device

    listener = listen(args.port) if args.web else None  # fails early if the port is taken
    device = choose_device(args.device)
    model = load(args.checkpoint).to(device)
    words, speaks = model.tokenizer, model.head_kind == "causal-lm"
    templates = words is not None and (words.chat_template or words.named_templates)
    if speaks and not args.raw and not templates:
        raise ModelError(
            f"{args.checkpoint} has no chat template: it was not trained on conversations. Train it on some: "
            f"pretrain finetune --model {args.checkpoint} --task chat --data chats.jsonl. To see how it continues "
            f"texts: pretrain chat {args.checkpoint} --raw."
        )
    left_out = ("checkpoint", "system", "device", "raw", "web", "port")
    options = {k: v for k, v in vars(args).items() if k not in left_out and v is not None}
    options["max_new_tokens"] = answer_length(model, options.get("max_new_tokens"), _NEW_TOKENS)
    Stream(model, [0], **options)  # checks the model and the options
    if listener is not None:
        serve(model, Path(args.checkpoint).resolve().name, listener, args.system, options)
    else:
        _Talk(model, args.system, args.raw, options).run(args.checkpoint)


def show_pieces(pieces: Iterable[str]) -> None:
    """Print a text as it is made; characters that could control the terminal are escaped."""
    try:
        for piece in printable_pieces(pieces):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


class _Talk:
    """A conversation in the terminal.

    If it is ``raw``, every line is continued by itself; the options are those of ``generate``, with
    ``max_new_tokens``.
    """

    def __init__(self, model: Model, system: str, raw: bool, options: dict[str, Any]) -> None:
        from pretrain.inference.chat import Chat

        self.model, self.system, self.options = model, system, options
        self.session = None if raw else Chat(model)
        self.turns: list[dict[str, Any]] = []
        self.noted_cut, self.read = False, 0
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self, name: str) -> None:
        """Read lines and answer them to the end of the input."""
        if self.on_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  lines can be edited and called back
            note(f"{name}: /help shows the commands, Ctrl-D leaves.")
        while (text := self._read()) is not None:
            word, _, rest = text.strip().partition(" ")
            if word == "/exit":
                return
            if word[:1] == "/" and word[1:].isalpha():
                self._command(word, rest.strip())
            elif text.strip():
                self._answer(text)

    def _read(self) -> str | None:
        """Return what was typed, or None at the end."""
        lines: list[str] = []
        try:
            while not lines or lines[-1].endswith("\\"):
                prompt = ("... " if lines else "> ") if self.on_terminal else ""
                self.read += 1
                lines.append(text_of(input(prompt), self.read))
        except DataError as error:
            if not self.on_terminal:
                raise
            note(f"error: {error}")
            return ""
        except Interrupted:
            raise
        except (EOFError, KeyboardInterrupt):
            if self.on_terminal:
                print()
            return None
        return "\n".join([*(line[:-1] for line in lines[:-1]), lines[-1]])

    def _command(self, word: str, rest: str) -> None:
        if word == "/help":
            print(_HELP)
        elif self.session is None:
            note(f"{word} needs a conversation, and with --raw every line is continued by itself.")
        elif word == "/reset":
            self.turns = []
            note("A new conversation begins.")
        elif word == "/system":
            self.system = rest
            note("The model is told this from now on." if rest else "The model is told nothing.")
        else:
            note(f"There is no command {word}. /help shows those that there are.")

    def _answer(self, text: str) -> None:
        """Print the answer to a line; it joins the conversation as far as it was printed."""
        stream = None
        try:
            stream = self._stream(text)
            show_pieces(stream)
        except Interrupted:
            raise
        except KeyboardInterrupt:
            pass
        except PretrainError as error:
            note(f"error: {error}")
            return
        if stream is None:
            return
        if self.session is not None and stream.text:
            exchange = (
                {"role": "user", "content": text},
                {"role": "assistant", "content": stream.text},
            )
            self.turns += exchange
        if self.session is not None and stream.finish_reason == "length":
            most = self.options["max_new_tokens"]
            reason = (
                f"--max_new_tokens is {most}"
                if stream.new_tokens >= most
                else f"the model reads {self.model.backbone.max_length:,} tokens, question and answer together"
            )
            note(f"note: the answer was cut, because {reason}.")

    def _stream(self, text: str) -> Stream:
        if self.session is None:
            from pretrain.inference.generate import generate

            pieces: Stream = generate(self.model, text, stream=True, **self.options)
            return pieces
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*system, *self.turns, {"role": "user", "content": text}]
        kept, ids = self.session.fit(asked, self.options["max_new_tokens"])
        if len(kept) < len(asked):
            self.turns = kept[len(system) : -1]
            if not self.noted_cut:
                note(
                    f"note: the model reads {self.model.backbone.max_length:,} tokens, so the first turns of the "
                    "conversation are left out from now on."
                )
            self.noted_cut = True
        return self.session.answer(ids, **self.options)

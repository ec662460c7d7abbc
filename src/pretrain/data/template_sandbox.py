"""Sandbox for chat templates: Jinja's immutable sandbox, with limits on steps, time and the size of every value.

A chat template comes with a checkpoint and is an untrusted program. Jinja's own sandbox prevents access to Python, but
does not limit time or memory. A deadline alone is not enough: ``'a' * 10 ** 10`` and ``7 ** 10 ** 9`` are single
operations that cannot be interrupted. Therefore every loop, call, filter, test and operator is counted, every value is
measured when it is created, and operations that can make a huge value of small ones are checked beforehand.

The settings, globals, filters and tags are those of ``transformers.utils.chat_template_utils``.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.sandbox
import jinja2.utils
from jinja2.visitor import NodeTransformer

__all__ = ["LimitExceeded", "Sandbox"]

MAX_STEPS = 2_000_000  # iterations, calls and items per rendering; 64 characters are one item
MAX_SIZE = 4_000_000  # characters of a text, items of a list
MAX_SECONDS = 10.0
_MAX_BITS = 4096  # of an integer

# Filters and methods whose results are not bounded by the size of their input, or (random) differ between renderings.
_NO_FILTERS = ("batch", "center", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr")
_NO_METHODS = ("center", "encode", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill")
# Matches a format width that is large, or taken from an argument.
_WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")


class LimitExceeded(jinja2.TemplateError):
    """The template exceeded a limit."""


class _Metered(NodeTransformer):
    """Replace loops, ``~`` and literals, which a Jinja sandbox cannot intercept, by calls of the sandbox."""

    def _call(self, name: str, *arguments: Any) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self._call("metered_items", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self._call("concatenated", *node.nodes)

    def _literal(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        # A tuple that is an assignment target, as in ``for key, value in ...``, is not a value.
        return node if getattr(node, "ctx", "load") != "load" else self._call("measured", node)

    visit_List = visit_Tuple = visit_Dict = _literal


class _Generation(jinja2.ext.Extension):
    """The tag ``{% generation %}`` for text of the assistant, which is printed between the marks of the sandbox."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        sandbox: Any = self.environment
        sandbox.has_generation = True
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        sandbox: Any = self.environment
        before, after = sandbox.marks
        return f"{before}{caller()}{after}"


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose repr omits its content, which may contain the namespace itself many times."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Dict:
    """The global ``dict`` without the methods of the class, which could modify the dictionaries of the caller."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment in which one chat template is compiled and rendered.

    Attributes:
        marks: strings that ``render`` prints before and after the content of every ``{% generation %}`` block.
        has_generation: the template has such blocks.
        constants: the string literals of the template, which it may search for in a message.

    Raises:
        jinja2.TemplateError: from ``template`` and ``render``: a syntax error, an error raised by the template itself,
            or ``LimitExceeded``.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            optimized=False,  # the optimizer would run parts of the template at compile time
            finalize=self.printed,
        )
        self._start()
        self.marks, self.has_generation = ("", ""), False
        self.constants: frozenset[str] = frozenset()
        filters: dict[str, Callable[..., Any]] = {
            **self.filters,
            "tojson": self._to_json,
            "join": self._join,
            "replace": self._replace,
            "indent": self._indent,
            "round": _round,
            "format": lambda text, *args, **named: self.call_binop(
                None, "%", str(text), named or args
            ),
            "sum": self._sum,
        }
        self.filters = {
            name: self._metered(function)
            for name, function in filters.items()
            if name not in _NO_FILTERS
        }
        self.tests = {name: self._metered(test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "dict": _Dict(),
            "namespace": _Namespace,
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }

    def template(self, source: str) -> jinja2.Template:
        """Compile a template, with metering calls inserted."""
        tree = self.parse(source)
        constants = (node.value for node in tree.find_all(nodes.Const))
        self.constants = frozenset(value for value in constants if isinstance(value, str))
        self._start()
        return self.from_string(_Metered().visit(tree).set_environment(self))

    def render(
        self,
        template: jinja2.Template,
        values: Mapping[str, Any],
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """Render a template of this sandbox within the limits."""
        self._start()
        self.marks = marks
        return str(template.render(values))

    def _start(self) -> None:
        self._steps_left, self._deadline = MAX_STEPS, time.monotonic() + MAX_SECONDS

    # ------------------------------------------------------------------ meters

    def step(self, count: int = 1) -> None:
        """Count steps; raise ``LimitExceeded`` if they or the time exceed their limits."""
        self._steps_left -= count
        if self._steps_left < 0 or time.monotonic() > self._deadline:
            raise LimitExceeded(
                f"it takes more than {MAX_STEPS:,} steps or {MAX_SECONDS:.0f} seconds"
            )

    def _check_size(self, size: int) -> None:
        if size > MAX_SIZE:
            raise LimitExceeded(f"it makes more than {MAX_SIZE:,} characters or items")

    def size(self, value: Any) -> int:
        """Return the number of items and characters in a value, counting shared ones at each occurrence."""
        if isinstance(value, str):
            self.step(1 + len(value) // 64)
            self._check_size(len(value))
            return len(value)
        pending, total = [value], 0
        while pending:
            item = pending.pop()
            total += self.size(item) if isinstance(item, str) else 1
            self.step()
            self._check_size(total)
            if isinstance(item, dict):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                pending += item
        return total

    def measured(self, value: Any) -> Any:
        """Return the value, or raise ``LimitExceeded`` if it is too large."""
        if isinstance(value, str | list | tuple | dict | set | frozenset):
            self.size(value)
        return value

    def printed(self, value: Any) -> str:
        """Return the value as a string; raise ``LimitExceeded`` if it is too long."""
        text = str(value)
        self.size(text)
        return text

    def metered_items(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the items of a loop, counting a step for each."""
        for value in values:
            self.step()
            yield value

    def _metered(self, function: Any) -> Callable[..., Any]:
        # wraps() copies the attribute by which Jinja marks functions that take its context.
        @functools.wraps(function)
        def metered(*args: Any, **named: Any) -> Any:
            self.step()
            return self.measured(function(*args, **named))

        return metered

    # ------------------------------------------------------------------ operations that make large values of small ones

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the output of the template, or of a block of it."""
        texts, size = [], 0
        for piece in pieces:
            size += len(piece)
            self._check_size(size)
            texts.append(piece)
        self.step(1 + size // 64)
        return "".join(texts)

    def concatenated(self, *values: Any) -> str:
        """Return ``a ~ b``."""
        return self.concat(map(self.printed, values))

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(jinja2.filters.make_attrgetter(self, attribute), values)
        return str(d).join(self._pieces(map(self.printed, values), str(d)))

    def _sum(
        self, values: Iterable[Any], attribute: str | int | None = None, start: Any = 0
    ) -> Any:
        if not isinstance(start, int | float):
            # Summing lists copies the partial sum for every item.
            raise jinja2.TemplateError("sum is available for numbers only")
        return jinja2.filters.sync_do_sum(self, values, attribute, start)

    def _to_json(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        """Return JSON without the HTML escapes of Jinja's own filter."""
        if indent is not None and not (isinstance(indent, int) and indent <= 16):
            raise LimitExceeded(f"it indents by {indent!r}")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        # Indents and separators can multiply the size, so such texts are generated and measured piece by piece.
        whole = indent is None and separators is None
        return self.concat([encoder.encode(value)] if whole else encoder.iterencode(value))

    def _pieces(self, values: Iterable[Any], separator: str) -> list[Any]:
        pieces = list(values)
        self._check_size(sum(self.size(piece) + len(separator) for piece in pieces))
        return pieces

    def _check_replace(self, text: str, old: Any, new: Any) -> None:
        times = text.count(str(old)) if old else len(text) + 1
        self._check_size(len(text) + times * len(str(new)))

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        self._check_replace(str(text), old, new)
        return str(text).replace(str(old), str(new), -1 if count is None else count)

    def _indent(
        self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        text, columns = str(text), len(width) if isinstance(width, str) else int(width)
        self._check_size(len(text) + (len(text.splitlines()) + 1) * columns)
        return jinja2.filters.do_indent(text, width, first, blank)

    def _check_format(self, text: str, values: Any) -> None:
        if _WIDE.search(text.replace("{{", "").replace("}}", "")):
            raise LimitExceeded(f"it formats with a large or computed width: {text[:40]!r}")
        self._check_size((text.count("{") + text.count("%")) * (self.size(values) + 1000))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply a binary operator; raise ``LimitExceeded`` if the result would be too large."""
        self.step()
        if operator == "%" and isinstance(left, str):
            self._check_format(left, right)
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, str | list | tuple) and isinstance(times, int):
                    self._check_size(len(items) * times)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 1)
            if max(bits, right.bit_length()) > _MAX_BITS:
                raise LimitExceeded(f"it computes numbers of more than {_MAX_BITS:,} bits")
        return self.measured(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
        """Call a macro, a function or a method."""
        __self.step()
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | int) and name in _NO_METHODS:
            raise jinja2.TemplateError(
                f"{type(owner).__name__}.{name} is not available in chat templates"
            )
        if isinstance(owner, str):
            if name in ("format", "format_map"):
                __self._check_format(owner, [list(args), named])
            elif name == "replace" and len(args) > 1:
                __self._check_replace(owner, *args[:2])
            elif name == "join" and args:
                args = (__self._pieces(args[0], owner), *args[1:])
        return __self.measured(super().call(__context, __obj, *args, **named))


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 64:
        raise LimitExceeded(f"it rounds to {precision} digits")
    return jinja2.filters.do_round(value, precision, method)  # type: ignore[arg-type]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)

"""A sandbox for chat templates of strangers: Jinja without loops that never end and texts that fill the memory.

Jinja's own sandbox keeps a template from reaching Python; it does not keep it from running for ever. Here every pass
through a loop, a macro or a block, every call and every container takes from a budget, and what can grow (``+``,
``*``, ``~``, ``**``, filters, methods of texts, captured blocks) is measured before it is made. The surroundings
(trimmed blocks, ``tojson``, ``raise_exception``, ``strftime_now``, ``{% generation %}``) are those that chat templates
on the hub are written for.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.sandbox
import jinja2.utils
from jinja2.visitor import NodeTransformer

__all__ = ["Runaway", "Sandbox"]

STEPS = 2_000_000  # passes, calls and items of one rendering
MOST = 4_000_000  # characters of a text, items of a list
SECONDS = 10.0
_BITS = 4096  # of a whole number

_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby"),
    *("int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse"),
    *("safe", "select", "selectattr", "sort", "string", "title", "trim", "truncate", "unique", "upper"),
)  # fmt: skip
_METHODS = frozenset(
    (
        *("capitalize", "casefold", "copy", "count", "endswith", "find", "format", "format_map", "get"),
        *("index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"),
        *("isnumeric", "isprintable", "isspace", "istitle", "isupper", "items", "join", "keys", "lower"),
        *("lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex"),
        *("rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase"),
        *("title", "upper", "values"),
    )
)  # fmt: skip
_PLAIN = (str, bytes, int, float, complex, list, tuple, dict, set, frozenset)
_WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # a width that is large, or comes from elsewhere


class Runaway(jinja2.TemplateError):
    """The template took more than its budget."""


class _Metered(NodeTransformer):
    """Put a call of the sandbox where a template can take time or memory without one."""

    def _call(self, name: str, *args: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)

    def _body(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("tick")))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_For(self, node: nodes.For) -> Any:
        node = self._body(node)
        if node.test is not None:  # it runs where the body may not
            node.test = nodes.And(self._call("tick"), node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:
        return self._call("joined", *self.generic_visit(node).nodes)  # type: ignore[attr-defined]

    def _container(self, node: Any) -> Any:
        node = self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._call("measured", node)

    visit_List = visit_Tuple = visit_Dict = _container


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant says; it prints its content, between the marks of the sandbox."""

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
    """Holds values across scopes; its text does not grow with what it holds."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment that chat templates are rendered in; a template has it for itself.

    Attributes:
        marks: what ``render`` puts before and behind the content of every ``{% generation %}`` block.
        has_generation: the template has such blocks.
        constants: the strings that the template itself spells, which it may look for in a message.

    Raises:
        jinja2.TemplateError: from ``template`` and ``render``: a syntax error, what the template itself raises, or
            ``Runaway``.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            optimized=False,
            finalize=self.measured,
        )
        self._left, self._end, self._ticks = STEPS, time.monotonic() + SECONDS, 0
        self.marks, self.has_generation = ("", ""), False
        self.constants: frozenset[str] = frozenset()
        self.concat = self._concat  # type: ignore[method-assign]
        plain = self.filters
        self.filters = {name: self._counted(plain[name]) for name in _FILTERS if name in plain}
        own: dict[str, Callable[..., Any]] = {
            "tojson": _to_json,
            "join": self._join,
            "replace": lambda text, old, new, count=None: self._replaced(str(text), str(old), str(new), count),
            "indent": self._indent,
            "round": _round,
            "format": lambda text, *args, **named: self.call_binop(None, "%", str(text), named or args),
            "sum": self._sum,
        }  # fmt: skip
        self.filters |= {name: self._counted(function) for name, function in own.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": _Namespace,
            "cycler": jinja2.utils.Cycler,
            "joiner": jinja2.utils.Joiner,
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }

    def template(self, source: str) -> jinja2.Template:
        """Compile a template, with its meters."""
        parsed = self.parse(source)
        found = (node.value for node in parsed.find_all(nodes.Const))
        self.constants = frozenset(value for value in found if isinstance(value, str))
        tree = _Metered().visit(parsed)
        tree.set_environment(self)
        self._start()
        return self.from_string(tree)

    def render(
        self,
        template: jinja2.Template,
        values: Mapping[str, Any],
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """Render a template of this sandbox within the budget."""
        self._start()
        self.marks = marks
        pieces, size = [], 0
        for piece in template.generate(values):
            size += len(piece)
            self._fits(size)
            pieces.append(piece)
        return "".join(pieces)

    def _start(self) -> None:
        self._left, self._end = STEPS, time.monotonic() + SECONDS

    # ------------------------------------------------------------------ the meters

    def tick(self, cost: int = 1) -> bool:
        """Take from the budget."""
        self._left -= cost
        self._ticks += 1
        if self._left < 0 or (self._ticks % 256 == 0 and time.monotonic() > self._end):
            raise Runaway(f"it takes more than {STEPS:,} steps or {SECONDS:.0f} seconds")
        return True

    def _fits(self, size: int) -> None:
        if size > MOST:
            raise Runaway(f"it makes more than {MOST:,} characters or items")

    def size(self, value: Any) -> int:
        """Items of a value and characters of its texts, what stands in it several times counted as often."""
        if isinstance(value, str):
            self.tick(1 + len(value) // 64)
            return len(value)
        todo, total = [value], 0
        while todo:
            item = todo.pop()
            total += len(item) if isinstance(item, str) else 1
            self.tick(1)
            self._fits(total)
            if isinstance(item, dict):
                todo += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                todo += item
        return total

    def measured(self, value: Any) -> Any:
        """The value, if it is not too large."""
        if isinstance(value, str | list | tuple | dict | set | frozenset):
            self._fits(self.size(value))
        return value

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # carries over whether Jinja passes itself along
        def counted(*args: Any, **named: Any) -> Any:
            self.tick()
            for value in (*args, *named.values()):
                self.measured(value)
            return self.measured(function(*args, **named))

        return counted

    # ------------------------------------------------------------------ what grows

    def _concat(self, parts: Iterable[Any]) -> str:
        texts = list(parts)
        self._fits(sum(map(len, texts)))
        self.tick(1 + len(texts))
        return "".join(texts)

    def joined(self, *parts: Any) -> str:
        """What ``a ~ b`` gives."""
        self._fits(sum(self.size(part) for part in parts))
        return str(self.measured("".join(map(str, parts))))

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = [
            item if attribute is None else self.getitem(item, attribute)
            for item in value
            if self.tick()
        ]
        self._fits(sum(self.size(item) + len(d) for item in items))
        return str(d).join(map(str, items))

    def _sum(
        self, values: Iterable[Any], attribute: str | int | None = None, start: Any = 0
    ) -> Any:
        total = start
        for value in values:
            item = value if attribute is None else self.getitem(value, attribute)
            if not isinstance(item, int | float) or not isinstance(total, int | float):
                # Lists would be copied once for every summand.
                raise jinja2.TemplateError("sum is open to numbers only")
            total = self.call_binop(None, "+", total, item)
        return total

    def _replaced(self, text: str, old: str, new: str, count: int | None = None) -> str:
        found = text.count(old) if old else len(text) + 1
        self._fits(len(text) + found * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _indent(
        self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        step = len(width) if isinstance(width, str) else int(width)
        self._fits(len(str(text)) + (str(text).count("\n") + 2) * step)
        return jinja2.filters.do_indent(str(text), width, first, blank)

    def _formatted(self, text: str, values: Any) -> None:
        """Hold the widths and the number of fields of a format against what may be made."""
        if _WIDE.search(text.replace("{{", "").replace("}}", "")):
            raise Runaway(f"it formats with a width that is no small number: {text[:40]!r}")
        self._fits((text.count("{") + text.count("%")) * (self.size(values) + 1000))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The method ``format`` of a text, measured."""
        made = super().wrap_str_format(value)
        if made is None:
            return None

        def checked(*args: Any, **named: Any) -> str:
            self._formatted(str(value.__self__), [list(args), named])
            return str(self.measured(made(*args, **named)))

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """``+ * ** %`` with an eye on how large the result is."""
        self.tick()
        if operator == "%" and isinstance(left, str):
            self._formatted(left, right)
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int):
                    self._fits(len(text) * times)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 1)
            if max(bits, right.bit_length()) > _BITS:
                raise Runaway(f"it computes numbers of more than {_BITS:,} bits")
        return self.measured(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
        """Call a macro, a function, or one of the harmless methods of a text, a list or a dictionary."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, _PLAIN):
            method = getattr(__obj, "__name__", "")
            if method not in _METHODS:
                raise jinja2.TemplateError(
                    f"{type(owner).__name__}.{method} is not open to chat templates"
                )
            if method == "replace" and isinstance(owner, str):
                __self._replaced(owner, str(args[0]), str(args[1]))
            if method == "join" and args and isinstance(owner, str):
                args = (list(args[0]), *args[1:])
                __self._fits(sum(__self.size(item) + len(owner) for item in args[0]))
        __self.tick(1 + (len(owner) // 64 if isinstance(owner, str) else 0))
        result = super().call(__context, __obj, *args, **named)
        return __self.measured(result)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not (isinstance(indent, int) and indent <= 16):
        raise Runaway(f"it indents by {indent!r}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 64:
        raise Runaway(f"it rounds to {precision} digits")
    return jinja2.filters.do_round(value, precision, method)  # type: ignore[arg-type]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)

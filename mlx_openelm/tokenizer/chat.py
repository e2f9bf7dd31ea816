"""Renders conversations with chat templates, as transformers does.

Source: transformers 5, `utils/chat_template_utils.py`.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import shown
from .template_limits import (
    FAILED,
    check_arguments,
    check_operands,
    check_result,
    check_size,
    limited,
)

if TYPE_CHECKING:
    from jinja2 import Template

ROLES = ("user", "system", "assistant")

# The format the Instruct models were tuned with (CoreNet,
# `projects/openelm/instruction_tuning/openelm-instruct.yaml`), with BOS in front, which the
# tuning's trainer added outside of its template.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

MAX_SECONDS = 5.0
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "


def choose_template(
    templates: str | Mapping[str, str] | None, wanted: str | None, tools: object
) -> str:
    """The template to use: the one `wanted`, by name or as text, or the tokenizer's own.

    Raises:
        InputError: when there is none, or several and none of them is the default.
    """
    if isinstance(templates, Mapping):
        if wanted is not None:
            return templates.get(wanted, wanted)
        for name in ("tool_use", "default") if tools is not None else ("default",):
            if name in templates:
                return templates[name]
        names = ", ".join(sorted(map(shown, templates)))
        raise InputError(
            f"several chat templates and no default: chat_template must be one of {names}"
        )
    template = wanted if wanted is not None else templates
    if template is None:
        raise InputError(
            "no chat template; for an OpenELM Instruct model set "
            "tokenizer.chat_template = mlx_openelm.tokenizer.CHAT_TEMPLATE"
        )
    return template


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """A conversation as text. `variables` are what else the template sees.

    Templates are untrusted programs. They run in jinja2's sandbox. `range`, every text and list
    that they make, and the time in loops and macros are bounded (`template_limits.MAX_TEXT`,
    `MAX_SECONDS`). Not bounded is the time of a single filter or method, and the memory of one
    that makes much of little by other means than padding, repetition and replacement.

    Raises:
        InputError: when a message can't be used, or the template fails or exceeds a limit.
    """
    chat = _plain_messages(messages)
    if not all(isinstance(entry, Mapping) for entry in [*(tools or []), *(documents or [])]):
        raise InputError("tools and documents must be lists of dictionaries (JSON schemas)")
    final = None
    if continue_final_message:
        if add_generation_prompt:
            raise InputError(
                "continue_final_message continues the last message and add_generation_prompt "
                "begins another: give one of them"
            )
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        final = _mark_end(chat, field, template)
    if template == CHAT_TEMPLATE:
        text = _render_openelm(chat, add_generation_prompt, **variables)
    else:
        text = _render_jinja(
            template,
            messages=chat,
            tools=_plain(tools),
            documents=_plain(documents),
            add_generation_prompt=add_generation_prompt,
            **_plain(variables),
        )
    return text if final is None else _cut_at_end(text, final)


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies without keys whose value is None, reasoning under all of its names."""
    if not messages:
        raise InputError("the conversation has no messages; give at least one")
    chat = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {i} is {shown(message)}, not a dictionary with a role")
        plain = {key: value for key, value in _plain(message).items() if value is not None}
        reasons = [plain[key] for key in _REASONING_FIELDS if plain.get(key) is not None]
        if reasons:
            plain = {"thinking": reasons[0], **plain, "reasoning_content": reasons[0]}
        chat.append(plain)
    return chat


def _plain(value: Any) -> Any:
    """JSON's types only: the sandbox doesn't know what other objects' methods do."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return f"<{type(value).__name__}>"


def _mark_end(chat: list[dict[str, Any]], field: str, template: str) -> str:
    """Put a mark at the end of the last message; returns its text without it."""
    last = chat[-1]
    final = last.get(field)
    names = [field]
    if field in _REASONING_FIELDS:
        names = [name for name in _REASONING_FIELDS if last.get(name) == final]
    if final is None or not any(name in template for name in names):
        raise InputError(
            f"continue_final_message: the last message or the template has no {field!r}"
        )
    if isinstance(final, str):
        for name in names:
            last[name] = final + _CONTINUE
        return final
    blocks = final if isinstance(final, (list, tuple)) else []
    for block in reversed(blocks):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            text: str = block["text"]
            block["text"] = text + _CONTINUE
            return text
    raise InputError(f"continue_final_message: no text in the last message's {field!r}")


def _cut_at_end(text: str, final: str) -> str:
    if final.strip() not in text or _CONTINUE.strip() not in text:
        raise InputError(
            "continue_final_message: the template doesn't show the last message as it is"
        )
    at = text.rindex(_CONTINUE.strip())
    kept = text[:at]
    return kept if text[at : at + len(_CONTINUE)] == _CONTINUE else kept.rstrip()


def _render_openelm(
    chat: list[dict[str, Any]], add_generation_prompt: bool, **variables: Any
) -> str:
    """`CHAT_TEMPLATE`, without jinja2."""
    text: str = variables["bos_token"]
    for i, message in enumerate(chat):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InputError(f"message {i} needs a {key!r} that is a string")
        if message["role"] not in ROLES:
            known = ", ".join(ROLES)
            raise InputError(
                f"message {i} has the role {shown(message['role'])}, not one of {known}"
            )
        text += f"<|{message['role']}|>\n{message['content']}{variables['eos_token']}\n"
    return text + "<|assistant|>\n" if add_generation_prompt else text


_deadline: ContextVar[float] = ContextVar("deadline")


def _render_jinja(template: str, **values: Any) -> str:
    from jinja2 import TemplateError

    token = _deadline.set(time.monotonic() + MAX_SECONDS)
    try:
        parts, size = [], 0
        for part in _compiled(template).generate(**values):
            parts.append(part)
            size += len(part)
            check_size(size)
            _check_time()
        return "".join(parts)
    except InputError:
        raise
    except MemoryError:
        reason = "it needs too much memory"
    except RecursionError:
        reason = "it is nested too deeply"
    except TemplateError as error:
        reason = error.message or type(error).__name__
    except Exception as error:  # the template's own mistakes: any of Python's
        reason = f"{type(error).__name__}: {error}"
    finally:
        _deadline.reset(token)
    lines = reason.splitlines() or [""]
    raise InputError(f"{FAILED}: {lines[0][:300]}")


def _join(parts: Iterable[str]) -> str:
    return check_result("".join(parts))


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise InputError(f"{FAILED}: it took more than {MAX_SECONDS:g} s")


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    """The template, with the settings, filters and functions that transformers gives it."""
    from jinja2 import TemplateError, nodes, pass_eval_context
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant said, for training."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        @pass_eval_context
        def _said(self, context: Any, caller: Any) -> Any:
            return caller()

    class Joins(NodeTransformer):
        """Make `a ~ b` a call, which is checked."""

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            parts = [self.visit(part) for part in node.nodes]
            join = nodes.EnvironmentAttribute("join_texts")
            return nodes.Call(join, parts, [], None, None).set_lineno(node.lineno)

    class Environment(ImmutableSandboxedEnvironment):
        """With limits for what operators, calls and filters make, and for the time in loops."""

        intercepted_binops = frozenset({"+", "*", "**", "%"})
        concat = staticmethod(_join)
        check_time = staticmethod(_check_time)

        @staticmethod
        def join_texts(*parts: Any) -> str:
            return _join(map(str, parts))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operands(operator, left, right)
            return check_result(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            name = getattr(__obj, "__name__", "")
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str):
                check_arguments(name, owner, args, kwargs)
            return check_result(super().call(__context, __obj, *args, **kwargs))

        def _generate(self, source: nodes.Template, *args: Any, **more: Any) -> str:
            source = Joins().visit(source)
            check = nodes.EnvironmentAttribute("check_time")
            for node in list(source.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
                call = nodes.Call(check, [], [], None, None)
                node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))  # type: ignore[attr-defined]
            return super()._generate(source, *args, **more)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.filters = {name: limited(name, f) for name, f in environment.filters.items()}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    del environment.globals["lipsum"]
    return environment.from_string(template)

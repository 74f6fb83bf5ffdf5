"""One file a paper. `METHODS` lists them once: command line, tests and documentation are made from it."""

from __future__ import annotations

import ast
import dataclasses

from lvlm_fix.methods.base import AttentionStep, Method
from lvlm_fix.methods.damro import DAMRO
from lvlm_fix.methods.var import VAR
from lvlm_fix.methods.vtc_cls import VTCCLS
from lvlm_fix.methods.zipvl import ZipVL

METHODS: dict[str, type[Method]] = {method.name: method for method in (DAMRO, VAR, VTCCLS, ZipVL)}

__all__ = ["DAMRO", "METHODS", "VAR", "VTCCLS", "AttentionStep", "Method", "ZipVL", "parse"]


def parse(text: str) -> list[Method]:
    """Methods written as on the command line; `none` or an empty text is no method.

    Raises:
        ValueError: an unknown name or argument, or a value that is not a plain number or word.

    >>> parse("damro(alpha=1.0, topk=4), vtc_cls")
    [DAMRO(alpha=1.0, beta=0.1, topk=4), VTCCLS(keep=0.3333333333333333, start_layer=-4)]
    """
    if text.strip().lower() in ("", "none", "plain"):
        return []
    unreadable = f"cannot read methods {text!r}: write them as damro(alpha=0.5),vtc_cls"
    try:
        listed = ast.parse(f"[{text}]", mode="eval").body
    except SyntaxError as error:
        raise ValueError(unreadable) from error
    if not isinstance(listed, ast.List):
        raise ValueError(unreadable)
    return [_method(part, text) for part in listed.elts]


def _method(part: ast.expr, text: str) -> Method:
    call = part if isinstance(part, ast.Call) else ast.Call(part, [], [])
    if not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(f"cannot read methods {text!r}: write them as damro(alpha=0.5),vtc_cls")
    name = call.func.id.lower()
    if name not in METHODS:
        raise ValueError(f"unknown method {call.func.id!r}: the methods are {', '.join(METHODS)}")
    try:
        return METHODS[name](**{str(item.arg): ast.literal_eval(item.value) for item in call.keywords})
    except TypeError as error:
        fields = ", ".join(field.name for field in dataclasses.fields(METHODS[name]))  # type: ignore[arg-type]
        raise ValueError(f"{name} takes {fields}: {error}") from error
    except ValueError as error:
        raise ValueError(f"cannot read methods {text!r}: {error}") from error

"""One file a paper. `METHODS` lists them once: command line, tests and documentation are made from it."""

from __future__ import annotations

import ast
import dataclasses
import math
import typing
from typing import Any

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
        ValueError: an unknown name or argument, or a value that the argument does not take.

    >>> parse("damro(alpha=1.0, topk=4), vtc_cls")
    [DAMRO(alpha=1.0, beta=0.1, topk=4, gate=None), VTCCLS(keep=0.3333333333333333, start_layer=-4)]
    """
    if text.strip().lower() in ("", "none", "plain"):
        return []
    try:
        listed = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL
        raise _unreadable(text) from error
    if not isinstance(listed, ast.List):
        raise _unreadable(text)
    return [_method(part, text) for part in listed.elts]


def _method(part: ast.expr, text: str) -> Method:
    call = part if isinstance(part, ast.Call) else ast.Call(part, [], [])
    names = [item.arg for item in call.keywords]
    if not isinstance(call.func, ast.Name) or call.args or len(set(names)) < len(names):
        raise _unreadable(text)
    name = call.func.id.lower()
    if name not in METHODS:
        raise ValueError(f"unknown method {call.func.id!r}: the methods are {', '.join(METHODS)}")
    kinds = typing.get_type_hints(METHODS[name])
    fields = [field.name for field in dataclasses.fields(METHODS[name])]  # type: ignore[arg-type]
    values = {}
    for item in call.keywords:
        if item.arg not in fields:
            raise ValueError(f"{name} takes {', '.join(fields)}: it has no {item.arg or 'values in **'}")
        wanted = f"{item.arg} is {_short(item.value)}; give {_told(kinds[item.arg])}"
        try:
            values[item.arg] = ast.literal_eval(item.value)
        except (ValueError, TypeError):
            raise ValueError(f"cannot read methods {text!r}: {wanted}") from None
        if not _fits(values[item.arg], kinds[item.arg]):
            raise ValueError(f"{name} takes {', '.join(fields)}: {wanted}")
    try:
        return METHODS[name](**values)
    except ValueError as error:
        raise ValueError(f"cannot read methods {text!r}: {error}") from error


def _short(value: ast.expr) -> str:
    written = ast.unparse(value)
    return written if len(written) <= 40 else f"{written[:37]}..."


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; numbers must be finite and no larger than machines count."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(one, typing.get_args(kind)[0]) for one in value)
    if typing.get_args(kind):  # a union
        return any(_fits(value, one) for one in typing.get_args(kind))
    if kind is float:
        return (isinstance(value, float) and math.isfinite(value)) or _fits(value, int)
    return type(value) is kind and (kind is not int or abs(value) < 2**63)


def _told(kind: Any) -> str:
    """A type in words."""
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a word in quotes"}
    if typing.get_origin(kind) is tuple:
        return "whole numbers in parentheses, as (3, 5)"
    parts = [_told(one) for one in typing.get_args(kind)]
    return " or ".join(parts) if parts else words.get(kind, "None")


def _unreadable(text: str) -> ValueError:
    return ValueError(f"cannot read methods {text!r}: write them as damro(alpha=0.5),vtc_cls")

"""HTML that is escaped by construction: whatever is not `Markup` already is text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

VOID = frozenset({"meta", "img", "br", "wbr"})


class Markup(str):
    """Text that is HTML already. Only this module makes it from other text."""

    __slots__ = ()


def element(tag: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """An HTML or SVG element; children and attribute values are escaped, but `Markup` children are not.

    A trailing underscore of an attribute's name is dropped (`class_`), the others are hyphens. Attributes
    that are None are left out.

    >>> element("a", "fish & ", element("b", "chips"), class_="x", aria_label='"')
    '<a class="x" aria-label="&quot;">fish &amp; <b>chips</b></a>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>{'' if tag in VOID else f'{join(children)}</{tag}>'}")


def join(parts: Iterable[str]) -> Markup:
    """Parts one after the other, those that are no `Markup` escaped.

    >>> join(["<", element("br")])
    '&lt;<br>'
    """
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def listed(parts: Sequence[str]) -> Markup:
    """Parts as a sentence lists them.

    >>> listed(["recall", "F1", "CHAIRi"])
    'recall, F1 and CHAIRi'
    """
    if len(parts) < 2:
        return join(parts)
    inner = [piece for part in parts[:-1] for piece in (", ", part)][1:]
    return join([*inner, " and ", parts[-1]])


def style(css: str) -> Markup:
    """A style sheet of ours; it is not escaped, for a browser would not undo that."""
    if "</" in css:
        raise ValueError("a style sheet cannot hold </")
    return Markup(f"<style>\n{css}</style>")


def document(*children: str) -> str:
    """A whole page in English."""
    return f"<!doctype html>\n{element('html', *children, lang='en')}\n"


def _plain(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)

"""Puts methods on a loaded model and takes them off again."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import transformers

from lvlm_fix.encoding import Companion
from lvlm_fix.errors import AttachError, UnsupportedModelError
from lvlm_fix.methods.base import Method
from lvlm_fix.models import family_of
from lvlm_fix.models.base import Family
from lvlm_fix.pipeline import Pipeline

_ABSENT = object()


class Attachment:
    """Methods on a model; made by `attach`. Use it in a `with`, or call `detach()`."""

    def __init__(
        self,
        model: Any,
        methods: tuple[Method, ...],
        scores: Companion | None = None,
        compile: bool = False,
    ) -> None:
        family = check(model, methods)
        if scores is not None and not callable(getattr(scores, "maps", None)):
            raise AttachError(
                f"{type(scores).__name__} scores no pictures: pass scores=CLSFrom(open_clip_model)"
            )
        self.model, self.methods = model, methods
        prepared = tuple(method.prepare(model) for method in methods)
        with _naming_what_is_assumed(family):
            generator, encoder = family.generator(model), family.encoder(model)
            self._pipeline = Pipeline(model, family, prepared, generator.forward, scores, compile)
        self._attached = bool(methods)  # "auto" may have found none
        if not methods:
            return
        self._saved = [
            (owner, name, owner.__dict__.get(name, _ABSENT))
            for owner, name in ((generator, "forward"), (encoder, "get_image_features"))
        ]
        self._pipeline.install()
        generator.forward = _like(self._pipeline.forward, generator.forward, self)
        encoder.get_image_features = _like(
            self._pipeline.encoder.get_image_features, encoder.get_image_features, self
        )

    @property
    def report(self) -> dict[str, list[dict[str, Any]]]:
        """What each method did in the last prefill, by method name, as plain numbers.

        One entry an image (`kept`, `outliers`) or a prompt (`sinks`, `heads`, `ratios`, `bytes`; with a gate, for how
        many of its `tokens` DAMRO `contrasted`); `prompt` is its row. `sinks` are numbers among the row's own tokens as
        the decoder saw them, after pruning and without padding; `image_sinks` among its kept image tokens; `bytes` and
        `full_bytes` are those of the row alone. In a batch without pictures each beam counts as a prompt.
        """
        return {} if self._pipeline.report is None else self._pipeline.report.plain()

    @property
    def pipeline(self) -> Pipeline:
        """What runs the methods, and what it last saw."""
        return self._pipeline

    def detach(self) -> None:
        """Take the methods off: hooks, forward pass and all else are exactly as before. Calling it twice is fine."""
        if not self._attached:
            return
        for owner, name, value in self._saved:
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._pipeline.remove()
        self._attached = False

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def check(model: Any, methods: tuple[Method, ...]) -> Family:
    """The model's family, once it is clear that the methods can be attached."""
    for method in methods:
        if not isinstance(method, Method):
            raise AttachError(
                f"{method!r} is not a method: pass instances such as DAMRO() or VTCCLS(keep=64)"
            )
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AttachError(f"{', '.join(twice)} is given more than once: pass each method once")
    family = family_of(model)
    for name in names:
        if name in family.unsupported:
            raise UnsupportedModelError(f"{name} makes no sense on {family.name}: {family.unsupported[name]}")
    carried = getattr(family.generator(model).forward, "_lvlm_fix", None)
    if carried is not None:
        raise AttachError(
            f"the model already carries {', '.join(map(repr, carried.methods))}: leave that `with` or call its "
            "detach(), or give all methods to one attach"
        )
    for method in methods:
        for other, reason in method.conflicts.items():
            if other in names:
                warnings.warn(f"{method.name} with {other}: {reason}", stacklevel=4)
    return family


@contextmanager
def _naming_what_is_assumed(family: Family) -> Iterator[None]:
    """Families reach for parts of a model by transformers' names; a part that is not there is told as such."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"lvlm-fix does not find its way in this {family.name} model: {error}; it assumes the parts and names that "
            f"transformers 5.17 to 5.24 give it, and this is {transformers.__version__}"
        ) from error


def _like(function: Any, original: Any, owner: Attachment) -> Any:
    """`function` with the signature of `original`, which transformers inspects, marked as ours."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    wrapped.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    wrapped._lvlm_fix = owner  # type: ignore[attr-defined]
    return wrapped

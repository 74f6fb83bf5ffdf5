"""Puts methods on a loaded model and takes them off again."""

from __future__ import annotations

import functools
import inspect
import warnings
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from lvlm_fix.errors import AttachError
from lvlm_fix.methods.base import Method
from lvlm_fix.models import family_of
from lvlm_fix.pipeline import Pipeline

_ABSENT = object()


class Attachment:
    """Methods on a model; made by `attach`. Use it in a `with`, or call `detach()`."""

    def __init__(self, model: Any, methods: tuple[Method, ...]) -> None:
        _check(model, methods)
        family = family_of(model)
        self.model, self.methods = model, methods
        self._pipeline = Pipeline(model, family, methods, model.forward)
        self._encoder = family.encoder(model)
        self._saved = [
            (model, "forward", model.__dict__.get("forward", _ABSENT)),
            (self._encoder, "get_image_features", self._encoder.__dict__.get("get_image_features", _ABSENT)),
        ]
        self._pipeline.recorder.install()
        model.forward = _like(self._pipeline.forward, model.forward, self)
        self._encoder.get_image_features = _like(
            self._pipeline.get_image_features, self._encoder.get_image_features, self
        )
        self._attached = True

    @property
    def report(self) -> dict[str, list[dict[str, Any]]]:
        """What each method did in the last prefill, by method name, one entry an image, as plain numbers."""
        return {
            name: [{key: _plain(value) for key, value in entry.items()} for entry in entries]
            for name, entries in self._pipeline.report.items()
        }

    def detach(self) -> None:
        """Take the methods off: hooks, forward pass and all else are exactly as before. Calling it twice is fine."""
        if not self._attached:
            return
        for owner, name, value in self._saved:
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._pipeline.recorder.remove()
        self._attached = False

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(model: nn.Module, *methods: Method) -> Attachment:
    """Put methods on a loaded Hugging Face model, in any order; `model.generate` then runs with them.

    Greedy decoding, sampling, beams, batches of left-padded prompts, several images in a prompt and streamers work
    as without. Only next-token logits of the last position are contrasted; with image tokens pruned, a bare
    `model(**inputs)` returns logits of the pruned prompt.

    Args:
        model: a model of a supported family, as `load` or transformers give it.
        methods: instances of `DAMRO`, `VTCCLS`, ...; each kind at most once.

    Returns:
        A handle: leave its `with`, or call `detach()`, and the model is what it was. `report` tells what was done.

    Raises:
        UnsupportedModelError: the model is of no supported family; the message names them.
        AttachError: no method, the same method twice, or a model that already carries methods.

    >>> from lvlm_fix import VTCCLS, attach, load
    >>> model, processor = load()
    >>> with attach(model, VTCCLS(keep=64)) as fix:
    ...     fix.methods
    (VTCCLS(keep=64, start_layer=-4),)
    """
    return Attachment(model, methods)


def _check(model: Any, methods: tuple[Method, ...]) -> None:
    if not methods:
        raise AttachError("attach needs at least one method, such as attach(model, VTCCLS(keep=64))")
    for method in methods:
        if not isinstance(method, Method):
            raise AttachError(
                f"{method!r} is not a method: pass instances such as DAMRO() or VTCCLS(keep=64)"
            )
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AttachError(f"{', '.join(twice)} is given more than once: pass each method once")
    carried = getattr(getattr(model, "forward", None), "_lvlm_fix", None)
    if carried is not None:
        raise AttachError(
            f"the model already carries {', '.join(map(repr, carried.methods))}: leave that `with` or call its "
            "detach(), or give all methods to one attach"
        )
    for method in methods:
        for other, reason in method.conflicts.items():
            if other in names:
                warnings.warn(f"{method.name} with {other}: {reason}", stacklevel=4)


def _like(function: Any, original: Any, owner: Attachment) -> Any:
    """`function` with the signature of `original`, which transformers inspects, marked as ours."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    wrapped.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    wrapped._lvlm_fix = owner  # type: ignore[attr-defined]
    return wrapped


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value

"""Puts methods on a loaded model and takes them off again."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import nn

from lvlm_fix.encoding import Companion
from lvlm_fix.errors import AttachError, PremiseWarning, UnsupportedModelError
from lvlm_fix.methods.base import Method
from lvlm_fix.models import family_of
from lvlm_fix.models.base import Family
from lvlm_fix.pictures import Picture
from lvlm_fix.pipeline import Pipeline

_ABSENT = object()


class Attachment:
    """Methods on a model; made by `attach`. Use it in a `with`, or call `detach()`."""

    def __init__(self, model: Any, methods: tuple[Method, ...], scores: Companion | None = None) -> None:
        family = _check(model, methods)
        self.model, self.methods = model, methods
        generator, encoder = family.generator(model), family.encoder(model)
        prepared = tuple(method.prepare(model) for method in methods)
        self._pipeline = Pipeline(model, family, prepared, generator.forward, scores)
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

        One entry an image (`kept`, `outliers`) or a prompt (`sinks`, `heads`, `ratios`, `bytes`); `prompt` is its row.
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


def attach(
    model: nn.Module,
    *methods: Method | str,
    scores: Companion | None = None,
    processor: Any = None,
    images: Sequence[Picture] | None = None,
) -> Attachment:
    """Put methods on a loaded Hugging Face model, in any order; `model.generate` then runs with them.

    Greedy decoding, sampling, beams, batches of left-padded prompts, several images in a prompt and streamers work
    as without. Only next-token logits of the last position are contrasted; with image tokens pruned, a bare
    `model(**inputs)` returns logits of the pruned prompt. Where a method's premise fails on the first pictures, a
    `PremiseWarning` says so once.

    `attach(model, "auto")` attaches the methods whose premise holds, see `diagnose`; of DAMRO and VTC-CLS, which pull
    against each other, DAMRO: its premise holds only where CLS looks at the background, and VTC-CLS would keep that.
    If none holds, it warns, and the handle's `methods` are empty. What the model is like on the pictures that ship
    is found out once for each model object.

    Args:
        model: a model of a supported family, as `load` or transformers give it.
        methods: instances of `DAMRO`, `VAR`, `VTCCLS`, `ZipVL`, each kind at most once; or only `"auto"`.
        scores: what scores image tokens instead of the model's own vision tower, such as `CLSFrom(open_clip_model)`.
        processor: for `"auto"`, the model's; None loads it from where the model came from.
        images: for `"auto"`, a few pictures like those that will be asked about; None for some that ship.

    Returns:
        A handle: leave its `with`, or call `detach()`, and the model is what it was. `report` tells what was done.

    Raises:
        UnsupportedModelError: the model is of no supported family; the message names them.
        AttachError: no method, the same method twice, or a model that already carries methods; `"auto"` beside other
            methods, or without a processor that can be found.

    >>> from lvlm_fix import VTCCLS, attach, load
    >>> model, processor = load()
    >>> with attach(model, VTCCLS(keep=64)) as fix:
    ...     fix.methods
    (VTCCLS(keep=64, start_layer=-4),)
    """
    if not methods:
        raise AttachError("attach needs at least one method, such as attach(model, VTCCLS(keep=64))")
    if "auto" in methods:
        methods = _chosen(model, methods, scores, processor, images)
    return Attachment(model, methods, scores)  # type: ignore[arg-type]  # _check refuses what is no method


def _chosen(
    model: nn.Module,
    methods: tuple[Method | str, ...],
    scores: Companion | None,
    processor: Any,
    images: Sequence[Picture] | None,
) -> tuple[Method, ...]:
    from lvlm_fix.diagnosis import diagnosed

    if len(methods) > 1:
        raise AttachError('"auto" chooses the methods: pass it alone, attach(model, "auto")')
    _check(model, ())
    chosen = diagnosed(model, processor, images, scores).chosen
    if not chosen:
        warnings.warn(
            "no method's premise holds for this model: none is attached (see `lvlm-fix diagnose`)",
            PremiseWarning,
            stacklevel=3,
        )
    return chosen


def _check(model: Any, methods: tuple[Method, ...]) -> Family:
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


def _like(function: Any, original: Any, owner: Attachment) -> Any:
    """`function` with the signature of `original`, which transformers inspects, marked as ours."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    wrapped.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    wrapped._lvlm_fix = owner  # type: ignore[attr-defined]
    return wrapped

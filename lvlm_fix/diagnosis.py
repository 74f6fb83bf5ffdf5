"""Does what each method rests on hold for a model? Measured on a few unlabelled pictures, one prefill each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import AutoProcessor, ProcessorMixin

from lvlm_fix import premises
from lvlm_fix.encoding import Companion
from lvlm_fix.errors import AttachError
from lvlm_fix.loading import EMBEDDED, embedded_folder
from lvlm_fix.methods import DAMRO, METHODS, VAR, VTCCLS, Method, ZipVL
from lvlm_fix.models import family_of
from lvlm_fix.observation import Observer, View, observed, tokens_seen, view_of
from lvlm_fix.pictures import Picture, open_picture
from lvlm_fix.premises import Premise, Seen
from lvlm_fix.prompting import model_inputs
from lvlm_fix.sinks import SinkDims, find_sink_dims

BY_LAYER = (
    (VAR.name, "image_sinks_by_layer", "image sinks"),
    (VAR.name, "image_heads_by_layer", "share of heads that give the image 20 %"),
    (VAR.name, "image_centric_heads_by_layer", "share of heads that VAR would change"),
    (ZipVL.name, "needed_by_layer", "share of tokens that hold 97.5 % of the attention"),
)
"""What is told by layer: method, key of the premise's numbers, title."""

_DIAGNOSED: WeakKeyDictionary[nn.Module, Diagnosis] = WeakKeyDictionary()


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found: `str()` and `table()` are for people, `to_dict()` for programs, `picture()` draws it.

    Attributes:
        model: name of the model.
        pictures: how many were looked at.
        premises: by the method's name, whether its premise holds, with the numbers.
        methods: one of each method whose premise holds, as it was judged: with the paper's defaults. DAMRO and VTC-CLS
            may both be here.
        sinks: the decoder's sink dimensions.
        views: a crop of each picture, for `picture`.
    """

    model: str
    pictures: int
    premises: dict[str, Premise]
    methods: tuple[Method, ...]
    sinks: SinkDims
    views: tuple[View, ...] = field(repr=False, default=())

    @property
    def chosen(self) -> tuple[Method, ...]:
        """What `attach(model, "auto")` attaches: `methods` without VTC-CLS where DAMRO's premise holds as well."""
        both = self.premises[DAMRO.name].holds
        return tuple(method for method in self.methods if not (both and isinstance(method, VTCCLS)))

    def table(self) -> str:
        """One line a method: whether its premise holds, and why."""
        width = max(len(name) for name in self.premises)
        verdict = {True: "holds", False: "fails"}
        return "\n".join(
            f"{name:{width}}  {verdict[premise.holds]}  {premise.sentence}"
            for name, premise in self.premises.items()
        )

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.pictures} picture{'s' * (self.pictures != 1)}", self.table()]
        for name, key, title in BY_LAYER:
            values = self.premises[name].numbers.get(key)
            if values is not None:
                lines.append(f"{title}, by layer: {' '.join(f'{value:.2g}' for value in values)}")
        names = ", ".join(method.name for method in self.chosen) or "nothing"
        return "\n".join([*lines, f'attach(model, "auto") attaches {names}'])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as plain numbers."""
        sinks = asdict(self.sinks)
        del sinks["profile"]
        return {
            "model": self.model,
            "pictures": self.pictures,
            "methods": {name: asdict(premise) for name, premise in self.premises.items()},
            "sink_dims": sinks,
            "auto": [method.name for method in self.chosen],
        }

    def picture(self, path: str | Path) -> None:
        """Draw the pictures with CLS attention, outliers and kept tokens, and charts by layer, as a PNG."""
        from lvlm_fix.diagnosis_plot import draw_diagnosis

        draw_diagnosis(self, path)


def diagnose(
    model: Any,
    processor: Any,
    images: Sequence[Picture] | Picture,
    *,
    question: str = "Describe the image.",
    scores: Companion | None = None,
) -> Diagnosis:
    """Measure on a few pictures, which need no labels, whether the premise of each method holds.

    Each picture is run once, up to the first word of the answer; the model is read, not changed.

    Args:
        model: a model of a supported family that carries no methods.
        processor: the model's.
        images: paths or Pillow images; five or more make the verdict on DAMRO firm.
        question: what is asked about each of them.
        scores: as in `attach`.

    Raises:
        UnsupportedModelError: the model is of no supported family.
        AttachError: the model carries methods.
        PictureError: a picture cannot be read.
        ValueError: there is no picture.

    >>> from PIL import Image
    >>> from lvlm_fix import load
    >>> diagnose(*load(), [Image.new("RGB", (144, 144), "teal")]).premises["zipvl"].holds
    False
    """
    family = family_of(model)
    pictures: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    if not pictures:
        raise ValueError("diagnose needs at least one picture: pass images=[...]")
    opened = [(_name(one, number), open_picture(one)) for number, one in enumerate(pictures, 1)]
    observer = Observer(find_sink_dims(model))
    candidates: dict[str, Method] = {name: method() for name, method in METHODS.items()}
    seen: list[Seen] = []
    views: list[View] = []
    for name, image in opened:
        inputs = model_inputs(model, processor, [[image]], [question])
        encoded, states = observed(model, family, observer, inputs, scores)
        own = tokens_seen(model, family, encoded, states)
        if len(own[0].vision.layer_scores) < 4:  # VTC-CLS's default needs four
            candidates[VTCCLS.name] = VTCCLS(start_layer=0)
        pruning = None if VTCCLS.name in family.unsupported else candidates[VTCCLS.name]
        view = view_of(model, family, processor, name, encoded, own, pruning)
        views += [] if view is None else [view]
        seen += own
    found = {
        DAMRO.name: premises.damro(seen, candidates[DAMRO.name]),  # type: ignore[arg-type]
        VAR.name: _var(observer),
        VTCCLS.name: premises.vtc_cls(seen, candidates[VTCCLS.name]),  # type: ignore[arg-type]
        ZipVL.name: _zipvl(observer),
    }
    for name, reason in family.unsupported.items():
        found[name] = Premise(name, False, {}, f"it makes no sense on {family.name}: {reason}")
    return Diagnosis(
        _title(model),
        len(opened),
        {name: found[name] for name in METHODS},
        tuple(method for name, method in candidates.items() if found[name].holds),
        observer.sinks,
        tuple(views),
    )


def diagnosed(
    model: Any, processor: Any, images: Sequence[Picture] | None, scores: Companion | None
) -> Diagnosis:
    """For `attach(model, "auto")`: on the caller's pictures, or, once for each model object, on those that ship."""
    if images is None and scores is None and model in _DIAGNOSED:
        return _DIAGNOSED[model]
    found = diagnose(model, processor or _processor_of(model), images or sample_pictures(), scores=scores)
    if images is None and scores is None:
        _DIAGNOSED[model] = found
    return found


def sample_pictures() -> list[Path]:
    """The pictures that ship with the package."""
    return sorted((embedded_folder().parent / "samples").glob("*.png"))


def _processor_of(model: Any) -> Any:
    """The processor from where the model came from.

    Raises:
        AttachError: there is none.
    """
    place = getattr(model, "name_or_path", "")
    missing = AttachError(
        f'"auto" looks at pictures, and no processor was found at {place!r}: pass it, attach(model, "auto", '
        "processor=processor)"
    )
    if not place:  # made in memory
        raise missing
    try:
        found = AutoProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise missing from error
    if not isinstance(found, ProcessorMixin):  # transformers falls back on a tokenizer
        raise missing
    return found


def _var(observer: Observer) -> Premise:
    dims = observer.sinks.dims
    if observer.refused is not None:
        return Premise(VAR.name, False, {"sink_dims": list(dims)}, observer.refused)
    image_sinks, heads = observer.by_layer("image_sinks"), observer.by_layer("centric_heads")
    found = premises.var(dims, image_sinks, heads, range(observer.var.first_layer, len(heads) - 1))
    further = {
        "threshold": observer.sinks.threshold,
        "image_heads_by_layer": observer.by_layer("image_heads"),
    }
    return replace(found, numbers=found.numbers | further)


def _zipvl(observer: Observer) -> Premise:
    if observer.refused is not None:
        return Premise(ZipVL.name, False, {}, observer.refused)
    return premises.zipvl(observer.by_layer("needed"), observer.zipvl.tau)


def _name(picture: Picture, number: int) -> str:
    return Path(picture).name if isinstance(picture, str | Path) else f"picture {number}"


def _title(model: Any) -> str:
    place = Path(getattr(model, "name_or_path", ""))
    return EMBEDDED if place == embedded_folder() else place.name or type(model).__name__

"""What happens when a visitor does something: the page's events, over the service."""

from __future__ import annotations

import html
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from PIL import Image

from lvlm_fix.demo import bounds, figures, measured, pieces, scores, settings, tables
from lvlm_fix.demo.api import shown as for_the_page
from lvlm_fix.demo.looking import Look
from lvlm_fix.demo.samples import samples, truth_of
from lvlm_fix.demo.service import Said, Service
from lvlm_fix.demo.settings import PRESETS
from lvlm_fix.errors import UnsupportedModelError


class Handlers:
    """The events of one page. Inputs come in the order in which the page names its components."""

    def __init__(self, service: Service) -> None:
        self.service, self.diagnosis = service, service.diagnosis()
        self.categories = service.categories()
        self.summaries = scores.summaries()

    async def side_by_side(
        self, picture: Image.Image | None, question: str, tokens: float, *values: Any
    ) -> AsyncIterator[list[Any]]:
        """The two answers as they are said, then what the model looked at."""
        image, asked = bounds.picture(picture), bounds.question(question)
        count, fix = bounds.tokens(tokens), bounds.methods(settings.fix_of(values))
        shown: list[Any] = [
            pieces.status("The plain model answers.", running=True),
            pieces.waiting(),
            pieces.waiting(),
            "",
            "",
            None,
        ]
        yield shown
        said: dict[str, Said] = {}
        for place, (which, methods) in enumerate((("plain", []), ("fixed", fix)), 1):
            async for news in self.service.answers(image, asked, methods, count):
                if isinstance(news, Said):
                    said[which] = news
                    shown[place] = pieces.answer(news)
                    now = "The methods are on." if which == "plain" else "Reading attention."
                    shown[0] = pieces.status(now, running=True)
                else:
                    shown[place] = pieces.beginning(news)
                yield shown
        looks: dict[str, Look] = {}
        try:
            for place, (which, methods) in enumerate((("plain", []), ("fixed", fix)), 1):
                looks[which] = await self.service.look(image, asked, said[which], methods)
                shown[place] = pieces.answer(said[which], looks[which])
        except UnsupportedModelError as error:
            shown[4] = pieces.waiting(str(error))
        else:
            shown[4] = figures.looked(looks["fixed"], said["fixed"], fix)
        shown[0] = pieces.status(
            "Done. Click a word to see what the model looked at for it." if looks else "Done."
        )
        shown[5] = {which: (said[which], look) for which, look in looks.items()}
        yield shown

    async def ask_all(self, picture: Image.Image | None, *values: Any) -> AsyncIterator[str]:
        """The probe's table, as it grows."""
        image, fix = bounds.picture(picture), bounds.methods(settings.fix_of(values))
        plain: dict[str, float] = {}
        fixed: dict[str, float] = {}
        truth = truth_of(image)
        everything = 2 * len(self.categories)
        for values_of, methods in ((plain, []), (fixed, fix)):
            async for some in self.service.probe(image, self.categories, methods):
                values_of |= some
                yield tables.probe_table(plain, fixed, truth, everything - len(plain) - len(fixed))

    def about(self, fix: str) -> str:
        """What is switched on, and what it did where it was measured."""
        return pieces.about(fix, measured.line(self.summaries, scores.SCORED_AS.get(fix, fix)))

    def choose(self, preset: str) -> list[Any]:
        """What a preset sets the controls to."""
        if preset not in PRESETS:
            raise for_the_page(
                ValueError(f"there is no preset {preset!r:.40}: choose one of {', '.join(PRESETS)}")
            )
        return settings.values_of(PRESETS[preset])

    def describe(self, picked: str | None, question: str, tokens: float, *values: Any) -> list[Any]:
        """The Python, the link, the warnings, the preset if it is one, and the measurements of a setting."""
        try:
            text = settings.fix_of(values)
            fix, asked = bounds.methods(text), bounds.question(question)
            count = bounds.tokens(tokens)
        except ValueError as error:
            return [f"# {error}", "", "", gr.skip(), gr.skip()]
        sample = samples().get(picked or "")
        code = settings.python(fix, sample.file if sample else None, asked, count, self.service.name)
        query = settings.link(text, sample.name if sample else None, asked, count)
        return [
            code,
            pieces.share(query, sample is not None),
            pieces.notes(fix, self.diagnosis, self.service.name),
            next((name for name, own in PRESETS.items() if own == text), None),
            self.about(text),
        ]

    def restore(self, request: gr.Request) -> list[Any]:
        """The page as a share link says; what it does not say, or says wrongly, stays as it is.

        Returns picture, samples, the picked sample's name, question, tokens, and the controls' values.
        """
        query = dict(request.query_params)
        unchanged: list[Any] = [gr.skip()] * len(settings.defaults())
        sample = _restored(query, "picture", _sample)
        picked = sample or samples()[settings.PICTURE]
        return [
            gr.skip() if sample is None else gr.Image(sample.image, alt_text=sample.alt),
            pieces.samples_row(picked.name),
            picked.name,
            _restored(query, "question", bounds.question) or gr.skip(),
            _restored(query, "tokens", lambda text: bounds.tokens(_number(text))) or gr.skip(),
            *(_restored(query, "fix", _values) or unchanged),
        ]


def _restored(query: dict[str, str], name: str, read: Callable[[str], Any]) -> Any:
    """What a link says of one thing; None where it says nothing, or nothing that can be used."""
    if name not in query:
        return None
    try:
        return read(query[name])
    except ValueError as error:
        gr.Warning(html.escape(f"The link's {name} could not be used: {error}"))
        return None


def _sample(name: str) -> Any:
    if name not in samples():
        raise ValueError(f"there is no sample {name!r:.40}: the samples are {', '.join(samples())}")
    return samples()[name]


def _values(fix: str) -> list[Any]:
    bounds.methods(fix)
    return settings.values_of(fix)


def _number(text: Any) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"tokens must be a number, not {text!r:.40}") from None


def pick(event: gr.EventData) -> list[Any]:
    """A sample was clicked: the picture, and the sample's name."""
    found = samples().get(str(getattr(event, "pick", "")))
    if found is None:
        return [gr.skip(), gr.skip()]
    return [gr.Image(found.image, alt_text=found.alt), found.name]


def own_picture() -> list[Any]:
    """The visitor brought a picture, or took it away: no sample is shown any more."""
    return [gr.Image(alt_text=pieces.OWN_ALT), None]


def check(picture: Image.Image | None) -> None:
    """Nothing: that the picture could be read is all that is asked."""


def word_of(which: str) -> Any:
    """What shows a word of the plain or the fixed answer once it is clicked."""

    def show(seen: dict[str, tuple[Said, Look]] | None, event: gr.EventData) -> Any:
        number = str(getattr(event, "pick", ""))
        said, look = (seen or {}).get(which, (None, None))
        if said is None or look is None or not number.isdecimal() or int(number) >= len(look.words):
            return gr.skip()
        return figures.word(look, said, int(number))

    return show

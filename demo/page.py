"""The page: what a visitor sees and clicks, tied to the service."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lvlm_fix.demo import bounds, handlers, measured, pieces, scores, scripts, settings
from lvlm_fix.demo.api import DESCRIPTIONS, Endpoints, shown_one_by_one, told
from lvlm_fix.demo.picture_input import PictureInput
from lvlm_fix.demo.samples import samples
from lvlm_fix.demo.service import Service
from lvlm_fix.demo.settings import PANELS, PRESETS
from lvlm_fix.demo.slider_input import SliderInput

PICTURES: dict[str, Any] = {"concurrency_id": "pictures", "concurrency_limit": 1}
"""Of events that decode a picture outside the model's turns: one at a time, for each may take a hundred MB."""

MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""Of events that need the model: they wait in one queue, in the order in which they came."""

INSTANT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

INTRO = (
    "# lvlm-fix\n"
    "Vision-language models describe things that are not in the picture. These four published methods change how a "
    "model looks while it answers; nothing is trained. Pick a picture, switch methods on, and compare. "
    "The page opens on a picture and a preset chosen to show a difference; **Results** has the average."
)

PRESETS_ARE = (
    "Measured on the embedded model: "
    + "; ".join(f"“{name}” has {rule}" for name, (rule, _) in scores.RULES.items())
    + "."
)


class Page:
    """Builds the interface over a service. `blocks` is what is launched."""

    def __init__(self, service: Service) -> None:
        self.service, self.categories = service, service.categories()
        self.handlers = handlers.Handlers(service)
        with gr.Blocks(
            title="lvlm-fix: see what an LVLM looks at",
            analytics_enabled=False,
            delete_cache=(600, 3600),
        ) as self.blocks:
            gr.Markdown(INTRO, elem_id="intro")
            with gr.Tab("Try it", id="try"):
                self._try()
            with gr.Tab("Probe", id="probe"):
                self._probe()
            with gr.Tab("Results", id="results"):
                gr.HTML(measured.results(self.handlers.summaries), elem_id="results")
            with gr.Tab("The methods", id="methods"):
                gr.HTML(pieces.cards(self.handlers.diagnosis), elem_id="cards")
            self._events()
            self._api()

    def _try(self) -> None:
        first = samples()[settings.PICTURE]
        self.picked = gr.State(None, time_to_live=3600)  # the sample's name; None is a picture of one's own
        self.seen = gr.State(None, time_to_live=3600)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.picture = PictureInput(
                    first.image, label="Picture", sources=["upload", "clipboard", "webcam"], format="png", height=260,
                    elem_id="picture", alt_text=first.alt, buttons=[],
                )  # fmt: skip
                self.samples = gr.HTML(
                    pieces.samples_row(settings.PICTURE), js_on_load=pieces.CLICK_ON, elem_id="samples"
                )
                self.question = gr.Textbox(
                    settings.QUESTION,
                    label="Question",
                    max_length=bounds.LONGEST_QUESTION,
                    elem_id="question",
                )
                with gr.Row():
                    self.run = gr.Button("Compare", variant="primary", elem_id="run")
                    self.stop = gr.Button("Stop", elem_id="stop")
                self._controls()
            with gr.Column(scale=3, min_width=320):
                self._answers()

    def _answers(self) -> None:
        self.status = gr.HTML(pieces.status(""), elem_id="status")
        self.answers: dict[str, gr.HTML] = {}
        with gr.Row(elem_id="answers"):
            for which, title in (("plain", "Plain model"), ("fixed", "With the methods")):
                with gr.Column(min_width=260):
                    gr.Markdown(f"### {title}")
                    self.answers[which] = gr.HTML(
                        pieces.waiting("Press Compare."), js_on_load=pieces.CLICK_ON, elem_id=which
                    )
        self.word = gr.HTML("", elem_id="word")
        self.looked = gr.HTML("", elem_id="looked")
        self.code = gr.Code(
            language="python",
            label="The same in Python",
            elem_id="code",
            interactive=False,
            wrap_lines=True,
        )
        self.link = gr.HTML("", elem_id="link")

    def _controls(self) -> None:
        self.preset = gr.Radio(
            list(PRESETS), value=settings.OPENING, label="Preset", elem_id="preset", info=PRESETS_ARE,
        )  # fmt: skip
        self.about = gr.HTML(self.handlers.about(settings.fix_of(settings.defaults())), elem_id="about")
        self.notes = gr.HTML("", elem_id="notes")
        values = iter(settings.defaults())
        self.values: list[Any] = []
        for name, panel in PANELS.items():
            with gr.Group(elem_classes="method", elem_id=f"method-{name}"):
                on = gr.Checkbox(
                    next(values),
                    label=f"{panel.title}: {panel.cures}",
                    info=panel.plainly,
                    elem_id=f"on-{name}",
                )
                gr.HTML(pieces.paper(name))
                with gr.Accordion("Settings", open=False):
                    sliders = [
                        gr.Checkbox(bool(next(values)), label=one.label, info=one.info)
                        if not one.step
                        else SliderInput(
                            one.least, one.most, next(values), step=one.step, label=one.label, info=one.info
                        )
                        for one in panel.controls
                    ]
            self.values += [on, *sliders]
        self.tokens = SliderInput(
            1,
            bounds.MOST_TOKENS,
            settings.TOKENS,
            step=1,
            label="Longest answer, in tokens",
            elem_id="tokens",
        )

    def _probe(self) -> None:
        gr.Markdown(
            f"“Is there a … in the image?” for {len(self.categories)} categories, about the picture of the first tab, "
            "with and without its methods. The rows on which they disagree most come first."
        )
        with gr.Row():
            self.ask = gr.Button("Probe", variant="primary", elem_id="ask")
            self.stop_probe = gr.Button("Stop", elem_id="stop-probe")
        self.table = gr.HTML("", elem_id="probe-table")

    def _events(self) -> None:
        """Ties what is clicked to what happens."""
        described = [self.picked, self.question, self.tokens, *self.values]
        description = [self.code, self.link, self.notes, self.preset, self.about]
        self.preset.input(self.handlers.choose, self.preset, self.values, **INSTANT)
        gr.on(
            [one.change for one in (*self.values, self.tokens, self.question)],
            self.handlers.describe, described, description, trigger_mode="always_last", **INSTANT,
        )  # fmt: skip
        started, probing = self._runs(), self._probes()
        shown = [self.status, *self.answers.values(), self.table]
        again = (self.handlers.describe, described, description)
        self.samples.click(handlers.pick, None, [self.picture, self.picked], **INSTANT).then(
            *again, **INSTANT
        )
        for change in (self.samples.click, self.picture.input, self.picture.clear):
            change(None, shown, shown, js=scripts.OTHER_PICTURE, **INSTANT)
            change(None, None, None, cancels=[started, probing], **INSTANT)
        for change in (self.picture.input, self.picture.clear):
            change(None, None, None, js=scripts.NO_SAMPLE, **INSTANT)
            change(handlers.own_picture, None, [self.picture, self.picked], **INSTANT).then(*again, **INSTANT)
        self.picture.input(handlers.check, self.picture, None, api_visibility="private", **PICTURES)
        for which, box in self.answers.items():
            box.click(handlers.word_of(which), self.seen, self.word, **INSTANT)
        self.blocks.load(
            self.handlers.restore,
            None,
            [self.picture, self.samples, self.picked, self.question, self.tokens, *self.values],
            # queued, for a warning reaches the page over the queue only
            show_progress="hidden",
            api_visibility="private",
        ).then(*again, **INSTANT)

    def _runs(self) -> Any:
        shown = [self.status, *self.answers.values()]
        asked = [self.run.click, self.question.submit]
        gr.on(asked, None, None, [*shown, self.word, self.looked], js=scripts.STARTED, **INSTANT)
        started = gr.on(
            asked,
            shown_one_by_one(self.handlers.side_by_side),
            [self.picture, self.question, self.tokens, *self.values],
            [*shown, self.word, self.looked, self.seen],
            show_progress="minimal", show_progress_on=self.status, api_visibility="private", **MODEL,
        )  # fmt: skip
        started.failure(None, shown, shown, js=scripts.FAILED, **INSTANT)
        # first what is shown: the cancelled run counts as failed, which is shown differently
        self.stop.click(None, shown, shown, js=scripts.STOPPED, **INSTANT)
        self.stop.click(None, None, None, cancels=[started], **INSTANT)
        return started

    def _probes(self) -> Any:
        self.ask.click(None, None, self.table, js=scripts.PROBE_STARTED, **INSTANT)
        started = self.ask.click(
            shown_one_by_one(self.handlers.ask_all), [self.picture, *self.values], self.table,
            show_progress="minimal", api_visibility="private", **MODEL,
        )  # fmt: skip
        started.failure(None, self.table, self.table, js=scripts.PROBE_FAILED, **INSTANT)
        self.stop_probe.click(None, self.table, self.table, js=scripts.PROBE_STOPPED, **INSTANT)
        self.stop_probe.click(None, None, None, cancels=[started], **INSTANT)
        return started

    def _api(self) -> None:
        """Endpoints for programs, over components that the page does not show."""
        endpoints = Endpoints(self.service, self.categories)
        with gr.Group(visible=False):
            picture = PictureInput(label="picture", format="png")
            question = gr.Textbox(settings.QUESTION, label="question")
            fix = gr.Textbox("none", label="fix")
            tokens = gr.Number(settings.TOKENS, label="max_new_tokens")
            result, button = gr.JSON(label="result"), gr.Button()
            inputs = {
                "answer": [picture, question, fix, tokens],
                "compare": [picture, question, fix, tokens],
                "probe": [picture, fix],
            }
            for name, given in inputs.items():
                button.click(
                    told(getattr(endpoints, name)), given, result,
                    api_name=name, api_description=DESCRIPTIONS[name], **MODEL,
                )  # fmt: skip

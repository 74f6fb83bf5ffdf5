"""The page: what a visitor sees and clicks, tied to the service."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lvlm_fix.demo import bounds, handlers, pieces, settings, tables
from lvlm_fix.demo.api import DESCRIPTIONS, Endpoints, told, told_one_by_one
from lvlm_fix.demo.picture_input import PictureInput
from lvlm_fix.demo.samples import samples
from lvlm_fix.demo.service import Service
from lvlm_fix.demo.settings import PANELS, PRESETS

MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""Of events that need the model: they wait in one queue, in the order in which they came."""

INSTANT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

TO_ANSWERS = (
    "() => { if (innerWidth < 640) document.getElementById('status').scrollIntoView({block: 'start'}); }"
)
"""JavaScript: on a phone the answers stand below the switches."""

INTRO = (
    "# lvlm-fix\n"
    "Vision-language models describe things that are not in the picture. These four published methods change how a "
    "model looks while it answers; nothing is trained. Pick a picture, switch methods on, and compare."
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
                gr.HTML(tables.results(self.handlers.summaries), elem_id="results")
            with gr.Tab("The methods", id="methods"):
                gr.HTML(pieces.cards(self.handlers.diagnosis), elem_id="cards")
            self._api()
            self._load()

    def _try(self) -> None:
        first = samples()[settings.PICTURE]
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.picture = PictureInput(
                    first.image, label="Picture", sources=["upload", "clipboard", "webcam"], format="png", height=260,
                    elem_id="picture", alt_text=first.alt, buttons=[],
                )  # fmt: skip
                sample = gr.HTML(pieces.samples_row(), js_on_load=pieces.CLICK_ON, elem_id="samples")
                self.question = gr.Textbox(
                    settings.QUESTION,
                    label="Question",
                    max_length=bounds.LONGEST_QUESTION,
                    elem_id="question",
                )
                with gr.Row():
                    run = gr.Button("Compare", variant="primary", elem_id="run")
                    stop = gr.Button("Stop", elem_id="stop")
                self._controls()
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(pieces.status(""), elem_id="status")
                with gr.Row(elem_id="answers"):
                    with gr.Column(min_width=260):
                        gr.Markdown("### Plain model")
                        plain = gr.HTML(
                            pieces.waiting("Press Compare."), js_on_load=pieces.CLICK_ON, elem_id="plain"
                        )
                    with gr.Column(min_width=260):
                        gr.Markdown("### With the methods")
                        fixed = gr.HTML(
                            pieces.waiting("Press Compare."), js_on_load=pieces.CLICK_ON, elem_id="fixed"
                        )
                word = gr.HTML("", elem_id="word")
                looked = gr.HTML("", elem_id="looked")
                self.code = gr.Code(
                    language="python",
                    label="The same in Python",
                    elem_id="code",
                    interactive=False,
                    wrap_lines=True,
                )
                self.link = gr.HTML("", elem_id="link")
        gr.on(
            [one.change for one in (*self.values, self.tokens, self.question, self.picture)],
            self.handlers.describe,
            [self.picture, self.question, self.tokens, *self.values],
            [self.code, self.link, self.notes, self.preset, self.about],
            trigger_mode="always_last",
            **INSTANT,
        )
        seen = gr.State(None, time_to_live=3600)
        started = gr.on(
            [run.click, self.question.submit],
            told_one_by_one(self.handlers.side_by_side),
            [self.picture, self.question, self.tokens, *self.values],
            [status, plain, fixed, word, looked, seen],
            show_progress="minimal", show_progress_on=status, api_visibility="private", **MODEL,
        )  # fmt: skip
        run.click(None, None, None, js=TO_ANSWERS, **INSTANT)
        stop.click(lambda: pieces.status("Stopped."), None, status, cancels=[started], **INSTANT)
        sample.click(handlers.pick, None, self.picture, **INSTANT)
        for which, box in (("plain", plain), ("fixed", fixed)):
            box.click(handlers.word_of(which), seen, word, **INSTANT)

    def _controls(self) -> None:
        self.preset = gr.Radio(
            list(PRESETS), value="least hallucination", label="Preset", elem_id="preset",
            info="Measured on the embedded model; other models need their own tuning.",
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
                with gr.Accordion("Settings", open=False):
                    sliders = [
                        gr.Checkbox(bool(next(values)), label=one.label, info=one.info)
                        if not one.step
                        else gr.Slider(
                            one.least, one.most, next(values), step=one.step, label=one.label, info=one.info
                        )
                        for one in panel.controls
                    ]
            self.values += [on, *sliders]
        self.tokens = gr.Slider(
            1,
            bounds.MOST_TOKENS,
            settings.TOKENS,
            step=1,
            label="Longest answer, in tokens",
            elem_id="tokens",
        )
        self.preset.input(self.handlers.choose, self.preset, self.values, **INSTANT)

    def _probe(self) -> None:
        gr.Markdown(
            f"“Is there a … in the image?” for {len(self.categories)} categories, about the picture of the first tab, "
            "with and without its methods. The rows on which they disagree most come first."
        )
        with gr.Row():
            ask = gr.Button("Probe", variant="primary", elem_id="ask")
            stop = gr.Button("Stop", elem_id="stop-probe")
        table = gr.HTML("", elem_id="probe-table")
        started = ask.click(
            told_one_by_one(self.handlers.ask_all), [self.picture, *self.values], table,
            show_progress="minimal", api_visibility="private", **MODEL,
        )  # fmt: skip
        stop.click(None, None, None, cancels=[started], **INSTANT)

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

    def _load(self) -> None:
        self.blocks.load(
            self.handlers.restore,
            None,
            [self.picture, self.question, self.tokens, *self.values],
            # queued, for a warning reaches the page over the queue only
            show_progress="hidden",
            api_visibility="private",
        ).then(
            self.handlers.describe,
            [self.picture, self.question, self.tokens, *self.values],
            [self.code, self.link, self.notes, self.preset, self.about],
            **INSTANT,
        )

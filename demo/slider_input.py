"""A slider whose number may have been emptied by hand: the page says so instead of failing."""

from __future__ import annotations

import gradio as gr

from lvlm_fix.demo.picture_input import WithoutStub


class SliderInput(gr.Slider, metaclass=WithoutStub):
    """`gr.Slider` that hands None on; whoever takes it says in one sentence that a number is missing."""

    def get_block_name(self) -> str:
        return "slider"

    def preprocess(self, payload: float | None) -> float | None:  # type: ignore[override]
        return None if payload is None else super().preprocess(payload)

"""A picture component that reads what visitors send within bounds, and says in one sentence what it cannot read."""

from __future__ import annotations

from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta
from PIL import Image

from lvlm_fix.demo import bounds


class _WithoutStub(ComponentMeta):
    """Gradio's own metaclass writes a .pyi file beside the source of every class, also where it is installed."""

    def __new__(mcs, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> Any:
        return ABCMeta.__new__(mcs, name, bases, attributes)


class PictureInput(gr.Image, metaclass=_WithoutStub):
    """`gr.Image` whose value reaches a function as an upright RGB picture, or not at all.

    Its own way would decode a file of any number of pixels, and answer a damaged one with a traceback.
    """

    def get_block_name(self) -> str:
        return "image"

    def preprocess(self, payload: Any) -> Image.Image | None:  # type: ignore[override]
        if payload is None:
            return None
        if not payload.path:
            raise gr.Error("the picture must come as a file: upload it first", print_exception=False)
        try:
            return bounds.picture(Path(payload.path))
        except (ValueError, OSError) as error:
            # What the system says of a file holds its path.
            sentence = (
                "cannot read the picture: its file is gone, send it again"
                if isinstance(error, OSError)
                else str(error)
            )
            raise gr.Error(sentence, print_exception=False) from error

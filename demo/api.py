"""What the API's endpoints and the page's events do with a request: check it, ask the model, say what is wrong."""

from __future__ import annotations

import functools
import html
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from PIL import Image

from lvlm_fix.demo import bounds
from lvlm_fix.demo.samples import truth_of
from lvlm_fix.demo.service import Service
from lvlm_fix.errors import AttachError, PictureError, PromptError, UnsupportedModelError

LOG = logging.getLogger("lvlm_fix.demo")

ASKED_WRONG = (ValueError, AttachError, PictureError, PromptError, UnsupportedModelError, NotImplementedError)
"""What a request can cause; the message is a sentence for the visitor."""


def sentence(error: Exception) -> gr.Error:
    """An error as the API tells it; one that is our fault goes to the log, whole."""
    if isinstance(error, ASKED_WRONG):
        return gr.Error(" ".join(str(error).split()), print_exception=False, title="Cannot do that")
    LOG.error("a request failed", exc_info=error)
    return gr.Error(
        f"the server failed on this request ({type(error).__name__}): its log says why", print_exception=False
    )


def shown(error: Exception) -> gr.Error:
    """The same for the page, which takes a message for HTML: a link must not bring any of its own."""
    told = sentence(error)
    told.message = html.escape(told.message)
    return told


def told(function: Callable) -> Callable:
    """A coroutine function of the API whose errors are sentences."""

    @functools.wraps(function)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise sentence(error) from error

    return wrapped


def shown_one_by_one(function: Callable) -> Callable:
    """An asynchronous generator of the page whose errors are sentences."""

    @functools.wraps(function)
    async def wrapped(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        try:
            async for one in function(*args, **kwargs):
                yield one
        except gr.Error:
            raise
        except Exception as error:
            raise shown(error) from error

    return wrapped


class Endpoints:
    """The documented API over one service; a request that is cancelled leaves the model free."""

    def __init__(self, service: Service, categories: list[str]) -> None:
        self.service, self.categories = service, categories

    async def answer(
        self, picture: Image.Image | None, question: str, fix: str, max_new_tokens: float
    ) -> dict[str, Any]:
        """Answer a question about a picture, with the methods of `fix` attached."""
        image, asked, methods = bounds.picture(picture), bounds.question(question), bounds.methods(fix)
        said = await self.service.answer(image, asked, methods, bounds.tokens(max_new_tokens))
        return said.to_dict()

    async def compare(
        self, picture: Image.Image | None, question: str, fix: str, max_new_tokens: float
    ) -> dict[str, Any]:
        """Answer without and with the methods of `fix`."""
        image, asked, methods = bounds.picture(picture), bounds.question(question), bounds.methods(fix)
        count = bounds.tokens(max_new_tokens)
        return {
            "plain": (await self.service.answer(image, asked, [], count)).to_dict(),
            "fixed": (await self.service.answer(image, asked, methods, count)).to_dict(),
        }

    async def probe(self, picture: Image.Image | None, fix: str) -> list[dict[str, Any]]:
        """Ask yes or no about every category, plain and fixed, the largest disagreement first."""
        image, methods = bounds.picture(picture), bounds.methods(fix)
        plain: dict[str, float] = {}
        fixed: dict[str, float] = {}
        async for some in self.service.probe(image, self.categories, []):
            plain |= some
        async for some in self.service.probe(image, self.categories, methods):
            fixed |= some
        truth = truth_of(image)
        order = sorted(fixed, key=lambda name: -abs(plain[name] - fixed[name]))
        return [
            {
                "category": name,
                "plain": plain[name],
                "fixed": fixed[name],
                "present": None if truth is None else name in truth,
            }
            for name in order
        ]


DESCRIPTIONS = {
    "answer": (
        "Answer a question about a picture. `fix` names methods as on the command line, such as "
        "'vtc_cls(keep=0.5),var', or 'none'. Returns text, tokens, seconds, tokens_per_second, peak_memory_bytes, "
        "hallucinated (null where nothing is judged), verdict and report."
    ),
    "compare": "Answer without and with methods: {'plain': ..., 'fixed': ...}, each as /answer returns it.",
    "probe": (
        "P(yes) to 'Is there a ... in the image?' for every category, plain and fixed, sorted by disagreement; "
        "`present` is null where the truth is not known."
    ),
}

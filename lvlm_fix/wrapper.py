"""The LVLM wrapper: a picture and a question in, an answer and a report out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lvlm_fix.attaching import attach
from lvlm_fix.attachment import Attachment
from lvlm_fix.errors import PromptError
from lvlm_fix.loading import EMBEDDED, load
from lvlm_fix.methods import Method
from lvlm_fix.pictures import Picture, open_picture
from lvlm_fix.prompting import model_inputs


@dataclass(frozen=True)
class Answer:
    """What the model said to one question.

    Attributes:
        text: the answer, without the prompt.
        report: what each method did, by method name: one entry an image of this question, or one for the prompt.
        tokens: number of generated tokens.
        seconds: wall time of the batch that this answer was part of.
    """

    text: str
    report: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return self.text


class LVLM:
    """A model with its processor, asked in plain strings.

    >>> from PIL import Image
    >>> from lvlm_fix import DAMRO
    >>> answer = LVLM().ask(Image.new("RGB", (64, 64)), "Is there a dog in the image?", fix=[DAMRO()])
    >>> list(answer.report)
    ['damro']
    """

    def __init__(self, model: str | Path | Any = EMBEDDED, processor: Any = None, **options: Any) -> None:
        """Load `model` with `options` (see `load`), or take a loaded model with its processor."""
        self.model: Any
        self.processor: Any
        if processor is not None:
            self.model, self.processor = model, processor
        else:
            self.model, self.processor = load(model, **options)
        self._warned: set[str] = set()

    def ask(
        self,
        image: Picture | Sequence[Picture | tuple[Picture, ...]] | tuple[Picture, ...],
        question: str | Sequence[str] = "Describe the image.",
        fix: Sequence[Method | str] = (),
        max_new_tokens: int = 64,
        **generation: Any,
    ) -> Any:
        """Ask about a picture.

        Args:
            image: a picture (path, bytes or Pillow image); a tuple of pictures for one question about them all; a
                list for a batch.
            question: the question, the same for all of a batch, or a list of them.
            fix: methods to attach for this call, or `["auto"]`; of a premise that fails it is warned once.
            max_new_tokens: longest answer.
            generation: passed on to `model.generate`, such as `num_beams=4` or `streamer=`.

        Returns:
            An `Answer`, or a list of them where either argument is a list.

        Raises:
            PictureError: a picture cannot be read.
            PromptError: a question is empty or holds image placeholders, or the lists differ in length.
        """
        images, questions, batched = _pairs(image, question)
        pictures = [
            [open_picture(one) for one in (item if isinstance(item, tuple) else (item,))] for item in images
        ]
        inputs = model_inputs(self.model, self.processor, pictures, questions)
        generation.setdefault("do_sample", False)
        context = self._attached(fix) if fix else contextlib.nullcontext()
        started = time.perf_counter()
        with context as attached, torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **generation)
            sequences = getattr(output, "sequences", output)[:, inputs["input_ids"].shape[1] :]
            report = attached.report if attached is not None else {}
        seconds = time.perf_counter() - started
        answers = self._answers(sequences, pictures, report, seconds)
        return answers if batched else answers[0]

    def _attached(self, fix: Sequence[Method | str]) -> Attachment:
        attached = attach(self.model, *fix, processor=self.processor)
        attached.pipeline.first_look.warned = self._warned
        return attached

    def _answers(self, sequences: Any, pictures: list, report: dict, seconds: float) -> list[Answer]:
        texts = self.processor.batch_decode(sequences, skip_special_tokens=True)
        copies = len(sequences) // len(pictures)  # num_return_sequences
        pad = self.model.generation_config.pad_token_id
        pad = self.processor.tokenizer.pad_token_id if pad is None else pad
        answers = []
        for index, text in enumerate(texts):
            own = {
                name: [
                    {key: value for key, value in entry.items() if key != "prompt"}
                    for entry in entries
                    if entry["prompt"] == index // copies
                ]
                for name, entries in report.items()
            }
            tokens = int((sequences[index] != pad).sum()) if pad is not None else len(sequences[index])
            answers.append(Answer(text.strip(), own, tokens, seconds))
        return answers


def _pairs(image: Any, question: str | Sequence[str]) -> tuple[list, list[str], bool]:
    """Images and questions of equal number, and whether either was a list."""
    batched = isinstance(image, list) or not isinstance(question, str)
    questions = [question] if isinstance(question, str) else list(question)
    images = image if isinstance(image, list) else [image] * len(questions)
    questions = questions * len(images) if isinstance(question, str) else questions
    if len(images) != len(questions) or not images:
        raise PromptError(
            f"{len(images)} images and {len(questions)} questions: give one question for each, or one for all"
        )
    return images, questions, batched

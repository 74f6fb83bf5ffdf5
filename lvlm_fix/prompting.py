"""Questions and pictures as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lvlm_fix.errors import PromptError


def model_inputs(model: Any, processor: Any, pictures: Sequence[list[Any]], questions: Sequence[str]) -> Any:
    """What `model.generate` takes: one row for each question about its own Pillow pictures.

    Raises:
        PromptError: a question is empty or holds image placeholders.
    """
    prompts = [prompt(processor, text, len(some)) for text, some in zip(questions, pictures, strict=True)]
    inputs = processor(images=list(pictures), text=prompts, padding=True, return_tensors="pt")
    return inputs.to(model.device, model.dtype)


def prompt(processor: Any, text: str, pictures: int) -> str:
    """A question about so many pictures, in the words of the model's chat template."""
    token = str(processor.image_token)
    if not text.strip():
        raise PromptError("the question is empty: ask something, such as 'Describe the image.'")
    if token in text:
        raise PromptError(f"the question holds {token}: leave it out, one is put in for each picture")
    if hasattr(processor, "qformer_tokenizer"):
        # InstructBLIP's processor puts the picture in by itself; the model was trained on bare instructions.
        if pictures != 1:
            raise PromptError(f"InstructBLIP takes one picture for each question, and this has {pictures}")
        return text.strip()
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": text.strip()}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )

"""What the model looked at: one more prefill over the prompt and its finished answer, watched and not changed."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from lvlm_fix import attach
from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.functional import image_centric_heads, redistribute, sink_tokens
from lvlm_fix.methods import DAMRO, VAR, VTCCLS, AttentionStep, Method, ZipVL
from lvlm_fix.models import family_of
from lvlm_fix.observation import View, view_of
from lvlm_fix.premises import Seen
from lvlm_fix.prompting import model_inputs
from lvlm_fix.vision import VisionEncoding
from lvlm_fix.wrapper import LVLM


@dataclass(frozen=True)
class Look:
    """What is drawn over a picture of N = rows * columns image tokens. Maps are (N,) lists.

    Attributes:
        pixels: the picture as the tower saw it.
        grid: rows and columns.
        cls: CLS attention of the feature layer, or what stands for it.
        outliers: tokens that DAMRO's negative branch sees, with the setting's `topk` or the default.
        kept: tokens that VTC-CLS keeps, with the setting's `keep` or the default.
        seen: tokens that reached the decoder.
        sinks: in how many of the decoder's layers each token is a sink.
        before, after: attention of the prompt's last token, mean over heads and the layers that VAR changes, as the
            model's own and as VAR hands it out; of all layers where it changes none.
        changed: in how many layers VAR changes a head at that token.
        words: of each word of the answer, where it begins and ends in the text, and the attention with which its first
            token was chosen, mean over heads and layers.
        missing: why a part is missing, one sentence, or empty.
    """

    pixels: Image.Image
    grid: tuple[int, int]
    cls: list[float]
    outliers: list[int]
    kept: list[int]
    seen: list[int] = field(default_factory=list)
    sinks: list[int] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    changed: int = 0
    words: list[tuple[int, int, list[float]]] = field(default_factory=list)
    missing: str = ""


class _Watcher(Method):
    """Notes, layer by layer, what the prompt's last token and the answer's tokens attend to."""

    name: ClassVar[str] = "watcher"
    paper: ClassVar[str] = ""

    def __init__(self, answered: int, var: VAR) -> None:
        self.answered, self.var = answered, var
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.changes: list[bool] = []
        self.sinks: Tensor | None = None

    def select(self, vision: VisionEncoding) -> None:
        return None

    def attention(self, step: AttentionStep) -> AttentionStep:
        if step.hidden_states is None:
            return step
        image = step.image_mask
        weights = _rows(step, self.answered + 1)
        moved = step.redistribution
        if moved is None and self.var.sink_dims:  # what VAR would do here, were it on
            moved = self.var.attention(step).redistribution
        after = weights
        if moved is not None:
            gate = image_centric_heads(
                weights, moved.image_mask, moved.sink_mask, moved.rho, moved.min_image_attention
            )
            after = redistribute(weights, moved.image_mask, moved.sink_mask, gate, moved.p)
            self.changes.append(bool(gate[0, :, 0].any()))
        else:
            self.changes.append(False)
        if self.var.sink_dims:
            threshold = self.var.threshold(step.hidden_states.shape[-1])
            found = sink_tokens(step.hidden_states, self.var.sink_dims, threshold)[image].int()
            self.sinks = found if self.sinks is None else self.sinks + found
        self.before.append(weights.mean(1)[0][:, image[0]])
        self.after.append(after.mean(1)[0][:, image[0]])
        return step


def _rows(step: AttentionStep, count: int) -> Tensor:
    """Attention (1, H, count, T) of the last tokens."""
    groups = step.query.shape[1] // step.key.shape[1]
    logits = step.query[:, :, -count:].float() @ step.key.repeat_interleave(groups, dim=1).float().mT
    logits = logits * (step.query.shape[-1] ** -0.5 if step.scale is None else step.scale)
    position = torch.arange(step.key.shape[2], device=logits.device)
    visible = (position <= position[-count:, None]) & step.real[:, None, None]
    return logits.masked_fill(~visible, float("-inf")).softmax(-1)


def look(lvlm: LVLM, image: Image.Image, question: str, ids: list[int], fix: list[Method]) -> Look:
    """Watch a model read a picture, a question and its own answer.

    VAR and VTC-CLS are attached as they were. ZipVL is left off, for it would choose other tokens with the answer in
    the prompt; DAMRO does not change what the model itself attends to.

    Args:
        lvlm: the model.
        image: the picture.
        question: the question.
        ids: tokens of the answer.
        fix: methods under which it was given.

    Raises:
        UnsupportedModelError: the picture reaches the model in crops, none of them whole.
    """
    family = family_of(lvlm.model)
    var = next((one for one in fix if isinstance(one, VAR)), VAR()).prepare(lvlm.model)
    watcher = _Watcher(len(ids), var)
    inputs = _with_answer(model_inputs(lvlm.model, lvlm.processor, [[image]], [question]), ids)
    carried = [one for one in fix if isinstance(one, VAR | VTCCLS)]
    missing = ""
    try:
        encoded, report = _watch(lvlm, [*carried, watcher], inputs)
    except (
        UnsupportedModelError
    ) as error:  # the decoder's attention is not plain; the tower is seen all the same
        missing = str(error)
        encoded, report = _watch(lvlm, [VTCCLS()], inputs)
    view = view_of(
        lvlm.model, family, lvlm.processor, "picture", encoded, [Seen(one.vision) for one in encoded], None
    )
    if view is None:
        raise UnsupportedModelError(
            "this model's image tokens form no grid, so nothing can be drawn over the picture"
        )
    found = _of_the_tower(view, fix)
    if missing or encoded[0].vision.crops is not None or len(encoded) > 1:
        reason = (
            missing or "this model cuts pictures into crops: attention by word is drawn for one crop only"
        )
        return Look(**found, missing=reason)
    return Look(**found, **_of_the_decoder(lvlm, watcher, report, found["grid"], ids))


def _watch(lvlm: LVLM, methods: list[Method], inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    with warnings.catch_warnings(), attach(lvlm.model, *methods) as attached, torch.inference_mode():
        lvlm.model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
        return list(attached.pipeline.encoder.known.values()), attached.report


def _with_answer(inputs: Any, ids: list[int]) -> dict[str, Any]:
    """Inputs whose prompt goes on with the answer's tokens."""
    prompt = inputs["input_ids"]
    shape = prompt.shape
    tail = prompt.new_tensor([ids])
    longer = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}
    made = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == shape:
            value = torch.cat([value, longer.get(name, torch.zeros_like(tail)).to(value.dtype)], dim=1)
        made[name] = value
    return made


def _of_the_tower(view: View, fix: list[Method]) -> dict[str, Any]:
    vision = view.seen.vision
    damro = next((one for one in fix if isinstance(one, DAMRO)), DAMRO())
    pruning = next((one for one in fix if isinstance(one, VTCCLS)), None)
    if pruning is None:
        pruning = VTCCLS() if len(vision.layer_scores) >= 4 else VTCCLS(start_layer=0)
    pixels = (view.pixels.permute(1, 2, 0) * 255).round().byte().numpy()
    return {
        "pixels": Image.fromarray(pixels),
        "grid": view.grid,
        "cls": vision.feature_scores.tolist(),
        "outliers": damro.negative_tokens(vision).tolist(),
        "kept": pruning.select(vision).tolist(),
    }


def _of_the_decoder(
    lvlm: LVLM, watcher: _Watcher, report: dict[str, Any], grid: tuple[int, int], ids: list[int]
) -> dict[str, Any]:
    count = grid[0] * grid[1]
    seen = report["vtc_cls"][0]["kept"] if VTCCLS.name in report else list(range(count))

    def spread(values: Tensor) -> list[float]:
        full = torch.zeros(count)
        full[torch.tensor(seen)] = values.float().cpu()
        return full.tolist()

    before, after = torch.stack(watcher.before), torch.stack(watcher.after)
    layers = [layer for layer, changes in enumerate(watcher.changes) if changes]
    chosen = layers or list(range(len(before)))
    by_token = after.mean(0)  # row k chose token k of the answer
    return {
        "seen": seen,
        "sinks": [round(value) for value in spread(watcher.sinks)]
        if watcher.sinks is not None
        else [0] * count,
        "before": spread(before[chosen, 0].mean(0)),
        "after": spread(after[chosen, 0].mean(0)),
        "changed": len(layers),
        "words": [
            (start, end, spread(by_token[token]))
            for start, end, token in _words(lvlm.processor.tokenizer, ids)
        ],
    }


def _words(tokenizer: Any, ids: list[int]) -> list[tuple[int, int, int]]:
    """Start, end and first token of each word of an answer, as characters of its text without outer spaces."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [len(tokenizer.decode(ids[: count + 1], skip_special_tokens=True)) for count in range(len(ids))]
    lead = len(text) - len(text.lstrip())
    return [
        (word.start() - lead, word.end() - lead, next(k for k, end in enumerate(ends) if end > word.start()))
        for word in re.finditer(r"\S+", text)
    ]


def zipvl_ratios(report: dict[str, list[dict[str, Any]]]) -> list[float]:
    """By layer of the decoder, the share of the prompt's tokens that ZipVL let attend; empty where it was off."""
    entries = report.get(ZipVL.name, [])
    return list(entries[0]["ratios"]) if entries and "ratios" in entries[0] else []

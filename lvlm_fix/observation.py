"""One picture through a model, watched: what the tower and the layers of the decoder attend to. Nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lvlm_fix import premises
from lvlm_fix.attachment import Attachment
from lvlm_fix.encoding import Companion, Encoded
from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.functional import image_centric_heads, important_tokens, sink_tokens
from lvlm_fix.kernels import probe_scores
from lvlm_fix.methods import VAR, AttentionStep, Method, ZipVL
from lvlm_fix.methods.var import last_row
from lvlm_fix.models.base import Family
from lvlm_fix.premises import Seen
from lvlm_fix.sinks import SinkDims
from lvlm_fix.vision import VisionEncoding


@dataclass(frozen=True)
class View:
    """One crop of a picture, to be drawn.

    Attributes:
        name: of the picture.
        pixels: (3, H, W) in 0..1, as the tower saw them.
        seen: what is known of its rows * columns tokens, `grid`.
        kept: (N,) bool, tokens that VTC-CLS keeps; None in families where it makes no sense.
    """

    name: str
    pixels: Tensor
    seen: Seen
    grid: tuple[int, int]
    kept: Tensor | None


class Observer(Method):
    """Changes nothing, and notes what each layer of the decoder attends to. Not a method that users attach."""

    name: ClassVar[str] = "diagnosis"
    paper: ClassVar[str] = ""

    def __init__(self, sinks: SinkDims) -> None:
        self.sinks, self.var, self.zipvl = sinks, VAR(sink_dims=sinks.dims), ZipVL()
        self.layers: list[dict[str, float]] = []
        self.refused: str | None = None

    def select(self, vision: VisionEncoding) -> None:
        return None

    def attention(self, step: AttentionStep) -> AttentionStep:
        if step.hidden_states is None:
            return step
        sinks = torch.zeros_like(step.real)
        if self.sinks.dims:
            sinks = sink_tokens(step.hidden_states, self.sinks.dims, self.sinks.threshold) & step.real
        positions = step.shared.setdefault(self.zipvl, self.zipvl.probes(step.real)).to(step.query.device)
        index = positions[:, None, :, None].expand(-1, step.query.shape[1], -1, step.query.shape[-1])
        scores, normalised = probe_scores(
            step.query.gather(2, index), step.key, positions, step.scale, step.real
        )
        needed = important_tokens(scores, normalised, self.zipvl.tau).sum() / step.real.sum()
        weights = last_row(step)
        on_image = (weights * step.image_mask[:, None, None]).sum(-1)
        gate = (self.var.rho, self.var.min_image_attention)
        heads = image_centric_heads(weights, step.image_mask, sinks, *gate)
        self.layers.append(
            {
                "layer": step.layer,
                "image_sinks": float((sinks & step.image_mask).sum()),
                "centric_heads": float(heads.float().mean()),
                "image_heads": float((on_image >= self.var.min_image_attention).float().mean()),
                "needed": float(needed),
            }
        )
        return step

    def by_layer(self, key: str) -> list[float]:
        """Mean over the pictures."""
        values: dict[float, list[float]] = {}
        for entry in self.layers:
            values.setdefault(entry["layer"], []).append(entry[key])
        return [sum(own) / len(own) for _, own in sorted(values.items())]


class _OfTheTowerOnly(Method):
    """Reads the tower's scores and leaves the decoder alone, for decoders whose attention cannot be observed."""

    name: ClassVar[str] = "diagnosis"
    paper: ClassVar[str] = ""

    def select(self, vision: VisionEncoding) -> None:
        return None


def observed(
    model: Any, family: Family, observer: Observer, inputs: Any, scores: Companion | None
) -> tuple[list[Encoded], list[Tensor]]:
    """A picture's images as they were encoded, and what the tower's feature layer put out."""
    states: list[Tensor] = []
    layer = _parent(model, family.tower_attention(model)[family.feature_layer(model)])
    handle = layer.register_forward_hook(
        lambda module, given, made: states.append(made[0] if isinstance(made, tuple) else made)
    )

    def run(method: Method) -> list[Encoded]:
        states.clear()
        with Attachment(model, (method,), scores) as attached, torch.inference_mode():
            model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
            return list(attached.pipeline.encoder.known.values())

    try:
        if observer.refused is None:
            try:
                return run(observer), states
            except UnsupportedModelError as error:
                # The decoder's attention is not plain; what the tower does is still seen below.
                observer.refused = str(error)
        return run(_OfTheTowerOnly()), states
    finally:
        handle.remove()


def _parent(model: nn.Module, child: nn.Module) -> nn.Module:
    """The module that holds another: of a layer's attention, the layer."""
    name = next(name for name, module in model.named_modules() if module is child)
    return model.get_submodule(name.rpartition(".")[0])


def tokens_seen(model: Any, family: Family, encoded: list[Encoded], states: list[Tensor]) -> list[Seen]:
    """Of each image of one picture, what is known of its tokens: scores, local detail, norms."""
    context = encoded[0].context
    detail = premises.local_detail(model, family, context)
    first_patch = 1 if family.has_cls else 0
    norms = torch.cat([state[..., first_patch:, :].float().norm(dim=-1).flatten() for state in states])
    tokens = [rows * columns for rows, columns in family.token_grids(model, context)]
    # The projector may merge blocks of patches.
    patches = [count * len(norms) // sum(tokens) for count in tokens]
    maps = family.maps(model, [crop[None] for crop in norms.split(patches)], context)
    arranged = [values[0] for values, _, _ in family.arrange(model, maps, context)]
    return [Seen(image.vision, detail[image.place], arranged[image.place]) for image in encoded]


def view_of(
    model: Any,
    family: Family,
    processor: Any,
    name: str,
    encoded: list[Encoded],
    seen: list[Seen],
    pruning: Method | None,
) -> View | None:
    """The first crop whose tokens are all there, in raster order; None where there is no such crop."""
    context = encoded[0].context
    pixels, grids = family.pixels(model, context), family.token_grids(model, context)
    first = 0
    for one in seen:
        crops = one.vision.crops
        for own in one.crops():
            at = first + (0 if crops is None else int(crops[own[0]]))
            if at >= len(grids) or len(own) != grids[at][0] * grids[at][1]:
                continue
            kept = None
            if pruning is not None:
                kept = torch.zeros(len(one.vision.feature_scores), dtype=torch.bool, device=own.device)
                kept[pruning.select(one.vision)] = True
                kept = kept[own].cpu()
            part = Seen(_part(one.vision, own, grids[at]), _at(one.detail, own), _at(one.norms, own))
            return View(name, _as_drawn(pixels[at], family, processor), part, grids[at], kept)
        first += 1 if crops is None else int(crops.max()) + 1
    return None


def _part(vision: VisionEncoding, own: Tensor, grid: tuple[int, int]) -> VisionEncoding:
    scores = vision.layer_scores[:, own].float().cpu()
    return VisionEncoding(scores, vision.feature_scores[own].float().cpu(), grid, None, vision.source)


def _at(values: Tensor | None, own: Tensor) -> Tensor | None:
    return None if values is None else values[own].float().cpu()


def _as_drawn(pixels: Tensor, family: Family, processor: Any) -> Tensor:
    """Pixels (3, H, W) in 0..1 again."""
    maker = getattr(processor, "image_processor", None)
    mean = torch.tensor(getattr(maker, "image_mean", None) or family.pixel_mean)[:, None, None]
    spread = torch.tensor(getattr(maker, "image_std", None) or family.pixel_std)[:, None, None]
    return (pixels.float().cpu() * spread + mean).clamp(0, 1)

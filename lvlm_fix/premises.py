"""What each method rests on, judged from a few numbers: does it hold on these pictures?

The thresholds stand here once, with their reasons. `diagnosis` measures on a few pictures, `first_look` on the first
that a model with methods is asked about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lvlm_fix.methods import DAMRO, VAR, VTCCLS, ZipVL
from lvlm_fix.models.base import Family
from lvlm_fix.vision import VisionEncoding

CLS_OUTLIER = 10.0
"""CLS attention of an outlier token, in means over its crop. DAMRO's figures show a few of CLIP-L's 576 tokens with
much of it: five that hold half of the attention have 58 means each; ten that hold a fifth, 12."""

NORM_OUTLIER = 2.0
"""Norm of an outlier token at the feature layer, in upper quartiles of its crop: the median would do where norms are
alike, but on a picture of two textures half of the tokens can have twice the norm of the other half. Darcet et al.
(arXiv 2309.16588) find two separate modes: a few percent of the tokens have up to ten times the norm of the others."""

IN_BACKGROUND = 2 / 3
"""Share of the outliers that must lie on patches of at most median local detail. Half is chance; two thirds of the
fifty outliers of five pictures is 2.4 standard deviations above it."""

WITH_OUTLIERS = 0.5
"""Share of the crops that must have outlier tokens at all."""

CONCENTRATED = 0.6
"""Share of the CLS attention that the highest third of the tokens must hold, or what pruning drops is far from
nothing. Evenly spread it is a third; an exponential distribution has 0.7."""

SINK_LAYERS = 0.25
"""Share of the layers on which VAR may act that must have image sinks: it leaves the others alone."""

CENTRIC_HEADS = 0.05
"""Share of the heads, over those layers, that must be image-centric for the prompt's last token: of 32 heads a layer
fewer than two would change otherwise."""

NEEDED = 0.6
"""Share of the tokens, mean over layers, within which tau of the attention must lie. Attention among 0.6 of the tokens
costs 0.36 of the whole, and the cache keeps 3.2 of 16 bits; above, little is saved and every layer skips tokens all the
same. The paper's models save more than half of both."""


@dataclass(frozen=True)
class Premise:
    """Whether what a method rests on is true of a model on some pictures.

    Attributes:
        name: the method's name.
        holds: whether it is.
        numbers: what was measured, as plain numbers; lists are by layer.
        sentence: the same for people.
    """

    name: str
    holds: bool
    numbers: dict[str, Any]
    sentence: str


@dataclass(frozen=True)
class Seen:
    """What is known of the N tokens of an image: `vision`, and (N,) local detail of the pixels below each and norms in
    the tower, None where they were not measured."""

    vision: VisionEncoding
    detail: Tensor | None = None
    norms: Tensor | None = None

    def crops(self) -> list[Tensor]:
        """Indices of the tokens of each crop; newline tokens are left out."""
        crops = self.vision.crops
        if crops is None:
            return [torch.arange(len(self.vision.feature_scores), device=self.vision.feature_scores.device)]
        return [(crops == crop).nonzero()[:, 0] for crop in crops[crops >= 0].unique()]


@dataclass(frozen=True)
class Outliers:
    """Outlier tokens of one crop, as indices into its image's tokens, and how far they stand out."""

    cls: Tensor
    norm: Tensor
    taken: Tensor
    cls_peak: float
    norm_peak: float | None
    low_detail: Tensor | None


def outliers(seen: Seen, method: DAMRO) -> list[Outliers]:
    """Of each crop of an image. `taken` are those that DAMRO's negative branch sees; `low_detail` is of the taken."""
    found = []
    for own in seen.crops():
        scores = seen.vision.feature_scores[own].float()
        best = torch.zeros_like(scores, dtype=torch.bool)
        best[scores.topk(min(method.topk, len(own))).indices] = True
        by_cls = scores >= CLS_OUTLIER * scores.mean()
        by_norm, peak = torch.zeros_like(by_cls), None
        if seen.norms is not None:
            norms = seen.norms[own].float()
            by_norm = norms >= NORM_OUTLIER * norms.quantile(0.75)
            peak = float(norms.max() / norms.median())
        taken = best & (by_cls | by_norm)
        low = None
        if seen.detail is not None:
            low = (seen.detail[own] <= seen.detail[own].median())[taken]
        cls_peak = float(scores.max() / scores.mean().clamp_min(1e-12))
        found.append(Outliers(own[by_cls], own[by_norm], own[taken], cls_peak, peak, low))
    return found


def damro(images: Sequence[Seen], method: DAMRO | None = None) -> Premise:
    """There are outlier tokens that CLS looks at, and they lie in the background (arXiv 2410.04514)."""
    crops = [crop for image in images for crop in outliers(image, method or DAMRO())]
    count = [len(crop.taken) for crop in crops]
    having = _mean([float(number > 0) for number in count])
    numbers: dict[str, Any] = {
        "crops": len(crops),
        "crops_with_outliers": having,
        "outliers": _mean(count),
        "cls_outliers": _mean([len(crop.cls) for crop in crops]),
        "largest_cls_over_mean": _mean([crop.cls_peak for crop in crops]),
    }
    peaks = [crop.norm_peak for crop in crops if crop.norm_peak is not None]
    if peaks:
        numbers["norm_outliers"] = _mean([len(crop.norm) for crop in crops])
        numbers["largest_norm_over_median"] = _mean(peaks)
    low = [crop.low_detail.float() for crop in crops if crop.low_detail is not None and len(crop.low_detail)]
    background = float(torch.cat(low).mean()) if low else None
    numbers["in_background"] = background
    look = attention_name(images[0].vision.source)
    if having < WITH_OUTLIERS:
        said = (
            f"{having:.0%} of the crops have outlier tokens, {CLS_OUTLIER:g} times the mean in {look} or "
            f"{NORM_OUTLIER:g} times the upper quartile in norm; DAMRO needs them in {WITH_OUTLIERS:.0%}"
        )
        return Premise(DAMRO.name, False, numbers, said)
    if background is None:
        said = "outlier tokens are there, but where they lie is unknown: the family does not tell the crops' pixels"
        return Premise(DAMRO.name, False, numbers, said)
    said = (
        f"of the outlier tokens, {numbers['outliers']:.1f} a crop, {background:.0%} lie on patches of little detail; "
        f"DAMRO needs {IN_BACKGROUND:.0%} in the background"
    )
    return Premise(DAMRO.name, background >= IN_BACKGROUND, numbers, said)


def vtc_cls(images: Sequence[Seen], method: VTCCLS | None = None) -> Premise:
    """CLS attention, summed over the ensemble's layers, is concentrated (arXiv 2412.05819)."""
    method = method or VTCCLS()
    shares = []
    for image in images:
        own = torch.cat(image.crops())
        layers = image.vision.layer_scores[method.start_layer : -1, own]
        scores = layers.float().sum(0).sort(descending=True).values
        third = max(1, round(len(scores) / 3))
        shares.append(float(scores[:third].sum() / scores.sum().clamp_min(1e-12)))
    share = _mean(shares)
    source = images[0].vision.source
    said = (
        f"the highest third of the image tokens holds {share:.0%} of the {attention_name(source)}; "
        f"VTC-CLS needs {CONCENTRATED:.0%}"
    )
    numbers = {"attention_in_highest_third": share, "by_image": shares, "source": source}
    return Premise(VTCCLS.name, share >= CONCENTRATED, numbers, said)


def var(
    dims: Sequence[int], image_sinks: Sequence[float], centric_heads: Sequence[float], layers: Sequence[int]
) -> Premise:
    """Sink dimensions exist, some layers have image sinks, and some heads look at the image (arXiv 2503.03321).

    Args:
        dims: the decoder's sink dimensions.
        image_sinks: mean number of image sinks an image, by layer.
        centric_heads: share of the heads that are image-centric for the prompt's last token, by layer; none are in
            layers without image sinks, which VAR leaves alone.
        layers: the layers on which VAR may act, as positions in the two lists.
    """
    with_sinks = _mean([float(image_sinks[layer] > 0) for layer in layers])
    heads = _mean([centric_heads[layer] for layer in layers])
    numbers = {
        "sink_dims": list(dims),
        "layers_with_image_sinks": with_sinks,
        "image_centric_heads": heads,
        "image_sinks_by_layer": list(image_sinks),
        "image_centric_heads_by_layer": list(centric_heads),
    }
    if not dims:
        said = "the decoder has no dimension with massive activations, so no sinks, whose attention VAR would give back"
        return Premise(VAR.name, False, numbers, said)
    said = (
        f"image sinks in {with_sinks:.0%} of the layers and {heads:.1%} of the heads image-centric; VAR needs "
        f"{SINK_LAYERS:.0%} and {CENTRIC_HEADS:.0%}"
    )
    holds = with_sinks >= SINK_LAYERS and heads >= CENTRIC_HEADS
    return Premise(VAR.name, holds, numbers, said)


def zipvl(needed: Sequence[float], tau: float = ZipVL.tau) -> Premise:
    """Few tokens hold most of the attention (arXiv 2410.08584); `needed` is the share for `tau` of it, by layer."""
    share = _mean(needed)
    said = f"{share:.0%} of the tokens hold {tau:.1%} of the attention, mean over layers; "
    said += f"ZipVL needs at most {NEEDED:.0%}"
    return Premise(ZipVL.name, share <= NEEDED, {"needed": share, "needed_by_layer": list(needed)}, said)


def local_detail(model: Any, family: Family, context: Mapping[str, Any]) -> list[Tensor]:
    """How much the pixels below each image token vary: (N,) of each image that one `get_image_features` encoded.

    The standard deviation of the normalised pixels within a token's cell, mean over channels; 0 for newline tokens.
    """
    grids = family.token_grids(model, context)
    maps = []
    for crop, grid in zip(family.pixels(model, context), grids, strict=True):
        pixels = crop[None].float()
        mean = adaptive_avg_pool2d(pixels, grid)
        variance = adaptive_avg_pool2d(pixels.square(), grid) - mean.square()
        maps.append(variance.clamp_min(0).sqrt().mean(1))
    return [values[0] for values, _, _ in family.arrange(model, maps, context)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def attention_name(source: str) -> str:
    """CLS attention, or what stands for it, in words."""
    name = source.split(",")[0]
    if name == "cls":
        return "CLS attention"
    return name if "attention" in name else f"attention ({name})"

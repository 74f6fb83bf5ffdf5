"""Scores from a companion: the CLS attention of an OpenCLIP ViT, for towers that have no CLS token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.functional import cls_scores
from lvlm_fix.models.base import Family

AT_ONCE = 32
"""Crops that go through the companion together."""

_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SIZES = {192: "Ti", 384: "S", 640: "M", 768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}


class CLSFrom:
    """CLS attention of an OpenCLIP ViT, run on the crops that the LVLM sees and resampled to its token grid.

    One query row is read in each layer; the ViT itself runs as it is. For VTC-CLS the rows are means over heads; for
    DAMRO it is the full-width row of the second last layer, from which LLaVA's CLIP towers hand their features on.

    Args:
        clip: an OpenCLIP model, or its `visual` tower.
        pixel_mean, pixel_std: what the LVLM's image processor subtracts and divides by, by colour, where it is not
            the family's `pixel_mean` and `pixel_std`.

    Raises:
        UnsupportedModelError: the tower is no ViT, or does not pool by a CLS token.

    >>> import open_clip
    >>> from lvlm_fix import VTCCLS, attach, load
    >>> sizes = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3}
    >>> clip = open_clip.CLIP(16, sizes, {"context_length": 8, "vocab_size": 32, "width": 64, "heads": 1, "layers": 1})
    >>> model, processor = load()
    >>> with attach(model, VTCCLS(), scores=CLSFrom(clip)) as fix:
    ...     fix.methods
    (VTCCLS(keep=0.3333333333333333, start_layer=-4),)
    """

    def __init__(
        self,
        clip: nn.Module,
        pixel_mean: tuple[float, ...] | None = None,
        pixel_std: tuple[float, ...] | None = None,
    ) -> None:
        visual: Any = getattr(clip, "visual", clip)
        self.attention = _attention_modules(visual)
        self.visual, self.pixel_mean, self.pixel_std = visual, pixel_mean, pixel_std
        self.feature_layer = len(self.attention) - 2
        self.source = f"CLS of OpenCLIP {_name(visual)}"

    @torch.no_grad()
    def maps(self, crops: list[Tensor], grids: list[tuple[int, int]], family: Family) -> list[Tensor]:
        """Scores of each crop's image tokens.

        Args:
            crops: (3, H, W) each, normalised as the family's processor does.
            grids: rows and columns of each crop's image tokens.
            family: of the LVLM; its pixel statistics undo the normalisation.

        Returns:
            (L + 1, rows, columns) of each crop for a ViT of L layers, the feature layer's row last. A map sums to what
            CLS gives all patches, whatever the grid.
        """
        found: list[Tensor] = []
        for start in range(0, len(crops), AT_ONCE):
            found += self._scores(crops[start : start + AT_ONCE], family)
        return [
            _resampled(scores, grid).to(crop.device)
            for scores, grid, crop in zip(found, grids, crops, strict=True)
        ]

    def _scores(self, crops: list[Tensor], family: Family) -> list[Tensor]:
        """(L + 1, rows, columns) of each crop, on the ViT's own patch grid."""
        rows: list[Tensor] = []
        features: list[Tensor] = []

        def read(module: nn.MultiheadAttention, args: tuple[Tensor, ...]) -> None:
            query, key = _cls_query_and_keys(module, args[0])
            rows.append(cls_scores(query, key, module.num_heads))
            if module is self.attention[self.feature_layer]:
                features.append(cls_scores(query, key, 1))

        training = self.visual.training
        handles = [module.register_forward_pre_hook(read) for module in self.attention]
        try:
            self.visual.eval()  # patch dropout would leave patches without a score
            self.visual(torch.stack([self._pixels(crop, family) for crop in crops]))
        finally:
            self.visual.train(training)
            for handle in handles:
                handle.remove()
        return list(torch.stack(rows + features, dim=1).unflatten(-1, self.visual.grid_size))

    def _pixels(self, crop: Tensor, family: Family) -> Tensor:
        """A crop as the ViT's own preprocessing would have made it."""
        weight = self.visual.conv1.weight
        crop = crop.to(weight.device, torch.float32)
        colours = crop * _by_colour(self.pixel_std or family.pixel_std, crop)
        colours = colours + _by_colour(self.pixel_mean or family.pixel_mean, crop)
        # Bicubic weights overshoot; preprocessing works on bytes, where that is cut.
        size = tuple(self.visual.image_size)
        colours = interpolate(colours[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        mean = getattr(self.visual, "image_mean", None) or _OPENAI_MEAN
        std = getattr(self.visual, "image_std", None) or _OPENAI_STD
        return ((colours - _by_colour(mean, crop)) / _by_colour(std, crop)).to(weight.dtype)


def _attention_modules(visual: Any) -> list[nn.MultiheadAttention]:
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", [])
    modules = [
        block.attn for block in blocks if isinstance(getattr(block, "attn", None), nn.MultiheadAttention)
    ]
    pools = getattr(visual, "pool_type", None) == "tok" and getattr(visual, "attn_pool", None) is None
    plain = 1 < len(modules) == len(blocks)
    if not (pools and plain and hasattr(visual, "class_embedding") and hasattr(visual, "grid_size")):
        raise UnsupportedModelError(
            f"cannot read CLS attention from {type(visual).__name__}: CLSFrom needs an OpenCLIP ViT that pools by its "
            "CLS token (such as ViT-B-16 or ViT-L-14), no ResNet, timm or SigLIP tower and no attention pooling"
        )
    return modules


def _name(visual: Any) -> str:
    """Such as ViT-L-14-336: OpenCLIP's models do not know their own."""
    width, size = visual.class_embedding.shape[0], visual.image_size[0]
    name = f"ViT-{_SIZES.get(width, f'width{width}')}-{visual.patch_size[0]}"
    return name if size == 224 else f"{name}-{size}"


def _cls_query_and_keys(module: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Projections (B, 1, C) of CLS and (B, N + 1, C) of all tokens from an attention's input; values are not made."""
    x = x if module.batch_first else x.transpose(0, 1)
    width, bias = module.embed_dim, module.in_proj_bias
    query, key = (
        linear(tokens, module.in_proj_weight[own], None if bias is None else bias[own])
        for tokens, own in ((x[:, :1], slice(width)), (x, slice(width, 2 * width)))
    )
    return query, key


def _resampled(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (S, rows, columns) on another grid, each with the sum that it had."""
    if tuple(scores.shape[1:]) == tuple(grid):
        return scores
    smaller = grid[0] <= scores.shape[1] and grid[1] <= scores.shape[2]
    options: dict[str, Any] = {"mode": "area"} if smaller else {"mode": "bilinear", "antialias": True}
    found = interpolate(scores[None], size=tuple(grid), **options)[0]
    return found * (scores.sum((1, 2)) / found.sum((1, 2)).clamp_min(1e-30))[:, None, None]


def _by_colour(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values)[:, None, None]

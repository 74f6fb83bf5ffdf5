"""Qwen2-VL and Qwen2.5-VL: packed towers without a CLS token, merged blocks of patches, three kinds of position."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lvlm_fix.errors import PromptError, UnsupportedModelError
from lvlm_fix.models.base import Family


class QwenVL(Family):
    """`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`.

    A token stands for a block of `spatial_merge_size ** 2` patches, and its score is the mean over them. In
    Qwen2.5-VL most tower layers attend within windows: only those with full attention are scored, so VTC-CLS counts
    its layers among these.
    """

    name: ClassVar[str] = "Qwen2-VL and Qwen2.5-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    has_cls: ClassVar[bool] = False

    def tower(self, model: Any) -> nn.Module:
        return model.base_model.visual

    def tower_attention(self, model: Any) -> list[nn.Module]:
        tower = model.base_model.visual
        full = getattr(tower.config, "fullatt_block_indexes", range(len(tower.blocks)))
        layers = [block.attn for index, block in enumerate(tower.blocks) if index in full]
        if not layers:
            raise UnsupportedModelError(
                "every layer of this Qwen2.5-VL's tower attends within windows (fullatt_block_indexes is empty): "
                "scores need one with full attention, or a companion such as CLSFrom(open_clip_model)"
            )
        return layers

    def feature_layer(self, model: Any) -> int:
        return len(self.tower_attention(model)) - 1

    def image_token_id(self, model: Any) -> int:
        return model.config.image_token_id

    def pixels(self, model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
        merge, config = _merge_size(model), model.config.vision_config
        crops, patches = [], inputs["pixel_values"]
        for rows, columns in self.token_grids(model, inputs):
            count, side = rows * columns * merge**2, config.patch_size
            own, patches = patches[:count], patches[count:]
            blocks = own.reshape(
                rows, columns, merge, merge, config.in_channels, config.temporal_patch_size, side, side
            )
            # a picture is one frame, repeated; from block, patch and pixel to one row and one column
            frame = blocks[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
            crops.append(frame.reshape(config.in_channels, rows * merge * side, columns * merge * side))
        return crops

    def token_grids(self, model: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        merge, grids = _merge_size(model), inputs["image_grid_thw"].tolist()
        if any(frames != 1 for frames, _, _ in grids):
            raise PromptError(
                "image_grid_thw holds a picture of several frames: under attach, videos are not read; pass their "
                "frames as pictures"
            )
        return [(rows // merge, columns // merge) for _, rows, columns in grids]

    def maps(self, model: Any, rows: list[Tensor], inputs: Mapping[str, Any]) -> list[Tensor]:
        maps = []
        for scores, grid in zip(rows, self.token_grids(model, inputs), strict=True):
            # the patches of a block follow each other
            tokens = scores.reshape(len(scores), grid[0] * grid[1], -1).mean(-1)
            order = _windowed(model, grid).to(tokens.device).argsort()
            # VTC-CLS leaves the last layer out; where only one has full attention, it counts all the same
            tokens = torch.cat([tokens[:1], tokens]) if len(tokens) == 2 else tokens
            maps.append(tokens[:, order].reshape(-1, *grid))
        return maps

    def positions(
        self, model: Any, input_ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any]
    ) -> Tensor:
        given = inputs.get("position_ids")
        if given is not None:
            # generate puts the position in the text before those in time, height and width
            return given[-3:] if given.ndim == 3 else given.expand(3, *input_ids.shape)
        arguments: dict[str, Any] = {"image_grid_thw": inputs.get("image_grid_thw"), "attention_mask": mask}
        if "mm_token_type_ids" in inspect.signature(model.base_model.get_rope_index).parameters:
            kinds = inputs.get("mm_token_type_ids")
            is_image = (input_ids == self.image_token_id(model)).int()
            arguments["mm_token_type_ids"] = is_image if kinds is None else kinds
        return model.base_model.get_rope_index(input_ids, **arguments)[0]


def _merge_size(model: Any) -> int:
    return model.config.vision_config.spatial_merge_size


def _windowed(model: Any, grid: tuple[int, int]) -> Tensor:
    """Raster indices (N,) of an image's tokens in the order in which the tower has them, window by window."""
    rows, columns = (torch.arange(side) for side in grid)
    raster = rows[:, None] * grid[1] + columns
    config = model.config.vision_config
    size = getattr(config, "window_size", None)
    if size is None:
        return raster.flatten()
    side = size // config.spatial_merge_size // config.patch_size
    window = (rows[:, None] // side) * grid[1] + columns // side
    return window.flatten().argsort(stable=True)

"""The prefill of all branches of a prompt: one forward pass, their tokens one branch after the other.

A negative branch is short. In a pass of its own it would cost what a token costs, weights read once more; behind the
positive branch it costs its few tokens, less those before the first image: they are the same in all branches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from lvlm_fix.attention import MethodAttention
from lvlm_fix.branches import Branch
from lvlm_fix.cache import OutOfSight
from lvlm_fix.dispatch import is_plain, looked_into
from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.models.base import Family
from lvlm_fix.passes import Pass, first_query
from lvlm_fix.prompt import Prefill, Prompt, kept_columns, pack
from lvlm_fix.replayed_decoder import ReplayedPrefill

WORTH_SHARING = 16
"""Tokens before the first image from which on they are not computed twice: for fewer, to fetch keys costs more."""


@dataclass(frozen=True)
class Part:
    """A branch to prefill: its tokens, which of them are an image's (R, T), and its pass through the decoder."""

    tokens: Prefill
    image_mask: Tensor
    this: Pass

    def branch(self) -> Branch:
        assert self.this.cache is not None
        return Branch(
            self.this.cache,
            self.tokens.mask,
            self.tokens.next_position,
            self.image_mask,
            self.this.sinks,
            self.tokens.unpadded,
        )


class Prefiller:
    """Runs `plain_forward`, the model's own forward pass, over prompts of which branches see different image tokens.

    `taken` are the caches that it filled.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        plain_forward: Callable,
        attention: MethodAttention | None,
        cache_name: str,
        replayed: ReplayedPrefill | None = None,
    ) -> None:
        """Prepare; `attention` is that of the methods, None where none of them changes the decoder's."""
        self.replayed = replayed
        self.model, self.plain_forward, self.cache_name = model, plain_forward, cache_name
        self.family, self.attention, self.config = family, attention, family.decoder(model).config
        self.taken: WeakSet[Cache] = WeakSet()

    @functools.cached_property
    def parting(self) -> MethodAttention | None:
        """Put over a decoder's own attention for the time of a pass, to keep branches from attending to each other.

        None where methods do that, and where the decoder's cannot be reached: its branches then take a pass each.
        """
        reached = getattr(self.family.decoder(self.model), "_supports_attention_backend", False)
        if self.attention is not None or not reached:
            return None
        try:
            return MethodAttention(self.model, self.family, ())
        except (AttributeError, UnsupportedModelError):
            return None

    def part(self, prompt: Prompt, kept: list[Tensor | None], cache: Cache | None = None) -> Part:
        """The branch that sees the tokens `kept` of each image, all of them where that is None."""
        tokens = pack(prompt.embeddings, kept_columns(prompt.where, kept), prompt.positions)
        image_mask = prompt.is_image.gather(1, tokens.columns) & tokens.mask
        if not prompt.caching:
            cache = None
        elif cache is None:
            cache = DynamicCache(config=self.model.config.get_text_config())
        if cache is not None:
            self.taken.add(cache)
        unpadded, first = tokens.unpadded, first_query(image_mask)
        this = Pass(tokens.mask, image_mask, first, cache, prefill=True, unpadded=unpadded)
        return Part(tokens, image_mask, this)

    def __call__(
        self, parts: Sequence[Part], rest: dict[str, Any], logits_to_keep: int | Tensor
    ) -> tuple[Any, list[Tensor]]:
        """Prefill the parts, the positive branch first.

        Args:
            rest: further arguments of the forward pass.
            logits_to_keep: of the positive branch; of the others the last token's are made.

        Returns:
            What the model says to the positive branch, and the last logits (R, V) of each other one.
        """
        if len(parts) > 1 and self._joins(parts, rest):
            return self._together(parts, rest, logits_to_keep)
        output = self._alone(parts[0], rest, logits_to_keep)
        return output, [self._alone(part, rest, 1).logits[:, -1] for part in parts[1:]]

    def _joins(self, parts: Sequence[Part], rest: dict[str, Any]) -> bool:
        if looked_into(self.config, rest):
            return False  # what is shown would be that of all branches
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            return False  # which logits are kept is said by a tensor, on one device
        if self.parting is None:
            return self.attention is not None
        return is_plain(self.config, self.parting.modules, max(part.tokens.mask.shape[1] for part in parts))

    def _alone(self, part: Part, rest: dict[str, Any], logits_to_keep: int | Tensor) -> Any:
        inputs = self._inputs(
            rest,
            part.this.cache,
            attention_mask=part.tokens.mask.long(),
            position_ids=part.tokens.positions,
            inputs_embeds=part.tokens.embeddings,
            logits_to_keep=logits_to_keep,
        )
        if self._replays([part], rest):
            return self._replay([part], inputs)
        with nullcontext() if self.attention is None else self.attention.running(part.this):
            return self.plain_forward(**inputs)

    def _replays(self, parts: Sequence[Part], rest: dict[str, Any]) -> bool:
        if self.replayed is None or looked_into(self.config, rest):
            return False
        return self.replayed.takes([part.this for part in parts])

    def _replay(self, parts: Sequence[Part], inputs: dict[str, Any]) -> Any:
        assert self.replayed is not None
        return self.replayed([part.this for part in parts], inputs, self.cache_name)

    def _together(
        self, parts: Sequence[Part], rest: dict[str, Any], logits_to_keep: int | Tensor
    ) -> tuple[Any, list[Tensor]]:
        if self.parting is not None:  # methods of the attention stage look at all tokens of a branch
            for part in parts[1:]:
                part.this.prefix = _prefix(parts[0], part)
        widths = [part.this.computed for part in parts]
        own = [(part.tokens, slice(-width, None)) for part, width in zip(parts, widths, strict=True)]
        inputs = self._inputs(
            rest,
            None if parts[0].this.cache is None else OutOfSight(),
            attention_mask=torch.cat([one.mask[:, columns] for one, columns in own], dim=1).long(),
            position_ids=torch.cat([one.positions[..., columns] for one, columns in own], dim=-1),
            inputs_embeds=torch.cat([one.embeddings[:, columns] for one, columns in own], dim=1),
            logits_to_keep=_columns(widths, logits_to_keep).to(parts[0].tokens.mask.device),
        )
        run = self._replay if self._replays(parts, rest) else self._queue
        output = run(parts, inputs)
        asked = output.logits.shape[1] + 1 - len(parts)
        output.logits, others = output.logits[:, :asked], output.logits[:, asked:].unbind(1)
        return output, list(others)

    def _queue(self, parts: Sequence[Part], inputs: dict[str, Any]) -> Any:
        attention = self.attention or self.parting
        assert attention is not None
        with (
            nullcontext() if self.parting is None else self.parting.installed(),
            attention.running(*(part.this for part in parts)),
        ):
            return self.plain_forward(**inputs)

    def _inputs(self, rest: dict[str, Any], cache: Cache | None, **inputs: Any) -> dict[str, Any]:
        return rest | inputs | {self.cache_name: cache, "use_cache": cache is not None}


def _prefix(first: Part, part: Part) -> Tensor | None:
    """Columns (R, S) of the first branch that hold the same as the first S of another; None where they are few."""
    pads, before = zip(*(_lengths(one) for one in (first, part)), strict=True)
    shared = int((pads[1] + torch.minimum(*before)).min())
    if shared < WORTH_SHARING:
        return None
    columns = torch.arange(shared, device=pads[0].device) + (pads[0] - pads[1])[:, None]
    return columns.clamp_min(0)


def _lengths(part: Part) -> tuple[Tensor, Tensor]:
    """Of each row (R,): its padding, and its tokens before the first image; all but the last of a row without one."""
    mask = part.tokens.mask
    text = mask & (part.image_mask.cumsum(1) == 0)
    return (~mask).sum(1), torch.minimum(text.sum(1), mask.sum(1) - 1)


def _columns(widths: Sequence[int], logits_to_keep: int | Tensor) -> Tensor:
    """Which columns' logits are made, of branches `widths` wide: as asked of the first, the last of the others."""
    first = torch.arange(widths[0])
    first = first[-logits_to_keep:] if isinstance(logits_to_keep, int) else first[logits_to_keep.cpu()]
    return torch.cat([first, torch.tensor(widths).cumsum(0)[1:] - 1])

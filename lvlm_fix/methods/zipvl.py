"""ZipVL: efficient large vision-language models with dynamic token sparsification."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lvlm_fix.functional import important_tokens
from lvlm_fix.kernels.probe_scores import scores_of_probes
from lvlm_fix.methods.base import AttentionStep, Method
from lvlm_fix.packed_layer import PackedLayer


@dataclass(frozen=True, eq=False)
class Same:
    """What ZipVL knows of a prefill of R rows and T columns in any layer.

    Attributes:
        positions: (R, P), the columns of the probes.
        stand: the same, int32.
        lengths: (R,), tokens that are no padding.
        key_mask: (R, T) bool, these tokens; None where that is all.
        kept: (R, T) bool, tokens that may not be dropped, padding among them; None where all may.
        always: (R, T) or (T,) bool, tokens that are important whatever the probes say, if they are no padding.
    """

    positions: Tensor
    stand: Tensor
    lengths: Tensor
    key_mask: Tensor | None
    kept: Tensor | None
    always: Tensor


@dataclass(frozen=True)
class ZipVL(Method):
    """Attend in the prefill among important tokens only, and pack the KV cache (He et al., arXiv 2410.08584).

    In each layer `recent` newest and `random` other queries probe which tokens get attention. As many tokens are
    important as it takes to hold `tau` of it; the others pass the layer's attention by the residual. In the KV cache
    important tokens have `bits` bits, the others `low_bits`, or none with `evict`. The newest `window` tokens always
    stay, as they are.

    Raises:
        ValueError: a field is out of range; the message names what each must be.

    >>> ZipVL(evict=True).stages()
    ('attention', 'cache')
    """

    tau: float = 0.975  # share of the attention that important tokens hold
    recent: int = 64  # newest queries that probe
    random: int = 64  # other queries that probe
    scope: str = "all"  # tokens that may be unimportant: "all", or those of the "image"
    bits: int = 4  # of important tokens in the cache
    low_bits: int = 2  # of the others
    evict: bool = False  # drop the others instead (the paper's second version)
    window: int = 32  # newest tokens, never dropped or packed
    seed: int = 0  # draws the random probes

    name: ClassVar[str] = "zipvl"
    paper: ClassVar[str] = "arXiv 2410.08584"
    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole = all(count == int(count) for count in (self.recent, self.random, self.window))
        counts = whole and self.recent >= 1 and self.random >= 0 and self.window >= 1
        kinds = self.scope in ("all", "image") and {self.bits, self.low_bits} <= {2, 4, 8}
        if not (0 < self.tau <= 1 and counts and kinds):
            raise ValueError(
                f"{self}: tau must lie above 0 and not above 1, recent and window be at least 1, random at least 0, "
                "bits 2, 4 or 8, and scope all or image"
            )

    def attention(self, step: AttentionStep) -> AttentionStep:
        if step.hidden_states is None:
            return step
        if step.real.shape[1] <= self.window:  # all are newest, whatever the probes say
            ratio = torch.ones(len(step.real), device=step.real.device)
            return replace(step, important=step.real, told={"ratios": ratio})
        place = self, step.query.device  # layers may be on several
        same = step.shared.get(place)
        if same is None:
            same = step.shared[place] = self.of_all_layers(step)
        index = same.positions[:, None, :, None].expand(-1, step.query.shape[1], -1, step.query.shape[-1])
        scores, normalised = scores_of_probes(
            step.query.gather(2, index), step.key, same.stand, step.scale, same.key_mask
        )
        if same.kept is not None:
            scores, normalised = scores.masked_fill(same.kept, 0), normalised.masked_fill(same.kept, -1)
        important = important_tokens(scores, normalised, self.tau) | same.always
        important = important if same.key_mask is None else important & same.key_mask
        ratios = functools.partial(_ratios, important, same.lengths)
        return replace(step, important=important, told={"ratios": ratios})

    def of_all_layers(self, step: AttentionStep) -> Same:
        """What is the same in all layers of a prefill: each operation costs the host as much as a small layer's."""
        real, device = step.real, step.query.device
        positions, lengths = self.probes(real).to(device), real.sum(1)
        newest = torch.arange(real.shape[1], device=device) >= real.shape[1] - self.window
        unpadded = bool((lengths == real.shape[1]).all())
        kept = (
            None if unpadded and self.scope == "all" else ~(real if self.scope == "all" else step.image_mask)
        )
        return Same(
            positions=positions,
            stand=positions.to(torch.int32),
            lengths=lengths,
            key_mask=None if unpadded else real,
            kept=kept,
            always=newest if kept is None else kept | newest,
        )

    def cache(self, step: AttentionStep) -> PackedLayer | None:
        if step.important is None:
            return None
        return PackedLayer.compress(
            step.key,
            step.value,
            step.important,
            step.real,
            bits=self.bits,
            low_bits=self.low_bits,
            window=self.window,
            evict=self.evict,
        )

    def probes(self, real: Tensor) -> Tensor:
        """Columns (R, P) of the probes of each row; they depend on its own length only, so batches change nothing.

        A row of fewer than P tokens has probes on its padding, which count for nothing.
        """
        rows, width = real.shape
        lengths = real.sum(1).tolist()
        positions = torch.zeros(rows, min(width, self.recent + self.random), dtype=torch.long)
        for row, length in enumerate(lengths):
            older = max(length - self.recent, 0)
            drawn = torch.randperm(older, generator=torch.Generator().manual_seed(self.seed))[: self.random]
            own = torch.cat([drawn.sort().values, torch.arange(older, length)]) + (width - length)
            positions[row, positions.shape[1] - len(own) :] = own
        return positions.to(real.device)

    @classmethod
    def for_model(cls, model: str, task: str = "general") -> ZipVL:
        """The paper's setting, the same for `llava-1.5`, `llava-next` and `qwen-vl` and every task."""
        models = ("llava-1.5", "llava-next", "qwen-vl")
        if model not in models:
            raise ValueError(f"ZipVL has no setting for model {model!r}: models are {', '.join(models)}")
        return cls()


def _ratios(important: Tensor, lengths: Tensor) -> Tensor:
    return important.sum(1) / lengths

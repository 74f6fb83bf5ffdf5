"""VAR: see what you are told. Visual attention sink in large multimodal models."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from lvlm_fix.functional import image_centric_heads, sink_tokens
from lvlm_fix.kernels import Redistribution
from lvlm_fix.methods.base import AttentionStep, Method


@dataclass(frozen=True)
class VAR(Method):
    """Give the attention that sinks hoard back to the image (Kang et al., arXiv 2503.03321, ICLR 2025).

    A few tokens, of the image too, draw attention though they tell nothing: their hidden states are massive in a
    few dimensions. In heads that look at the image, they give the fraction `p` of their weight to the image's other
    tokens. The first two layers and the last are left alone, and so is every query before the end of the image.

    `tau` is the paper's threshold for decoders 4096 wide and more; |x| / rms(x) cannot pass the root of the width, so
    for narrower ones it is scaled by it. `sink_dims=None` takes those of the model, see `find_sink_dims`.

    Raises:
        ValueError: `rho`, `p` or `min_image_attention` is outside 0..1, `tau` is not positive, or `first_layer` is
            negative.

    >>> VAR.for_model("llava-1.5", task="pope")
    VAR(p=0.6, rho=0.5, min_image_attention=0.2, tau=20.0, first_layer=2, sink_dims=None)
    """

    p: float = 0.6  # fraction of every sink's weight that moves
    rho: float = 0.8  # least non-sink share of the image's attention in an image-centric head
    min_image_attention: float = 0.2  # least attention to the image in such a head
    tau: float = 20.0  # |x| / rms(x) above which a token is a sink
    first_layer: int = 2  # first layer that is changed
    sink_dims: tuple[int, ...] | None = None  # dimensions with massive activations

    name: ClassVar[str] = "var"
    paper: ClassVar[str] = "arXiv 2503.03321"
    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        shares = all(0 <= value <= 1 for value in (self.p, self.rho, self.min_image_attention))
        if not (shares and self.tau > 0 and self.first_layer >= 0):
            raise ValueError(
                f"{self}: p, rho and min_image_attention must lie in 0..1, tau above 0 and first_layer not below 0"
            )
        if self.sink_dims is not None:
            object.__setattr__(self, "sink_dims", tuple(int(dim) for dim in self.sink_dims))

    def prepare(self, model: Any) -> VAR:
        if self.sink_dims is not None:
            return self
        from lvlm_fix.sinks import find_sink_dims

        return replace(self, sink_dims=find_sink_dims(model).dims)

    def threshold(self, width: int) -> float:
        """`tau` for a decoder of this width."""
        from lvlm_fix.sinks import threshold_at

        return threshold_at(width, self.tau)

    def attention(self, step: AttentionStep) -> AttentionStep:
        if not self.first_layer <= step.layer < step.layers - 1 or not self.sink_dims:
            return step
        sinks = step.sinks
        if step.hidden_states is not None:
            threshold = self.threshold(step.hidden_states.shape[-1])
            sinks = sink_tokens(step.hidden_states, self.sink_dims, threshold) & step.real
            step = self._tell(step, sinks)
            # The paper leaves a layer without image sinks alone. On a GPU the kernel sees to that: to ask would wait
            # for the device in every layer, and the KV cache asks once for all of them.
            if not sinks.is_cuda and not bool((sinks & step.image_mask).any()):
                sinks = None
        if sinks is None:
            return step
        gate = (self.rho, self.min_image_attention, self.p)
        return replace(
            step,
            sinks=sinks,
            redistribution=Redistribution(step.image_mask, sinks, step.first_query, *gate),
        )

    def _tell(self, step: AttentionStep, sinks: Tensor) -> AttentionStep:
        """Report the sinks, and which heads are image-centric for the prompt's last token: one query row a head."""
        # A dozen operations a layer that nobody may ask for: only the products are made now, while the keys are there.
        logits = last_logits(step)

        @functools.cache
        def heads() -> Tensor:
            weights = attention_of(logits, step.real)
            masks = step.image_mask, sinks
            return image_centric_heads(weights, *masks, self.rho, self.min_image_attention)[..., 0]

        return replace(step, told={"sinks": sinks, "heads": heads})

    @classmethod
    def for_model(cls, model: str, task: str = "general") -> VAR:
        """The paper's `rho` for a task: 0.8 `general`, 0.5 `pope` and `captions` (hallucination), 0.9 `vision`.

        It holds for `llava-1.5`, `llava-next` and `instructblip`; the sink dimensions are those of the model at hand.
        """
        rho = {"general": 0.8, "pope": 0.5, "captions": 0.5, "vision": 0.9}
        models = ("llava-1.5", "llava-next", "instructblip")
        if model not in models or task not in rho:
            raise ValueError(
                f"VAR has no setting for model {model!r} and task {task!r}: models are {', '.join(models)}; tasks are "
                f"{', '.join(rho)}"
            )
        return cls(rho=rho[task])


def last_row(step: AttentionStep) -> Tensor:
    """Attention (R, H, 1, T) of the prompt's last token."""
    return attention_of(last_logits(step), step.real)


def last_logits(step: AttentionStep) -> Tensor:
    """Scaled products (R, H, 1, T) of the prompt's last token and every key."""
    # Heads that share keys become rows of one head, and no key is copied.
    query = step.query[:, :, -1].unflatten(1, (step.key.shape[1], -1)).float()
    logits = query @ step.key.float().mT
    scale = step.query.shape[-1] ** -0.5 if step.scale is None else step.scale
    return logits.flatten(1, 2)[:, :, None] * scale


def attention_of(logits: Tensor, real: Tensor) -> Tensor:
    """Weights (R, H, 1, T) among the keys that are `real` (R, T)."""
    return logits.masked_fill(~real[:, None, None], float("-inf")).softmax(-1)

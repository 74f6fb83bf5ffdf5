"""A method is nothing but the pipeline stages it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lvlm_fix.kernels import Redistribution
from lvlm_fix.vision import VisionEncoding

Told = Tensor | Callable[[], Tensor]
"""What a report is made of: a tensor, or what makes it when somebody reads."""


def made(told: Told) -> Tensor:
    return told if isinstance(told, Tensor) else told()


@dataclass(frozen=True)
class AttentionStep:
    """One decoder layer's attention, before it is computed. Stages return it with fields replaced.

    R rows, H heads, K key heads, Q queries, T keys, D width of a head, C width of the model. In the prefill Q = T.
    When decoding, keys may stand in any order: the masks follow them.

    Attributes:
        layer, layers: index of this layer, and how many there are.
        query, key, value: (R, H, Q, D), (R, K, T, D), (R, K, T, D); positions already rotated in. When one token is
            decoded from a packed cache, keys and values are not unpacked: these two are NaN of that shape.
        scale: factor on the dot products.
        real: (R, T) bool, keys that are no padding.
        image_mask: (R, T) bool, image tokens.
        first_query: (R,) column of the first query after the row's last image token; T where there is no image.
        hidden_states: (R, T, C) input of the layer in the prefill; None when decoding.
        sinks: (R, T) bool, the sink tokens found in this layer's prefill; None where there are none.
        important: (R, T) bool, set in the prefill to let only these tokens attend and be attended to.
        redistribution: set to move attention from sinks to the image.
        shared: what a method wants to keep from layer to layer of one prefill.
        told: what a method wants in the report of this layer: by key, one entry a row, numbers (R,) or masks (R, ...);
            or what makes them when the report is read.
    """

    layer: int
    layers: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    real: Tensor
    image_mask: Tensor
    first_query: Tensor
    hidden_states: Tensor | None = None
    sinks: Tensor | None = None
    important: Tensor | None = None
    redistribution: Redistribution | None = None
    shared: dict[Any, Any] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)


class Method:
    """Base of all methods: every stage does nothing. A method overrides the stages it changes.

    Subclasses are frozen dataclasses whose fields are the paper's hyper-parameters. They hold no state and know
    nothing of models: the pipeline calls the stages.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    conflicts: ClassVar[dict[str, str]] = {}
    """Other method's name -> why the two pull against each other."""
    steady: ClassVar[bool] = False
    """Whether `attention`, when decoding, goes by the layer and its masks alone: it is then asked once a layer."""

    reads_feature_scores: ClassVar[bool] = True
    """Whether `select` or `negative_tokens` read `VisionEncoding.feature_scores`: NaN where no method does."""

    def prepare(self, model: Any) -> Method:
        """The method with what it must know of a model filled in; `attach` asks once."""
        return self

    def scored_layers(self, layers: int) -> range:
        """Which of the tower's layers `select` and `negative_tokens` read `VisionEncoding.layer_scores` of."""
        return range(layers)

    def select(self, vision: VisionEncoding) -> Tensor | None:
        """Sorted indices (K,) of the image tokens that enter the prompt; None keeps all."""
        return None

    def negative_tokens(self, vision: VisionEncoding) -> Tensor | None:
        """Indices (K,) of the image tokens that a negative branch sees, of the unpruned image; None for no branch."""
        return None

    def attention(self, step: AttentionStep) -> AttentionStep:
        """How one layer of the decoder attends; called for every layer of every branch, in prefill and decoding."""
        return step

    def cache(self, step: AttentionStep) -> Any | None:
        """What holds the layer's keys and values after the prefill, a transformers cache layer; None for the plain."""
        return None

    def unsure(self, logits: Tensor) -> Tensor | None:
        """Rows (B,) bool whose next token, of logits (B, V), needs the negative branch; None runs it always."""
        return None

    def logits(self, logits: Tensor, negative: Tensor) -> Tensor:
        """Next-token logits (B, V) from the positive and this method's negative branch."""
        return logits

    @classmethod
    def stages(cls) -> tuple[str, ...]:
        """Names of the stages that this method changes."""
        known = ("select", "negative_tokens", "attention", "cache", "logits")
        return tuple(stage for stage in known if getattr(cls, stage) is not getattr(Method, stage))

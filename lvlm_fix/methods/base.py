"""A method is nothing but the pipeline stages it changes."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lvlm_fix.vision import VisionEncoding


class Method:
    """Base of all methods: every stage does nothing. A method overrides the stages it changes.

    Subclasses are frozen dataclasses whose fields are the paper's hyper-parameters. They hold no state and know
    nothing of models: the pipeline calls the stages.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    conflicts: ClassVar[dict[str, str]] = {}
    """Other method's name -> why the two pull against each other."""

    def select(self, vision: VisionEncoding) -> Tensor | None:
        """Sorted indices (K,) of the image tokens that enter the prompt; None keeps all."""
        return None

    def negative_tokens(self, vision: VisionEncoding) -> Tensor | None:
        """Indices (K,) of the image tokens that a negative branch sees, of the unpruned image; None for no branch."""
        return None

    def logits(self, logits: Tensor, negative: Tensor) -> Tensor:
        """Next-token logits (B, V) from the positive and this method's negative branch."""
        return logits

    @classmethod
    def stages(cls) -> tuple[str, ...]:
        """Names of the stages that this method changes."""
        known = ("select", "negative_tokens", "logits")
        return tuple(stage for stage in known if getattr(cls, stage) is not getattr(Method, stage))

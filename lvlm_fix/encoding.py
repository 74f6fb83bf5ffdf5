"""Images as the model encodes them, with what the vision tower, or a companion, says of their tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from lvlm_fix.errors import PromptError
from lvlm_fix.interception import standing_in
from lvlm_fix.methods.base import Method
from lvlm_fix.models.base import Family
from lvlm_fix.recorder import TowerRecorder
from lvlm_fix.replayed_tower import ReplayedTower
from lvlm_fix.vision import VisionEncoding

REPEATS_PICTURES = not hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
"""Whether `generate` hands pixels on, repeated for beams, instead of encoding them once before."""


LOOKING = ("output_hidden_states", "output_attentions", "vision_feature_layer")
"""Arguments of `get_image_features` that ask for more than the features, or for others."""


class Companion(Protocol):
    """Scores the patches of a crop where the model's own tower has no CLS token."""

    source: str

    def maps(self, crops: list[Tensor], grids: list[tuple[int, int]], family: Family) -> list[Tensor]:
        """Scores (S, rows, columns) of each crop (3, H, W), normalised as the family's processor does, on its grid."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """One image as it was encoded.

    Attributes:
        features: (N, C) its tokens.
        vision: what is known of them.
        context: the arguments of the call that encoded it, and under `result` what it returned.
        place: which of the images of that call it is.
    """

    features: Tensor
    vision: VisionEncoding
    context: Mapping[str, Any]
    place: int


class ImageEncoder:
    """Stands in for a model's `get_image_features` and keeps what was said beside the features."""

    def __init__(
        self, model: Any, family: Family, scoring: Sequence[Method], companion: Companion | None
    ) -> None:
        """Prepare; `scoring` are the methods that read scores of image tokens."""
        self.model, self.family, self.reads_scores = model, family, bool(scoring)
        self.companion = companion
        self.recorder = TowerRecorder(model, family, scoring) if scoring and companion is None else None
        self.plain: Callable = family.encoder(model).get_image_features
        self.signature = inspect.signature(self.plain)
        # Older transformers name here what is asked of the decoder too.
        self.arguments = tuple(name for name in self.signature.parameters if not name.startswith("output_"))
        self.unread = self._unread(scoring)
        self.tower: ReplayedTower | None = None
        self.known: dict[int, Encoded] = {}  # by the identity of an image's features
        self.unused = False  # encoded, and not yet looked for in a prompt

    def _unread(self, scoring: Sequence[Method]) -> list[nn.Module]:
        """Tower layers that nobody reads: neither the features nor the methods."""
        layers = self.family.unread_layers(self.model)
        if layers and self.recorder is not None:
            first, count = self.recorder.count - len(layers), self.recorder.count
            if any(layer >= first for method in scoring for layer in method.scored_layers(count)):
                return []
        return layers

    def replay(self) -> ReplayedTower:
        """Record the vision tower as a CUDA graph, from its second run on."""
        self.tower = ReplayedTower(self.family.tower(self.model), self.recorder)
        return self.tower

    def install(self) -> None:
        if self.recorder is not None:
            self.recorder.install()

    def remove(self) -> None:
        if self.recorder is not None:
            self.recorder.remove()
        self.known.clear()

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, whose result `generate` hands on to the prefill."""
        inputs = dict(zip(self.signature.parameters, args, strict=False)) | kwargs
        self.known.clear()  # the tower has use for its memory
        if self.recorder is not None:
            self.recorder.clear()
        # Who asks for more than the features gets all of the tower.
        looking = any(inputs.get(name) not in (None, False) for name in LOOKING)
        skipped = [] if looking else self.unread
        tower = None if looking else self.tower
        with skipping(skipped), nullcontext() if tower is None else tower.standing_in():
            result = self.plain(*args, **kwargs)
        if tower is not None and hasattr(result, "hidden_states"):  # the next picture's are written over them
            result["hidden_states"] = None
        if skipped and hasattr(result, "last_hidden_state"):  # what no layer has made is not shown
            result["last_hidden_state"] = None
            if result.hidden_states is not None:
                kept = result.hidden_states[: -len(skipped)]
                result["hidden_states"] = (*kept, *[None] * len(skipped))
        features = self.family.images(self.family.features(result), inputs)
        context = inputs | {"result": result}
        encodings = self._encodings(features, context)
        self.known = {
            id(feature): Encoded(feature, seen, context, place)
            for place, (feature, seen) in enumerate(zip(features, encodings, strict=True))
        }
        self.unused = True
        return self.family.with_features(result, features)

    def _encodings(self, features: list[Tensor], inputs: Mapping[str, Any]) -> list[VisionEncoding]:
        if not self.reads_scores:
            return [VisionEncoding.unread(len(feature)) for feature in features]
        if self.companion is not None:
            grids = self.family.token_grids(self.model, inputs)
            maps = self.companion.maps(self.family.pixels(self.model, inputs), grids, self.family)
            return self.family.encodings(self.model, maps, inputs, self.companion.source)
        assert self.recorder is not None
        maps = self.family.maps(self.model, self.recorder.crops(), inputs)
        return self.family.encodings(self.model, maps, inputs, self.recorder.source)

    def _encode_here(self, kwargs: Mapping[str, Any], input_ids: Tensor) -> list[Tensor]:
        """Features of the pictures among the arguments of a forward pass, one an image, in reading order.

        Older transformers repeat pictures for beams one by one, so that a prompt's second picture would follow its
        first one's repetitions: each is encoded once and put where its prompt has it.
        """
        inputs = {name: kwargs[name] for name in self.arguments if kwargs.get(name) is not None}
        if not REPEATS_PICTURES or len(input_ids) == 1:
            return self.family.features(self.get_image_features(**inputs))
        is_image = input_ids == self.family.image_token_id(self.model)
        # Without a KV cache the beams' own words follow: they are the same up to their last image token.
        shared = input_ids[:, : int(is_image.any(0).nonzero().amax()) + 1] if is_image.any() else input_ids
        beams = _beams(inputs, shared)
        if beams == 1:
            return self.family.features(self.get_image_features(**inputs))
        once = {
            name: value[::beams].contiguous() if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        left = list(self.family.features(self.get_image_features(**once)))
        features = []
        for count in is_image[::beams].sum(1).tolist():
            own: list[Tensor] = []
            while left and sum(map(len, own)) < count:
                own.append(left.pop(0))
            features += own * beams
        return features

    def images(self, kwargs: Mapping[str, Any], input_ids: Tensor) -> list[Encoded]:
        """The images of a forward pass, in reading order: encoded by `generate` before, or here from pixels."""
        given = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        features = self._encode_here(kwargs, input_ids) if given is None else self.family.features(given)
        if any(id(feature) not in self.known for feature in features):
            raise PromptError(
                "the image features were not made under this attach, or were cut in chunks, so their CLS scores are "
                "unknown: pass pixel_values, and leave mm_encoder_outputs and prefill_chunk_size out"
            )
        return [self.known[id(feature)] for feature in features]


def skipping(layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Within, the layers hand on the hidden states that they are given."""
    return standing_in(dict.fromkeys(layers, _hand_on))


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _beams(inputs: dict[str, Any], words: Tensor) -> int:
    """How often each picture and each prompt's words, row by row, were repeated for beams."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    if any(len(value) != len(tensors[0]) for value in tensors):
        return 1
    for beams in range(len(words), 1, -1):
        if all(len(value) % beams == 0 and _repeats(value, beams) for value in (words, *tensors)):
            return beams
    return 1


def _repeats(value: Tensor, times: int) -> bool:
    groups = value.unflatten(0, (-1, times))
    return torch.equal(groups, groups[:, :1].expand_as(groups))

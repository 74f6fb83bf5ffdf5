"""The forward pass of a model with methods attached: choose image tokens, prefill all branches, decode, contrast.

`generate` stays transformers' own. It sees a forward pass that takes the caller's prompt and returns next-token
logits; that the prompt inside is shorter and the batch has a second half is known only here and to the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lvlm_fix.attention import MethodAttention
from lvlm_fix.cache import NAMES, BranchedCache, cache_name
from lvlm_fix.compiling import CompiledStep
from lvlm_fix.encoding import Companion, Encoded, ImageEncoder
from lvlm_fix.errors import PromptError, UnsupportedModelError
from lvlm_fix.first_look import FirstLook
from lvlm_fix.methods.base import Method
from lvlm_fix.models.base import Family
from lvlm_fix.prefilling import Part, Prefiller
from lvlm_fix.prompt import Prompt, layout
from lvlm_fix.recording import Recordings, replays
from lvlm_fix.replayed_decoder import ReplayedPrefill, ReplayedStep
from lvlm_fix.reporting import Report
from lvlm_fix.stepping import Stepper, contrasted


class Pipeline:
    """Runs the stages of `methods` around `plain_forward`, the forward pass that `generate` would have called."""

    def __init__(
        self,
        model: Any,
        family: Family,
        methods: tuple[Method, ...],
        plain_forward: Callable,
        companion: Companion | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.family, self.methods, self.plain_forward = model, family, methods, plain_forward
        self.cache_name = cache_name(family.generator(model))
        stages = {stage for method in methods for stage in method.stages()}
        self.packs_cache = "cache" in stages
        scoring = [method for method in methods if {"select", "negative_tokens"} & set(method.stages())]
        self.encoder = ImageEncoder(model, family, scoring, companion)
        attends = bool({"attention", "cache"} & stages)
        self.attention = MethodAttention(model, family, methods) if attends else None
        step: CompiledStep | ReplayedStep | None = None
        prefill: ReplayedPrefill | None = None
        self.recordings: list[Recordings] = []
        if compiled:
            attention = self.attention or MethodAttention(model, family, ())
            if replays(model):
                prefill = ReplayedPrefill(plain_forward, attention)
                step = ReplayedStep(plain_forward, attention)
                self.recordings = [one.recordings for one in (self.encoder.replay(), prefill, step)]
            else:
                step = CompiledStep(plain_forward, attention, model.device)
        self.step = Stepper(plain_forward, methods, self.attention, family.decoder(model).config, step)
        self.prefill = Prefiller(model, family, plain_forward, self.attention, self.cache_name, prefill)
        self.report: Report | None = None
        self.first_look = FirstLook()

    def install(self) -> None:
        self.encoder.install()
        if self.attention is not None:
            self.attention.install()

    def remove(self) -> None:
        self.encoder.remove()
        if self.attention is not None:
            self.attention.remove()
        for (
            recordings
        ) in self.recordings:  # whoever keeps the handle for its report does not keep their memory
            recordings.clear()

    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        self._refuse(args, kwargs)
        # Callers may still use the older of transformers' names.
        kwargs = {self.cache_name if name in NAMES else name: value for name, value in kwargs.items()}
        cache, embeddings = kwargs.get(self.cache_name), kwargs.get("inputs_embeds")
        if isinstance(cache, BranchedCache):
            if input_ids is None or _has_images(kwargs):
                raise PromptError(
                    "under attach, a conversation goes on in text: pass a new picture in a new generate call"
                )
            return self.step(input_ids, cache, self._without_pictures(kwargs), self.report)
        if cache is not None and cache in self.prefill.taken:
            raise PromptError(
                "attach took this KV cache over in an earlier call and keeps more than it shows: pass the cache that "
                "generate returned with return_dict_in_generate=True, or start a new prompt"
            )
        is_image = None if embeddings is None else self._placed_images(embeddings)
        if is_image is None and not _has_images(kwargs):
            self._refuse_missing_pictures(input_ids)
            fresh = cache is None or not cache.get_seq_length()
            if not (fresh and self.packs_cache and input_ids is not None):
                self.report = Report(self.methods) if fresh else self.report
                return self.plain_forward(input_ids=input_ids, **kwargs)
        if input_ids is None and is_image is None:
            raise PromptError(
                "under attach, a prompt with pictures is passed as input_ids, not inputs_embeds"
            )
        grows = isinstance(cache, DynamicCache) and not getattr(cache, "offloading", False)
        if cache is not None and (cache.get_seq_length() or not grows):
            raise PromptError(
                "under attach, pictures come in the first call, into an empty DynamicCache that stays on its device: "
                f"leave {self.cache_name}, prefill_chunk_size and cache_implementation='static' or another out"
            )
        return self._prefill(self._prompt(input_ids, embeddings, is_image, kwargs), kwargs)

    def _placed_images(self, embeddings: Tensor) -> Tensor | None:
        """Where the images are that the model has encoded and put into the embeddings itself; None without images."""
        known = [image.features for image in self.encoder.known.values()]
        is_image = self.family.finds_images(embeddings, known)
        places_images = type(self.family).finds_images is not Family.finds_images
        if is_image is None and self.encoder.unused and places_images:
            raise UnsupportedModelError(
                "the image tokens are not in the prompt: lvlm-fix assumes that transformers' "
                f"{self.family.name} models put them there unchanged"
            )
        self.encoder.unused = False
        return is_image

    def _refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise TypeError("under attach, call the model with keyword arguments: model(**inputs)")
        if kwargs.get("return_dict") is False or kwargs.get("labels") is not None:
            raise PromptError(
                "under attach, the model generates: call it without labels and return_dict=False"
            )
        # generate encodes videos, too, before the first call
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if kwargs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
            raise PromptError("under attach, videos are not read: pass their frames as pictures")
        if self.packs_cache and kwargs.get("use_cache") is False:
            raise PromptError("ZipVL packs the KV cache: leave use_cache=False out, or attach it not")

    def _refuse_missing_pictures(self, input_ids: Tensor | None) -> None:
        if input_ids is not None and bool((input_ids == self.family.image_token_id(self.model)).any()):
            raise PromptError(
                "the prompt holds image tokens but no picture comes with it: pass pixel_values in the call that holds "
                "them, and leave prefill_chunk_size out"
            )

    def _prompt(
        self,
        input_ids: Tensor | None,
        embeddings: Tensor | None,
        is_image: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Prompt:
        """The prompt with its images in place; families whose generator gets embeddings have put them there."""
        mask, rest = kwargs.get("attention_mask"), self._without_pictures(kwargs)
        if is_image is not None:
            assert embeddings is not None
            images = list(self.encoder.known.values())
            beams = len(embeddings) // len(images)
            images = [image for image in images for _ in range(beams)]
            where = layout(is_image, mask, [len(image.features) for image in images])
            rest.pop("inputs_embeds")
            return Prompt(embeddings, is_image, where, images, None, rest)
        assert input_ids is not None
        images = self.encoder.images(kwargs, input_ids) if _has_images(kwargs) else []
        is_image = input_ids == self.family.image_token_id(self.model)
        where = layout(is_image, mask, [len(image.features) for image in images])
        embeddings = self.model.get_input_embeddings()(input_ids)
        for (row, columns), image in zip(where.spans, images, strict=True):
            own = image.features.to(embeddings.device, embeddings.dtype)
            embeddings[row].index_copy_(0, columns.to(embeddings.device), own)
        positions = self.family.positions(self.model, input_ids, mask, kwargs) if images else None
        return Prompt(embeddings, is_image & where.visible, where, images, positions, rest)

    def _without_pictures(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        own = ("pixel_values", "mm_encoder_outputs", "mm_token_type_ids", *self.encoder.arguments)
        return {name: value for name, value in kwargs.items() if name not in own}

    def _prefill(self, prompt: Prompt, kwargs: dict[str, Any]) -> Any:
        self.report = Report(self.methods)
        self.report.begin(prompt.images, [row for row, _ in prompt.where.spans])
        contrasting = self.step.contrasting
        kept = self._for_each(prompt.images, self._select)
        parts = [self.prefill.part(prompt, kept, kwargs.get(self.cache_name))]
        parts += [self._negative_part(prompt, method) for method in contrasting]
        output, said = self.prefill(parts, prompt.rest, kwargs.get("logits_to_keep", 0))
        apart, pictured = set[int](), None if prompt.all_pictured else prompt.is_image.any(1)
        for number, (method, negative) in enumerate(zip(contrasting, said, strict=True), 1):
            last = output.logits[:, -1]
            unsure = method.unsure(last)
            if unsure is not None:
                apart.add(number)
                self.report.contrasted(method, unsure)
            last = contrasted(method, last, negative, unsure, pictured)
            output.logits = torch.cat([output.logits[:, :-1].to(last.dtype), last[:, None]], dim=1)
        this = None if self.attention is None else parts[0].this
        if this is not None:
            self.report.attention(self.methods, this)
        self.first_look(self.model, self.family, self.methods, prompt.images, this)
        if prompt.caching:
            output[self.cache_name] = BranchedCache(
                [part.branch() for number, part in enumerate(parts) if number not in apart],
                prompt.embeddings.shape[1],
                self.step.methods,
                self.cache_name,
                [parts[number].branch() for number in sorted(apart)],
                all_pictured=prompt.all_pictured,
            )
        return output

    def _negative_part(self, prompt: Prompt, method: Method) -> Part:
        """The branch of a contrasting method."""
        chosen = self._for_each(prompt.images, functools.partial(self._negative, method))
        embeddings = prompt.embeddings.clone()
        for (row, columns), (features, places) in zip(prompt.where.spans, chosen, strict=True):
            embeddings[row, columns[places.to(columns.device)]] = features.to(
                embeddings.device, embeddings.dtype
            )
        return self.prefill.part(replace(prompt, embeddings=embeddings), [places for _, places in chosen])

    @staticmethod
    def _for_each(images: list[Encoded], choose: Callable) -> list[Any]:
        """What `choose` says of each image; of images repeated for beams it is asked once."""
        chosen = {id(image): choose(image) for image in {id(one): one for one in images}.values()}
        return [chosen[id(image)] for image in images]

    def _select(self, image: Encoded) -> Tensor | None:
        kept: Tensor | None = None
        for method in self.methods:
            if "select" not in method.stages():
                continue
            indices = method.select(image.vision)
            if indices is None:
                continue
            assert self.report is not None
            self.report.image(method, image, kept=indices)
            kept = indices if kept is None else kept[torch.isin(kept, indices)]
        return kept

    def _negative(self, method: Method, image: Encoded) -> tuple[Tensor, Tensor]:
        """Features of an image in a method's negative branch, and which of its places they take."""
        indices = method.negative_tokens(image.vision)
        assert indices is not None and self.report is not None
        self.report.image(method, image, outliers=indices)
        return self.family.negative_features(self.model, image.features, indices, image.context, image.place)


def _has_images(kwargs: dict[str, Any]) -> bool:
    encoded = kwargs.get("mm_encoder_outputs") or {}  # generate passes {} along with plain text
    return kwargs.get("pixel_values") is not None or encoded.get("image") is not None

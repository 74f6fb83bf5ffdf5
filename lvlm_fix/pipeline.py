"""The forward pass of a model with methods attached: choose image tokens, prefill all branches, decode, contrast.

`generate` stays transformers' own. It sees a forward pass that takes the caller's prompt and returns next-token
logits; that the prompt inside is shorter and the batch has a second half is known only here and to the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from lvlm_fix.cache import BranchedCache
from lvlm_fix.errors import PromptError
from lvlm_fix.methods.base import Method
from lvlm_fix.models.base import Family
from lvlm_fix.prompt import kept_columns, layout, pack
from lvlm_fix.recorder import CLSRecorder
from lvlm_fix.vision import VisionEncoding

IMAGE_INPUTS = ("pixel_values", "mm_encoder_outputs", "image_sizes")


class Pipeline:
    """Runs the stages of `methods` around `plain_forward`, the model's own forward pass."""

    def __init__(
        self, model: Any, family: Family, methods: tuple[Method, ...], plain_forward: Callable
    ) -> None:
        self.model, self.family, self.methods, self.plain_forward = model, family, methods, plain_forward
        self.contrasting = [method for method in methods if "negative_tokens" in method.stages()]
        self.recorder = CLSRecorder(model, family)
        self.encode: Callable = family.encoder(model).get_image_features
        self.encoded: dict[int, tuple[Tensor, VisionEncoding]] = {}  # by the identity of an image's features
        self.report: dict[str, list[dict[str, Any]]] = {}

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `get_image_features`; keeps what the tower said beside the features."""
        result = self.encode(*args, **kwargs)
        features = self.family.features(result)
        encodings = self.recorder.encodings()
        self.encoded = {
            id(feature): (feature, seen) for feature, seen in zip(features, encodings, strict=True)
        }
        if hasattr(result, "pooler_output"):
            result.pooler_output = features  # the very tensors, which generate hands on to the prefill
            return result
        return features

    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError("under attach, call the model with keyword arguments: model(**inputs)")
        if kwargs.get("return_dict") is False or kwargs.get("labels") is not None:
            raise PromptError(
                "under attach, the model generates: call it without labels and return_dict=False"
            )
        cache = kwargs.get("past_key_values")
        if isinstance(cache, BranchedCache):
            return self._step(input_ids, cache, kwargs)
        if not _has_images(kwargs):
            if cache is None or not cache.get_seq_length():
                self.report = {method.name: [] for method in self.methods}
            return self.plain_forward(input_ids=input_ids, **kwargs)
        if input_ids is None:
            raise PromptError(
                "under attach, a prompt with pictures is passed as input_ids, not inputs_embeds"
            )
        if cache is not None and (cache.get_seq_length() or getattr(cache, "is_compileable", False)):
            raise PromptError(
                "under attach, pictures come in the first call, into an empty DynamicCache: leave past_key_values, "
                "prefill_chunk_size and cache_implementation='static' out"
            )
        return self._prefill(input_ids, kwargs)

    def _images(self, kwargs: dict[str, Any]) -> list[tuple[Tensor, VisionEncoding]]:
        """Features and CLS scores of each image, in reading order."""
        given = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if given is None:
            pixels = kwargs["pixel_values"]
            # Older transformers repeat the pictures themselves for beams: each is encoded once.
            new = torch.ones(len(pixels), dtype=torch.bool)
            new[1:] = (pixels[1:] != pixels[:-1]).flatten(1).any(1).cpu()
            sizes = kwargs.get("image_sizes")
            extra = {} if sizes is None else {"image_sizes": sizes[new.to(sizes.device)]}
            unique = self.family.features(
                self.get_image_features(pixel_values=pixels[new.to(pixels.device)], **extra)
            )
            features = [unique[index] for index in (new.cumsum(0) - 1).tolist()]
        else:
            features = self.family.features(given)
        if any(id(feature) not in self.encoded for feature in features):
            raise PromptError(
                "the image features were not made under this attach, or were cut in chunks, so their CLS scores are "
                "unknown: pass pixel_values, and leave mm_encoder_outputs and prefill_chunk_size out"
            )
        return [self.encoded[id(feature)] for feature in features]

    def _prefill(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Any:
        images = self._images(kwargs)
        mask, keep_logits = kwargs.get("attention_mask"), kwargs.pop("logits_to_keep", 0)
        lengths = [len(features) for features, _ in images]
        where = layout(input_ids, mask, self.family.image_token_id(self.model), lengths)
        embeddings = self.model.get_input_embeddings()(input_ids)
        for (row, columns), (features, _) in zip(where.spans, images, strict=True):
            embeddings[row, columns] = features.to(embeddings.device, embeddings.dtype)

        self.report = {method.name: [] for method in self.methods}
        kept = self._for_each(images, self._select)
        rest = {name: value for name, value in kwargs.items() if name not in IMAGE_INPUTS}
        caching = kwargs.get("use_cache") is not False
        first = kwargs.get("past_key_values")
        if first is None:
            first = DynamicCache(config=self.model.config.get_text_config())

        def run(stays: Tensor, cache: Cache, keep: int | Tensor) -> tuple[Any, Tensor]:
            prompt = pack(embeddings, stays)
            inputs = rest | {"attention_mask": prompt.mask.long(), "position_ids": prompt.positions}
            inputs |= {"past_key_values": cache if caching else None, "use_cache": caching}
            inputs |= {"logits_to_keep": keep}
            return self.plain_forward(inputs_embeds=prompt.embeddings, **inputs), prompt.mask

        output, real = run(kept_columns(where, kept), first, keep_logits)
        caches, masks = [first], [real]
        for method in self.contrasting:
            tokens = self._for_each(images, functools.partial(self._outliers, method))
            cache = DynamicCache(config=self.model.config.get_text_config())
            negative, real = run(kept_columns(where, tokens), cache, 1)
            last = method.logits(output.logits[:, -1], negative.logits[:, -1])
            output.logits = torch.cat([output.logits[:, :-1].to(last.dtype), last[:, None]], dim=1)
            caches.append(cache)
            masks.append(real)
        if caching:
            output.past_key_values = BranchedCache(caches, masks, input_ids.shape[1])
        return output

    @staticmethod
    def _for_each(images: list[tuple[Tensor, VisionEncoding]], choose: Callable) -> list[Tensor | None]:
        """What `choose` says of each image; of images repeated for beams it is asked once."""
        chosen = {
            id(encoding): choose(encoding) for encoding in {id(seen): seen for _, seen in images}.values()
        }
        return [chosen[id(encoding)] for _, encoding in images]

    def _outliers(self, method: Method, encoding: VisionEncoding) -> Tensor | None:
        indices = method.negative_tokens(encoding)
        self.report[method.name].append({"outliers": indices, "grid": encoding.grid})
        return indices

    def _select(self, encoding: VisionEncoding) -> Tensor | None:
        kept: Tensor | None = None
        for method in self.methods:
            indices = method.select(encoding)
            if indices is None:
                continue
            self.report[method.name].append({"kept": indices, "grid": encoding.grid})
            kept = indices if kept is None else kept[torch.isin(kept, indices)]
        return kept

    def _step(self, input_ids: Tensor | None, cache: BranchedCache, kwargs: dict[str, Any]) -> Any:
        if input_ids is None or _has_images(kwargs):
            raise PromptError(
                "under attach, a conversation goes on in text: pass a new picture in a new generate call"
            )
        rows, new = input_ids.shape
        mask: Tensor | None
        if cache.branches != 1 + len(self.contrasting):
            raise PromptError(
                "past_key_values comes from a call with other methods attached: continue under the same methods"
            )
        if new > 1:  # a continued conversation
            since_prompt = _since_prompt(kwargs, cache, rows, new)
            # generate cuts the ids by the cache's length, which pruning made shorter
            input_ids = input_ids[:, -(since_prompt.shape[1] - cache.generated()) :]
            ids, mask, positions = cache.continue_inputs(input_ids, since_prompt)
        else:
            ids, mask, positions = cache.step_inputs(input_ids)
        rest = {name: value for name, value in kwargs.items() if name not in IMAGE_INPUTS}
        rest |= {"attention_mask": mask, "position_ids": positions}
        output = self.plain_forward(input_ids=ids, **rest)
        parts = output.logits.split(rows)
        logits = parts[0]
        for method, negative in zip(self.contrasting, parts[1:], strict=True):
            logits = method.logits(logits, negative)
        output.logits = logits
        for name in ("hidden_states", "attentions"):
            if output.get(name) is not None and len(parts) > 1:
                output[name] = tuple(tensor[:rows] for tensor in output[name])
        return output


def _has_images(kwargs: dict[str, Any]) -> bool:
    encoded = kwargs.get("mm_encoder_outputs") or {}  # generate passes {} along with plain text
    return kwargs.get("pixel_values") is not None or encoded.get("image") is not None


def _since_prompt(kwargs: dict[str, Any], cache: BranchedCache, rows: int, new: int) -> Tensor:
    """Mask (rows, T) of the columns after the prompt; generate leaves out a mask that hides nothing."""
    given, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if given is not None:
        columns = given.shape[1]
    elif positions is not None:
        columns = int(positions[0, -1]) + 1
    else:
        columns = cache.full_length + cache.generated() + new
    seen = cache.generated()
    unseen = min(new, max(1, columns - cache.full_length - seen))
    if given is not None:
        return given[:, -(seen + unseen) :]
    return torch.ones(rows, seen + unseen, dtype=torch.long, device=cache.mask.device)

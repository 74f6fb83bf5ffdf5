"""The forward passes after the prefill: one for all branches of a token, or of a further turn, and the contrast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lvlm_fix.attention import MethodAttention
from lvlm_fix.cache import BranchedCache
from lvlm_fix.compiling import CompiledStep
from lvlm_fix.decoding import hiding
from lvlm_fix.dispatch import looked_into, without_plans
from lvlm_fix.errors import PromptError
from lvlm_fix.methods.base import Method
from lvlm_fix.passes import Pass
from lvlm_fix.replayed_decoder import ReplayedStep
from lvlm_fix.reporting import Report


class Stepper:
    """Goes on from a `BranchedCache` by `plain_forward`, the model's own forward pass; `config` is the decoder's."""

    def __init__(
        self,
        plain_forward: Callable,
        methods: Sequence[Method],
        attention: MethodAttention | None,
        config: Any,
        compiled: CompiledStep | ReplayedStep | None = None,
    ) -> None:
        self.config, self.compiled = config, compiled
        self.plain_forward, self.methods, self.attention = plain_forward, frozenset(methods), attention
        self.contrasting = [method for method in methods if "negative_tokens" in method.stages()]

    def __call__(
        self, input_ids: Tensor, cache: BranchedCache, kwargs: dict[str, Any], report: Report | None
    ) -> Any:
        """Logits of `input_ids` (rows, Q), contrasted; `kwargs` are what else the forward pass takes."""
        if cache.methods != self.methods:
            made, here = (", ".join(sorted(map(repr, own))) for own in (cache.methods, self.methods))
            raise PromptError(
                f"this KV cache was made under other methods ({made}) than are attached ({here}): continue under the "
                "same ones, or start a new prompt"
            )
        rows, new = input_ids.shape
        since_prompt = None
        if new > 1:  # a further turn of the conversation
            since_prompt = _since_prompt(kwargs, cache, rows, new)
            # generate cuts the ids by the cache's length, which pruning made shorter
            input_ids = input_ids[:, -(since_prompt.shape[1] - cache.generated()) :]
        output = self._advance(input_ids, cache, since_prompt, kwargs)
        parts = output.logits.unflatten(0, (-1, rows)).unbind() if cache.branches > 1 else (output.logits,)
        stacked, apart, logits = iter(parts[1:]), iter(cache.apart), parts[0]
        for method in self.contrasting:
            unsure = method.unsure(logits[:, -1])
            if unsure is None:
                negative = next(stacked)
            else:
                other, negative = next(apart), logits
                other.wait(input_ids)
                # The one question that a step asks of the device; what it may save is a whole pass. A further turn is
                # never waited with: its padding would be forgotten.
                if since_prompt is not None or bool(unsure.any()):
                    said = self._advance(other.waited(), other, since_prompt, kwargs).logits
                    negative = said[:, -logits.shape[1] :]
                if report is not None:
                    report.contrasted(method, unsure)
            logits = contrasted(method, logits, negative, unsure, cache.pictured(rows))
        output.logits = logits
        for name in ("hidden_states", "attentions"):
            if output.get(name) is not None and len(parts) > 1:
                output[name] = tuple(tensor[:rows] for tensor in output[name])
        return output

    def _advance(
        self,
        input_ids: Tensor,
        cache: BranchedCache,
        since_prompt: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """One pass of all branches that are stacked in `cache`."""
        if since_prompt is not None:
            ids, positions = cache.continue_inputs(input_ids, since_prompt)
            real = cache.mask
        else:
            ids, positions = cache.step_inputs(input_ids)
            real = cache.real(input_ids.shape[1])
        inputs = kwargs | {"input_ids": ids, "attention_mask": None, "position_ids": positions}
        compiles = ids.shape[1] == 1 and not looked_into(self.config, kwargs)
        compiled = self.compiled if compiles else None
        attention = self.attention if compiled is None else compiled.attention
        context: Any = nullcontext()
        if attention is not None:
            start = torch.zeros_like(cache.next_position)
            this = Pass(real, cache.image_mask, start, cache, False, cache.sinks)
            if compiled is not None:
                with without_plans(ids.device):
                    return compiled(this, cache, inputs)
            context = attention.running(this)
        if since_prompt is not None or not cache.unpadded:
            of_one_token = attention is None and ids.shape[1] == 1 and not cache.slides
            inputs["attention_mask"] = self._mask(real, cache.dtype, of_one_token)
        inputs |= {cache.name: cache}
        with context, cache.attached(), without_plans(ids.device):
            return self.plain_forward(**inputs)

    def _mask(self, real: Tensor, dtype: torch.dtype, of_one_token: bool) -> Tensor:
        """Keys that are no padding (R, T), as the model's forward pass takes them."""
        if of_one_token and self.config._attn_implementation == "sdpa":
            # What transformers would make of it, in a twentieth of a small model's step.
            return hiding(real, dtype)
        return real.long()


def contrasted(
    method: Method, logits: Tensor, negative: Tensor, unsure: Tensor | None, pictured: Tensor | None
) -> Tensor:
    """Logits (R, ..., V) by a method, of the rows (R,) that have pictures (None: all) and are `unsure` (None: all).

    Rows that are sure are contrasted with themselves, which leaves the method's plausibility cut and nothing else.
    """
    beside = (len(logits), *[1] * (logits.ndim - 1))
    if unsure is not None:
        negative = torch.where(unsure.view(beside).to(logits.device), negative, logits)
    changed = method.logits(logits, negative)
    if pictured is None:
        return changed
    return torch.where(pictured.view(beside).to(changed.device), changed, logits.to(changed.dtype))


def _since_prompt(kwargs: dict[str, Any], cache: BranchedCache, rows: int, new: int) -> Tensor:
    """Mask (rows, T) of the columns after the prompt; generate leaves out a mask that hides nothing."""
    given, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if given is not None:
        columns = given.shape[1]
    elif positions is not None and positions.ndim == 3 and len(positions) != 4:
        # positions in time, height and width, which go on from those of the whole prompt
        columns = int(positions[0, 0, -1]) + 1 + cache.full_length - int(cache.next_position[0])
    elif positions is not None:
        # of four kinds of position, the first is that in the text
        columns = int(positions.flatten(0, -2)[0, -1]) + 1
    else:
        columns = cache.full_length + cache.generated() + new
    seen = cache.generated()
    unseen = min(new, max(1, columns - cache.full_length - seen))
    if given is not None:
        return given[:, -(seen + unseen) :]
    return torch.ones(rows, seen + unseen, dtype=torch.long, device=cache.mask.device)

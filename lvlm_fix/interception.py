"""Stand in for the attention of chosen modules, through transformers' own attention interface.

This file and `attachment` are where lvlm-fix relies on how transformers calls attention: every model looks up
`config._attn_implementation` in the attention and in the mask interface at each call. Assumed of transformers 5.17 on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lvlm_fix.errors import UnsupportedModelError

Proceed = Callable[..., tuple[Tensor, Any]]
"""The attention that the module would have had: (module, query, key, value, mask, **options)."""

Handler = Callable[..., tuple[Tensor, Any]]
"""Called as (proceed, module, query, key, value, mask, **options); query (B, H, Q, D), output (B, Q, H, D)."""

_HANDLERS: dict[nn.Module, Handler] = {}


class Interception:
    """Lets `handler` answer for the attention of `modules` from install to remove.

    Other modules that read the same configuration keep their own attention.
    """

    def __init__(
        self, modules: list[nn.Module], handler: Handler, *, own_mask: Callable | None = None
    ) -> None:
        """Prepare.

        Args:
            modules: attention modules of one transformers model.
            handler: what is called instead.
            own_mask: a module's function, tried first where transformers makes the attention mask, with the arguments
                of a mask function; it returns NotImplemented to leave it to the implementation that was configured.
        """
        self.modules, self.handler, self.own_mask = modules, handler, own_mask
        configs = {id(config): config for config in (getattr(module, "config", None) for module in modules)}
        self.config: Any = next(iter(configs.values()), None)
        if len(configs) != 1 or not hasattr(self.config, "_attn_implementation"):
            raise UnsupportedModelError(
                "cannot reach the model's attention: lvlm-fix assumes that transformers' attention modules share one "
                "config and look their implementation up in its _attn_implementation, and these do not"
            )
        self.original: str | None = None

    def install(self) -> None:
        self.original = self.config._attn_implementation or "eager"
        for module in self.modules:
            _HANDLERS[module] = self.handler
        self.config._attn_implementation = _registered(self.original, self.own_mask)

    @contextmanager
    def replaced_by(self, implementation: str) -> Iterator[None]:
        """Within, all modules that read the same configuration attend by another implementation that is registered."""
        configured, self.config._attn_implementation = self.config._attn_implementation, implementation
        try:
            yield
        finally:
            self.config._attn_implementation = configured

    def remove(self) -> None:
        if self.original is None:
            return
        self.config._attn_implementation = self.original
        for module in self.modules:
            _HANDLERS.pop(module, None)
        self.original = None


def _registered(original: str, own_mask: Callable | None) -> str:
    """Name of an implementation that asks the module's handler and falls back on `original`.

    No name of flash attention may be part of it: models would then hand packed sequences over.
    """
    name = f"lvlm_fix_over_{original.replace('flash', 'fast')}"
    name += f"_{own_mask.__name__}" if own_mask else ""
    # Each file of models has an eager attention of its own.
    implementation: Any = ALL_ATTENTION_FUNCTIONS.get(original)

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        handler = _HANDLERS.get(module)
        proceed = implementation or sys.modules[type(module).__module__].eager_attention_forward
        return (
            proceed(module, *args, **kwargs) if handler is None else handler(proceed, module, *args, **kwargs)
        )

    def mask(*args: Any, **kwargs: Any) -> Any:
        made = NotImplemented if own_mask is None else own_mask(*args, **kwargs)
        if made is not NotImplemented:
            return made
        return ALL_MASK_ATTENTION_FUNCTIONS.get(original, sdpa_mask)(*args, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Within, each module's forward pass is the function given for it; hooks are called as ever."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, other in forwards.items():
        vars(module)["forward"] = other
    try:
        yield
    finally:
        for module, forward in before.items():
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward

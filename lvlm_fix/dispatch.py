"""Which kernel attends for a decoder layer, once the methods have said what it must do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.kernels import sparse_prefill, visual_attention
from lvlm_fix.kernels.fused.launch import fits_attention
from lvlm_fix.kernels.visual_attention import plain_attention
from lvlm_fix.methods.base import AttentionStep


def attend_by(step: AttentionStep, unpadded: bool) -> Tensor:
    """Attention (R, H, Q, D) of a layer's step; `unpadded` only where its `real` is known to hide nothing."""
    masked: dict[str, Any] = {"key_mask": None if unpadded else step.real, "scale": step.scale}
    if step.important is not None and step.important is not step.real:
        moved = step.redistribution
        return sparse_prefill(
            step.query, step.key, step.value, step.important, redistribution=moved, **masked
        )
    if step.redistribution is None:
        if masked["key_mask"] is not None and fits_attention(step.query):
            # Nothing is moved: the kernel's tiles are all plain, and no mask of Q x T is made.
            nothing, idle = torch.zeros_like(step.real), {"rho": 0.0, "min_image_attention": 0.0, "p": 0.0}
            masked |= idle | {"first_query": step.key.shape[2]}
            return visual_attention(step.query, step.key, step.value, nothing, nothing, **masked)
        return plain_attention(step.query, step.key, step.value, **masked)
    moved = step.redistribution
    return visual_attention(
        step.query,
        step.key,
        step.value,
        moved.image_mask,
        moved.sink_mask,
        rho=moved.rho,
        min_image_attention=moved.min_image_attention,
        p=moved.p,
        first_query=moved.first_query,
        **masked,
    )


@contextmanager
def without_plans(device: torch.device) -> Iterator[None]:
    """Within, torch's attention on a GPU is another than cuDNN's, if it has one.

    cuDNN plans its attention anew for every number of keys, which takes longer than a large model's whole step, and in
    decoding every token has another.
    """
    backends = torch.backends.cuda
    chosen = (
        backends.cudnn_sdp_enabled() and backends.flash_sdp_enabled() and backends.mem_efficient_sdp_enabled()
    )
    if device.type != "cuda" or not chosen:
        yield
        return
    backends.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        backends.enable_cudnn_sdp(True)


def widen(mask: Tensor, width: int) -> Tensor:
    """Columns that came after the prompt are neither image nor sinks."""
    missing = width - mask.shape[1]
    return torch.cat([mask, mask.new_zeros(len(mask), missing)], dim=1) if missing > 0 else mask


def looked_into(config: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a forward pass with these arguments shows what is inside the decoder."""
    shown = ("output_hidden_states", "output_attentions")
    return any(arguments.get(name, getattr(config, name, False)) for name in shown)


def is_plain(config: Any, modules: Sequence[nn.Module], columns: int) -> bool:
    """Whether a decoder is known to attend to all that came before, up to so many columns, and to nothing else."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    others = [getattr(config, name, None) for name in ("attn_logit_softcapping", "num_kv_shared_layers")]
    others += [getattr(module, "sinks", None) is not None for module in modules]
    known = kinds <= {"full_attention", "sliding_attention"} and not any(others)
    return known and (window is None or columns <= window)


def refuse_what_is_not_plain_attention(columns: int, options: dict[str, Any]) -> None:
    """Refuse the options of a layer's attention over so many columns that no kernel here has.

    Raises:
        UnsupportedModelError: attention is windowed, capped, or has a sink of its own.
    """
    window = options.get("sliding_window")
    own = options.get("softcap") is not None or options.get("s_aux") is not None
    if own or (window is not None and columns > window):
        raise UnsupportedModelError(
            "this decoder caps its attention logits, slides a window over its keys or has a sink that is no token: "
            "VAR, ZipVL and compile=True work on plain causal attention; attach methods without the attention stage, "
            "such as VTCCLS or DAMRO"
        )

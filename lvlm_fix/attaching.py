"""`attach`: what users call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from lvlm_fix.attachment import Attachment, check
from lvlm_fix.diagnosis import diagnosed
from lvlm_fix.encoding import Companion
from lvlm_fix.errors import AttachError, PremiseWarning
from lvlm_fix.methods.base import Method
from lvlm_fix.pictures import Picture


def attach(
    model: nn.Module,
    *methods: Method | str,
    scores: Companion | None = None,
    processor: Any = None,
    images: Sequence[Picture] | None = None,
    compile: bool = False,
) -> Attachment:
    """Put methods on a loaded Hugging Face model, in any order; `model.generate` then runs with them.

    Greedy decoding, sampling, beams, batches of left-padded prompts, several images in a prompt and streamers work
    as without. Only next-token logits of the last position are contrasted; with image tokens pruned, a bare
    `model(**inputs)` returns logits of the pruned prompt. Where a method's premise fails on the first pictures, a
    `PremiseWarning` says so once. Vision tower layers that the image features do not come from are left out;
    `get_image_features(..., output_hidden_states=True)` runs them all.

    `attach(model, "auto")` attaches the methods whose premise holds, see `diagnose`; of DAMRO and VTC-CLS, which pull
    against each other, DAMRO: its premise holds only where CLS looks at the background, and VTC-CLS would keep that.
    If none holds, it warns, and the handle's `methods` are empty. What the model is like on the pictures that ship
    is found out once for each model object.

    Args:
        model: a model of a supported family, as `load` or transformers give it.
        methods: instances of `DAMRO`, `VAR`, `VTCCLS`, `ZipVL`, each kind at most once; or only `"auto"`.
        scores: what scores image tokens instead of the model's own vision tower, such as `CLSFrom(open_clip_model)`.
        processor: for `"auto"`, the model's; None loads it from where the model came from.
        images: for `"auto"`, a few pictures like those that will be asked about; None for some that ship.
        compile: run what follows a prompt with pictures as graphs; the tokens are the same. On one GPU the vision
            tower, prompts and decoding steps are recorded as CUDA graphs when one of the same size comes for the second
            time in an attachment; hooks that are put on the model after that are not called. Elsewhere decoding steps
            are one graph of `torch.compile`: the first takes some seconds more, those of later calls and attachments
            to the same model do not.

    Returns:
        A handle: leave its `with`, or call `detach()`, and the model is what it was. `report` tells what was done.

    Raises:
        UnsupportedModelError: the model is of no supported family; the message names them.
        AttachError: no method, the same method twice, or a model that already carries methods; `"auto"` beside other
            methods, or without a processor that can be found; `compile` without a C++ compiler on a CPU.

    >>> from lvlm_fix import VTCCLS, attach, load
    >>> model, processor = load()
    >>> with attach(model, VTCCLS(keep=64)) as fix:
    ...     fix.methods
    (VTCCLS(keep=64, start_layer=-4),)
    """
    if not methods:
        raise AttachError("attach needs at least one method, such as attach(model, VTCCLS(keep=64))")
    if "auto" in methods:
        methods = _chosen(model, methods, scores, processor, images)
    return Attachment(model, methods, scores, compile)  # type: ignore[arg-type]  # check refuses what is no method


def _chosen(
    model: nn.Module,
    methods: tuple[Method | str, ...],
    scores: Companion | None,
    processor: Any,
    images: Sequence[Picture] | None,
) -> tuple[Method, ...]:
    if len(methods) > 1:
        raise AttachError('"auto" chooses the methods: pass it alone, attach(model, "auto")')
    check(model, ())
    chosen = diagnosed(model, processor, images, scores).chosen
    if not chosen:
        warnings.warn(
            "no method's premise holds for this model: none is attached (see `lvlm-fix diagnose`)",
            PremiseWarning,
            stacklevel=3,
        )
    return chosen

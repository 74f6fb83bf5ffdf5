"""Warns of premises that fail on the first pictures that a model with methods is asked about."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lvlm_fix.encoding import Encoded
from lvlm_fix.errors import PremiseWarning
from lvlm_fix.methods import DAMRO, VAR, VTCCLS, Method, ZipVL
from lvlm_fix.methods.base import made
from lvlm_fix.models.base import Family
from lvlm_fix.passes import Pass
from lvlm_fix.premises import NEEDED, Premise, Seen, damro, local_detail, var, vtc_cls, zipvl


@dataclass
class FirstLook:
    """Warns of premises that fail in the first prefill with pictures; later ones are not looked at.

    `warned` are the names of the methods that were warned of: who attaches again and again can share one set.
    """

    warned: set[str] = field(default_factory=set)
    done: bool = False

    def __call__(
        self, model: Any, family: Family, methods: Sequence[Method], images: list[Encoded], this: Pass | None
    ) -> None:
        if self.done or not images:
            return
        self.done = True
        for method in methods:
            judge = _AT_HAND.get(type(method))
            if judge is None or method.name in self.warned:
                continue
            with torch.no_grad():
                premise = judge(method, model, family, images, this)
            if not premise.holds:
                self.warned.add(method.name)
                warnings.warn(
                    f"do not expect {method.name} to help, its premise fails on this picture: {premise.sentence} "
                    "(see `lvlm-fix diagnose`)",
                    PremiseWarning,
                    stacklevel=2,
                )


def _damro_at_hand(method: Any, model: Any, family: Family, images: list[Encoded], this: Any) -> Premise:
    details: dict[int, list[Tensor]] = {}
    seen = []
    for image in {id(image): image for image in images}.values():  # beams repeat them
        call = id(image.context)
        if call not in details:
            details[call] = local_detail(model, family, image.context)
        seen.append(Seen(image.vision, details[call][image.place]))
    return damro(seen, method)


def _vtc_cls_at_hand(method: Any, model: Any, family: Family, images: list[Encoded], this: Any) -> Premise:
    return vtc_cls([Seen(image.vision) for image in {id(image): image for image in images}.values()], method)


def _var_at_hand(method: Any, model: Any, family: Family, images: list[Encoded], this: Any) -> Premise:
    told = [values for _, values in this.told.get(VAR.name, [])]
    rows = this.image_mask.any(1)
    sinks, heads = [], []
    for values in told:
        found = made(values["sinks"])
        mask, own = this.image_mask.to(found.device), rows.to(found.device)
        sinks.append(_number((found & mask)[own].sum(1)))
        heads.append(_number(made(values["heads"])[own]))
    return var(method.sink_dims or (), sinks, heads, range(len(told)))


def _zipvl_at_hand(method: Any, model: Any, family: Family, images: list[Encoded], this: Any) -> Premise:
    found = zipvl([_number(made(values["ratios"])) for _, values in this.told[ZipVL.name]], method.tau)
    # What counts here is what ZipVL skips: the ratios hold the newest tokens, which always stay.
    said = f"it must attend to {found.numbers['needed']:.0%} of the tokens, mean over layers; "
    said += f"it needs at most {NEEDED:.0%}"
    return replace(found, sentence=said)


_AT_HAND: dict[type[Method], Callable[..., Premise]] = {
    DAMRO: _damro_at_hand,
    VAR: _var_at_hand,
    VTCCLS: _vtc_cls_at_hand,
    ZipVL: _zipvl_at_hand,
}


def _number(values: Tensor) -> float:
    return float(values.float().mean())

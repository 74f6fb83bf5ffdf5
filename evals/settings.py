"""What one run compares, settings of methods, and what it holds fixed, the decoding."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvlm_fix.methods import Method

PLAIN = "none"


@dataclass(frozen=True)
class Setting:
    """Methods that are attached together, under one name; no methods is the plain model."""

    name: str
    methods: tuple[Method, ...] = ()

    @classmethod
    def of(cls, methods: str | Setting | Sequence[Method]) -> Setting:
        """A setting as `--fix` spells it, or from method objects.

        >>> Setting.of("damro( topk = 4 ), vtc_cls").name
        'damro(topk=4),vtc_cls'
        """
        if isinstance(methods, Setting):
            return methods
        if not isinstance(methods, str):
            return cls(",".join(map(_spelled, methods)) or PLAIN, tuple(methods))
        from lvlm_fix.methods import parse

        chosen = tuple(parse(methods))
        return cls(re.sub(r"\s+", "", methods) if chosen else PLAIN, chosen)

    @property
    def slug(self) -> str:
        """The name as part of a file name; a hash keeps shortened or simplified names apart.

        >>> Setting.of("vtc_cls").slug, Setting.of("vtc_cls(keep=72)").slug
        ('vtc_cls', 'vtc_cls-keep-72-f84f68')
        """
        simple = re.sub(r"[^a-z0-9_.]+", "-", self.name.lower()).strip("-.")[:60]
        if simple == self.name:
            return simple
        return f"{simple}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"

    def as_dict(self) -> dict[str, Any]:
        """The name, and each method with all its hyper-parameters, also those left at their defaults."""
        return {"name": self.name, "methods": [{"method": one.name, **_fields(one)} for one in self.methods]}


def parse_settings(settings: Iterable[str | Setting | Sequence[Method]]) -> list[Setting]:
    """The settings of a run: the plain model first, asked for or not, then the others as given.

    Raises `ValueError` for an unknown method, and where two settings are the same in other words.

    >>> [setting.name for setting in parse_settings(["damro", "none"])]
    ['none', 'damro']
    """
    chosen = [Setting(PLAIN), *(setting for setting in map(Setting.of, settings) if setting.methods)]
    for index, setting in enumerate(chosen):
        for other in chosen[:index]:
            if setting.as_dict()["methods"] == other.as_dict()["methods"]:
                raise ValueError(f"settings {other.name} and {setting.name} are the same; give it once")
    return chosen


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded, the same for every setting of a run.

    Without sampling a seed has no effect, and whichever was given, `seeds` is (0,).

    >>> Decoding(seeds=(5,)).seeds, Decoding(seeds=(5,), do_sample=True).seeds
    ((0,), (5,))

    Raises `ValueError` for values out of range, sampling beams, and several seeds without sampling.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0  # of sampling, from the whole distribution: no top-k, no top-p
    num_beams: int = 1
    seeds: tuple[int, ...] = (0,)  # of sampling, one full pass over the items each

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1 or not self.seeds:
            raise ValueError("max_new_tokens, num_beams and the number of seeds count from 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; give more than 0, or leave sampling off")
        if self.do_sample and self.num_beams > 1:
            raise ValueError("sampling and beams exclude each other here; give one of them")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat one; give different seeds")
        if not self.do_sample and len(self.seeds) > 1:
            raise ValueError("several seeds need sampling: without it every seed gives the same answers")
        if not self.do_sample and self.temperature != 1:
            raise ValueError("a temperature needs sampling; turn it on (--do-sample) or leave it out")
        if not self.do_sample:  # lines of results are told apart by their seed, so it must not vary in vain
            object.__setattr__(self, "seeds", (0,))

    def as_dict(self) -> dict[str, Any]:
        """As the manifest holds it: what has no effect without sampling is left out."""
        values: dict[str, Any] = {**asdict(self), "seeds": list(self.seeds)}
        if not self.do_sample:
            del values["temperature"]
        return values

    def generation(self, seed: int, prompts: Sequence[str]) -> dict[str, Any]:
        """Arguments of `generate` for a batch; `prompts` names its rows, so that each has its own chance."""
        arguments: dict[str, Any] = {"do_sample": False, "num_beams": self.num_beams}
        if self.do_sample:
            arguments["logits_processor"] = [_OwnChance(seed, prompts, self.temperature)]
        return arguments


class _OwnChance:
    """Sampling whose draws depend on the prompt and the seed, not on what else is in the batch.

    The largest of logits plus Gumbel noise is a draw from their softmax. So greedy decoding over logits to
    which each row adds noise from a generator of its own is sampling, and a run that was stopped or is spread
    over machines draws what it would have drawn in one go.
    """

    def __init__(self, seed: int, prompts: Sequence[str], temperature: float) -> None:
        import torch

        self.temperature = temperature
        self.chances = []
        for prompt in prompts:
            digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
            self.chances.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        noise = torch.stack(
            [torch.empty(scores.shape[-1]).exponential_(generator=one) for one in self.chances]
        )
        return scores.float() / self.temperature - noise.clamp_min(1e-30).log().to(scores.device)


def _fields(method: Method) -> dict[str, Any]:
    return asdict(method)  # type: ignore[call-overload]


def _spelled(method: Method) -> str:
    return f"{method.name}({','.join(f'{name}={value!r}' for name, value in _fields(method).items())})"

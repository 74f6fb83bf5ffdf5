"""A model for lmms-eval, with methods attached, so that any of its tasks runs on a fixed model.

    pip install 'lvlm-fix[lmms-eval]'
    python -m lmms_eval --model lvlm_fix --tasks pope --batch_size 8 \\
        --model_args 'pretrained=llava-hf/llava-1.5-7b-hf,fix="var(p=0.6,rho=0.5),vtc_cls"'

The quotes keep lmms-eval from cutting `fix` at its commas. lmms-eval finds the model by the entry point
`lmms_eval.models`, which names `manifest`. It asks in its "simple" way: a text, and a function for the pictures.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .processes import Process

if TYPE_CHECKING:
    from PIL import Image

NAME = "lvlm_fix"
MAX_NEW_TOKENS = 1024  # of a task that does not say, as lmms-eval's own models have it
_SAMPLING = ("temperature", "top_p", "top_k")
_GENERATION = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")
_OWN = ("until", "max_new_tokens", "do_sample", *_SAMPLING)


def manifest() -> Any:
    """What lmms-eval's registry wants to know of the model; raises `ImportError` without lmms-eval 0.7 or later."""
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.LvlmFix")


class FixedModel:
    """Everything of the model but lmms-eval's base class, which `LvlmFix` has besides.

    Args:
        pretrained: what `lvlm_fix.load` takes.
        fix: methods as the command line's `--fix` spells them; none by default.
        dtype, device_map: passed on to `lvlm_fix.load`.
        device: of the model where there is no `device_map`; the process's own GPU by default, if there is one.
        batch_size: questions asked at once.
        max_batch_size: what lmms-eval passes along; of no use here.

    Raises:
        ValueError: an unknown method, or a batch size that is no number.
        OSError: the model cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "embedded",
        fix: str = "",
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        from lvlm_fix import LVLM
        from lvlm_fix.methods import parse

        super().__init__()
        self.fix = parse(str(fix).strip("\"' "))
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; give a whole number from 1")
        self.batch_size = int(batch_size)
        self.pretrained = pretrained
        process = Process.from_environment()
        self._rank, self._world_size = process.rank, process.world
        self.task_dict: dict[str, Any] = {}
        self.lvlm = LVLM(
            pretrained, dtype=dtype, device_map=device_map or device or _own_device(process.local_rank)
        )

    @property
    def device(self) -> Any:
        """Where the model's inputs go; lmms-eval counts the processes' requests there."""
        return self.lvlm.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to requests, in their order: those of equal decoding in batches, long questions first.

        A request's `args` are the text, the decoding, a function from the document to its pictures, the
        document's index, the task and the split.

        Raises:
            ValueError: a question has no picture, something else than pictures, or places them in its midst.
        """
        from tqdm import tqdm

        together: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            together[json.dumps(request.args[1], sort_keys=True, default=str)].append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc=NAME, unit="question", disable=self._rank > 0) as bar:
            for indices in together.values():
                indices.sort(key=lambda index: -len(requests[index].args[0]))
                until, generation = decoding(requests[indices[0]].args[1])
                for start in range(0, len(indices), self.batch_size):
                    part = indices[start : start + self.batch_size]
                    asked = [self._asked(requests[index].args) for index in part]
                    said = self.lvlm.ask(
                        [pictures for pictures, _ in asked],
                        [text for _, text in asked],
                        fix=self.fix,
                        **generation,
                    )
                    for index, answer in zip(part, said, strict=True):
                        answers[index] = cut(answer.text, until)
                    bar.update(len(part))
        return answers

    def _asked(self, args: Sequence[Any]) -> tuple[tuple[Image.Image, ...], str]:
        """A request's pictures, and its text without the places of pictures at its beginning."""
        from PIL import Image

        context, _, doc_to_visual, doc_id, task, split = args
        where = f"question {doc_id} of {task}"
        pictures = tuple(
            (doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None) or ()
        )
        if not pictures:
            raise ValueError(f"{where} has no picture; lvlm_fix answers questions about pictures only")
        other = next((one for one in pictures if not isinstance(one, Image.Image)), None)
        if other is not None:
            raise ValueError(
                f"{where} has a {type(other).__name__}; lvlm_fix takes Pillow images, no video or sound"
            )
        token, text = str(self.lvlm.processor.image_token), context.lstrip()
        while text.startswith(token):  # put there again, one for each picture, as the model wants them
            text = text.removeprefix(token).lstrip()
        if token in text:
            raise ValueError(
                f"{where} has {token} in the midst of its text; lvlm_fix puts pictures before it"
            )
        return pictures, text

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: methods change how answers are generated."""
        raise NotImplementedError(
            "lvlm_fix generates answers and has no loglikelihood; choose the task's generate_until version"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: under `attach` a conversation cannot bring a new picture."""
        raise NotImplementedError("lvlm_fix answers single questions; choose a task of one round")


def decoding(given: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """A task's generation arguments as texts to stop at, and as arguments of `generate`.

    As with lmms-eval's own models a temperature of 0 is greedy decoding, and one above 0 samples unless
    `do_sample` says no. Without sampling its parameters are left out. A null is as good as absent.

    >>> decoding({"until": "\\n", "max_new_tokens": 8, "temperature": 0, "do_sample": False, "top_p": None})
    (['\\n'], {'max_new_tokens': 8, 'do_sample': False})

    Raises `ValueError` for an argument it does not know.
    """
    known = {name: value for name, value in given.items() if value is not None}
    known.pop("image_aspect_ratio", None)  # of LLaVA's own code; the processor knows how to fit pictures
    unknown = known.keys() - {*_OWN, *_GENERATION}
    if unknown:
        raise ValueError(f"lvlm_fix does not know the generation argument {min(unknown)!r}; leave it out")
    until = known.get("until", [])
    temperature = known.get("temperature", 1.0 if known.get("do_sample") else 0)
    sampling = bool(known.get("do_sample", temperature > 0)) and temperature > 0
    arguments = {"max_new_tokens": int(known.get("max_new_tokens", MAX_NEW_TOKENS)), "do_sample": sampling}
    arguments |= {name: known[name] for name in _GENERATION if name in known}
    if sampling:
        arguments |= {name: known[name] for name in _SAMPLING if name in known}
    return [until] if isinstance(until, str) else list(until), arguments


def cut(answer: str, until: Sequence[str]) -> str:
    """An answer up to the first of the texts that it should stop at.

    >>> cut("Yes, a dog.\\n\\nUSER: And", ["USER:", "\\n\\n"])
    'Yes, a dog.'
    """
    ends = [place for text in until if text and (place := answer.find(text)) >= 0]
    return answer[: min(ends)] if ends else answer


def __getattr__(name: str) -> Any:
    """`LvlmFix` is made when asked for: its base class comes with lmms-eval, which few have installed."""
    if name == "LvlmFix":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _model_class() -> type:
    try:
        from lmms_eval.api.model import lmms
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return type("LvlmFix", (FixedModel, lmms), {"__module__": __name__, "__doc__": FixedModel.__doc__})


def _missing(error: ModuleNotFoundError) -> ImportError:
    if (error.name or "").startswith("lmms_eval"):
        return ImportError("lmms-eval 0.7 or later is not installed; run pip install 'lvlm-fix[lmms-eval]'")
    return ImportError(f"lmms-eval lacks the module {error.name}; install it with all that it depends on")


def _own_device(local_rank: int) -> str | None:
    import torch

    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else None

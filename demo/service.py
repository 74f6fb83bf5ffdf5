"""One model that serves many visitors: requests take turns in a single thread, and a cancelled one ends at a token.

Only that thread ever touches the model, so methods attached for one request cannot be seen by another. The page and
the API are coroutines on the server's event loop; when their task is cancelled, the request stops generating.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from lvlm_fix.assets.recipe.world import GLYPHS
from lvlm_fix.demo.judging import Verdict, judge
from lvlm_fix.demo.looking import Look, look
from lvlm_fix.demo.samples import truth_of
from lvlm_fix.diagnosis import Diagnosis, diagnose, sample_pictures
from lvlm_fix.errors import PremiseWarning
from lvlm_fix.evals.memory import PeakMemory
from lvlm_fix.evals.vocabulary import CATEGORIES
from lvlm_fix.loading import EMBEDDED
from lvlm_fix.methods import Method
from lvlm_fix.wrapper import LVLM

AT_ONCE = 11
"""Questions of a probe in one batch; a cancelled probe ends after one."""


@dataclass(frozen=True)
class Said:
    """One finished answer.

    Attributes:
        text: the answer.
        ids: its tokens, without the one that ends it.
        tokens: how many were generated.
        seconds: wall time of `generate`, with reading the picture.
        peak_bytes: peak memory meanwhile, of the GPU or else of the whole server process, with all that it holds.
        report: what each method did.
        verdict: what is known of the answer's truth.
        of_gpu: whether the memory is the GPU's.
    """

    text: str
    ids: tuple[int, ...]
    tokens: int
    seconds: float
    peak_bytes: int
    report: dict[str, list[dict[str, Any]]]
    verdict: Verdict
    of_gpu: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What the API returns: plain values."""
        marked = None
        if self.verdict.wrong is not None:
            marked = [
                {"word": one.word, "object": one.category, "start": one.start, "end": one.end}
                for one in self.verdict.wrong
            ]
        return {
            "text": self.text,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "peak_memory_bytes": self.peak_bytes,
            "hallucinated": marked,
            "verdict": self.verdict.sentence,
            "report": self.report,
        }


class Service:
    """A model with its processor, for many visitors at a time."""

    def __init__(self, model: str = EMBEDDED) -> None:
        """Load `model`: `embedded`, a local folder or a hub id."""
        self.name = model
        self.lvlm = LVLM(model)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._diagnosis: Diagnosis | None = None
        # The page shows every premise's verdict; the server's log need not repeat them.
        warnings.filterwarnings("ignore", category=PremiseWarning)

    def diagnosis(self) -> Diagnosis:
        """Which methods' premises hold, on the samples; found out once, in the model's thread."""
        return self._worker.submit(self._diagnose).result()

    def _diagnose(self) -> Diagnosis:
        if self._diagnosis is None:
            self._diagnosis = diagnose(self.lvlm.model, self.lvlm.processor, sample_pictures())
        return self._diagnosis

    def categories(self) -> list[str]:
        """What a probe asks about: the embedded model's world, or COCO's categories."""
        if self.name == EMBEDDED:
            return list(GLYPHS)
        return list(CATEGORIES)

    async def answers(
        self, image: Image.Image, question: str, fix: list[Method], max_new_tokens: int
    ) -> AsyncIterator[str | Said]:
        """The answer so far, again and again, and at last what was `Said`."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[str]()

        def tell(text: str) -> None:
            loop.call_soon_threadsafe(news.put_nowait, text)

        stop = threading.Event()
        running = loop.run_in_executor(
            self._worker, self._answer, image, question, fix, max_new_tokens, tell, stop
        )
        try:
            while not (running.done() and news.empty()):
                heard = asyncio.ensure_future(news.get())
                try:
                    waited: set[asyncio.Future[Any]] = {heard, running}
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                    if heard.done():
                        yield heard.result()
                finally:
                    heard.cancel()
            yield await running
        finally:
            _end(running, stop)

    async def answer(self, image: Image.Image, question: str, fix: list[Method], max_new_tokens: int) -> Said:
        """The finished answer."""
        stop = threading.Event()
        return await self._in_turn(stop, self._answer, image, question, fix, max_new_tokens, _silent, stop)

    async def probe(
        self, image: Image.Image, categories: list[str], fix: list[Method]
    ) -> AsyncIterator[dict[str, float]]:
        """P(yes) that each category is in the image, a few categories at a time."""
        stop = threading.Event()
        for start in range(0, len(categories), AT_ONCE):
            some = categories[start : start + AT_ONCE]
            values = await self._in_turn(stop, self._probabilities, image, some, fix, stop)
            yield dict(zip(some, values, strict=True))

    async def look(self, image: Image.Image, question: str, said: Said, fix: list[Method]) -> Look:
        """What the model looked at while it said that."""
        stop = threading.Event()
        return await self._in_turn(stop, look, self.lvlm, image, question, list(said.ids), fix)

    async def _in_turn(self, stop: threading.Event, function: Callable[..., Any], *args: Any) -> Any:
        running = asyncio.get_running_loop().run_in_executor(self._worker, function, *args)
        try:
            return await running
        finally:
            _end(running, stop)

    def _answer(
        self,
        image: Image.Image,
        question: str,
        fix: list[Method],
        max_new_tokens: int,
        tell: Callable[[str], None],
        stop: threading.Event,
    ) -> Said:
        tokenizer = self.lvlm.processor.tokenizer
        streamer = _Tokens(tokenizer, tell)
        memory = PeakMemory(self.lvlm.model.device)
        answer = self.lvlm.ask(
            image, question, fix, max_new_tokens, streamer=streamer, stopping_criteria=[_Stopped(stop)]
        )
        special = set(tokenizer.all_special_ids)
        cut = len(streamer.ids) >= max_new_tokens and streamer.ids[-1] not in special
        return Said(
            answer.text,
            tuple(token for token in streamer.ids if token not in special),
            answer.tokens,
            answer.seconds,
            memory.peak(),
            answer.report,
            judge(question, answer.text, truth_of(image), cut),
            memory.on_gpu,
        )

    def _probabilities(
        self, image: Image.Image, categories: list[str], fix: list[Method], stop: threading.Event
    ) -> list[float]:
        """P(yes) of the first word of each answer, over the whole vocabulary."""
        questions = [f"Is there {with_article(name)} in the image?" for name in categories]
        seen: list[torch.Tensor] = []

        def keep(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(scores.float().softmax(-1).cpu())
            return scores

        self.lvlm.ask(
            [image] * len(questions),
            questions,
            fix,
            1,
            logits_processor=[keep],
            stopping_criteria=[_Stopped(stop)],
        )
        yes = self._first_tokens("yes", "Yes", " yes", " Yes")
        return seen[0][:, yes].sum(-1).tolist()

    def _first_tokens(self, *words: str) -> list[int]:
        tokenizer = self.lvlm.processor.tokenizer
        found = {tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words}
        # A word of several tokens would count for whatever else begins with its first.
        whole = sorted({ids[-1] for ids in found if len(ids) == 1 or _is_space(tokenizer, ids[:-1])})
        if not whole:
            raise ValueError("this model's tokenizer has no single token for 'yes': the probe cannot ask it")
        return whole


class _Tokens(BaseStreamer):
    """Collects the answer's tokens, and tells the text so far."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        self.tokenizer, self.tell = tokenizer, tell
        self.ids: list[int] = []
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:  # transformers hands the prompt on first
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        # half of a character may be there
        self.tell(self.tokenizer.decode(self.ids, skip_special_tokens=True).rstrip("\ufffd").strip())

    def end(self) -> None:
        pass


class _Stopped(StoppingCriteria):
    """Ends every row once the request is cancelled."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


def with_article(name: str) -> str:
    """As POPE's questions say it.

    >>> with_article("umbrella")
    'an umbrella'
    """
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _silent(text: str) -> None:
    """Nobody listens to the answer's beginning."""


def _end(running: asyncio.Future, stop: threading.Event) -> None:
    """Stop a request that nobody waits for any more: at once where it has not begun, else at the next token."""
    stop.set()
    if not running.done():
        running.cancel()


def _is_space(tokenizer: Any, ids: tuple[int, ...]) -> bool:
    return not tokenizer.decode(list(ids)).strip()

"""What a load consists of: prompts of a wanted length, request bodies, and when they are sent."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Api = Literal["tgi", "openai-completions", "openai-chat"]
ROUTES: dict[Api, str] = {
    "tgi": "/generate_stream",
    "openai-completions": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
TOKENS_PER_WORD = 1.3
"""Of English in a common vocabulary; used where no tokenizer is given."""
COMMON_WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many off before must well back through years much where your way down should "
    "because long each just state those people too mr how little good world make very year still see own work day life"
)


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: ``128``, ``uniform:50:200``, ``normal:128:32`` or ``list:16,64,256``."""

    text: str
    draw: Callable[[random.Random], int]

    @staticmethod
    def of(text: str) -> Lengths:
        """Raises ValueError."""
        kind, _, rest = text.partition(":")
        if kind.isdigit():
            fixed = int(kind)
            return Lengths(text, lambda _: fixed)
        if kind == "uniform":
            low, high = (int(part) for part in rest.split(":"))
            if low > high:
                raise ValueError(f"{text!r}: {low} > {high}")
            return Lengths(text, lambda rng: rng.randint(low, high))
        if kind == "normal":
            mean, deviation = (float(part) for part in rest.split(":"))
            return Lengths(text, lambda rng: max(1, round(rng.gauss(mean, deviation))))
        if kind == "list":
            values = [int(part) for part in rest.split(",")]
            return Lengths(text, lambda rng: rng.choice(values))
        raise ValueError(f"{text!r} is no length: write N, uniform:A:B, normal:MEAN:DEVIATION or list:A,B,C")


class PromptMaker:
    """Prompts of random words: all begin with the same `shared_tokens`, none share more."""

    def __init__(self, seed: int, shared_tokens: int, tokenizer: Path | None, words: Path | None) -> None:
        """`tokenizer` is a folder with tokenizer.json, or None to guess from the number of words."""
        self._random = random.Random(seed)
        self._words = (words.read_text("utf-8") if words else COMMON_WORDS).split()
        if not self._words:
            raise ValueError(f"{words} holds no words")
        self._tokenizer: Any = None
        if tokenizer is not None:
            import tokenizers  # only needed for exact lengths

            self._tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._shared_tokens = shared_tokens
        self._shared = self._text(random.Random(seed ^ 0x5EED), shared_tokens)

    def make(self, tokens: int) -> tuple[str, int]:
        """(prompt, its tokens): as many as asked for, or nearly."""
        own = max(tokens - self._shared_tokens, 0)
        # Measured with its space, without which a first word may be other tokens than later ones.
        text = self._shared + self._text(self._random, own, " " if self._shared else "")
        return text, self._count(text)

    def _text(self, rng: random.Random, tokens: int, lead: str = "") -> str:
        if not tokens:
            return ""
        if self._tokenizer is None:
            return lead + " ".join(rng.choices(self._words, k=max(1, round(tokens / TOKENS_PER_WORD))))
        text = ""
        words = tokens
        while True:
            text = f"{text or lead}{' ' if text else ''}{' '.join(rng.choices(self._words, k=words))}"
            encoding = self._encode(text)
            if len(encoding.ids) >= tokens:
                return text[: encoding.offsets[tokens - 1][1]]
            words = tokens - len(encoding.ids) + 1

    def _count(self, text: str) -> int:
        if self._tokenizer is None:
            return round(len(text.split()) * TOKENS_PER_WORD)
        return len(self._encode(text).ids)

    def _encode(self, text: str) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the load."""

    prompt: str
    prompt_tokens: int
    output_tokens: int

    def body(self, api: Api, *, model: str, ignore_eos: bool, extra: dict[str, Any]) -> bytes:
        """The JSON of a streaming request; `extra` fields overwrite."""
        if api == "tgi":
            parameters: dict[str, Any] = {"max_new_tokens": self.output_tokens, "details": True}
            if ignore_eos:
                parameters["ignore_eos"] = True
            body: dict[str, Any] = {"inputs": self.prompt, "parameters": {**parameters, **extra}}
            return json.dumps(body).encode()
        body = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        body["max_tokens"] = self.output_tokens
        if ignore_eos:
            body |= {"ignore_eos": True, "min_tokens": self.output_tokens}
        if api == "openai-chat":
            body["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            body["prompt"] = self.prompt
        return json.dumps({**body, **extra}).encode()


def asks(count: int, prompts: PromptMaker, inputs: Lengths, outputs: Lengths, seed: int) -> list[Ask]:
    """The requests of a load, the same for the same seed."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt, tokens = prompts.make(inputs.draw(rng))
        made.append(Ask(prompt, tokens, max(outputs.draw(rng), 1)))
    return made


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests are sent, `rate` per second on average."""
    rng = random.Random(seed)
    return itertools.accumulate(rng.expovariate(rate) for _ in itertools.count())


def apis() -> tuple[Api, ...]:
    return get_args(Api)

"""Chat completions: a request's responses, whole or as a stream of events."""

import asyncio
import dataclasses
import functools
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jax

from prism_jax.commands.serve import text as text_lib
from prism_jax.commands.serve.chat_request import ChatRequest, Limits
from prism_jax.commands.serve.encoding import Encoder
from prism_jax.commands.serve.exchange import Reply
from prism_jax.commands.serve.measures import Measures
from prism_jax.commands.serve.refusals import Refusal
from prism_jax.commands.serve.sampler import Response, Sampler
from prism_jax.rollout.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The next part of a choice."""

    index: int
    piece: text_lib.Piece
    finish_reason: str | None  # None: more comes


class Chat:
    """The policy behind `/v1/chat/completions`."""

    def __init__(
        self,
        *,
        name: str,
        encoder: Encoder,
        vocabulary: text_lib.Vocabulary,
        end_token_ids: tuple[int, ...],
        sampler: Sampler,
        limits: Limits,
        measures: Measures,
    ):
        self._name, self._encoder, self._vocabulary = name, encoder, vocabulary
        self._end_token_ids, self._sampler = end_token_ids, sampler
        self._limits, self._measures = limits, measures

    async def __call__(self, value: Any, begun: float, reply: Reply) -> None:
        """Answer a request; see `exchange.Work`."""
        request = ChatRequest.of(value, name=self._name, limits=self._limits)
        example = await self._encoder.encode(request.prompt)
        sampling = Sampling(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            max_tokens=request.max_tokens,
            end_token_ids=self._end_token_ids,
        )
        seed = secrets.randbits(32) if request.seed is None else request.seed
        answer = _Answer(self._name, request, len(example.tokens), self._vocabulary)
        feed = _Feed(answer.writers, self._sampler, self._measures, begun)
        responses = self._sampler.submit(
            example,
            sampling,
            key_of(seed),
            feed.listeners,
            # A stop text is looked for while the response is drawn.
            is_whole=not request.is_stream and not request.stops,
        )
        self._measures.prompt_tokens.inc(len(example.tokens))
        try:
            if request.is_stream:
                await _stream(feed, answer, request, reply)
            else:
                await reply.whole(await _collect(feed, answer, request))
        finally:
            # Those that are not done, where the client has left or the request has failed.
            self._sampler.cancel(responses)
            self._measures.response_tokens.inc(sum(one.num_tokens for one in responses))


class _Feed:
    """The parts of an answer's choices that became certain and are not taken yet.

    Responses are read when the sampler hands out their tokens, however slow the client is: a stop
    text frees its slot at once. What a slow client has not taken becomes one part of each choice.
    """

    def __init__(
        self,
        writers: Sequence[text_lib.Writer],
        sampler: Sampler,
        measures: Measures,
        begun: float,
    ):
        self.listeners = [functools.partial(self._hear, index) for index in range(len(writers))]
        self._writers, self._sampler, self._measures = writers, sampler, measures
        self._begun: float | None = begun  # None: the first token came
        self._steps: dict[int, Step] = {}
        self._ended: set[int] = set()
        self._error: Exception | None = None
        self._is_new = asyncio.Event()

    async def parts(self) -> AsyncIterator[tuple[list[Step], bool]]:
        """Yield the next part of choices, and whether these are the last ones."""
        num_left = len(self._writers)
        while num_left:
            await self._is_new.wait()
            self._is_new.clear()
            if self._error is not None:
                raise self._error
            steps, self._steps = [*self._steps.values()], {}
            num_left -= sum(step.finish_reason is not None for step in steps)
            yield steps, num_left == 0

    def _hear(self, index: int, response: Response) -> None:
        if index in self._ended:  # by a stop text; the response itself ends with the next look
            return
        try:
            step = self._read(index, response)
        except Exception as error:
            self._error = error
        else:
            if step.finish_reason is not None:
                self._ended.add(index)
            if index in self._steps:
                step = dataclasses.replace(step, piece=self._steps[index].piece + step.piece)
            self._steps[index] = step
        self._is_new.set()

    def _read(self, index: int, response: Response) -> Step:
        part, writer, reason = response.take(), self._writers[index], None
        if not all(map(math.isfinite, part.logprobs)):
            raise Refusal("the logits of this model are not finite", status=500, code="not_finite")
        if self._begun is not None and part.tokens:
            self._measures.first_token_seconds.observe(time.monotonic() - self._begun)
            self._begun = None
        piece = writer.add(part.tokens, part.logprobs)
        if writer.is_stopped:
            reason = "stop"
            self._sampler.cancel([response])
        elif part.is_done:
            piece += writer.end(by_token=response.is_ended)
            reason = "stop" if response.is_ended or writer.is_stopped else "length"
        return Step(index=index, piece=piece, finish_reason=reason)


class _Answer:
    """The JSON objects of an answer."""

    def __init__(
        self,
        name: str,
        request: ChatRequest,
        num_prompt_tokens: int,
        vocabulary: text_lib.Vocabulary,
    ):
        self.writers = [
            text_lib.Writer(vocabulary, request.stops, with_tokens=request.with_logprobs)
            for _ in range(request.num_responses)
        ]
        self._request, self._vocabulary = request, vocabulary
        self._num_prompt_tokens = num_prompt_tokens
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    def num_tokens(self) -> int:
        """Return the tokens of all responses, their end tokens included."""
        return sum(writer.num_tokens for writer in self.writers)

    def whole(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the object of an answer that is not a stream."""
        head = self._head | {"object": "chat.completion", "choices": choices}
        return head | {"usage": self._usage()}

    def event(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the object of an event; one without choices has the usage."""
        head = self._head | {"object": "chat.completion.chunk", "choices": choices}
        if not self._request.with_usage:
            return head
        return head | {"usage": None if choices else self._usage()}

    def logprobs(self, drawn: Sequence[text_lib.Drawn]) -> dict[str, Any] | None:
        """Return the field `logprobs` of a choice."""
        if not self._request.with_logprobs:
            return None
        content = [
            {
                "token": self._vocabulary.name(one.token),
                "logprob": one.logprob,
                # Those of the text: together they spell it, special tokens have none.
                "bytes": list(self._vocabulary.text(one.token)),
                "top_logprobs": [],
            }
            for one in drawn
        ]
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, int]:
        num_tokens = self.num_tokens()
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self._num_prompt_tokens + num_tokens,
        }


async def _collect(feed: _Feed, answer: _Answer, request: ChatRequest) -> dict[str, Any]:
    """Return the whole answer."""
    texts: list[list[str]] = [[] for _ in range(request.num_responses)]
    drawn: list[list[text_lib.Drawn]] = [[] for _ in range(request.num_responses)]
    reasons: list[str | None] = [None] * request.num_responses
    async for steps, _ in feed.parts():
        for step in steps:
            texts[step.index].append(step.piece.text)
            drawn[step.index] += step.piece.drawn
            reasons[step.index] = step.finish_reason
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(parts), "refusal": None},
            "logprobs": answer.logprobs(drawn[index]),
            "finish_reason": reasons[index],
        }
        for index, parts in enumerate(texts)
    ]
    return answer.whole(choices)


async def _stream(feed: _Feed, answer: _Answer, request: ChatRequest, reply: Reply) -> None:
    """Send events; a slow reader holds back only its events."""
    begun: set[int] = set()
    async for steps, is_last in feed.parts():
        events = []
        for step in steps:
            piece, is_first = step.piece, step.index not in begun
            if not (piece.text or piece.drawn or step.finish_reason or is_first):
                continue
            begun.add(step.index)
            delta = ({"role": "assistant"} if is_first else {}) | {"content": piece.text}
            choice = {
                "index": step.index,
                "delta": delta,
                "logprobs": answer.logprobs(piece.drawn),
                "finish_reason": step.finish_reason,
            }
            events.append(answer.event([choice]))
        if is_last and request.with_usage:
            events.append(answer.event([]))
        if events:
            await reply.events(events, is_last=is_last)


def key_of(seed: int) -> jax.Array:
    """Return the key of a seed, on the host where JAX runs on it too.

    A key on an accelerator would wait for the chunk that is decoded there.
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.random.key(seed)
    with jax.default_device(host):
        return jax.random.key(seed)

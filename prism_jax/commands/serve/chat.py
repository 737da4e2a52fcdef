"""Chat completions: a request's responses, whole or as a stream of events."""

import asyncio
import contextlib
import dataclasses
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
        responses = self._sampler.submit(
            example, sampling, key_of(seed), num_responses=request.num_responses
        )
        self._measures.prompt_tokens.inc(len(example.tokens))
        answer = _Answer(self._name, request, len(example.tokens), self._vocabulary)
        try:
            async with contextlib.aclosing(self._steps(responses, answer, begun)) as steps:
                if request.is_stream:
                    await _stream(steps, answer, request, reply)
                else:
                    await reply.whole(await _collect(steps, answer, request))
        finally:
            # Those that are not done, where the client has left or the request has failed.
            self._sampler.cancel(responses)
            self._measures.response_tokens.inc(answer.num_tokens())

    async def _steps(
        self, responses: Sequence[Response], answer: "_Answer", begun: float
    ) -> AsyncIterator[Step]:
        """Yield what becomes certain of all choices, as it comes."""
        steps: asyncio.Queue[Step | Exception] = asyncio.Queue()

        async def follow(index: int, response: Response) -> None:
            try:
                async for step in _followed(index, response, answer.writers[index]):
                    steps.put_nowait(step)
            except Exception as error:
                steps.put_nowait(error)
            # After a stop text the response has its slot still, however slow the reader is.
            self._sampler.cancel([response])

        tasks = [asyncio.ensure_future(follow(n, one)) for n, one in enumerate(responses)]
        num_left, is_first = len(responses), True
        try:
            while num_left:
                step = await steps.get()
                if isinstance(step, Exception):
                    raise step
                if is_first:
                    self._measures.first_token_seconds.observe(time.monotonic() - begun)
                    is_first = False
                num_left -= step.finish_reason is not None
                yield step
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _followed(index: int, response: Response, writer: text_lib.Writer) -> AsyncIterator[Step]:
    async for part in response.parts():
        if not all(math.isfinite(logprob) for _, logprob in part.drawn):
            raise Refusal("the logits of this model are not finite", status=500, code="not_finite")
        piece = writer.add(part.drawn)
        if writer.is_stopped:
            yield Step(index=index, piece=piece, finish_reason="stop")
            return
        yield Step(index=index, piece=piece, finish_reason=None)
        if part.is_done:
            piece = writer.end(by_token=response.is_ended)
            by_itself = response.is_ended or writer.is_stopped
            yield Step(index=index, piece=piece, finish_reason="stop" if by_itself else "length")
            return


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
            text_lib.Writer(vocabulary, request.stops) for _ in range(request.num_responses)
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


async def _collect(
    steps: AsyncIterator[Step], answer: _Answer, request: ChatRequest
) -> dict[str, Any]:
    """Return the whole answer."""
    texts = [""] * request.num_responses
    reasons: list[str | None] = [None] * request.num_responses
    drawn: list[list[text_lib.Drawn]] = [[] for _ in range(request.num_responses)]
    async for step in steps:
        texts[step.index] += step.piece.text
        drawn[step.index] += step.piece.drawn
        reasons[step.index] = step.finish_reason
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": answer.logprobs(drawn[index]),
            "finish_reason": reasons[index],
        }
        for index, text in enumerate(texts)
    ]
    return answer.whole(choices)


async def _stream(
    steps: AsyncIterator[Step], answer: _Answer, request: ChatRequest, reply: Reply
) -> None:
    """Send events; a slow reader holds back only its events."""
    begun: set[int] = set()
    async for step in steps:
        piece = step.piece
        if (
            not piece.text
            and not piece.drawn
            and step.finish_reason is None
            and step.index in begun
        ):
            continue
        delta: dict[str, Any] = {"content": piece.text}
        if step.index not in begun:
            begun.add(step.index)
            delta = {"role": "assistant", **delta}
        choice = {
            "index": step.index,
            "delta": delta,
            "logprobs": answer.logprobs(piece.drawn),
            "finish_reason": step.finish_reason,
        }
        await reply.event(answer.event([choice]))
    if request.with_usage:
        await reply.event(answer.event([]))
    await reply.end_of_events()


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

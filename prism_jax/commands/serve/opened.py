"""The models of the server, in memory before it listens."""

import argparse
import asyncio
import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
from flax import nnx
from PIL import Image

from models import inputs
from prism_jax import errors
from prism_jax.checkpoints import model_files, pretrained
from prism_jax.commands import loaded
from prism_jax.commands.serve import chat as chat_lib
from prism_jax.commands.serve import chat_request, encoding, measures, text
from prism_jax.commands.serve import pictures as pictures_lib
from prism_jax.commands.serve import score as score_lib
from prism_jax.commands.serve.sampler import Response, Sampler
from prism_jax.data import chat, examples, processor
from prism_jax.rollout import engine, memory, prefill
from prism_jax.rollout.sampling import Sampling
from prism_jax.rollout.session import Session

_LEAST_PREFILL_TOKENS = 256  # smaller prompts are read no faster
# The programs of decoding: the likeliest token, a drawn one, one drawn among the likeliest.
_MODES = ((0.0, None), (1.0, None), (1.0, 0.9))

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy with its slots."""

    words: processor.Processor
    vocabulary: text.Vocabulary
    room: encoding.Room
    session: Session

    @classmethod
    def open(cls, args: argparse.Namespace, say: Say) -> "Policy":
        """Load `--model` and make its slots."""
        place = _place(args, args.model, "policy")
        words = _words(args, args.model, is_discriminator=False)
        room = encoding.Room.of(args.max_prompt_tokens, args.max_images, words)
        policy = loaded.Policy.load(args.model, place, say, step=args.step)
        sampler = policy.engine(
            engine.Shapes(prompt_tokens=1, prompt_patches=1, prompt_images=1),
            chunk_tokens=args.chunk_tokens,
            num_slots=args.num_slots,
            say=say,
        )
        return cls(
            words=words,
            vocabulary=text.Vocabulary.of(words),
            room=room,
            session=session(sampler, policy.params, words, room, args),
        )

    def chat(
        self,
        args: argparse.Namespace,
        sampler: Sampler,
        counted: measures.Measures,
        threads: concurrent.futures.Executor,
    ) -> chat_lib.Chat:
        """Return what answers chat completions."""
        return chat_lib.Chat(
            name=args.name,
            encoder=encoding.Encoder(
                self.words,
                room=self.room,
                longest_bytes=self.vocabulary.longest_bytes(),
                pictures=picture_rules(args),
                threads=threads,
            ),
            vocabulary=self.vocabulary,
            end_token_ids=self.words.ids.ends,
            sampler=sampler,
            limits=request_limits(args),
            measures=counted,
        )

    async def warm_up(self, sampler: Sampler) -> None:
        """Compile what requests need, so that none of them waits for it.

        Raises:
          InputError: the prompts have less room than the least picture.
        """
        # It is resized to the least picture.
        side = self.words.image_settings.factor
        plain, pictured = self._example(()), self._example((Image.new("RGB", (side, side)),))
        tokens, patches, _ = prefill.measure(pictured)
        if tokens > self.room.tokens or patches > self.room.patches:
            raise errors.InputError(
                f"--max_prompt_tokens must be >= {tokens}, which a prompt with the least picture "
                f"has, got {self.room.tokens}"
            )
        await asyncio.to_thread(self.session.compile_prefill, (plain, pictured))
        for mode in _MODES:
            await self._draw(sampler, plain, mode)

    async def _draw(
        self, sampler: Sampler, prompt: inputs.Example, mode: tuple[float, float | None]
    ) -> None:
        """Draw one token; raise where the sampler fails."""
        sampling = Sampling(
            temperature=mode[0],
            top_k=None,
            top_p=mode[1],
            max_tokens=1,
            end_token_ids=self.words.ids.ends,
        )
        ended = asyncio.Event()

        def hear(response: Response) -> None:
            if response.error is not None or response.is_done:
                ended.set()

        key = chat_lib.key_of(0)
        (response,) = sampler.submit(prompt, sampling, key, [hear], is_whole=True)
        await ended.wait()
        response.take()

    def _example(self, pictures: Sequence[Image.Image]) -> inputs.Example:
        turn = chat.turn("user", "?", num_images=len(pictures))
        encoded = self.words.encode([turn], images=pictures, add_generation_prompt=True)
        return examples.from_encoded(encoded, self.words)


def session(
    sampler: engine.Engine,
    params: nnx.State,
    words: processor.Processor,
    room: encoding.Room,
    args: argparse.Namespace,
) -> Session:
    """Return the slots, fewer than asked for where memory is short."""
    work = memory.Work(
        num_groups=args.num_slots,
        num_responses=args.num_slots,
        group_responses=args.group_responses,
        prompt_tokens=room.tokens,
        prompt_patches=room.patches,
        prompt_images=room.images,
        response_tokens=args.max_new_tokens,
    )
    return sampler.open(
        params,
        work,
        num_ends=len(words.ids.ends),
        key_impl=str(jax.random.key_impl(chat_lib.key_of(0))),
        least_prefill_tokens=_LEAST_PREFILL_TOKENS,
    )


def open_score(
    args: argparse.Namespace, threads: concurrent.futures.Executor, say: Say
) -> score_lib.Score:
    """Load `--discriminator` and return what answers `/v1/score`."""
    place = _place(args, args.discriminator, "discriminator")
    words = _words(args, args.discriminator, is_discriminator=True)
    return score_lib.Score(
        name=discriminator_name(args),
        encoder=encoding.Encoder(
            words,
            room=encoding.Room.of(args.max_prompt_tokens, args.max_images, words),
            longest_bytes=text.Vocabulary.of(words).longest_bytes(),
            pictures=picture_rules(args),
            threads=threads,
        ),
        words=words,
        discriminator=score_lib.Discriminator.load(args.discriminator, place, say),
        reading=score_lib.Reading(
            gate=args.gate, scored_token=args.scored_token, positions=args.positions
        ),
        limits=request_limits(args),
    )


def discriminator_name(args: argparse.Namespace) -> str:
    """Return the name of the discriminator among the models."""
    return f"{args.name}-discriminator"


def request_limits(args: argparse.Namespace) -> chat_request.Limits:
    """Return the largest values of a request."""
    return chat_request.Limits(
        num_responses=args.max_responses, max_tokens=args.max_new_tokens, num_images=args.max_images
    )


def picture_rules(args: argparse.Namespace) -> pictures_lib.Rules:
    """Return which pictures are opened."""
    return pictures_lib.Rules(
        limit_pixels=args.limit_image_pixels,
        hosts=tuple(host.lower() for host in args.image_host),
        limit_bytes=args.max_body_mebibytes << 20,
    )


def _place(args: argparse.Namespace, folder: pathlib.Path, role: pretrained.Role) -> loaded.Place:
    return loaded.Place.of(
        folder, role=role, dtype=args.dtype, tensor=args.tensor, attention=args.attention
    )


def _words(
    args: argparse.Namespace, folder: pathlib.Path, *, is_discriminator: bool
) -> processor.Processor:
    return processor.Processor.from_folder(
        model_files.of(folder, is_discriminator=is_discriminator),
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        place="--",
    )

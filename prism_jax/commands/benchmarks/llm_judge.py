"""A model behind an endpoint that judges the responses which rules do not call right.

It is asked as the published scorers ask theirs (`rewards.benchmarks.rules.question`), and its
verdict stands beside that of the rules. Replies are kept in the workdir, so a killed job asks
nothing twice.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prism_jax import configuration, errors, progress
from prism_jax.commands.benchmarks import grading
from prism_jax.data import parallel
from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import groups, llm, mathvista, rules
from prism_jax.teacher import cache, client
from prism_jax.teacher import endpoint as endpoint_lib

Json = Any
Facts = Callable[[int], facts_lib.Facts]
CACHE = "judge_replies"
_PLACE = "config.llm_judge"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(configuration.Section):
    """Files with the wording of the questions; None: that of `rewards.benchmarks.llm`."""

    right: str | None
    clear: str | None
    extract: str | None

    def read(self) -> dict[rules.Question, str]:
        """Return the wording of each question.

        Raises:
          InputError: a file cannot be read, or is no template.
        """
        wording = dict(llm.PROMPTS)
        for name, path in vars(self).items():
            if path is None:
                continue
            place = f"{_PLACE}.prompts.{name} = {path}"
            try:
                wording[name] = pathlib.Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise errors.InputError(f"{place}: cannot be read: {error}") from error
            llm.check(wording[name], place=place)
        return wording


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMJudge(configuration.Section):
    """The model that judges answers."""

    endpoint: endpoint_lib.Endpoint
    sampling: endpoint_lib.Sampling
    prompts: Prompts

    def open(self, folder: pathlib.Path) -> "Judge":
        """Return the judge of a job; InputError for a key or a file that is missing."""
        return Judge(self, folder / CACHE)


class Judge:
    """A judge with its cache of replies. Thread-safe."""

    def __init__(self, options: LLMJudge, folder: pathlib.Path):
        self._options = options
        self._wording = options.prompts.read()
        self._stop = threading.Event()
        self._client = client.Client(
            options.endpoint.base_url,
            key=options.endpoint.key(place=f"{_PLACE}.endpoint"),
            patience=options.endpoint.patience(),
            stop=self._stop,
        )
        self._folder = folder
        self._failure: errors.RunError | None = None

    def judged(
        self,
        records: Iterable[Mapping[str, Json]],
        facts: Facts,
        *,
        title: str,
        num_records: int,
        line_every_steps: int,
    ) -> Iterator[Mapping[str, Json]]:
        """Yield the records in order, each with the verdict under `judged`.

        Args:
          facts: returns the facts of a record by its number.

        Raises:
          RunError: the endpoint fails, or refuses all requests. Replies so far are kept.
        """
        replies = cache.Cache(self._folder)
        shown = progress.Progress(
            sys.stderr,
            title=title,
            first_step=0,
            num_steps=num_records,
            watched=("right",),
            line_every_steps=line_every_steps,
        )

        def judge(item: tuple[int, Mapping[str, Json]]) -> dict[str, Json]:
            number, record = item
            return self._verdict(facts(number), record, replies)

        num_right = 0.0
        pairs = parallel.ordered_map(
            judge, enumerate(records), self._options.endpoint.num_concurrent
        )
        try:
            for (number, record), verdict in pairs:
                num_right += verdict["accuracy"]
                shown.show(number + 1, {"right": num_right / (number + 1)})
                yield {**record, "judged": verdict}
        except BaseException:
            self._stop.set()  # a request under way must not keep the process from ending
            raise
        shown.close()

    def _verdict(
        self, facts: facts_lib.Facts, record: Mapping[str, Json], replies: cache.Cache
    ) -> dict[str, Json]:
        is_right = record["accuracy"] == 1.0
        question = rules.question(facts, grading.reading_of(record), is_right=is_right)
        verdict = {
            "accuracy": float(is_right),
            "question": question,
            "reply": "",
            "is_refused": False,
        }
        if question is None:
            return verdict
        try:
            text = self._ask(question, facts, record["response"], replies)
            is_right = _is_right(question, facts, text)
            if question == "extract" and not is_right and facts.protocol == "prism":
                text = self._ask("right", facts, record["response"], replies)
                is_right = llm.is_one(text)
        except client.RefusedError as error:
            # One response that the endpoint does not take, such as a too long one.
            return verdict | {"reply": str(error), "is_refused": True}
        return verdict | {"accuracy": float(is_right), "reply": text}

    def _ask(
        self, question: rules.Question, facts: facts_lib.Facts, response: str, replies: cache.Cache
    ) -> str:
        model = self._options.endpoint.model
        message = {"role": "user", "content": llm.prompt(self._wording[question], facts, response)}
        options = self._options.sampling.options()
        body = json.dumps({"model": model, "messages": [message], **options}).encode()
        key = hashlib.sha256(body).hexdigest()
        received = replies.get(key)
        if received is None:
            try:
                received = self._client.ask(body, unusable=lambda _: None)
            except client.StoppedError as error:
                raise self._failure or errors.RunError("the judge was stopped") from error
            except (client.FailedError, client.FatalError) as error:
                self._failure = errors.RunError(
                    f"the judge at {self._options.endpoint.base_url}: {error}; its replies so far "
                    "are kept, start the command again"
                )
                self._stop.set()
                raise self._failure from error
            replies.put(key, received, model=model)
        return received.text


def _is_right(question: rules.Question, facts: facts_lib.Facts, text: str) -> bool:
    if question == "right":
        return llm.is_one(text)
    if question == "extract":
        return mathvista.extracted(facts, text).is_right is True
    clarity = llm.clarity(text)
    return clarity == "correct" or (clarity == "unclear" and groups.has_no_figure(facts.group))

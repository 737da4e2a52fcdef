"""Effects of docs/fidelity.md that are seen in texts: where segments end, and what is cut off."""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from prism_jax.data import processor, prompts, tokenizer_files
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import examples as numerals_examples
from prism_jax.discriminator import segments
from prism_jax.honesty import probes

Json = Any
_FORMS = {
    "last": {"scored_token": "last", "teacher_max_tokens": None},
    "newline": {"scored_token": "newline", "teacher_max_tokens": None},
    "pad": {"scored_token": "pad", "teacher_max_tokens": 512},
}


def _words() -> processor.Processor:
    """Return a tokenizer of Qwen's kind, its merges learned from the embedded corpus."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        ids = tokenizer_files.write(
            folder, numerals_corpus.sample_texts("small", 0, 400), num_merges=256
        )
        config = {
            "model_type": "qwen3_vl",
            "image_token_id": ids.image_token_id,
            "video_token_id": ids.video_token_id,
            "vision_start_token_id": ids.vision_start_token_id,
            "vision_end_token_id": ids.vision_end_token_id,
            "text_config": {"model_type": "qwen3_vl_text", "vocab_size": ids.vocab_size},
        }
        ends = {"eos_token_id": [ids.eos_token_id, ids.pad_token_id]}
        for file, values in (("config.json", config), ("generation_config.json", ends)):
            (folder / file).write_text(json.dumps(values), encoding="utf-8")
        return processor.Processor.from_folder(folder)


def _reader(words: processor.Processor, name: str) -> segments.Reader:
    form = segments.Form(view="caption_cot", **_FORMS[name])
    return segments.Reader(words, vocab_tokens=None, gate="strict", form=form)


def _examples(num_pairs: int) -> list[numerals_examples.Example]:
    return list(numerals_corpus.stream(level="small", seed=0, name="teacher", rows=num_pairs))


def _texts(example: numerals_examples.Example) -> tuple[segments.Text, segments.Text]:
    """Return the teacher's and the public response to a question."""
    public = example.public(numerals_corpus.slips_of("small", {}))
    return segments.Text.of_whole(example.teacher.response), segments.Text.of_whole(public.response)


def scored_tokens(*, num_pairs: int) -> dict[str, Json]:
    """Items 1 to 3: how often the id of the scored token alone tells the teacher, by form.

    The probe of the honesty panel, fitted on one half of the questions and asked about the other.
    `pad` is what the released alignment does; the student's side is as it is drawn there.
    """
    words = _words()
    texts = [_texts(example) for example in _examples(num_pairs)]
    accuracies: dict[str, Json] = {"pairs": num_pairs}
    for name in _FORMS:
        reader = _reader(words, name)
        cuts = [(reader.teacher(teacher), reader.student(student)) for teacher, student in texts]
        for segment in ("caption", "cot"):
            pairs = probes.Pairs.of(
                range(len(cuts)),
                [teacher.tokens[segment] for teacher, _ in cuts],
                [student.tokens[segment] for _, student in cuts],
            )
            accuracy = probes.across_prompts(probes.last_token, pairs)
            accuracies[f"{name}_{segment}_last_token_probe_accuracy"] = accuracy
    return accuracies


def lengths(*, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens of prompt and segment, teachers' and students', int[2 num_pairs] each.

    Captions and cots are pairs of their own, as in the released warm-up.
    """
    words = _words()
    reader = _reader(words, "newline")
    lengths_by_pair = []
    for example in _examples(num_pairs):
        text = prompts.SYSTEM_PROMPT + prompts.user_turn(example.question.text)
        width, height = example.picture().size
        prompt = len(words.tokenizer.encode(text)) + height * width // 32**2
        teacher, student = _texts(example)
        cuts = reader.teacher(teacher), reader.student(student)
        for name in ("caption", "cot"):
            lengths_by_pair.append([prompt + len(cut.tokens[name]) for cut in cuts])
    sides = np.array(lengths_by_pair)
    return sides[:, 0], sides[:, 1]


def teacher_cut() -> dict[str, Json]:
    """Item 1: share of teachers whose cot of so many tokens loses its answer to the limit of 512.

    Responses are made to length; how long the published teacher's are is not known here, so shares
    are given for lognormal lengths of several medians, with a deviation of 0.5 of the logarithm.
    """
    words = _words()
    reader = _reader(words, "pad")
    is_answer_kept = {}
    for steps in (100, 200, 240, 260, 400, 1000):
        cot = "<think>" + " 1 +" * steps + "</think><answer>7</answer>"
        cut = reader.teacher(segments.Text.of_parts("<caption>a</caption>", cot))
        text = words.tokenizer.decode(cut.tokens["cot"].tolist())
        is_answer_kept[str(len(words.tokenizer.encode(cot, add_special_tokens=False)))] = (
            "</answer>" in text
        )
    rng = np.random.default_rng(0)
    shares = {}
    for median in (128, 256, 512, 1024, 2048):
        samples = rng.lognormal(np.log(median), 0.5, 100_000)
        shares[str(median)] = float(np.mean(samples > 512))
    return {
        "answer_is_kept_by_cot_tokens": is_answer_kept,
        "share_cut_by_median_cot_tokens": shares,
    }

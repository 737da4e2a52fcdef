"""The format gate and the cut into caption and cot, on tokens that straddle tags and letters."""

import random
import re
import time

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from prism_jax import errors
from prism_jax.rewards import tags
from tests.rewards import oracle_files

END = "<|im_end|>"
WELL_FORMED = (
    "<caption>a dog</caption><think>one dog</think><answer>1</answer>",
    "<caption>\n- a dog\n</caption>\n<think>\none\n</think>\n<answer>\n1\n</answer>\n",
    "<caption>一只狗在草地上。</caption><think>数一数：一只。</think><answer>1</answer>",
    "<caption>🐶👩‍👩‍👧 ½ ✓</caption>\n\n<think>é ñ 🤔</think><answer>🙂</answer>",
    "<caption>x</ caption > <b></caption> <think>></think><answer>a<b</answer>",
)
OFFICIAL = re.compile(
    r"^\s*<caption>.*?</caption>\s*<think>.*?</think>\s*<answer>.*?</answer>\s*$", re.DOTALL
)


def make_tokenizer(texts, *, crosses_words):
    """Train a byte-level BPE; with `crosses_words` tokens may span tags and white space."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=not crosses_words
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["tokens_inside_words", "tokens_across_tags"])
def tokenizer(request):
    mixed = [text.replace("</caption>", "n</caption>") for text in WELL_FORMED]
    return make_tokenizer(mixed, crosses_words=request.param == "tokens_across_tags")


def cut(tokenizer, tokens, gate="strict"):
    return tags.segment(
        tokens,
        bytes_of_token=tags.token_bytes(tokenizer, vocab_tokens=None),
        end_tokens=(tokenizer.convert_tokens_to_ids(END),),
        gate=gate,
    )


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_oracle_formats_are_judged_as_recorded():
    for case in oracle_files.read("formats.json"):
        assert tags.format_ok(case["text"], gate="strict") is case["format_ok"], case
        official = case["official"]["format_reward"] == 1.0
        assert tags.format_ok(case["text"], gate="official") is official, case


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<caption> </caption><think>b</think><answer>3</answer>",
        "<caption>a</caption><think>\n</think><answer>3</answer>",
        "<caption>a</caption><think>b</think><answer> </answer>",
        "<think>b</think><caption>a</caption><answer>3</answer>",
        "<caption>a<think></caption>b</think><answer>3</answer>",
        "<caption>a</caption>and<think>b</think><answer>3</answer>",
        "so <caption>a</caption><think>b</think><answer>3</answer>",
        "<caption>a</caption><think>b</think><answer>3</answer></answer>",
        "<caption>a</caption><think>b</think><answer>3",
        "<CAPTION>a</CAPTION><think>b</think><answer>3</answer>",
        "<caption>a</caption><think>b</think><answer>3</answer><answer>4</answer>",
    ],
)
def test_strict_gate_refuses(text):
    assert not tags.format_ok(text, gate="strict")


@pytest.mark.parametrize("text", WELL_FORMED)
def test_strict_gate_accepts_and_official_gate_agrees(text):
    assert tags.format_ok(text, gate="strict")
    assert tags.format_ok(text, gate="official")
    assert tags.format_ok(text, gate="geo3k")


def test_official_gate_equals_the_released_expression_on_random_texts():
    pieces = [*tags.TAGS, " ", "\n", "x", "\u3000", "<"]
    source = random.Random(0)
    accepted = 0
    for _ in range(4000):
        text = "".join(source.choices(pieces, k=source.randrange(4)))
        for tag in tags.TAGS:
            text += tag if source.random() < 0.93 else ""
            text += "".join(source.choices(pieces, k=source.randrange(3)))
        wanted = bool(OFFICIAL.match(text))
        assert tags.format_ok(text, gate="official") is wanted, repr(text)
        accepted += wanted
    assert 100 < accepted < 3900


def test_geo3k_gate_wants_the_order_only():
    assert tags.format_ok("x<caption></caption>y<think></think><answer></answer>z", gate="geo3k")
    assert not tags.format_ok("<think></think><caption></caption><answer></answer>", gate="geo3k")


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match="gate must be"):
        tags.format_ok("", gate="loose")


@pytest.mark.parametrize("text", WELL_FORMED)
def test_segments_partition_the_response_at_the_token_that_completes_the_tag(tokenizer, text):
    tokens = encode(tokenizer, text)
    end = tokenizer.convert_tokens_to_ids(END)
    segments = cut(tokenizer, [*tokens, end])
    # The definition, at quadratic cost: the shortest prefix whose bytes hold the tag.
    table = tags.token_bytes(tokenizer, vocab_tokens=None)
    wanted = next(
        n for n in range(len(tokens)) if b"</caption>" in b"".join(table[t] for t in tokens[:n])
    )
    assert segments.format_ok and segments.ended and segments.text == text
    assert segments.caption_tokens == wanted
    assert segments.response_tokens == len(tokens) + 1
    assert segments.caption_tokens + segments.cot_tokens == segments.response_tokens
    assert segments.caption.endswith("</caption>") and segments.caption + segments.cot == text


def test_some_tag_straddles_tokens_and_some_character_is_split():
    tokenizer = make_tokenizer(list(WELL_FORMED), crosses_words=True)
    table = tags.token_bytes(tokenizer, vocab_tokens=None)
    pieces = [table[token] for text in WELL_FORMED for token in encode(tokenizer, text)]
    assert any(b"><" in piece and piece != b"><" for piece in pieces)
    split = [piece for piece in pieces if "\ufffd" in piece.decode("utf-8", errors="replace")]
    assert split


def test_a_token_that_completes_the_tag_and_goes_on_belongs_to_the_caption():
    table = [b"<caption>a</cap", b"tion", b"><thi", b"nk>b</think><answer>3</answer>", b"<end>"]
    segments = tags.segment([0, 1, 2, 3, 4], bytes_of_token=table, end_tokens={4}, gate="strict")
    assert (segments.caption_tokens, segments.cot_tokens, segments.response_tokens) == (3, 2, 5)
    assert segments.caption == "<caption>a</caption>"


def test_tokens_behind_the_end_token_are_padding():
    table = [b"<caption>a</caption>", b"<think>b</think>", b"<answer>3</answer>", b"", b"junk"]
    segments = tags.segment([0, 1, 2, 3, 4, 3], bytes_of_token=table, end_tokens={3}, gate="strict")
    assert segments.format_ok
    assert (segments.caption_tokens, segments.cot_tokens, segments.response_tokens) == (1, 3, 4)


def test_teacher_and_student_of_one_text_are_scored_at_the_same_tokens(tokenizer):
    """The same text from the sampler (padded) and from a file (encoded) gives the same cut."""
    end = tokenizer.convert_tokens_to_ids(END)
    teacher = [*encode(tokenizer, WELL_FORMED[0]), end]
    student = [*teacher, end, end, end]
    assert cut(tokenizer, teacher) == cut(tokenizer, student)


@pytest.mark.parametrize("text", WELL_FORMED[:4])
def test_a_response_cut_at_any_length_is_invalid_and_has_no_segments(tokenizer, text):
    tokens = encode(tokenizer, text)
    for length in range(len(tokens) + 1):
        for gate in ("strict", "official"):
            segments = cut(tokenizer, tokens[:length], gate)
            assert not segments.ended and not segments.format_ok
            assert (segments.caption_tokens, segments.cot_tokens) == (0, 0)
            assert segments.response_tokens == length
            assert segments.cot == "" and segments.caption == ""


def test_segmenting_looks_at_each_token_once():
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    table = Counted([b"<caption>", b"a", b"</caption><think>b</think><answer>3</answer>", b""])
    tokens = [0, *[1] * 5000, 2, 3]
    segments = tags.segment(tokens, bytes_of_token=table, end_tokens={3}, gate="strict")
    assert segments.caption_tokens == 5002
    assert Counted.reads == len(tokens) - 1


@pytest.mark.parametrize(
    "piece", ["</caption>", "</caption><think></think><answer></answer>", "<answer>", " "]
)
def test_gates_take_linear_time_on_repeated_tags(piece):
    def seconds(repeats):
        text = "<caption>" + piece * repeats + "x"
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for gate in ("strict", "official", "geo3k"):
                tags.format_ok(text, gate=gate)
            best = min(best, time.perf_counter() - start)
        return best

    # 16 times the text: 16 times the time when linear, 256 times when quadratic.
    assert seconds(64000) < 80 * seconds(4000)


def test_token_bytes_of_all_tokens_spell_any_text(tokenizer):
    table = tags.token_bytes(tokenizer, vocab_tokens=None)
    text = "".join(WELL_FORMED) + "\x00\t\xa0\xad\u0100\U0001f600"
    assert b"".join(table[token] for token in encode(tokenizer, text)).decode() == text
    assert table[tokenizer.convert_tokens_to_ids(END)] == END.encode()


def test_rows_beyond_the_tokenizer_decode_to_a_visible_mark(tokenizer):
    table = tags.token_bytes(tokenizer, vocab_tokens=len(tokenizer) + 5)
    assert len(table) == len(tokenizer) + 5
    assert {piece.decode() for piece in table[-5:]} == {"\ufffd"}
    with pytest.raises(errors.InputError, match="rows"):
        tags.token_bytes(tokenizer, vocab_tokens=len(tokenizer) - 1)


def test_a_vocabulary_that_is_not_byte_level_is_refused():
    plain = tokenizers.Tokenizer(models.WordLevel({"▁a b": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(errors.InputError, match="byte-level"):
        tags.token_bytes(
            transformers.PreTrainedTokenizerFast(tokenizer_object=plain), vocab_tokens=None
        )


def test_texts_are_split_behind_the_first_closing_caption_tag():
    assert tags.split_text("<caption>a</caption>\n<think>") == (
        "<caption>a</caption>",
        "\n<think>",
    )
    assert tags.split_text("<caption>a") == ("", "")


def test_answer_text_is_the_first_pair():
    assert tags.answer_text("<think><answer> 5\n</answer></think><answer>6</answer>") == "5"
    assert tags.answer_text("<answer>5") == "" and tags.answer_text("5</answer>") == ""

"""Rows as arrays: encoding, what is a response, static shapes, steps that resume."""

import dataclasses

import numpy as np
import pytest

from models import config as config_lib
from models import inputs
from prism_jax import errors
from prism_jax.data import collate, demonstrations, encode, packing, processor, records, steps
from tests import data_files, make_tokenizer, tiny_checkpoint

IMAGES = {i: data_files.png(40 * i, size) for i, size in enumerate([(40, 30), (64, 64), (100, 30)])}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> processor.Processor:
    folder = tmp_path_factory.mktemp("words")
    ids = make_tokenizer.write(folder, min_pixels=32 * 32, max_pixels=64 * 64)
    make_tokenizer.write_config(folder, ids)
    return processor.Processor.from_folder(folder)


@pytest.fixture(scope="module")
def config(words) -> config_lib.Qwen3VLConfig:
    values = tiny_checkpoint.config_json(
        make_tokenizer.Ids(
            vocab_size=len(words.tokenizer),
            image_token_id=words.ids.image,
            video_token_id=words.ids.video,
            vision_start_token_id=words.ids.vision_start,
            vision_end_token_id=words.ids.vision_end,
            eos_token_id=words.ids.ends[0],
            pad_token_id=words.ids.pad,
        ),
        num_experts=None,
        tied=True,
    )
    return config_lib.from_hf(values)


def _row(*turns: tuple[str, str], images: tuple[int, ...] = ()) -> records.SFTRow:
    sizes = {0: (40, 30), 1: (64, 64), 2: (100, 30)}
    return records.SFTRow(
        id="row",
        source="test",
        messages=tuple(records.Message(role=role, content=text) for role, text in turns),
        images=tuple(
            records.Image(
                path=None, data=IMAGES[i], width_pixels=sizes[i][0], height_pixels=sizes[i][1]
            )
            for i in images
        ),
    )


ROWS = (
    _row(("user", "How many?"), ("assistant", "7")),
    _row(("user", "<image>\nHow many?"), ("assistant", "So 7."), images=(0,)),
    _row(
        ("system", "Answer."),
        ("user", "First <image> then <image>"),
        ("assistant", "one"),
        ("user", "And?"),
        ("assistant", "two"),
        images=(1, 2),
    ),
)


def _encode(row: records.SFTRow, words: processor.Processor) -> inputs.Example:
    return encode.example(row.messages, row.images, words, add_generation_prompt=False)


@pytest.mark.parametrize("row", ROWS)
def test_measuring_without_pixels_tells_what_encoding_takes(row, words):
    example = _encode(row, words)
    size = encode.measure(row.messages, row.images, words, add_generation_prompt=False)
    assert size.tokens == len(example.tokens)
    assert size.patches == sum(len(pixels) for pixels in example.pixels)
    assert size.images == len(example.grids) == len(row.images)


def test_pictures_stand_where_their_marks_stand():
    (message,) = encode.messages([records.Message(role="user", content="a<image> b<image>")])
    assert message["content"] == [
        {"type": "text", "text": "a"},
        {"type": "image"},
        {"type": "text", "text": " b"},
        {"type": "image"},
    ]
    (message,) = encode.messages([records.Message(role="user", content="<image>")])
    assert message["content"] == [{"type": "image"}]


def test_every_assistant_turn_with_its_end_token_is_a_response_and_nothing_else(words):
    example = _encode(ROWS[2], words)
    turns = encode.TurnTokens.of(words.tokenizer)

    def kept(messages):
        is_response = turns.is_response(example.tokens, messages)
        return words.decode(example.tokens[is_response], keep_special=True)

    assert kept(ROWS[2].messages) == "one<|im_end|>two<|im_end|>"
    # Turns of the user may say that they are not learned, and no turn of theirs is.
    for flags, expected in (
        ((False, True, False, True), "one<|im_end|>two<|im_end|>"),
        ((True, False, True, True), "two<|im_end|>"),
        ((True, True, True, False), "one<|im_end|>"),
    ):
        pairs = zip(ROWS[2].messages[-4:], flags, strict=True)
        assert kept([dataclasses.replace(m, is_learned=flag) for m, flag in pairs]) == expected
    with pytest.raises(errors.InputError, match="writes 2 turns of the assistant for 1"):
        kept([dataclasses.replace(ROWS[2].messages[-1], is_learned=False)])


RESPONSE = [records.Message(role="assistant", content="")]


def test_the_token_behind_the_role_is_the_templates_whatever_line_breaks_were_merged_into_it():
    turns = encode.TurnTokens(start=(1, 2), end=9)
    tokens = np.array([1, 2, 77, 5, 9, 0, 1, 3, 77, 5, 9])
    assert np.flatnonzero(turns.is_response(tokens, RESPONSE)).tolist() == [3, 4]


def test_a_response_without_end_reaches_to_the_end():
    turns = encode.TurnTokens(start=(1, 2), end=9)
    tokens = np.array([1, 3, 9, 1, 2, 0, 5, 6])
    assert turns.is_response(tokens, RESPONSE).tolist() == [False] * 6 + [True, True]


SHAPES = collate.Shapes(row_tokens=128, row_examples=3, row_patches=(32, 64), row_images=3)


def test_few_sizes_of_vision_rows_and_the_smallest_that_fits():
    assert [SHAPES.patches_for(n) for n in (0, 32, 33, 64)] == [32, 32, 64, 64]
    for sizes in ((64, 32), (8, 16, 24, 32), (8, 8)):
        with pytest.raises(errors.InputError, match=r"data\.row_patches"):
            collate.Shapes(row_tokens=1, row_examples=1, row_patches=sizes, row_images=1)
    none = collate.Shapes(row_tokens=8, row_examples=1, row_patches=(), row_images=4)
    assert none.patches_for(0) is None
    assert none.limits().images == none.limits().patches == 0


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1, 0), (8, 8)),
        ((8, 8), (8, 8)),
        ((9, 3), (16, 16)),
        ((3, 17), (24, 32)),
        ((24, 0), (24, 32)),
    ],
)
def test_slots_for_segments_are_few_and_of_few_sizes(counts, expected):
    shapes = collate.Shapes(row_tokens=8, row_examples=24, row_patches=(8,), row_images=100)
    assert shapes.segments_for(*counts) == expected
    # One slot would be an unpacked row to cuDNN.
    single = collate.Shapes(row_tokens=8, row_examples=1, row_patches=(), row_images=1)
    assert single.segments_for(1, 0) == (2, 2)


def test_rows_with_few_or_no_images_have_the_shapes_of_full_ones(words, config):
    def packed(rows):
        return collate.collate(
            rows,
            config=config,
            shapes=SHAPES,
            row_patches=64,
            segments=SHAPES.segments_for(2, 3),
            dtype=collate.pixels_dtype(words),
        )

    one, two, three = (_encode(row, words) for row in ROWS)
    full, empty = packed([[one, two], [three]]), packed([[one], []])
    describe = [[(x.shape, x.dtype) for x in _leaves(batch)] for batch in (full, empty)]
    assert describe[0] == describe[1]
    assert not empty[0].segments.ids[1].any()
    assert not empty[1].segments.ids.any()


def _leaves(batch) -> list[np.ndarray]:
    text, vision = batch
    found = [text.tokens, text.positions, text.image_slots, vision.pixels, vision.coords]
    for part in (text.segments, vision.segments):
        found += [part.ids, part.lengths, part.offsets]
    return found


def test_values_of_tokens_are_laid_where_the_tokens_are():
    laid = collate.lay(
        [[np.array([1, 2]), np.array([3])], []], row_tokens=4, dtype=np.dtype(np.int32)
    )
    assert laid.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0]]


class _Rows:
    def __init__(self):
        self.num_read = 0

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        self.num_read += 1
        return ROWS[index]


def _packed(words, config, *, cache_bytes, rows):
    found = demonstrations.Demonstrations(
        [("a", rows)], words, cache_bytes=cache_bytes, num_threads=1
    )
    plan = packing.Plan(
        found.sizes,
        found.lengths,
        (),
        limits=SHAPES.limits(),
        step_rows=2,
        num_open_rows=2,
        seed=None,
    )
    return demonstrations.Packed(
        found, plan, SHAPES, config=config, pixels_dtype=collate.pixels_dtype(words)
    )


def test_parts_of_a_step_have_the_shapes_of_the_whole_whoever_makes_them(words, config):
    packed = _packed(words, config, cache_bytes=0, rows=_Rows())
    whole, parts = packed.rows(0, [0, 1]), [packed.rows(0, [0]), packed.rows(0, [1])]
    for index in range(2):
        assert np.array_equal(whole[0].tokens[index], parts[index][0].tokens[0])
        assert np.array_equal(whole[1].pixels[index], parts[index][1].pixels[0])
        assert np.array_equal(whole[2][index], parts[index][2][0])


def test_rows_that_were_counted_are_not_read_to_be_measured(words, config):
    count, rows = demonstrations.counter(words, SHAPES.limits()), _Rows()
    options = {"cache_bytes": 0, "num_threads": 1}
    sizes = [count(row) for row in ROWS]
    known = demonstrations.Demonstrations([("a", rows)], words, sizes=sizes, **options)
    assert rows.num_read == 0
    measured = demonstrations.Demonstrations([("a", _Rows())], words, **options)
    np.testing.assert_array_equal(known.sizes, measured.sizes)
    with pytest.raises(ValueError, match="sizes of 1 rows"):
        demonstrations.Demonstrations([("a", rows)], words, sizes=sizes[:1], **options)


def test_encoded_rows_are_cached_up_to_the_limit(words, config):
    kept, read = _Rows(), _Rows()
    for rows, num_bytes in ((kept, 1 << 20), (read, 0)):
        packed = _packed(words, config, cache_bytes=num_bytes, rows=rows)
        first = packed.rows(0, [0, 1])
        assert np.array_equal(first[0].tokens, packed.rows(0, [0, 1])[0].tokens)
    # Measured once each, then encoded once, or once in each step.
    assert kept.num_read == 2 * len(ROWS)
    assert read.num_read == 3 * len(ROWS)


def _steps(**identity) -> steps.Steps:
    return steps.Steps(lambda k: k * k, num_steps=6, identity={"seed": 0} | identity, num_threads=2)


def test_steps_go_on_behind_a_position_and_end():
    data = _steps()
    assert [next(data) for _ in range(3)] == [0, 1, 4]
    state = data.get_state()
    other = _steps()
    next(other)
    other.set_state(state)
    assert list(other) == [9, 16, 25]
    data.close()
    other.close()


def test_a_position_of_other_data_is_refused():
    state = _steps().get_state()
    with pytest.raises(errors.InputError, match=r"data seed was 0 .* and is 1 now"):
        _steps(seed=1).set_state(state)

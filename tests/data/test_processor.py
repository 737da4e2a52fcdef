"""Chats to tokens and patches; transformers' processor without its video part is the reference."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers
from PIL import Image
from transformers import processing_utils

from prism_jax import errors
from prism_jax.data import chat, images, processor
from tests import make_tokenizer, processor_cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    processor_cases.write_folder(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return processor.Processor.from_folder(folder)


_TEXTS = (
    "",
    " ",
    "Hi there",
    "Grüße, 世界! 👩‍👩‍👧 e\u0301",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>1 + 1?<|im_end|>\n",
    "a  b\n\n\tc<|im_end|>  <|endoftext|>d <|im_sta",
    "word " * 3000,
)


def test_ids_of_a_text_are_those_that_a_call_of_the_tokenizer_gives(ours, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    path = tmp_path / "cut" / "tokenizer.json"
    limits = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"truncation": limits, "padding": padding})
    )
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for made in (ours, processor.Processor.from_folder(tmp_path / "cut")):
        for text in _TEXTS:
            assert made.token_ids(text) == reference(text)["input_ids"], text[:40]


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_a_token_in_front_of_every_text_is_added_as_a_call_of_the_tokenizer_does(
    folder, add_special_tokens
):
    made = processor.Processor.from_folder(folder)
    start = made.tokenizer.convert_tokens_to_ids("<|im_start|>")
    made.tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    for text in _TEXTS:
        ids = made.token_ids(text, add_special_tokens=add_special_tokens)
        called = made.tokenizer(text, add_special_tokens=add_special_tokens)
        assert ids == called["input_ids"], text[:40]
    assert (made.token_ids("", add_special_tokens=add_special_tokens) == [start]) == (
        add_special_tokens
    )


class ImageProcessor(transformers.Qwen3VLProcessor):
    """Hugging Face's processor without the video part, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        processing_utils.ProcessorMixin.__init__(
            self, image_processor, tokenizer, chat_template=chat_template
        )


@pytest.fixture(scope="module")
def reference(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    return ImageProcessor(image_processor, tokenizer, chat_template=template)


def case_pictures(case):
    pictures = processor_cases.pictures()
    return [pictures[name] for name in case.pictures]


def encode(made, text="Hi", *, num_images=0, **media):
    messages = [chat.turn("user", text, num_images=num_images)]
    return made.encode(messages, add_generation_prompt=True, **media)


# Equal to Hugging Face


@pytest.mark.parametrize("name", [n for n, c in processor_cases.CASES.items() if not c.clips])
def test_encode_equals_hugging_face(name, ours, reference):
    case = processor_cases.CASES[name]
    made = ours.encode(
        case.messages,
        images=case_pictures(case),
        add_generation_prompt=case.add_generation_prompt,
    )
    text = reference.apply_chat_template(
        case.messages, tokenize=False, add_generation_prompt=case.add_generation_prompt
    )
    expected = reference(text=[text], images=case_pictures(case) or None)
    assert made.tokens.dtype == made.token_types.dtype == made.grids.dtype == np.int32
    np.testing.assert_array_equal(made.tokens, expected["input_ids"][0])
    np.testing.assert_array_equal(made.token_types, expected["mm_token_type_ids"][0])
    assert set(expected["attention_mask"][0]) == {1}
    if case.pictures:
        np.testing.assert_array_equal(made.grids, expected["image_grid_thw"])
        normal = images.normalise(np.concatenate(made.patches), ours.image_settings)
        np.testing.assert_allclose(normal, expected["pixel_values"], rtol=0, atol=1e-6)
    else:
        assert made.grids.shape == (0, 3)
        assert made.patches == ()


def test_a_video_is_written_step_by_step_inside_the_pair_of_the_template(ours):
    case = processor_cases.CASES["an_odd_video_behind_an_image"]
    made = ours.encode(
        case.messages,
        images=case_pictures(case),
        videos=[processor_cases.clips()["odd"]],
        add_generation_prompt=True,
    )
    # The clip is 5 frames at 1.5 a second: steps of frames 0-1, 2-3 and 4-4.
    np.testing.assert_array_equal(made.grids, [[1, 4, 6], [3, 4, 4]])
    np.testing.assert_array_equal(made.is_video, [False, True])
    assert [len(patches) for patches in made.patches] == [24, 48]
    start, end = "<|vision_start|>", "<|vision_end|>"
    image, step = "<|image_pad|>" * 6, start + "<|video_pad|>" * 4 + end
    video = f"<0.3 seconds>{step}<1.7 seconds>{step}<2.7 seconds>{step}"
    assert ours.decode(made.tokens, keep_special=True) == (
        f"<|im_start|>user\n{start}{image}{end}Look.<|im_end|>\n"
        f"<|im_start|>user\n{start}{video}{end}And here?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (made.token_types == 1).sum() == 6
    assert (made.token_types == 2).sum() == 12


def test_images_and_videos_come_in_order_of_appearance(ours):
    parts = [{"type": kind} for kind in ("video", "image", "video")]
    clips = processor_cases.clips()
    made = ours.encode(
        [{"role": "user", "content": parts}],
        images=[processor_cases.pictures()["exact"]],
        videos=[clips["odd"], clips["to_sample"]],
        add_generation_prompt=False,
    )
    np.testing.assert_array_equal(made.grids, [[3, 4, 4], [1, 4, 6], [3, 4, 6]])
    np.testing.assert_array_equal(made.is_video, [True, False, True])


@pytest.mark.parametrize(
    "text", ["naïve 中文 🎉\n\n\ttab", "It's 123 + 4", "<think>a</think> ", ""]
)
def test_decode_returns_the_text_without_special_tokens(text, ours):
    made = encode(ours, text)
    assert ours.decode(made.tokens) == f"user\n{text}\nassistant\n"
    whole = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert ours.decode(made.tokens, keep_special=True) == whole


# Bad input


@pytest.mark.parametrize(("num_placeholders", "num_images"), [(1, 0), (0, 1), (1, 2), (2, 1)])
def test_encode_refuses_another_number_of_images(num_placeholders, num_images, ours):
    message = f"got {num_placeholders} placeholders and {num_images} images"
    with pytest.raises(errors.InputError, match=message):
        encode(ours, num_images=num_placeholders, images=[Image.new("RGB", (64, 64))] * num_images)


def test_encode_refuses_a_literal_image_token(ours):
    with pytest.raises(errors.InputError, match=r"message 1: text must not contain .*image_pad"):
        encode(ours, "what is <|image_pad|>?")
    with pytest.raises(errors.InputError, match=r"message 1: text must not contain .*image_pad"):
        encode(ours, "<|image_pad|>", images=[Image.new("RGB", (64, 64))])


def test_encode_names_the_image_that_cannot_be_cut(ours):
    given = [Image.new("RGB", (64, 64)), Image.new("RGB", (4, 1000))]
    with pytest.raises(errors.InputError, match="image 2: aspect ratio must be <= 200, got 250"):
        encode(ours, num_images=2, images=given)


def copy_folder(folder, tmp_path, name, change):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    value = json.loads((tmp_path / name).read_text())
    change(value)
    (tmp_path / name).write_text(json.dumps(value))
    return tmp_path


@pytest.mark.parametrize(
    "template", ["no placeholder", "{{ '<|image_pad|><|image_pad|>' }}", "{{ '<|video_pad|>' }}"]
)
def test_encode_refuses_a_template_that_does_not_write_the_images(template, folder, tmp_path):
    def change(value):
        value["chat_template"] = template

    made = processor.Processor.from_folder(
        copy_folder(folder, tmp_path, "chat_template.json", change)
    )
    with pytest.raises(errors.InputError, match="chat template: must write one placeholder"):
        encode(made, num_images=1, images=[Image.new("RGB", (64, 64))])


def test_a_folder_without_settings_for_videos_encodes_images_alone(folder, tmp_path):
    copy_folder(folder, tmp_path, "config.json", lambda value: None)
    (tmp_path / "video_preprocessor_config.json").unlink()
    made = processor.Processor.from_folder(tmp_path)
    encode(made, num_images=1, images=[Image.new("RGB", (64, 64))])
    with pytest.raises(errors.InputError, match=r"video 1: .* no settings for videos"):
        made.encode(
            [chat.turn("user", "", num_videos=1)],
            videos=[processor_cases.clips()["odd"]],
            add_generation_prompt=True,
        )


# The folder


def test_ids_come_from_the_folder(folder, ours):
    config = json.loads((folder / "config.json").read_text())
    tokenizer = ours.tokenizer
    assert ours.ids == processor.SpecialIds(
        image=config["image_token_id"],
        video=config["video_token_id"],
        vision_start=config["vision_start_token_id"],
        vision_end=config["vision_end_token_id"],
        pad=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        ends=tuple(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])),
    )


def test_end_tokens_of_other_places(folder, tmp_path):
    def change(value):
        value["eos_token_id"] = 7

    copy_folder(folder, tmp_path, "generation_config.json", change)
    assert processor.Processor.from_folder(tmp_path).ids.ends == (7,)
    (tmp_path / "generation_config.json").unlink()
    from_tokenizer = processor.Processor.from_folder(tmp_path)
    assert from_tokenizer.ids.ends == (from_tokenizer.tokenizer.eos_token_id,)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [9, 8]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert processor.Processor.from_folder(tmp_path).ids.ends == (8, 9)


def shrink_vocabulary(config):
    config["text_config"]["vocab_size"] = 300


def move_image_token(config):
    config["image_token_id"] = 151655


def drop_video_token(config):
    del config["video_token_id"]


def drop_vocabulary(config):
    del config["text_config"]["vocab_size"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shrink_vocabulary, "it has 340 tokens, text_config.vocab_size of config.json is 300"),
        (
            move_image_token,
            r"image_pad\|> is \[332\] in the tokenizer, image_token_id of config.json is 151655",
        ),
        (drop_video_token, "video_token_id of config.json is None"),
        (drop_vocabulary, "text_config.vocab_size must be a whole number, got None"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(change, message, folder, tmp_path):
    copy_folder(folder, tmp_path, "config.json", change)
    with pytest.raises(errors.InputError, match=message):
        processor.Processor.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model_max_length", "a", "model_max_length must be a number, got 'a'"),
        ("chat_template", "\ud800", "half a surrogate pair"),
        ("auto_map", {"AutoTokenizer": ["stranger.X", "stranger.X"]}, None),
    ],
)
def test_settings_of_the_tokenizer_are_one_line_and_choose_no_code(
    name, value, message, folder, tmp_path
):
    copy_folder(folder, tmp_path, "tokenizer_config.json", lambda v: v.update({name: value}))
    (tmp_path / "chat_template.json").unlink()
    (tmp_path / "stranger.py").write_text("raise SystemExit('ran')")
    if message is None:
        processor.Processor.from_folder(tmp_path)
        return
    with pytest.raises(errors.InputError, match=message):
        processor.Processor.from_folder(tmp_path)


@pytest.mark.parametrize("end", [340, -1, "im_end", [2, None]])
def test_an_end_token_outside_the_vocabulary_is_refused(end, folder, tmp_path):
    def change(value):
        value["eos_token_id"] = end

    copy_folder(folder, tmp_path, "generation_config.json", change)
    with pytest.raises(errors.InputError, match="end tokens must be whole numbers below 340"):
        processor.Processor.from_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.json"]
)
@pytest.mark.parametrize("is_broken", [True, False])
def test_a_missing_or_broken_file_is_named(name, is_broken, folder, tmp_path):
    copy_folder(folder, tmp_path, "tokenizer_config.json", lambda v: v.pop("chat_template"))
    (tmp_path / name).unlink()
    if is_broken:
        (tmp_path / name).write_text("{ not json")
    match = "tokenizer" if name == "tokenizer.json" else name.replace(".", r"\.")
    with pytest.raises(errors.InputError, match=match):
        processor.Processor.from_folder(tmp_path)


def test_other_patches_for_videos_than_for_images_are_refused(folder, tmp_path):
    def change(value):
        value["merge_size"] = 1

    copy_folder(folder, tmp_path, "video_preprocessor_config.json", change)
    with pytest.raises(errors.InputError, match=r"merge_size must be the same .* got \[2, 1\]"):
        processor.Processor.from_folder(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(errors.InputError, match="no such folder"):
        processor.Processor.from_folder(tmp_path / "Qwen" / "Qwen3-VL-4B-Instruct")


# No torch; the tokenizer of the tests

_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
sys.modules["torchvision"] = None
from PIL import Image
from prism_jax.data import chat, processor
made = processor.Processor.from_folder(sys.argv[1])
encoded = made.encode(
    [chat.turn("user", "Hi", num_images=1)],
    images=[Image.new("RGB", (64, 64))],
    add_generation_prompt=True,
)
print((encoded.token_types == 1).sum())
"""


def test_the_processor_works_where_torch_cannot_be_imported(folder):
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"


def test_the_tokenizer_of_the_tests_is_made_alike_every_time(tmp_path):
    made = [make_tokenizer.write(tmp_path / name) for name in "ab"]
    assert made[0] == made[1]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    larger = make_tokenizer.write(tmp_path / "c", num_merges=80)
    assert larger.vocab_size == made[0].vocab_size + 16
    assert larger.image_token_id == made[0].image_token_id + 16

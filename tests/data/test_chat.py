"""Messages, reserved tokens and the folder's chat template."""

import json

import pytest
import transformers

from prism_jax import errors
from prism_jax.data import chat, tokenizer_files
from tests import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer.write(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def render(tokenizer, messages, *, add_generation_prompt=False, template=None):
    return chat.render(
        tokenizer,
        template or tokenizer_files.CHAT_TEMPLATE,
        messages,
        add_generation_prompt=add_generation_prompt,
    )


def test_render_writes_turns_placeholders_and_no_system_turn(tokenizer):
    text = render(
        tokenizer, [chat.turn("user", "Which?", num_images=2)], add_generation_prompt=True
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == f"<|im_start|>user\n{image}{image}Which?<|im_end|>\n<|im_start|>assistant\n"


def test_render_keeps_the_system_turn_and_its_final_newline(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief.\n"},
        chat.turn("user", "Hi", num_videos=1),
        chat.turn("assistant", "Ho"),
    ]
    assert render(tokenizer, messages) == (
        "<|im_start|>system\nBe brief.\n<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Hi<|im_end|>\n"
        "<|im_start|>assistant\nHo<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no images please') }}", "{% for %}", "{{ 'a' + messages[0].content }}"],
)
def test_a_template_that_fails_is_reported(template, tokenizer):
    with pytest.raises(errors.InputError, match="chat template: cannot render"):
        render(tokenizer, [chat.turn("user", "Hi")], template=template)


def test_a_template_cannot_reach_out_of_its_sandbox(tokenizer):
    with pytest.raises(errors.InputError, match="chat template: cannot render"):
        template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
        render(tokenizer, [chat.turn("user", "Hi")], template=template)


def test_half_a_surrogate_pair_that_a_template_writes_is_named(tokenizer):
    with pytest.raises(errors.InputError, match="half a surrogate pair at character 1"):
        render(tokenizer, [chat.turn("user", "Q")], template='a{{ "\\ud800" }}')


def test_check_lists_images_and_videos_in_order():
    messages = [
        chat.turn("user", "a", num_images=1, num_videos=1),
        chat.turn("assistant", "b"),
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "image"}]},
        {"role": "user", "content": "d"},
    ]
    assert chat.check(messages) == ["image", "video", "image"]


@pytest.mark.parametrize("token", chat.RESERVED_TOKENS)
@pytest.mark.parametrize("as_parts", [True, False])
def test_a_reserved_token_in_a_text_is_refused(token, as_parts):
    text = f"see {token} here"
    message = chat.turn("user", text) if as_parts else {"role": "user", "content": text}
    with pytest.raises(errors.InputError, match=r"message 2: .* special token .* at character 4"):
        chat.check([chat.turn("system", "ok"), message])


def test_reserved_tokens_are_special_tokens_of_the_tokenizer():
    assert set(chat.RESERVED_TOKENS) <= set(tokenizer_files.SPECIAL_TOKENS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "robot", "content": "a"}], "message 1: role must be one of"),
        (["hello"], "message 1: role must be one of .* got 'hello'"),
        ([{"role": "user"}], "content must be text or a list of parts, got None"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "part must be text, image or video"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part must be text, image or video"),
        ([{"role": "user", "content": "a", "tool_calls": []}], r"got \['tool_calls'\] too"),
    ],
)
def test_malformed_messages_are_refused(messages, message):
    with pytest.raises(errors.InputError, match=message):
        chat.check(messages)


def test_load_template_prefers_the_jinja_file_then_json_then_the_tokenizer(tmp_path):
    with pytest.raises(errors.InputError, match="no chat template"):
        chat.load_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "third"}))
    assert chat.load_template(tmp_path) == "third"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "second"}))
    assert chat.load_template(tmp_path) == "second"
    (tmp_path / "chat_template.jinja").write_text("first")
    assert chat.load_template(tmp_path) == "first"


def test_load_template_takes_the_default_of_several(tmp_path):
    templates = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert chat.load_template(tmp_path) == "b"

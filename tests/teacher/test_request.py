"""What a teacher is asked: turns and pictures in their places, one hash for one question."""

import base64
import dataclasses
import io
import json

import pytest
from PIL import Image

from prism_jax.data import data_urls, images, prompts, records
from prism_jax.teacher import request
from tests import data_files

_ASKING = request.Settings(model="teacher", instruction="", options={"max_tokens": 5})


def _image(data: bytes) -> records.Image:
    return records.Image(path=None, data=data)


def _row(**changes) -> records.PromptRow:
    turns = [("user", "<image>First <image>"), ("assistant", "Yes."), ("user", "What number 0?")]
    row = records.PromptRow(
        id="a",
        source="rows",
        prompt=tuple(records.Message(role=role, content=text) for role, text in turns),
        images=tuple(_image(data_files.png(shade)) for shade in (1, 2)),
        teacher_response=None,
        teacher_caption=None,
        teacher_cot=None,
        data_source=None,
        ground_truth="0",
        equivalent_answers=(),
        extra_info={},
    )
    return dataclasses.replace(row, **changes)


def test_pictures_and_texts_of_many_turns_keep_their_places():
    body = json.loads(request.body(_row(), _ASKING))
    system, first, second, third = body["messages"]
    assert system == {"role": "system", "content": prompts.SYSTEM_PROMPT}
    kinds = [part["type"] for part in first["content"]]
    assert kinds == ["image_url", "text", "image_url"]
    urls = [part["image_url"]["url"] for part in first["content"] if "image_url" in part]
    shown = [base64.b64decode(url.partition(",")[2]) for url in urls]
    assert shown == [data_files.png(1), data_files.png(2)]
    assert second == {"role": "assistant", "content": "Yes."}
    assert third == {"role": "user", "content": "What number 0?"}
    assert (body["model"], body["max_tokens"]) == ("teacher", 5)


def test_the_published_prompt_replaces_a_rows_system_turn():
    other = records.Message(role="system", content="Answer.")
    row = _row(prompt=(other, *_row().prompt))
    assert request.student_prompt(row) == request.student_prompt(_row())
    assert request.body(row, _ASKING) == request.body(_row(), _ASKING)


def test_the_key_is_of_all_that_a_reply_depends_on_and_of_nothing_else():
    key = request.key(_row(), _ASKING, try_number=0)
    same = _row(id="b", source="other", ground_truth="1", extra_info={"a": 1})
    assert request.key(same, _ASKING, try_number=0) == key
    swapped = _row(images=_row().images[::-1])
    changed = [
        request.key(_row(), _ASKING, try_number=1),
        request.key(swapped, _ASKING, try_number=0),
        request.key(_row(prompt=_row().prompt[:1]), _ASKING, try_number=0),
        *(
            request.key(_row(), dataclasses.replace(_ASKING, **change), try_number=0)
            for change in ({"model": "x"}, {"instruction": "x"}, {"options": {"max_tokens": 6}})
        ),
    ]
    assert len({key, *changed}) == 7


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_common_formats_are_sent_byte_for_byte(name):
    data = data_files.encoded(Image.new("RGB", (8, 6), (10, 20, 30)), name)
    head, _, sent = data_urls.data_url(_image(data)).partition(",")
    assert head == f"data:image/{name.lower()};base64"
    assert base64.b64decode(sent) == data


def test_other_formats_and_turned_pictures_are_sent_as_upright_png():
    picture = Image.new("RGB", (8, 6), (10, 20, 30))
    picture.putpixel((0, 0), (200, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = data_files.encoded(picture, "PNG", exif=exif)
    for data in (data_files.encoded(picture, "BMP"), turned):
        head, _, sent = data_urls.data_url(_image(data)).partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(sent))) as shown:
            assert shown.convert("RGB").tobytes() == images.open_image(data).tobytes()
            assert shown.size == ((6, 8) if data is turned else (8, 6))
            assert shown.getexif().get(0x0112, 1) == 1

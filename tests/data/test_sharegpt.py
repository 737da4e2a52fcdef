"""Both sharegpt variants give the same rows; `dataset_info.json` renames and refuses."""

import json

import pytest

from prism_jax import errors
from prism_jax.data import records, sharegpt, sources
from tests import data_files

PLACE = records.Place(file="f.json", row=3)
MESSAGES = [
    {"role": "user", "content": "<image>Q"},
    {"role": "assistant", "content": "A"},
]
CONVERSATIONS = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]


def parse(row, columns=None):
    return sharegpt.parse(row, place=PLACE, source="s", columns=columns)


def test_both_variants_give_the_same_row():
    first = parse({"messages": MESSAGES, "images": ["a.png"], "system": "S"})
    second = parse({"conversations": CONVERSATIONS, "images": ["a.png"], "system": "S"})
    assert first == second
    assert first == records.SFTRow(
        id="f.json:3",
        source="s",
        messages=(
            records.Message(role="system", content="S"),
            records.Message(role="user", content="<image>Q"),
            records.Message(role="assistant", content="A"),
        ),
        images=(records.Image(path="a.png", data=None),),
    )


def test_a_system_turn_equals_the_system_column():
    turns = [{"role": "system", "content": "S"}, *MESSAGES]
    assert parse({"messages": turns}) == parse({"messages": MESSAGES, "system": "S"})


def test_text_and_image_parts_become_marked_text():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Q"}]
    turns = [{"role": "user", "content": parts}, MESSAGES[1]]
    assert parse({"messages": turns, "images": "a.png"}) == parse(
        {"messages": MESSAGES, "images": ["a.png"]}
    )


def test_unused_optional_columns_may_be_empty():
    row = {"messages": MESSAGES, "images": ["a.png"]}
    extra = {"videos": [], "audios": None, "tools": "[]", "system": "", "conversations": None}
    assert parse(row | extra) == parse(row)
    assert parse(row | {"tools": "[ ]\n", "functions": " null "}) == parse(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "missing_field"),
        ({"messages": MESSAGES, "conversations": CONVERSATIONS}, "missing_field"),
        ({"messages": []}, "missing_field"),
        ({"messages": "hello"}, "bad_type"),
        ({"messages": ["hello"]}, "bad_type"),
        ({"messages": [{"role": "user"}]}, "missing_field"),
        ({"messages": [{"content": "x"}]}, "missing_field"),
        ({"messages": [{"role": "user", "content": 5}]}, "bad_type"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "bad_type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "bad_role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "bad_role"),
        ({"messages": CONVERSATIONS}, "missing_field"),
        ({"messages": [{"role": "system", "content": "S"}, *MESSAGES], "system": "S"}, "bad_role"),
        ({"messages": MESSAGES, "system": 3}, "bad_type"),
        ({"messages": MESSAGES, "audios": ["v.mp3"]}, "unsupported"),
        ({"messages": MESSAGES, "tools": "[...]"}, "unsupported"),
        ({"messages": MESSAGES, "images": [5]}, "bad_type"),
        ({"messages": MESSAGES, "images": [{"path": ""}]}, "bad_type"),
        ({"messages": MESSAGES, "images": [{"bytes": "text"}]}, "bad_type"),
        ({"messages": MESSAGES, "images": ["a.png"], "image": "a.png"}, "bad_type"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not_utf8"),
        ({"messages": MESSAGES, "images": ["\ud800.png"]}, "not_utf8"),
        ({"messages": MESSAGES, "id": [1]}, "bad_type"),
    ],
)
def test_a_wrong_row_is_named(row, reason):
    with pytest.raises(records.RowError) as caught:
        parse(row)
    assert caught.value.reason == reason


def write_info(folder, entry) -> str:
    path = folder / "dataset_info.json"
    path.write_text(json.dumps({"mine": entry, "other": {}}))
    return str(path)


def test_dataset_info_renames_columns_and_tags(tmp_path):
    entry = {
        "file_name": "sub/rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "images": "pictures", "system": "rules"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"},
    }
    talk = [{"who": "me", "says": "<image>Q"}, {"who": "it", "says": "A"}]
    data_files.write_images(tmp_path / "sub", 1)
    row = {"talk": talk, "pictures": ["0.png"], "rules": "S"}
    (tmp_path / "sub" / "rows.json").write_text(json.dumps([row]))
    write_info(tmp_path, entry)
    source = sources.Source(kind="sft", path=str(tmp_path), entry="mine")
    (found,), _ = data_files.read_all(source)
    assert [(m.role, m.content) for m in found.messages] == [
        ("system", "S"),
        ("user", "<image>Q"),
        ("assistant", "A"),
    ]
    assert (found.source, found.images[0].path) == ("mine", "0.png")


def test_a_sharegpt_entry_without_tags_has_llama_factorys_defaults(tmp_path):
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "ranking": False}
    found = sharegpt.find_entry(write_info(tmp_path, entry), "mine")
    assert found.columns == sharegpt.CONVERSATIONS
    assert found.path == str(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"file_name": "a.json"}, "alpaca"),
        ({"file_name": "a.json", "formatting": "sharegpt", "ranking": True}, "ranking"),
        ({"hf_hub_url": "x/y", "formatting": "sharegpt"}, "hf_hub_url"),
        ({"formatting": "sharegpt"}, "file_name"),
        ({"file_name": "a.json", "formatting": []}, "alpaca"),
        ({"file_name": "a.json", "formatting": ["x"]}, "formatting"),
        ({"file_name": "../rows.json", "formatting": "sharegpt"}, "folder of dataset_info"),
        ({"file_name": "/etc/rows.json", "formatting": "sharegpt"}, "folder of dataset_info"),
        ({"file_name": "linked/rows.json", "formatting": "sharegpt"}, "folder of dataset_info"),
        ({"file_name": "gs://b/rows.json", "formatting": "sharegpt"}, "folder of dataset_info"),
        ({"file_name": "a\0.json", "formatting": "sharegpt"}, "folder of dataset_info"),
        ({"file_name": "a", "formatting": "sharegpt", "columns": {"audios": "v"}}, "audios"),
        ({"file_name": "a", "formatting": "sharegpt", "tags": {"user_tag": 1}}, "tags"),
        ("a.json", "mine"),
    ],
)
def test_an_entry_that_asks_for_something_else_is_refused(tmp_path, entry, named):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(errors.InputError, match=named) as caught:
        sharegpt.find_entry(write_info(folder, entry), "mine")
    assert len(str(caught.value)) < 400


def test_the_column_that_an_entry_names_is_the_only_one_that_holds_pictures(tmp_path):
    data_files.write_images(tmp_path, 1)
    row = {"conversations": CONVERSATIONS, "pics": ["0.png"], "image": "thumbnail of the page"}
    data_files.write_lines(tmp_path / "rows.jsonl", [row])
    columns = {"messages": "conversations", "images": "pics"}
    entry = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": columns, "split": None}
    source = sources.Source(kind="sft", path=write_info(tmp_path, entry), entry="mine")
    (row_read,), _ = data_files.read_all(source)
    assert row_read.images[0].path == "0.png"


def test_an_unknown_entry_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(errors.InputError, match="mine, other"):
        sharegpt.find_entry(write_info(tmp_path, {}), "yours")

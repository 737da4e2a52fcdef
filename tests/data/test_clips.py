"""Videos of rows of every kind: read, checked, measured, encoded, stored and written again."""

import dataclasses
import pathlib

import numpy as np
import pytest

from models import positions
from prism_jax import errors
from prism_jax.data import (
    build,
    clips,
    encode,
    processor,
    prompt_files,
    records,
    sharegpt_files,
    sources,
    validate,
)
from prism_jax.data import turns as turns_lib
from tests import data_files, tiny_checkpoint

FRAMES = [f"{i}.png" for i in range(5)]
LIST = records.Video(
    files=tuple(records.Image(path=name, data=None) for name in FRAMES),
    is_list=True,
    frames_per_second=2.0,
)
FILE = records.Video(files=(records.Image(path="v.mp4", data=None),), is_list=False)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return processor.Processor.from_folder(
        tiny_checkpoint.write(tmp_path_factory.mktemp("clips") / "model")
    )


@pytest.mark.parametrize(
    ("row", "videos"),
    [
        ({"videos": ["v.mp4"]}, (FILE,)),
        ({"videos": "v.mp4"}, (FILE,)),
        ({"video": "v.mp4"}, (FILE,)),
        ({"video": {"url": "v.mp4", "type": "video"}}, (FILE,)),
        ({"videos": [{"video": "v.mp4"}, FRAMES]}, (FILE, LIST)),
        ({"video": FRAMES}, (LIST,)),
        ({"videos": [{"video": FRAMES, "sample_fps": None}]}, (LIST,)),
        (
            {"videos": [{"video": FRAMES, "sample_fps": 4}, {"path": "v.mp4", "fps": 1}]},
            (
                dataclasses.replace(LIST, frames_per_second=4.0),
                dataclasses.replace(FILE, sampled_per_second=1.0),
            ),
        ),
        (
            {"videos": [{"bytes": b"x", "video": [], "sample_fps": float("nan")}]},
            (dataclasses.replace(FILE, files=(records.Image(path=None, data=b"x"),)),),
        ),
        ({"videos": "[]", "video": " null "}, ()),
    ],
)
def test_a_row_names_its_videos_in_each_of_these_forms(row, videos):
    assert clips.of_row(row) == videos


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"videos": ["a"], "video": "b"}, "bad_type", "not both"),
        ({"videos": [7]}, "bad_type", r"videos\[0\] must be a path"),
        ({"videos": [[7]]}, "bad_type", r"videos\[0\]\[0\] must be a path"),
        ({"videos": [[]]}, "bad_type", r"videos\[0\] has no frames"),
        ({"videos": [{}]}, "bad_type", "one of video, url and bytes or path"),
        ({"videos": [{"video": "a", "path": "b"}]}, "bad_type", "one of video"),
        ({"videos": [{"video": "a", "nframes": 4}]}, "unsupported", "nframes"),
        ({"videos": [{"video": "a", "fps": 0}]}, "bad_type", r"fps must be .* from 0\.001"),
        ({"videos": [{"video": "a", "fps": True}]}, "bad_type", "fps"),
        ({"videos": [{"video": "a", "sample_fps": 2}]}, "unsupported", "a file has its own"),
        ({"videos": [{"video": "a", "type": "image"}]}, "bad_type", "type must be video"),
        ({"videos": [[{"image": "a", "max_pixels": 9999}]]}, "unsupported", "cannot set a size"),
    ],
)
def test_a_wrong_video_is_named(row, reason, message):
    with pytest.raises(records.RowError, match=message) as caught:
        clips.of_row(row)
    assert caught.value.reason == reason


def test_turns_name_their_videos_and_agree_with_the_column():
    parts = [{"type": "video", "video": FRAMES}, {"type": "text", "text": "Q"}]
    turns = turns_lib.read(
        [{"role": "user", "content": parts}],
        "prompt",
        role_tag="role",
        content_tag="content",
        roles={"user": "user"},
    )
    assert (turns.messages[0].content, turns.videos) == ("<video>Q", (LIST,))
    assert clips.of_marks(turns.videos, ()) == clips.of_marks((None,), (LIST,)) == (LIST,)
    assert clips.of_marks(turns.videos, (LIST,)) == (LIST,)
    for named, column, reason in (
        ((LIST,), (FILE,), "image_mismatch"),
        ((LIST, None), (), "placeholders"),
    ):
        with pytest.raises(records.RowError) as caught:
            clips.of_marks(named, column)
        assert caught.value.reason == reason


# Rows of each kind


def write_files(folder: pathlib.Path) -> None:
    data_files.write_images(folder, 5)
    for kind, name in (("mp4", "v.mp4"), ("GIF", "v.gif")):
        (folder / name).write_bytes(data_files.video(kind, num_frames=13, frames_per_second=5))


def rows_of(kind: str) -> list[dict]:
    """Return a row with a picture and two videos, and one with a list of frames."""
    if kind == "sft":
        turn = {"role": "user", "content": "<video><image>And <video>?"}
        answer = {"role": "assistant", "content": "A"}
        two = {"messages": [turn, answer], "images": ["0.png"], "videos": ["v.mp4", "v.gif"]}
        return [
            two,
            {"messages": [{"role": "user", "content": "<video>Q"}, answer], "video": FRAMES},
        ]
    if kind == "pairs":
        row = data_files.pair_row(0, video="v.gif")
        return [row, data_files.pair_row(1, image=None, video={"video": FRAMES, "sample_fps": 4})]
    return [
        {"prompt": "Q", "answer": "1", "image": "0.png", "videos": ["v.mp4", {"path": "v.gif"}]},
        {"prompt": "Q", "answer": "2", "videos": [{"video": FRAMES, "fps": 1}]},
    ]


def turns_of(row: records.Row) -> tuple[records.Message, ...]:
    if isinstance(row, records.PairRow):
        return (records.Message(role="user", content=row.prompt),)
    return row.messages if isinstance(row, records.SFTRow) else row.prompt


@pytest.mark.parametrize("kind", records.KINDS)
def test_files_and_the_folder_built_from_them_give_the_same_rows_with_videos(tmp_path, kind, words):
    write_files(tmp_path)
    path = data_files.write_lines(tmp_path / "rows.jsonl", rows_of(kind))
    source = sources.Source(kind=kind, path=str(path))
    rows, report = data_files.read_all(source)
    built = str(tmp_path / "built")
    build.build(source, built, validate.Rules())
    again, built_report = data_files.read_all(
        sources.Source(kind=kind, path=built), count_tokens=lambda row: 1, max_tokens=9
    )
    assert again == rows
    assert report.digests == built_report.digests
    assert report.has_videos
    videos = [video for row in rows for video in records.get_videos(row)]
    assert {(video.num_frames, video.is_list) for video in videos} == {(13, False), (5, True)}
    assert {video.frames_per_second for video in videos if not video.is_list} == {5.0}
    for row in rows:
        media = records.get_media(row)
        example = encode.example(turns_of(row), media, words, add_generation_prompt=True)
        size = encode.measure(turns_of(row), media, words, add_generation_prompt=True)
        assert (size.tokens, size.patches, size.images) == (
            len(example.tokens),
            sum(map(len, example.pixels)),
            sum(t for t, _, _ in example.grids),
        )
    text = words.decode(example.tokens, keep_special=True)
    # Five frames at 2, 4 and (sampled at 1 from 2: the least number of 4) 2 per second.
    times = {"sft": (0.25, 1.25, 2.0), "pairs": (0.125, 0.625, 1.0), "prompts": (0.25, 1.75)}
    for time in times[kind]:
        assert f"<{time:.1f} seconds><|vision_start|><|video_pad|>" in text
    assert text.count(" seconds>") == len(times[kind])


@pytest.mark.torch
def test_positions_of_a_rows_pictures_and_videos_equal_hugging_face(tmp_path, words):
    import torch
    from transformers.models.qwen3_vl import configuration_qwen3_vl, modeling_qwen3_vl

    write_files(tmp_path)
    path = data_files.write_lines(tmp_path / "rows.jsonl", rows_of("sft"))
    (row, _), _ = data_files.read_all(sources.Source(kind="sft", path=str(path)))
    example = encode.example(
        row.messages, records.get_media(row), words, add_generation_prompt=False
    )
    ours = positions.text_positions(example.token_types, example.grids, spatial_merge_size=2)
    config = configuration_qwen3_vl.Qwen3VLConfig(
        text_config={"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2},
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "num_heads": 2,
            "deepstack_visual_indexes": [],
        },
    )
    with torch.device("meta"):
        model = modeling_qwen3_vl.Qwen3VLModel(config)
    grids = torch.tensor(example.grids)
    is_image = torch.tensor([t == 1 for t, _, _ in example.grids])
    theirs, _ = model.get_rope_index(
        torch.tensor(example.tokens)[None].long(),
        torch.tensor(example.token_types)[None],
        image_grid_thw=grids[is_image],
        video_grid_thw=grids[~is_image],
    )
    assert is_image.tolist() == [False, True, False]
    np.testing.assert_array_equal(ours, theirs[:, 0].numpy())


def reason_of(tmp_path, row) -> str:
    """Return why a demonstration with a video is left out, with its message."""
    turn = {"role": "user", "content": "<video>Q"}
    row = {"messages": [turn, {"role": "assistant", "content": "A"}]} | row
    path = data_files.write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(errors.InputError) as caught:
        data_files.read_all(sources.Source(kind="sft", path=str(path)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_damaged_video_is_refused_in_one_line_like_a_damaged_picture(tmp_path):
    write_files(tmp_path)
    (tmp_path / "cut.gif").write_bytes((tmp_path / "v.gif").read_bytes()[:200])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "wide.png").write_bytes(data_files.png(size=(41, 30)))
    for video, reason in (
        ("cut.gif", "bad_video: video cut.gif: cannot be decoded"),
        ("text.mp4", "bad_video: video text.mp4: not a video"),
        ("none.mp4", "image_missing: no file at 'none.mp4'"),
        ("../v.mp4", "unsafe_path: "),
        ("https://a/v.mp4", "unsafe_path: "),
        ("0.png", "bad_video: video 0.png: must have at least 2 frames, got 1"),
        (["0.png"], "bad_video: video 0.png: must have at least 2 frames, got 1"),
        (["0.png", "wide.png"], r"frames must have one size, got (40, 30) and (41, 30) in frame 2"),
        (["0.png", "text.mp4"], "bad_image: image text.mp4: not an image"),
    ):
        assert reason in reason_of(tmp_path, {"video": video})
    assert "1 <video>, but 2 videos" in reason_of(tmp_path, {"videos": ["v.gif", "v.mp4"]})
    answer = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<video>"}]
    assert "<video> stands outside" in reason_of(tmp_path, {"messages": answer})


def test_written_rows_with_videos_are_read_again(tmp_path):
    write_files(tmp_path)
    path = data_files.write_lines(tmp_path / "rows.jsonl", rows_of("prompts"))
    rows, _ = data_files.read_all(sources.Source(kind="prompts", path=str(path)))
    prompt_files.write(
        tmp_path / "again.parquet", rows, infos=[{}, {}], has_scales=False, has_videos=True
    )
    again, _ = data_files.read_all(sources.Source(kind="prompts", path=f"{tmp_path}/again.parquet"))
    assert [records.digest(row) for row in again] == [records.digest(row) for row in rows]

    path = data_files.write_lines(tmp_path / "sft.jsonl", rows_of("sft"))
    rows, _ = data_files.read_all(sources.Source(kind="sft", path=str(path)))
    (tmp_path / "out").mkdir()
    sharegpt_files.write(tmp_path / "out" / "again.json", rows)
    again, _ = data_files.read_all(
        sources.Source(kind="sft", path=str(tmp_path / "out"), entry="again")
    )
    assert [records.digest(row) for row in again] == [records.digest(row) for row in rows]

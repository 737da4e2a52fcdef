"""Frames, times and patches of videos, from files of every format and from lists of pictures."""

import dataclasses
import io
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image
from transformers import video_utils

from prism_jax import errors
from prism_jax.data import image_settings, images, records, video_files, videos
from tests import data_files

VIDEO = image_settings.VideoSettings(
    patch_size=16,
    merge_size=2,
    temporal_patch_size=2,
    min_pixels=64 * 64,
    max_pixels=10 * 128 * 128,
    image_mean=(0.5, 0.4, 0.3),
    image_std=(0.5, 0.25, 0.2),
    frames_per_second=2,
    min_frames=4,
    max_frames=8,
    max_frame_tokens=None,
)


def clip(num_frames, *, frames_per_second=2.0, is_sampled=True, size=(64, 64)):
    frames = [Image.new("RGB", size, (i, i, i)) for i in range(num_frames)]
    return videos.Video(frames=frames, frames_per_second=frames_per_second, is_sampled=is_sampled)


def test_an_odd_video_repeats_its_last_frame_and_averages_times():
    made, seconds = videos.patches(clip(5), VIDEO)
    assert made.grid == (3, 4, 4)
    # Inside a patch the frame changes slower than the row: [C, frame, row, column].
    frames = made.pixels.reshape(3, 16, 3, 2, 256)
    np.testing.assert_array_equal(frames[:, 0, 0, :, 0], [[0, 1], [2, 3], [4, 4]])
    assert seconds == [0.25, 1.25, 2.0]


def test_a_video_is_sampled_at_the_rate_of_the_settings():
    # 13 frames at 5 a second last 2.6 s: 5 frames, 3 apart.
    made, seconds = videos.patches(clip(13, frames_per_second=5.0, is_sampled=False), VIDEO)
    frames = made.pixels.reshape(3, 16, 3, 2, 256)[:, 0, 0, :, 0]
    np.testing.assert_array_equal(frames, [[0, 3], [6, 9], [12, 12]])
    np.testing.assert_allclose(seconds, [0.3, 1.5, 2.4])


def test_sampling_keeps_the_limits_of_the_number_of_frames():
    def sampled(num_frames):
        return len(videos.sample_frames(num_frames, frames_per_second=24.0, settings=VIDEO))

    assert [sampled(n) for n in (3, 4, 24, 72, 1000)] == [3, 4, 4, 6, 8]


def test_the_cap_of_a_frame_lowers_its_size():
    capped = dataclasses.replace(VIDEO, max_frame_tokens=4, min_pixels=1024)
    assert videos.frame_size(4, 128, 128, VIDEO) == (128, 128)
    assert videos.frame_size(4, 128, 128, capped) == (64, 64)


def test_videos_that_cannot_be_cut_are_refused():
    mixed = clip(2)
    mixed = dataclasses.replace(mixed, frames=[*mixed.frames, Image.new("RGB", (32, 32))])
    for video, message in (
        (clip(1), "at least 2 frames, got 1"),
        (clip(0), "got 0 frames"),
        (clip(4, frames_per_second=0.0), r"at 0\.0 a second"),
        (mixed, "one size"),
        (clip(4, size=(2, 2000)), "aspect ratio"),
    ):
        with pytest.raises(errors.InputError, match=f"video 3: .*{message}"):
            videos.patches(video, VIDEO, name="video 3")


def test_video_size_by_hand():
    settings = dataclasses.replace(VIDEO, min_pixels=4 * 64 * 64, max_pixels=4 * 128 * 128)
    assert videos.frame_size(4, 96, 128, settings) == (96, 128)
    # Twice the frames: sides smaller by sqrt(1.5), 78 and 104, cut to whole tokens.
    assert videos.frame_size(8, 96, 128, settings) == (64, 96)
    # Half the needed pixels: sides larger by 2, rounded up to whole tokens.
    assert videos.frame_size(4, 32, 32, settings) == (64, 64)
    # Three frames count as four for the bound, as three for the scale: sqrt(16384 / 3072) = 2.3.
    assert videos.frame_size(3, 32, 32, settings) == (96, 96)
    # A side below one token is first scaled up to one: 8 x 24 becomes 32 x 96.
    assert videos.frame_size(4, 8, 24, settings) == (64, 128)


# Files

FORMATS = ("GIF", "WEBP", "PNG", "mp4", "matroska", "webm", "avi")


def measured(data, **limits):
    return video_files.measure(data, "v", limit_pixels=10**6, **limits)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_any_format_has_its_frames_in_order_at_its_rate(kind):
    data = data_files.video(kind, num_frames=7, frames_per_second=5)
    assert measured(data) == (7, 5.0, (64, 48))
    stored = records.Video(
        files=(records.Image(path="v", data=data),),
        is_list=False,
        frames_per_second=5.0,
        num_frames=7,
    )
    opened = video_files.open_stored(stored)
    # Each frame is brighter than the one before; the second read of an earlier one starts anew.
    shades = [int(np.asarray(opened.frames[index]).mean()) for index in (0, 2, 3, 6, 6, 1)]
    assert len(opened.frames) == 7
    assert np.abs(np.array(shades) - [20, 80, 110, 200, 200, 50]).max() <= 4


def test_a_stored_video_that_is_not_as_it_was_checked_is_refused(monkeypatch):
    file = records.Image(path="v", data=data_files.video("GIF", num_frames=3, frames_per_second=5))
    stored = records.Video(files=(file,), is_list=False, frames_per_second=5.0, num_frames=4)
    frames = video_files.open_stored(stored).frames
    for _ in range(2):
        with pytest.raises(errors.InputError, match=r"video v: must have 4 frames .*, got 3"):
            list(frames)
    monkeypatch.setattr(images, "LIMIT_PIXELS", 64 * 48 - 1)
    with pytest.raises(errors.InputError, match="at most 3071 pixels, got 64 x 48"):
        video_files.open_stored(stored).frames[0]
    known = dataclasses.replace(file, width_pixels=64, height_pixels=48)
    stored = dataclasses.replace(stored, files=(known,))
    assert video_files.open_stored(stored).frames[0].size == (64, 48)


def test_a_container_is_read_as_hugging_face_reads_it(tmp_path):
    data = data_files.video("mp4", num_frames=26, frames_per_second=10)
    path = tmp_path / "v.mp4"
    path.write_bytes(data)
    num_frames, rate, (width, height) = measured(data)
    used = videos.plan(
        num_frames,
        height,
        width,
        VIDEO,
        frames_per_second=rate,
        is_sampled=False,
        sampled_per_second=None,
    )
    theirs, metadata = video_utils.read_video_pyav(str(path), lambda metadata: used.indices)
    assert (metadata.total_num_frames, metadata.fps) == (num_frames, rate)
    stored = records.Video(
        files=(records.Image(path=None, data=data),),
        is_list=False,
        frames_per_second=rate,
        num_frames=num_frames,
    )
    frames = video_files.open_stored(stored).frames
    np.testing.assert_array_equal([np.asarray(frames[i]) for i in used.indices.tolist()], theirs)


def test_a_frame_without_a_time_is_shown_for_100_milliseconds():
    assert measured(data_files.video("GIF", num_frames=4, frames_per_second=None))[1] == 10.0


def test_the_still_picture_of_an_animated_png_is_no_frame():
    frames = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(4)]
    options = {"save_all": True, "append_images": frames[1:], "duration": 500}
    data = data_files.encoded(frames[0], "PNG", default_image=True, **options)
    assert measured(data) == (3, 2.0, (8, 8))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_is_refused(kind):
    data = data_files.video(kind, num_frames=9, frames_per_second=5)
    for part in (0.35, 0.7):
        with pytest.raises(errors.InputError, match=r"^video v: .*(cut|decoded|truncated)"):
            measured(data[: int(len(data) * part)])


def test_files_that_are_no_videos_and_those_beyond_a_limit_are_one_line(monkeypatch):
    gif = data_files.video("GIF", num_frames=5, frames_per_second=5)
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    for data, message in (
        (b"", "the file is empty"),
        (b"text", "not a video"),
        (playlist, "not a video"),
        (b"\0\0\0\x0cftypmp42" + playlist, "cut|decoded"),
        (data_files.png(), "at least 2 frames, got 1"),
        (data_files.encoded(Image.new("RGB", (9, 9)), "JPEG"), "not a video"),
        (_sound(), "no video stream"),
    ):
        with pytest.raises(errors.InputError, match=f"^video v: .*({message})"):
            measured(data)
    with pytest.raises(errors.InputError, match="at most 3071 pixels, got 64 x 48"):
        video_files.measure(gif, "v", limit_pixels=64 * 48 - 1)
    monkeypatch.setattr(video_files, "LIMIT_PIXELS", 4 * 64 * 48)
    with pytest.raises(errors.InputError, match="in all frames, got more in 5 frames of 64 x 48"):
        measured(gif)
    monkeypatch.setattr(video_files, "LIMIT_FRAMES", 2)
    with pytest.raises(errors.InputError, match="at most 2 frames"):
        measured(gif)


def _sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def test_without_the_extra_a_container_names_it_and_a_gif_needs_none():
    mp4 = data_files.video("mp4", num_frames=4, frames_per_second=5)
    gif = data_files.video("GIF", num_frames=4, frames_per_second=5)
    program = f"""
import sys
sys.modules["av"] = None
from prism_jax import errors
from prism_jax.data import video_files
assert video_files.measure({gif!r}, "a", limit_pixels=10**6)[0] == 4
try:
    video_files.measure({mp4!r}, "b.mp4", limit_pixels=10**6)
except errors.InputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("video b.mp4: ") and "'prism-jax[video]'" in done.stdout

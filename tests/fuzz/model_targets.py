"""Files of a model folder: weights, sizes, processor settings, tokenizer, chat template."""

import collections
import contextlib
import json
import pathlib
import random
import struct

from models.hf import files as hf_files
from prism_jax import errors
from prism_jax.checkpoints import pretrained
from prism_jax.data import chat, image_settings, processor
from tests import hf_checkpoints, make_tokenizer
from tests.fuzz import mutations
from tests.fuzz.target import Target, require

_EMBED = "model.language_model.embed_tokens.weight"
_SHARD = "model-00001-of-00001.safetensors"
_HEADER = {
    "__metadata__": {"format": "pt"},
    _EMBED: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
}
_BODY = bytes(28)
_WORDS = (b"{", b"[", b'"', b"\\ud800", b"1e9", b"-1")
_OTHER_FORMATS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x05cposix\nsystem\n", b"")
_SHARD_NAMES = (
    _SHARD, "../model.safetensors", "/etc/passwd", "x.bin", "a/b.safetensors", "..", "",
    f"{_SHARD}\0", "\\x.safetensors", "link.safetensors", ".safetensors",
)  # fmt: skip


class Weights(Target):
    """Headers and the index of safetensors; nothing outside the folder is opened."""

    weight = 3.0
    num_short = 80

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        config = hf_checkpoints.config_json("dense", tied=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "link.safetensors").symlink_to("/proc/self/maps")

    def make(self, rng: random.Random) -> list:
        """Return which file is damaged, and its bytes."""
        if rng.random() < 0.75:
            return ["model.safetensors", self._file(rng)]
        names = {_EMBED: rng.choice(_SHARD_NAMES), "b": rng.choice(_SHARD_NAMES)}
        index = {"metadata": {"total_size": 28}, "weight_map": names}
        return [
            "model.safetensors.index.json",
            mutations.json_file(rng, index, times=(0, 1, 2)),
        ]

    def _file(self, rng: random.Random) -> bytes:
        header = json.dumps(mutations.tree(rng, _HEADER, times=rng.choice((1, 1, 2, 3)))).encode()
        if rng.random() < 0.5:
            header = mutations.damaged(rng, json.dumps(_HEADER).encode(), words=_WORDS)
        if rng.random() < 0.001:
            header = b'{"a":' * 50000
        length = len(header)
        if rng.random() < 0.2:
            length = rng.choice((0, 1, 2**40, 2**63, 2**64 - 1, length + 7))
        data = struct.pack("<Q", length) + header + _BODY
        if rng.random() < 0.2:
            data = mutations.damaged(rng, data)
        return rng.choice(_OTHER_FORMATS) + data if rng.random() < 0.05 else data

    def run(self, given: list) -> None:
        """List the tensors, and look at the folder as the commands do."""
        name, data = given
        for file in ("model.safetensors", "model.safetensors.index.json", _SHARD):
            (self.folder / file).unlink(missing_ok=True)
        if name != "model.safetensors":
            header = json.dumps(_HEADER).encode()
            (self.folder / _SHARD).write_bytes(struct.pack("<Q", len(header)) + header + _BODY)
        (self.folder / name).write_bytes(data)
        try:
            tensors = hf_files.list_tensors(self.folder, check_manifest=True)
        except ValueError:  # `models` knows no InputError; `Source.of` makes it one
            tensors = {}
        for tensor in tensors.values():
            require(tensor.file in ("model.safetensors", _SHARD), "a file outside the folder")
        pretrained.Source.of(self.folder)


class Configs(Target):
    """`config.json` of every kind of model."""

    weight = 4.0
    num_short = 120

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self._seeds = [
            hf_checkpoints.config_json(kind, tied=tied)
            for kind in hf_checkpoints.KINDS
            for tied in (True, False)
        ]

    def make(self, rng: random.Random) -> bytes:
        """Return a file's bytes."""
        return mutations.json_file(rng, rng.choice(self._seeds))

    def run(self, given: bytes) -> None:
        """Read the model's sizes."""
        (self.folder / "config.json").write_bytes(given)
        pretrained.config_of(self.folder)


class Settings(Target):
    """Files of image and video processors, and the places of a chat template."""

    weight = 4.0
    num_short = 80
    _own = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        make_tokenizer.write_config(folder, make_tokenizer.write(folder))
        names = (*self._own, "tokenizer_config.json")
        self.seeds = {name: json.loads((folder / name).read_text()) for name in names}
        self.seeds["processor_config.json"] = {
            "image_processor": self.seeds["preprocessor_config.json"],
            "video_processor": self.seeds["video_preprocessor_config.json"],
        }

    def make(self, rng: random.Random) -> list:
        """Return a file's name and bytes."""
        name = rng.choice(list(self.seeds))
        return [name, mutations.json_file(rng, self.seeds[name])]

    def run(self, given: list) -> None:
        """Read the folder with this file in the place of its own."""
        name, data = given
        path = self.folder / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(data)
        try:
            self.read()
        finally:
            path.unlink()
            if before is not None:
                path.write_bytes(before)

    def read(self) -> None:
        """Read what the files say."""
        for function in (
            image_settings.ImageSettings.from_folder,
            image_settings.VideoSettings.from_folder,
            image_settings.has_video,
            chat.load_template,
        ):
            with contextlib.suppress(errors.InputError):
                function(self.folder)


class Tokenizers(Settings):
    """A whole processor with a damaged tokenizer, as it encodes a chat."""

    weight = 2.0
    num_short = 12

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        for name in ("tokenizer.json", "config.json", "generation_config.json"):
            self.seeds[name] = json.loads((folder / name).read_text())
        self._names = [
            *["tokenizer.json"] * 6, *["tokenizer_config.json"] * 3,
            "config.json", "generation_config.json", "chat_template.json",
        ]  # fmt: skip

    def make(self, rng: random.Random) -> list:
        """Return a file's name and bytes, mostly of tokenizer.json."""
        name = rng.choice(self._names)
        return [name, mutations.json_file(rng, self.seeds[name])]

    def read(self) -> None:
        """Encode a turn."""
        words = processor.Processor.from_folder(self.folder)
        words.encode([{"role": "user", "content": "Hi é"}], add_generation_prompt=True)


class Templates(Target):
    """Chat templates, which are programs in a sandbox; an endless one is documented as such."""

    weight = 1.0
    num_short = 40
    is_slow_allowed = True
    _pieces = (
        "{{ messages[0].__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ 'a' * 10000000 }}",
        "{% for i in range(100000) %}x{% endfor %}", "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y') }}", "{% generation %}", "{% include 'x' %}", "{{ 1/0 }}",
        "{% import 'os' as os %}", "{{ cycler.__init__.__globals__ }}", "{{ messages | tojson }}",
        "{{ (1).bit_length() }}", "{{ messages.append(1) }}", "{% set x = messages.pop() %}", "{%",
        "%}", "{{", "}}", "{#", "\0", "{{ 9**9999 }}", "{{ '%s' % messages }}", "{{ lipsum(3) }}",
        "{{ '{0.__class__}'.format(messages) }}", "{{ messages.__reduce_ex__(2) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ self._TemplateReference__context }}",
    )  # fmt: skip

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        make_tokenizer.write_config(folder, make_tokenizer.write(folder))
        words = processor.Processor.from_folder(folder)
        self._tokenizer, self._seed = words.tokenizer, words.template
        self.counts: collections.Counter[str] = collections.Counter()

    def make(self, rng: random.Random) -> str:
        """Return a template."""
        text = mutations.text(rng, self._seed, self._pieces)
        if rng.random() < 0.5:
            text = mutations.damaged(rng, text.encode()).decode("utf-8", "replace")
        return text

    def run(self, given: str) -> None:
        """Render a turn with a picture."""
        turns = [chat.turn("user", "hi", num_images=1)]
        text = chat.render(self._tokenizer, given, turns, add_generation_prompt=True)
        text.encode()
        require(turns == [chat.turn("user", "hi", num_images=1)], "the template changed the turns")
        self.counts["rendered"] += 1

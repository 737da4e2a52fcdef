"""Read a Hugging Face `config.json` key by key, so that no setting is ignored."""

import math
from collections.abc import Mapping
from typing import Any

# Keys without an effect here: bookkeeping of the library or tool that wrote the file. The width of
# sliding windows has none because `use_sliding_window` must be false.
_BOOKKEEPING = frozenset(
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal _auto_class "
    "_commit_hash _experts_implementation _experts_implementation_internal _name_or_path "
    "add_cross_attention architectures attn_implementation auto_map bad_words_ids "
    "begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size "
    "decoder_start_token_id diversity_penalty do_sample dtype early_stopping "
    "encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range "
    "is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty max_length "
    "max_new_tokens max_position_embeddings max_window_layers min_length model_max_length "
    "model_name model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences "
    "output_attentions output_hidden_states output_logits output_router_logits output_scores "
    "pad_token_id padding_side prefix problem_type pruned_heads remove_invalid_values "
    "repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id "
    "sliding_window suppress_tokens task_specific_params temperature tf_legacy_loss "
    "tokenizer_class tokenizer_padding_side top_k top_p torch_dtype torchscript "
    "transformers.js_config transformers_version transformers_weights trust_remote_code typical_p "
    "use_bfloat16 use_cache".split()
)
# The keys of a tool begin with its name.
_TOOLS = ("unsloth_", "llamafactory_", "axolotl_", "swift_", "trl_")

# Keys with a single implemented value.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "norm_topk_prob": (True,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "use_sliding_window": (False,),
    "tie_encoder_decoder": (False,),
}

# Larger than any existing model: more layers are an error in the file, and building them would take
# unbounded memory and time.
MAX_LAYERS = 1024
_MAX_INTEGER = 2**31 - 1


class Reader:
    """A JSON object that is read key by key; `finish` refuses keys that were never read.

    null means the same as an absent key.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = {key: value for key, value in values.items() if value is not None}
        self.where = where
        self.seen = set(_BOOKKEEPING)
        for key, allowed in _FIXED.items():
            self.fixed(key, allowed)
        self.seen.add("quantization_config")
        if self.values.get("quantization_config"):
            raise ValueError(
                f"{where}.quantization_config: quantized weights are not read; dequantize the "
                "model and save it in bfloat16 first"
            )

    def fixed(self, key: str, allowed: tuple[Any, ...]) -> None:
        self.seen.add(key)
        if key in self.values and self.values[key] not in allowed:
            raise ValueError(
                f"{self.where}.{key} = {self.values[key]!r:.80} is not implemented, "
                f"only {allowed[0]!r} is"
            )

    def get(self, *keys: str, default: Any = None) -> Any:
        """Return the value of the first existing key; without a default one of them must exist."""
        self.seen.update(keys)
        for key in keys:
            if key in self.values:
                return self.values[key]
        if default is None:
            raise ValueError(f"{self.where}.{keys[0]} is missing")
        return default

    def part(self, *keys: str, default: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Return a JSON object."""
        value = self.get(*keys, default=default)
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.where}.{keys[0]} must be a JSON object, got {value!r:.80}")
        return value

    def integer(
        self, *keys: str, default: int | None = None, least: int = 1, most: int = _MAX_INTEGER
    ) -> int:
        """Return a whole number between two bounds."""
        return integer(
            self.get(*keys, default=default), f"{self.where}.{keys[0]}", least=least, most=most
        )

    def number(self, *keys: str, default: float | None = None, above: float = 0.0) -> float:
        """Return a finite number greater than `above`."""
        return number(self.get(*keys, default=default), f"{self.where}.{keys[0]}", above=above)

    def flag(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        self.seen.add(key)
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}.{key} must be true or false, got {value!r:.80}")
        return value

    def finish(self) -> None:
        unread = {
            key: value
            for key, value in self.values.items()
            if key not in self.seen and not key.startswith(_TOOLS)
        }
        if unread:
            raise ValueError(
                f"{self.where} holds settings that are not implemented: {unread!s:.500}"
            )


def integer(value: Any, where: str, *, least: int = 1, most: int = _MAX_INTEGER) -> int:
    """Return a whole number between two bounds; true and 3.0 are not whole numbers."""
    if type(value) is not int or not least <= value <= most:
        shown = value if type(value) is not int or abs(value) < 10**20 else "a longer number"
        raise ValueError(
            f"{where} must be a whole number between {least} and {most}, got {shown!r:.80}"
        )
    return value


def number(value: Any, where: str, *, above: float = 0.0) -> float:
    """Return a finite number greater than `above` as float; true is not a number."""
    is_number = type(value) is float or (type(value) is int and abs(value) <= _MAX_INTEGER)
    if not is_number or not math.isfinite(value) or not value > above:
        raise ValueError(f"{where} must be a finite number above {above:g}, got {value!r:.40}")
    return float(value)


def integers(value: Any, where: str, *, least: int = 0) -> tuple[int, ...]:
    """Return a list of whole numbers."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} must be a list of whole numbers, got {value!r:.80}")
    return tuple(integer(item, where, least=least) for item in value)


def single(value: Any, where: str) -> int:
    """Return a size that Hugging Face writes as an int or as a list of equal ints."""
    if isinstance(value, list | tuple):
        sides = set(integers(value, where, least=1))
        if len(sides) != 1:
            raise ValueError(f"{where} = {value!s:.80} is not implemented: sides must be equal")
        return sides.pop()
    return integer(value, where)

"""Read a Hugging Face `config.json` key by key, so that no setting is passed over unread."""

from collections.abc import Mapping
from typing import Any

# Keys that change nothing here: bookkeeping of the library that wrote the file.
_BOOKKEEPING = frozenset(
    "_attn_implementation_autoset _name_or_path add_cross_attention architectures bad_words_ids "
    "begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size "
    "decoder_start_token_id diversity_penalty do_sample dtype early_stopping "
    "encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder "
    "is_encoder_decoder label2id length_penalty max_length max_position_embeddings "
    "max_window_layers min_length model_type no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_attentions output_hidden_states output_router_logits "
    "output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values "
    "repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id "
    "suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p "
    "torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache".split()
)

# Keys that must have one value, the one that is implemented.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "norm_topk_prob": (True,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "tie_encoder_decoder": (False,),
}


class Reader:
    """Read one JSON object key by key; `finish` lists every key that nobody read."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where
        self.seen = set(_BOOKKEEPING)
        for key, allowed in _FIXED.items():
            self.fixed(key, allowed)

    def fixed(self, key: str, allowed: tuple[Any, ...]) -> None:
        self.seen.add(key)
        if key in self.values and self.values[key] not in allowed:
            raise ValueError(
                f"{self.where}.{key} = {self.values[key]!r} is not implemented, "
                f"only {allowed[0]!r} is"
            )

    def get(self, *keys: str, default: Any = None) -> Any:
        """Return the first of `keys` that is there; without a default one of them must be."""
        self.seen.update(keys)
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        if default is None:
            raise ValueError(f"{self.where}.{keys[0]} is missing")
        return default

    def finish(self) -> None:
        unread = {k: v for k, v in self.values.items() if k not in self.seen}
        if unread:
            raise ValueError(f"{self.where} holds settings that are not implemented: {unread}")


def single(value: Any, where: str) -> int:
    """Return a size that Hugging Face allows to be an int or a list of equal ints."""
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise ValueError(f"{where} = {value} is not implemented: sides must be equal")
        return int(value[0])
    return int(value)

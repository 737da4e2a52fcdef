"""Architectures of Qwen3-VL in Flax NNX: arrays in, arrays out.

Dimension letters, used in shapes and einsum strings everywhere, each for one thing:
  A kinds of sequence     whole, caption and cot, see `kinds`
  B rows                  of tokens
  C patch channels        numbers of one patch
  D embed
  E experts
  F mlp
  G N / K                 query heads that share a kv head
  H head dim
  I, O inputs, outputs    of a linear map
  J runs of a row         its sequences or images, and its padding
  K kv heads
  L layers
  M microbatches
  N query heads
  P patches               of a vision row
  Q merged tokens         of a vision row: squares of patches
  R responses             per prompt
  S key time
  T query time            tokens of a row
  U sequences of a row    places for segments, in a policy's rows for responses
  V vocab
  W vision rows           of patches
  X experts               per token
  Y DeepStack levels      tapped blocks of the vision tower
  Z response tokens       of a row, side by side
Grid sizes are lower case: t h w. Any other size is a word, as in int32[prompts, readers].
"""

"""Architectures of Qwen3-VL in Flax NNX: arrays in, arrays out.

Dimension letters, used in shapes and einsum strings everywhere:
  B rows, T query time, S key time, N query heads, K kv heads, G = N/K, H head dim, D embed, F mlp,
  V vocab, L layers, E experts, X experts per token, P patches, C patch channels,
  R responses per prompt, M segments of a row. Grid sizes are lower case t h w.
"""

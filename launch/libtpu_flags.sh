#!/usr/bin/env bash
# Print libtpu's flags for a TPU generation, one a line: v5e, v5p, v6e or tpu7x.
#   LIBTPU_INIT_ARGS="$(bash launch/libtpu_flags.sh v5p | tr '\n' ' ')"
# They overlap collectives with computation. Each has its source; none has been measured here.
# [A] maxtext benchmarks/xla_flags_library.py: CF_FOR_ALL_GATHER, DATA_PARALLEL_OVERLAP,
#     LAYOUT_FOR_ALL_REDUCE_SCATTER, DENSE_VMEM_LIMIT
# [B] maxtext benchmarks/maxtext_v5p_model_configs.py
# [C] tpu-recipes training/ironwood/gemma4-4b/8k-bf16-tpu7x-4x4x4/k8s/k8s_manifest.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

# Continuation fusion of all-gathers, those of weights under fsdp. [A]
continuation_fusion=(
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
)
# Pipelining of the gradients' all-reduces between slices. [A]
data_parallel_overlap=(
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)

refuse_tpu_flags
case "${1:-}" in
  v5e) flags=("${continuation_fusion[@]}" "${data_parallel_overlap[@]}") ;;
  v5p)
    flags=("${continuation_fusion[@]}" "${data_parallel_overlap[@]}")
    flags+=(--xla_tpu_megacore_fusion_allow_ags=false) # [B]
    ;;
  v6e)
    flags=("${continuation_fusion[@]}" "${data_parallel_overlap[@]}")
    flags+=(
      --xla_tpu_scoped_vmem_limit_kib=98304 # [A]
      # Layout of all-reduces that become reduce-scatters. [A]
      --xla_tpu_use_minor_sharding_for_major_trivial_input=true
      --xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1
      --xla_tpu_assign_all_reduce_scatter_layout=true
    )
    ;;
  tpu7x)
    # Collectives on SparseCores; not together with continuation fusion. [C]
    flags=(
      --xla_tpu_scoped_vmem_limit_kib=65536
      --xla_tpu_bf16_emission_mode=NATIVE_EMISSION
      --xla_tpu_enable_sparse_core_reduce_scatter_v2=true
      --xla_tpu_enable_sparse_core_collective_offload_all_gather=true
      --xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true
      --xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true
      --xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter=true
      --xla_tpu_enable_sparse_core_collective_offload_all_reduce=true
      --xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true
      --xla_tpu_use_single_sparse_core_for_all_gather_offload=true
      --xla_tpu_use_tc_device_shape_on_sc=true
      --xla_sc_disable_megacore_partitioning=true
      --xla_enable_async_all_gather=true
      --xla_tpu_prefer_async_allgather_to_allreduce=true
      --xla_tpu_enable_latency_hiding_layer_scheduler=true
      --xla_tpu_enable_layer_scheduler_for_dependent_collectives=true
      --xla_tpu_scheduler_percent_shared_memory_limit=150
      --xla_tpu_enable_sparse_core_collective_aggregator=true
      --xla_tpu_enable_all_gather_offload_tracing=true
    )
    ;;
  -h | --help)
    usage launch/libtpu_flags.sh
    exit 0
    ;;
  *) die "libtpu_flags.sh ${1:-}: the generation must be v5e, v5p, v6e or tpu7x" ;;
esac
printf '%s\n' "${flags[@]}"

"""Post-training of Qwen3-VL: data, rollout, losses, rewards, stages, one training loop."""

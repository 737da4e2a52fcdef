"""Changes of the configuration that several tests of RLVR set."""

# Several updates of a rollout, large enough for clips to bind; with a large eps the size of a
# gradient matters to Adam.
SEVERAL = {"train.num_minibatches": 2, "train.num_epochs": 2, "optim.peak": 6.0, "optim.eps": 1.0}
BUFFER = {"overlong.buffer_tokens": 2, "overlong.penalty_factor": 1.0}
REFILL = {
    "groups.keep": "accuracy",
    "groups.generation_prompts": 4,
    "groups.max_generations": 2,
    "groups.surplus_steps": 1,
}
REFILL_MORE = REFILL | {"groups.generation_prompts": 12, "rollout.num_prompts": 2}
REWARD_KL = {"reference.reward_coefficient": 1.0}
ADAPTED = REWARD_KL | {"reference.reward_target": 0.01, "reference.reward_horizon": 20.0}

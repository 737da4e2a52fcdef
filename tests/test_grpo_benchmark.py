"""The step that is timed against TRL is that of the shipped configuration."""

from benchmarks import grpo, grpo_step


def test_the_step_against_trl_is_that_of_the_configuration_of_one_gpu():
    work = grpo.work_of("4b")
    options = grpo_step.options_of("4b", work)
    assert len(work.lengths) == work.prompts * work.responses == options.rollout.batch_responses
    assert (options.optim.mu_dtype, options.optim.frozen) == ("bfloat16", ())
    assert options.rollout.max_response_tokens == max(work.lengths) == 512
    assert (options.model.param_dtype, options.model.init) == ("bfloat16", "random")
    assert options.train.num_updates == 1 and options.groups.keep == "all"

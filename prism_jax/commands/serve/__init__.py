"""An OpenAI-compatible server of a policy, and of a discriminator as `/v1/score`."""

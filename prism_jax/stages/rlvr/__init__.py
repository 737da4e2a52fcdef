"""RL with verifiable rewards."""

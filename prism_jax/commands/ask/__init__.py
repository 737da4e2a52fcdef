"""Many prompts put to one policy, in parts that survive a kill."""

"""Prompts chosen by difficulty, answered by a teacher."""

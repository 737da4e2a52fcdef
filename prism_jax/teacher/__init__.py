"""Ask a teacher behind an OpenAI-compatible chat endpoint; nothing here needs JAX."""

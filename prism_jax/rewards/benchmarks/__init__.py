"""The scorers of published benchmarks, as rules on texts.

A benchmark's file reads a response as its published scorer does and says what it takes for the
answer, whether that is right, and whether the scorer would guess. Two protocols share the rules:

  prism      the tasks that PRISM evaluates with: the text in `<answer>` counts
  upstream   the tasks of lmms-eval, or the benchmark's rule where lmms-eval needs a model

Source: PRISM scripts/eval/tasks; lmms-eval 75571ce lmms_eval/tasks.
"""

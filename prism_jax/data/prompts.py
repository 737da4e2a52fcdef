"""The texts around a question, which all stages share."""

# Source: PRISM moe/train_moe_vl_warmup_fast.py:37-51, verl/examples/data_preprocess/geo3k.py:52-66;
# the final newline is part of it there.
SYSTEM_PROMPT = """You are a helpful scientific assistant.
Answer the user's question based on the image provided.

Your output must strictly follow this XML format:

<caption>
- [Briefly describe the image style, key objects, and text using bullet points]
</caption>
<think>
[Reason step-by-step to solve the problem]
</think>
<answer>
[Final answer ONLY]
</answer>
"""


def user_turn(question: str) -> str:
    """Return the user's text for a question about an image.

    Source: PRISM verl/examples/data_preprocess/geo3k.py:68-74.
    """
    return f"<image>\n{question}\n"

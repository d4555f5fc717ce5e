"""Answer several prompts together: one target forward verifies the drafts of all of them.

python examples/batch.py [TARGET [DRAFTER]]
"""

import sys

import amphista

PROMPTS = ["Why is the sky blue?", "Name three colours.", "What is a verb?", "Count from one to ten."]

llm = amphista.load(*sys.argv[1:3])

# As each one ends; all prompts are checked before the first is decoded.
for index, answer in llm.answers(PROMPTS, max_new_tokens=48):
    print(f"{PROMPTS[index]}\n  {answer.text.strip()}")

# Or all at once, in the order of the prompts. The tokens do not depend on what else is in the batch.
answers = llm.generate(PROMPTS, max_new_tokens=48, batch_size=2)
alone = llm.generate(PROMPTS[0], max_new_tokens=48)
print("the same tokens alone and in a batch:", answers[0].token_ids == alone.token_ids)

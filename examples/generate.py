"""Answer one prompt with drafts and without, and compare.

python examples/generate.py [TARGET [DRAFTER]]
"""

import sys

import amphista

llm = amphista.load(*sys.argv[1:3])  # no argument: the default target with the drafter shipped for it
answer = llm.generate("Why is the sky blue?", max_new_tokens=64)
print(answer.text)
print(f"{answer.stats.tau:.2f} tokens per target forward, {answer.stats.tokens_per_second:.0f} tokens per second")

plain = llm.baseline.generate("Why is the sky blue?", max_new_tokens=64)
print("the same tokens as plain decoding:", answer.token_ids == plain.token_ids)

# Sampling is exact, too: the noise is keyed by the seed, so drafts change nothing but the time.
sampled = [one.generate("Name a colour.", temperature=0.8, seed=1, max_new_tokens=32) for one in (llm, llm.baseline)]
print("and when sampled:", sampled[0].token_ids == sampled[1].token_ids)

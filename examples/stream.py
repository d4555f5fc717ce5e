"""Print an answer while it is decoded, and show what each target forward brought.

python examples/stream.py [TARGET [DRAFTER]]
"""

import sys

import amphista

llm = amphista.load(*sys.argv[1:3])

with llm.stream("Why is the sky blue?", max_new_tokens=64) as stream:  # leaving the block ends the answer early
    for piece in stream:
        print(piece, end="", flush=True)
print(f"\n{stream.answer.finish_reason}: {len(stream.answer.token_ids)} tokens")

# The same stream as one record per target forward: between the bars stands what one forward gave.
for step in llm.stream("Why is the sky blue?", max_new_tokens=64).steps():
    print(step.text, end="|", flush=True)
print()

"""Hold a conversation: one line of standard input is one turn, and each turn reads only what is new.

python examples/chat.py [TARGET [DRAFTER]]
"""

import sys

import amphista

llm = amphista.load(*sys.argv[1:3])
conversation = llm.conversation(system="Answer in one sentence.")

print("Type a line, or Ctrl-D to end.", file=sys.stderr)
for line in sys.stdin:
    if line.strip():
        for piece in conversation.stream(line.strip(), max_new_tokens=64):
            print(piece, end="", flush=True)
        print()

print(len(conversation.messages), "messages")

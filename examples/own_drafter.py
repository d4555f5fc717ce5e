"""A drafter of your own, counting what followed what: python examples/own_drafter.py [TARGET]"""

import sys
from collections import Counter, defaultdict
from itertools import pairwise
from math import log

import amphista
from amphista.drafter.base import Drafter
from amphista.tree.candidates import Candidates


class Bigrams(Drafter):
    name, num_heads = "bigrams", 3

    def __init__(self, token_ids):
        super().__init__()
        self.followers = defaultdict(Counter)
        for token, follower in pairwise(token_ids):
            self.followers[token][follower] += 1

    def commit(self, state, hidden, next_ids):  # the target's hidden states, and the tokens that came after them
        state.num_rows, state.pending = state.num_rows + len(next_ids), int(next_ids[-1])

    def draft(self, state, num_ranks, max_depth=None):  # the best tokens of each depth
        tokens, log_probs, last = [], [], state.pending
        while len(tokens) < min(max_depth or 3, 3) and (best := self.followers[last].most_common(num_ranks)):
            tokens.append([token for token, _ in best])
            log_probs.append([log(count / (1 + self.followers[last].total())) for _, count in best])
            last = tokens[-1][0]
        return Candidates(tokens, log_probs)

    def trim(self, state, num_rows):  # a conversation's next turn may rewrite the last rows
        state.num_rows = num_rows


plain = amphista.load(*sys.argv[1:2], drafter="none")
learned = plain.generate("Why is the sky blue?").token_ids
answer = amphista.LLM(plain.target, Bigrams(learned), tree=4).generate("What colour has the sky?", max_new_tokens=64)
print(f"{answer.text}\n{answer.stats.tau:.2f} tokens per target forward")

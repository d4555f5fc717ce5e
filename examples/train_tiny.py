"""Train a drafter on a few answers of the target: a minute on a CPU, too little to be good, enough to see it work.

python examples/train_tiny.py OUT [TARGET]
"""

import json
import sys
from pathlib import Path

import amphista
from amphista.train.config import DataConfig, OptimizerConfig, TrainConfig
from amphista.train.trainer import Trainer

out, target = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "smollm2-135m-instruct"
out.mkdir(parents=True, exist_ok=True)

# 1. The best text to train on is what the target itself would say (`amphista distill` does this for thousands).
llm = amphista.load(target)
prompts = [f"Write one sentence about {w}." for w in ("sun", "rain", "snow", "wind", "fire", "sea", "tree", "ice")]
with open(out / "answers.jsonl", "w") as file:
    for number, answer in enumerate(llm.generate(prompts, max_new_tokens=32)):
        row = {"id": f"q{number}", "prompt_ids": answer.prompt_ids, "answer_ids": answer.token_ids}
        print(json.dumps(row), file=file)

# 2. Train; the target stays frozen. `amphista train --data OUT/answers.jsonl` takes the same settings.
config = TrainConfig(
    model={"num_heads": 3, "draft_vocab": 128},
    data=DataConfig(files=(str(out / "answers.jsonl"),), validation_share=0.35),
    optimizer=OptimizerConfig(epochs=8, batch_size=2, warmup_steps=2),
)
Trainer(llm.target, config, out / "run", report=print).run()

# 3. Decode with it.
answer = amphista.load(target, out / "run" / "best", tree=4).generate(prompts[0], max_new_tokens=32)
print(f"{answer.text}\n{answer.stats.tau:.2f} tokens per target forward")

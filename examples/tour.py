"""The whole of speculative decoding with parallel heads in two minutes on a CPU, nothing downloaded.

python examples/tour.py [OUT [SHARE]]      SHARE of the full length, such as 0.1 for a quick look

1. A tiny language model learns to continue these very docs: the target. From here on it is frozen.
2. It writes continuations of its own: what a drafter is trained on.
3. An Amphista drafter learns to guess them; every so often it is asked how many tokens a forward would now bring.
4. Together they decode, and the tokens are compared with those of plain decoding.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import amphista
from amphista.target.loading import load_target
from amphista.train.config import DataConfig, OptimizerConfig, TrainConfig
from amphista.train.trainer import Trainer

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="amphista-tour-"))
SHARE = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
DOCS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
VOCAB, LENGTH = 512, 96


def make_tokenizer(text):
    """Bytes and the pairs of them that the text has most of."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs = BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False)
    tokenizer.train_from_iterator([text], pairs)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def train_target(ids, num_steps):
    """A Llama of two layers, by plain next-token prediction."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps)
    for step in range(1, num_steps + 1):
        starts = torch.randint(len(ids) - LENGTH, (4, 1))
        batch = ids[starts + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(num_steps // 5, 1) == 0:
            print(f"  step {step:4}: loss {loss:.2f}")
    return model


disable_progress_bar()
torch.manual_seed(0)
chance = random.Random(0)

print("1. The target learns")
text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS)
tokenizer = make_tokenizer(text)
ids = torch.tensor(tokenizer(text)["input_ids"])
train_target(ids, max(int(1200 * SHARE), 160)).save_pretrained(OUT / "target")
tokenizer.save_pretrained(OUT / "target")

print("2. It writes what the drafter learns from")
target = str(OUT / "target")
plain = amphista.load(target, "none")
places = [chance.randrange(len(ids) - 16) for _ in range(max(int(320 * SHARE), 20))]
prompts = [ids[place : place + 16].tolist() for place in places]
noises = [amphista.SamplingParams(temperature=0.5, seed=n) for n in range(len(prompts))]  # one of its own for each
answers = plain.generate(prompts, params=noises, max_new_tokens=32)
rows = [
    {"id": f"row{n}", "prompt_ids": one.prompt_ids, "answer_ids": one.token_ids, "temperature": 0.5}
    for n, one in enumerate(answers)
]
(OUT / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
print(f"  {sum(len(one.token_ids) for one in answers)} tokens, such as: {answers[0].text[:60]!r}")

print("3. The drafter learns to guess it")
num_steps = max(int(240 * SHARE), 24)
config = TrainConfig(
    model={"num_heads": 4, "num_encoder_layers": 1},
    data=DataConfig(files=(str(OUT / "answers.jsonl"),), validation_share=0.2),
    optimizer=OptimizerConfig(learning_rate=3e-3, epochs=1000, max_steps=num_steps, batch_size=8, warmup_steps=5),
    validate_every=num_steps // 8,
)
Trainer(load_target(target), config, OUT / "run", report=lambda line: None).run()
for line in (OUT / "run" / "log.jsonl").read_text().splitlines():
    if validation := json.loads(line).get("validation"):
        tau = validation["tau"]["16"]
        print(f"  step {json.loads(line)['step']:4}: {tau:.2f} tokens per forward {'#' * round(20 * (tau - 1))}")

print("4. Together they decode")
llm = amphista.load(target, OUT / "run" / "best", tree=16)
prompt = tokenizer("The drafter ")["input_ids"]
stream = llm.stream(prompt, max_new_tokens=96)
print("  " + "|".join(step.text for step in stream.steps()).replace("\n", " "))
print(f"  {stream.answer.stats.tau:.2f} tokens per target forward, each bar is one")
same = stream.answer.token_ids == llm.baseline.generate(prompt, max_new_tokens=96).token_ids
print(f"  the same tokens as plain decoding: {same}")

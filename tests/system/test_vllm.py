"""`amphista dev export vllm`, then vLLM itself on its own model: the tokens of vLLM without drafts and of our own
decoding, and drafts accepted as often as ours are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import amphista
from amphista.target.gguf import SMOLLM2_135M, packaged_folder
from tests.system.test_cli import amphista as command

pytestmark = pytest.mark.vllm
QUESTIONS = [
    "Why is the sky blue?",
    "Name three colours of the rainbow and say why they appear.",
    "Write a short story about a fox.",
    "Why is the sky blue, and why is the sea?",
]
NUM_TOKENS, NUM_DRAFTED = 48, 4
# vLLM in a process of its own: few tokens a step, so that prompts are read in pieces beside answers in the making.
DECODE = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    asked = json.loads(sys.argv[1])
    llm = LLM(
        model=asked["target"], dtype="float32", enforce_eager=True, max_model_len=512, max_num_batched_tokens=32,
        max_num_seqs=3, kv_cache_memory_bytes=2**28, disable_log_stats=False, speculative_config=asked["drafts"],
    )
    params = SamplingParams(temperature=0, max_tokens=asked["num_tokens"])
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    tokens = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, params)]
    counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    with open(asked["out"], "w") as file:
        json.dump({"tokens": tokens, "counted": counted}, file)
"""


def decode(tmp_path: Path, prompts, target, drafts=None):
    asked = {"target": target, "drafts": drafts, "prompts": prompts, "num_tokens": NUM_TOKENS}
    script, out = tmp_path / "decode.py", tmp_path / "answers.json"
    script.write_text(DECODE)
    paths = [str(tmp_path / "export"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "VLLM_NO_USAGE_STATS": "1"}
    asked["out"] = str(out)
    result = subprocess.run(
        [sys.executable, script, json.dumps(asked)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return json.loads(out.read_text())


def test_the_tokens_of_vllm_and_ours_in_fewer_steps(tmp_path):
    pytest.importorskip("vllm", reason="vllm is not installed: make test-vllm")
    llm = amphista.load(dtype="float32", tree="chain")
    exported = command("dev", "export", "vllm", tmp_path / "export")
    assert exported.returncode == 0, exported.stderr
    drafts = json.loads(exported.stdout.partition("'")[2].rpartition("'")[0])
    assert drafts["num_speculative_tokens"] == NUM_DRAFTED
    prompts = [llm.prompt_ids(question) for question in QUESTIONS]
    ours = [llm.generate(prompt, max_new_tokens=NUM_TOKENS) for prompt in prompts]
    target = str(packaged_folder(SMOLLM2_135M))
    plain, drafted = decode(tmp_path, prompts, target), decode(tmp_path, prompts, target, drafts)
    assert drafted["tokens"] == plain["tokens"] == [answer.token_ids for answer in ours]
    counted = drafted["counted"]
    realised = counted["vllm:spec_decode_num_accepted_tokens"] / counted["vllm:spec_decode_num_drafts"]
    accepted = [min(NUM_DRAFTED, number) for answer in ours for number in answer.stats.accepted]
    expected = sum(accepted) / len(accepted)
    assert expected > 0.3 and abs(realised - expected) < 0.15 * expected, (realised, expected)

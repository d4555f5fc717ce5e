"""Serve a model and talk to it with OpenAI's client; `amphista serve` in a terminal of its own does the first half.

python examples/serve.py [TARGET [DRAFTER]]
"""

import subprocess
import sys

from openai import OpenAI

command = [sys.executable, "-m", "amphista", "serve", "--port", "0"]  # 0: a free one
for option, value in zip(("--target", "--drafter"), sys.argv[1:], strict=False):
    command += [option, value]

with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
    address = next(line for line in server.stderr if "http://" in line).split()[-1]
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    question = {"role": "user", "content": "Why is the sky blue?"}
    asked = {"model": client.models.list().data[0].id, "messages": [question], "max_tokens": 64, "seed": 1}

    text = ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            print(chunk.choices[0].delta.content or "", end="", flush=True)

    # What OpenAI has no word for goes into extra_body: the same seed without drafts gives the same text.
    plain = client.chat.completions.create(**asked, extra_body={"amphista": {"drafter": "none"}})
    print("\nthe same text as plain decoding:", plain.choices[0].message.content == text)
    server.terminate()

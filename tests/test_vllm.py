"""What serve.py and the README's script make vLLM answer, on vLLM itself, against model.generate(). Runs where vLLM is
installed (.ci/run makes an environment for it)."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/run makes an environment for it")

import requests
import torch
from conftest import CHATML, EXAMPLES, ROOT, save_tokenizer, sentence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import lora
from model import ScaleDown, ScaleDownConfig

MORE = ["--enforce-eager", "--max-model-len=1024"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint whose generator vLLM can run on a CPU: its attention takes heads of 32 numbers or more."""
    folder = tmp_path_factory.mktemp("vllm")
    V = save_tokenizer(f"{folder}/llama", CHATML)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.15, bos_token_id=3, eos_token_id=4,
    )).save_pretrained(f"{folder}/llama")
    GenerationConfig(repetition_penalty=1.5, bos_token_id=3, eos_token_id=4).save_pretrained(f"{folder}/llama")
    model = ScaleDown(ScaleDownConfig(generator=f"{folder}/llama", num_layers=2, num_memory_tokens=3, answer_tokens=12))
    with torch.no_grad():
        for _, m in lora.layers(model.generator):
            m.lora_B.normal_(std=0.1)
    os.makedirs(f"{folder}/checkpoint")
    model.save(f"{folder}/checkpoint")
    return f"{folder}/checkpoint"


@pytest.fixture(scope="module")
def server(checkpoint):
    """The address of `python serve.py` with an API key, and its process."""
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, "serve.py", f"--out_dir={checkpoint}", "--device=cpu", "--dtype=float32",
                                "--compress_batch=8", "--", f"--port={port}", "--api-key=secret", *MORE], cwd=ROOT,
                               start_new_session=True)
    url, end = f"http://localhost:{port}", time.time() + 300
    while True:
        assert process.poll() is None and time.time() < end, "the server has not come up"
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                break
        except requests.ConnectionError:
            time.sleep(1)
    yield f"{url}/v1", process
    os.killpg(process.pid, signal.SIGKILL)


def post(server, path, body, key="secret", **kwargs):
    return requests.post(f"{server[0]}/{path}", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120, **kwargs)


def chat(x, **more):
    return dict(model="scaledown", messages=[dict(role="user", content=x["query"])], documents=x["documents"], **more)


def questions(n):
    rng = random.Random(0)
    return [dict(query=f"{sentence(rng, rng.randint(1, 12))}?",
                 documents=[sentence(rng, rng.randint(1, 60)) for _ in range(rng.randint(1, 5))]) for _ in range(n)]


def text(answer):
    """An answer but for the part of a character that it may end with: vLLM leaves that out."""
    return answer.rstrip("\ufffd").strip()


def content(reply):
    return text(reply.json()["choices"][0]["message"]["content"])


def answers(checkpoint, examples):
    model = ScaleDown.from_pretrained(checkpoint, dtype=torch.float32)
    return [text(model.generate([x["query"]], [x["documents"]])[0]) for x in examples]


def test_answers_are_generates(server, checkpoint):
    examples = EXAMPLES + questions(9)
    theirs = []
    for x in examples:
        reply = post(server, "chat/completions", chat(x))
        assert reply.ok, reply.text
        theirs.append(content(reply))
    assert theirs == answers(checkpoint, examples)
    x = examples[0]
    body = dict(model="scaledown", prompt=x["query"], documents=x["documents"])
    assert text(post(server, "completions", body).json()["choices"][0]["text"]) == theirs[0]
    parts = dict(chat(x), messages=[dict(role="user", content=[dict(type="text", text=x["query"])])])
    assert content(post(server, "chat/completions", parts)) == theirs[0]
    streamed = [json.loads(line[6:]) for line in post(server, "chat/completions", chat(x, stream=True), stream=True).iter_lines()
                if line.startswith(b"data: {")]
    assert text("".join(c["choices"][0]["delta"].get("content") or "" for c in streamed)) == theirs[0]
    short = post(server, "chat/completions", chat(x, max_tokens=2)).json()
    assert short["usage"]["completion_tokens"] == 2


BROKEN = [
    (dict(documents=[]), 400, "documents is a list"), (dict(documents=[3]), 400, "documents is a list"),
    (dict(documents=["\ud800"]), 400, "half a surrogate pair"),
    (dict(documents="x"), 400, "documents is a list"), (dict(messages=[]), 400, "one message, the question"),
    (dict(messages=[dict(role="system", content="x"), dict(role="user", content="x")]), 400, "one message, the question"),
    (dict(messages=[dict(role="user", content=" ")]), 400, "the question is missing, empty or no text"),
    (dict(messages=[dict(role="user", content=[dict(type="image_url")])]), 400, "the question is missing, empty"),
    (dict(documents=["x"] * 900), 400, "are longer than the generator's 1024 positions"),
    (dict(prompt_embeds="x"), 400, "prompt_embeds are what this server makes"),
    (dict(messages=[dict(role="user", content=[dict(type="prompt_embeds", data="x")])]), 400, "prompt_embeds are what"),
    (dict(model="none"), 404, "does not exist"), (dict(max_tokens=-1), 400, "max_tokens"),
    (dict(temperature="hot"), 400, "temperature")]


def test_many_requests_at_once_half_of_them_broken(server, checkpoint):
    good = questions(32)
    bodies = [body for i, x in enumerate(good) for body in (chat(x), chat(EXAMPLES[0]) | BROKEN[i % len(BROKEN)][0])]

    def ask(body):
        return post(server, "chat/completions", body)

    with ThreadPoolExecutor(64) as pool:
        replies = [*pool.map(ask, bodies)]
    assert [*map(content, replies[::2])] == answers(checkpoint, good)
    for i, reply in enumerate(replies[1::2]):
        _, status, message = BROKEN[i % len(BROKEN)]
        assert reply.status_code == status and message in reply.text, reply.text


def test_clients_that_leave_and_what_is_no_request_of_ours(server, checkpoint):
    for _ in range(8):
        with pytest.raises(requests.exceptions.Timeout):
            requests.post(f"{server[0]}/chat/completions", json=chat(EXAMPLES[0], max_tokens=500, ignore_eos=True),
                          headers={"Authorization": "Bearer secret"}, timeout=0.05)
    assert post(server, "chat/completions", chat(EXAMPLES[0]), key="wrong").status_code == 401
    for data in (b"{broken", b"[]", b"\xff"):
        reply = requests.post(f"{server[0]}/chat/completions", data=data, timeout=60, headers={
            "Authorization": "Bearer secret", "Content-Type": "application/json"})
        assert reply.status_code == 400, reply.text
    assert "prompt_embeds are what" in post(server, "completions", dict(model="scaledown", prompt_embeds="x")).text
    # without documents it is vLLM as ever: the generator's own chat template
    plain = post(server, "chat/completions", dict(model="scaledown", max_tokens=3, temperature=0,
                                                  messages=[dict(role="user", content="who is it?")])).json()
    assert plain["usage"]["prompt_tokens"] > 5
    x = EXAMPLES[1]
    assert content(post(server, "chat/completions", chat(x))) == answers(checkpoint, [x])[0]
    assert server[1].poll() is None


def test_the_script_in_the_docs(checkpoint, tmp_path):
    """docs/serving.md's lines for vLLM's own classes, on 100 questions."""
    with open(f"{ROOT}/docs/serving.md") as f:
        code = next(part.split("```")[0] for part in f.read().split("```python\n")[1:] if "from vllm import" in part)
    examples = questions(100)
    code = code.replace("out/smollm/best", checkpoint).replace('LLM("generator"', f'LLM("{tmp_path}/generator"')
    code = code.replace("enable_prompt_embeds=True", 'enable_prompt_embeds=True, enforce_eager=True, dtype="float32", '
                        "max_model_len=1024").replace(
        "print(answers)", f"json.dump(answers, open('{tmp_path}/answers.json', 'w'))")
    lines = [line for line in code.splitlines() if not line.startswith("queries, documents = ")]
    body = "\n".join("    " * (not line.startswith(("from", "import"))) + line for line in lines)
    (tmp_path / "script.py").write_text(
        "import json\n" + body.replace("    model = ", "if __name__ == '__main__':\n"
                                       f"    queries = json.loads({json.dumps(json.dumps([x['query'] for x in examples]))})\n"
                                       f"    documents = json.loads({json.dumps(json.dumps([x['documents'] for x in examples]))})\n"
                                       "    model = ", 1))
    run = [sys.executable, "evaluate.py", f"--out_dir={checkpoint}", f"--export={tmp_path}/generator", "--dtype=float32",
           "--device=cpu"]
    subprocess.run(run, cwd=ROOT, check=True)
    done = subprocess.run([sys.executable, f"{tmp_path}/script.py"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [*map(text, json.loads((tmp_path / "answers.json").read_text()))] == answers(checkpoint, examples)

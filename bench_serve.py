"""
Throughput of serve.py, which must be running: questions with documents, compressed, against the same questions with the
documents' text in the prompt, answered by the same vLLM, compression included. One run, in turns:

    python serve.py --out_dir=out/smollm/best -- --port=8000
    python bench_serve.py --tokenizer=out/smollm/best.generator --corpus=corpus.jsonl

No two prompts begin with the same documents, so that vLLM's prefix cache helps neither side.
"""

import math
import os
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import requests

from configurator import at_least, configure, fail, fail_on
from data import document_text
from formats import read_documents
from pretrained import load_tokenizer
from prompt import Prompt, chat_messages

# -----------------------------------------------------------------------------
url = "http://localhost:8000/v1"
api_key = ""
tokenizer = ""  # the generator's, by name or folder: the folder that serve.py has exported
corpus = ""  # where the documents come from, in any of prepare.py's formats
docs = 10  # documents a question
doc_tokens = 128
answer_tokens = 32  # of every answer
requests_at_once = "1,32"
repeats = 5
# -----------------------------------------------------------------------------


def post(body):
    reply = requests.post(f"{url}/chat/completions", json=body, headers={"Authorization": f"Bearer {api_key}"},
                          timeout=600)
    if not reply.ok:
        fail(f"{url}: {reply.status_code} {reply.text[:200]}")
    usage = reply.json()["usage"]
    if usage["completion_tokens"] != answer_tokens:
        fail(f"an answer has {usage['completion_tokens']} tokens, not {answer_tokens}")
    return usage["prompt_tokens"]


def seconds(bodies):
    """Wall time of all requests at once, and the mean length of their prompts in tokens."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(bodies)) as pool:
        lengths = [*pool.map(post, bodies)]
    return time.perf_counter() - start, statistics.mean(lengths)


def main():
    configure(globals())
    at_least(globals(), docs=1, doc_tokens=1, answer_tokens=1, repeats=1)
    if not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", requests_at_once):
        fail(f"requests_at_once are numbers with commas, such as 1,32, not '{requests_at_once}'")
    if not tokenizer or not os.path.isfile(corpus):
        fail("--tokenizer=FOLDER, the generator's, and --corpus=FILE, the passages to ask about, are needed")
    prompt = Prompt(load_tokenizer(tokenizer))
    passages = (document_text(dict(title=title, text=text)) for _, title, text in read_documents(corpus))
    passages = [cut for p in passages for cut in prompt.cut([p], doc_tokens) if len(prompt.ids(cut)) >= doc_tokens - 2]
    loads = [*map(int, requests_at_once.split(","))]
    prompts = sum(2 * (1 + repeats * n) for n in loads)
    # the second time around other documents come first
    while len(passages) > docs and math.gcd(len(passages), docs) > 1:
        passages.pop()
    if len(passages) < max(prompts, docs + 1):
        fail(f"{corpus} has {len(passages)} documents of {doc_tokens} tokens: too few for {prompts} prompts that begin "
             "with different ones: lower repeats or requests_at_once")
    passages = cycle(passages)
    common = dict(model="scaledown", max_tokens=answer_tokens, ignore_eos=True, temperature=0)
    for n in loads:
        taken = dict(compressed=[], full=[])
        for repeat in range(-1, repeats):  # the first does not count
            for name in taken:
                bodies = []
                for _ in range(n if repeat >= 0 else 1):
                    documents = [*islice(passages, docs)]
                    query = f"What is said about {' '.join(documents[0].split()[:8])}?"
                    full = chat_messages(query, "\n\n".join(documents), prompt.system_role)
                    bodies.append(common | (dict(messages=full) if name == "full" else dict(
                        messages=[dict(role="user", content=query)], documents=documents)))
                if repeat >= 0:
                    taken[name].append(seconds(bodies))
                else:
                    seconds(bodies)
        base = statistics.median(s for s, _ in taken["full"])
        for name, runs in taken.items():
            s = [s for s, _ in runs]
            print(f"{n:3} at once  {name:10}  {n / statistics.median(s):7.2f} questions/s ({n / max(s):.2f} to "
                  f"{n / min(s):.2f}), prompts of {runs[0][1]:.0f} positions   {base / statistics.median(s):5.2f}x",
                  flush=True)


if __name__ == "__main__":
    with fail_on(ValueError, OSError):
        main()

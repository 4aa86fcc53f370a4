"""bench.py in short: that it runs, that both sides gave the same before anything was timed, and the FLOPs."""

import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import jsonl
from test_scripts import run


@pytest.fixture(scope="module")
def flops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flops")
    run("bench.py", f"--json={folder / 'rows.json'}")
    rows = json.loads((folder / "rows.json").read_text())
    return {row["name"]: row for row in rows}


def test_flops_are_the_papers_where_it_leaves_the_query_out(flops):
    """Table 1 of the paper."""
    assert flops["none"]["compression_tflop"] == 0 and 20 < flops["none"]["total_tflop"] < 21.6  # 20.33
    assert all(3.4 < row["generator_tflop"] < 3.5 for name, row in flops.items() if name != "none")  # 3.49
    for name, tflop in (("n_layers_5", 3.04), ("n_layers_8", 4.87), ("llama_1b", 2.66)):
        assert flops[f"{name}_separate_without_query"]["compression_tflop"] == pytest.approx(tflop, rel=0.03)


def test_flops_are_those_counted_by_hand(flops):
    """Mistral-7B: 2 FLOPs a weight and token, and 4 * d for each pair of positions that attention multiplies."""
    d, kv, inner, q, k, S = 4096, 1024, 14336, 128, 10, 136
    T = q + k * S
    attention, mlp = 2 * d * d + 2 * d * kv, 3 * d * inner
    pairs = q * q + k * S * (q + S)
    for n in (5, 8, 10):
        separate = n * (2 * (attention + mlp) * k * (q + S) + 4 * d * k * (q + S) ** 2)
        packed = n * (2 * (attention + mlp) * T + 4 * d * pairs)
        last = 2 * (d * d + 2 * d * kv) * T + 2 * (attention + mlp) * 80 + 4 * d * k * 8 * (q + S)  # query, key, value
        cut = packed * (n - 1) / n + last
        for name, by_hand in (("_separate", separate), ("_packed", packed), ("", cut)):
            assert flops[f"n_layers_{n}{name}"]["compression_tflop"] == pytest.approx(by_hand / 1e12, rel=1e-3)
    for name, P in (("none", q + k * 128), ("n_layers_8", q + k * 8 + k - 1)):  # 32 tokens, of which 31 are read again
        generator = 32 * (2 * (attention + mlp) * (P + 31) + 4 * d * (P * P + sum(range(P + 1, P + 32)))) + 32 * 2 * d * 32000
        assert flops[name]["generator_tflop"] == pytest.approx(generator / 1e12, rel=1e-6)


def test_flops_of_the_released_layout_by_hand(tmp_path, flops):
    """Llama-3.2-1B with 131 tokens for query and document: 10 rows of 131 + 8; packed the query's 32 tokens once."""
    assert "llama_1b_as_released" not in flops  # a query of 128 tokens leaves no document
    run("bench.py", "--query_tokens=32", f"--json={tmp_path / 'rows.json'}")
    cost = {row["name"]: row["compression_tflop"] for row in json.loads((tmp_path / "rows.json").read_text())}
    d, kv, inner, layers, q, k, S = 2048, 512, 8192, 16, 32, 10, 99 + 8
    block, projection = 2 * d * d + 2 * d * kv + 3 * d * inner, 80 * 2 * (2048 * 8096 + 8096 * 4096)
    rows = layers * (2 * block * k * (q + S) + 4 * d * k * (q + S) ** 2)
    assert cost["llama_1b_as_released"] == pytest.approx((rows + projection) / 1e12, rel=1e-3)
    T = q + k * S
    whole = layers * (2 * block * T + 4 * d * (q * q + k * S * (q + S)))
    last = 2 * (d * d + 2 * d * kv) * T + 2 * block * 80 + 4 * d * k * 8 * (q + S)
    cut = whole * (layers - 1) / layers + last
    assert cost["llama_1b_as_released_packed"] == pytest.approx((cut + projection) / 1e12, rel=1e-2)


def test_flops_that_the_readme_promises(flops):
    for name, most in (("n_layers_5_packed", 3.43), ("n_layers_8_packed", 5.48), ("n_layers_10_packed", 6.86),
                       ("n_layers_8", 4.95)):
        assert flops[name]["compression_tflop"] <= most
    assert flops["n_layers_8"]["total_tflop"] <= 8.4 and flops["n_layers_8"]["speedup"] >= 2.5
    assert flops["modernbert"]["total_tflop"] <= 4.2 and flops["modernbert"]["speedup"] >= 5
    assert 1.6 < flops["n_layers_8_separate"]["speedup"] < 1.7


def test_flops_of_other_shapes_and_their_plots(tmp_path):
    run("bench.py", "--generator=llama-3.2-1b", "--docs=2,4", "--num_memory_tokens=1,2", "--answer_tokens=2",
        f"--json={tmp_path / 'rows.json'}", f"--plot={tmp_path / 'plots'}")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["docs"], row["num_memory_tokens"]) for row in rows} == {(2, 1), (2, 2), (4, 1), (4, 2)}
    assert sorted(os.listdir(tmp_path / "plots")) == ["llama-3.2-1b_docs.svg", "llama-3.2-1b_num_memory_tokens.svg"]


def test_cost_and_accuracy_of_a_run(trained, job, tmp_path):
    _, out_dir, _ = job
    run("bench.py", f"--runs={out_dir}", f"--json={tmp_path / 'rows.json'}", f"--plot={tmp_path}")
    row, = json.loads((tmp_path / "rows.json").read_text())
    assert (row["docs"], row["num_memory_tokens"], row["answer_tokens"], row["query_tokens"]) == (3, 2, 8, 64)
    assert row["total_tflop"] > 0 and 0 <= row["em"] <= 1 and (tmp_path / "accuracy.svg").exists()


SMALL = ["--query_tokens=6", "--doc_tokens=8", "--docs=2", "--num_memory_tokens=2", "--answer_tokens=4",
         "--compressors=n_layers_2", "--batch=1", "--repeats=1", "--device=cpu", "--dtype=float32"]


@pytest.mark.parametrize("what", ["time", "train", "decode"])
def test_time_and_memory_in_short(what, tiny, tmp_path):
    batches = (1, 2) if what == "decode" else (2,)
    out = run("bench.py", f"--what={what}", f"--generator={tiny('llama')}", *SMALL, f"--batch={','.join(map(str, batches))}",
              f"--json={tmp_path / 'rows.json'}")
    rows = json.loads((tmp_path / "rows.json").read_text())
    names = dict(time=["none", "n_layers_2", "n_layers_2_separate"], train=["ours", "ordinary"],
                 decode=["ours", "transformers"])[what]
    assert [(row["batch"], row["name"]) for row in rows] == [(n, name) for n in batches for name in names]
    assert what != "time" or "memory embeddings of n_layers_2, packed and separate," in out
    if what != "decode":
        assert all(0 < row["peak_gb"] < 1 for row in rows)


def test_decoding_of_a_shape_with_a_larger_head_than_its_tokeniser():
    out = run("bench.py", "--what=decode", "--generator=smollm2-135m", *SMALL)
    assert "batch 1: 1 of 1 answers are the same" in out


@pytest.mark.skipif(not shutil.which("g++"), reason="to compile on a CPU takes a compiler")
def test_decoding_compiled(tiny):
    out = run("bench.py", "--what=decode", f"--generator={tiny('llama')}", *SMALL, "--compile=True")
    assert re.findall(r"^batch   1  (.*?) +[\d.,]+ \(", out, re.M) == ["ours", "merged", "merged and compiled", "transformers"]


def test_a_batch_that_does_not_fit_is_halved(tiny, tmp_path):
    """On a machine that runs out of memory at more than two queries."""
    (tmp_path / "small.py").write_text(f"""import sys, torch, model
sys.argv = {["bench.py", "--what=time", f"--generator={tiny('llama')}", *SMALL, "--batch=8", f"--json={tmp_path / 'rows.json'}"]}
generate = model.ScaleDown.generate
def small(self, queries, *args, **kwargs):
    if len(queries) > 2:
        raise torch.OutOfMemoryError
    return generate(self, queries, *args, **kwargs)
model.ScaleDown.generate = small
exec(compile(open("bench.py").read(), "bench.py", "exec"))""")
    out = run(tmp_path / "small.py")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert "batch 8 does not fit: half of it\nbatch 4 does not fit" in out and {row["batch"] for row in rows} == {2}
    assert len(rows) == 3 and all(row["ms_a_query"][0] > 0 for row in rows)


@pytest.mark.skipif(not shutil.which("g++"), reason="FlexAttention on a CPU takes a compiler")
def test_attention_in_short():
    out = run("bench.py", "--what=attention", "--generator=smollm2-135m", *SMALL)
    assert len(re.findall(r" ms$", out, re.M)) == 5 and "ours and FlexAttention: largest difference" in out


def test_lora_in_short():
    out = run("bench.py", "--what=lora", "--hidden=16,32", "--ranks=2,4", "--repeats=2", "--device=cpu", "--dtype=float32")
    assert len(re.findall(r"ours / PEFT: time [\d.]+ .* memory kept for the backward pass ([\d.]+)", out)) == 4
    assert all(float(ratio) <= 1 for ratio in re.findall(r"backward pass ([\d.]+)", out))


def test_prepare_beside_the_usual_way(tiny, tmp_path):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(dict(_id=str(i), text="the mayor of Loku " * (i + 1))) + "\n" for i in range(6)))
    out = run("bench.py", "--what=prepare", f"--splade={tiny('splade')}", f"--corpus={tmp_path / 'c.jsonl'}", "--texts=5",
              "--passages=3000", "--queries=8", "--repeats=2", "--device=cpu", "--dtype=float32")
    assert "encoding 5 passages" in out and "searching 3,000 synthetic passages for 8 queries, the 50 best" in out
    assert len(re.findall(r"/s  \(", out)) == 6


@pytest.mark.parametrize("args, message", [
    (["--what=prepare", "--corpus=nowhere.jsonl"], "--corpus=FILE"),
    (["--what=x"], "what is flops, time, train, attention, lora, decode or prepare, not 'x'"),
    (["--docs=1..x"], "docs is a number, several with commas, or a range like 1..50, not '1..x'"),
    (["--docs=0"], "docs must be at least 1"),
    (["--generator=gpt-5"], "generator is mistral-7b, .* or, but for flops and attention, a model's folder, not 'gpt-5'"),
    (["--json=nowhere/x.json"], "json=nowhere/x.json is a folder, or in none"),
    (["--plot=x"], "plot takes --what=flops and several docs, num_memory_tokens or runs"),
    (["--dtype=half"], "dtype is float32 or bfloat16, not 'half'"),
    (["--runs=nowhere"], "nowhere/best holds no checkpoint"),
    (["--what=time", "--generator=smollm2-135m", "--compressors=n_layers_99"], "num_layers=99, but"),
    (["--what=time", "--docs=1,2"], "docs is one number"),
    (["--what=attention", "--generator=smollm2-135m", "--docs=1..1"], "docs is one number"),
    (["--generator=smollm2-135m", "--doc_tokens=8192"], "are longer than the compressor's"),
    (["--what=time", "--generator=smollm2-135m", "--compressors=x"], "compressors are n_layers_N, llama_1b and modernbert"),
])
def test_bad_input(args, message):
    assert re.search(message, run("bench.py", *args, ok=False))


class Answers(BaseHTTPRequestHandler):
    """What bench_serve.py needs of a server: the number of tokens."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        body = b'{"usage": {"completion_tokens": 32, "prompt_tokens": 100}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_no_two_prompts_of_the_server_begin_alike(tiny, tmp_path):
    corpus = jsonl(tmp_path / "c.jsonl", [dict(_id=str(i), text=f"{i} the mayor of Loku " * 20) for i in range(42)])
    args = "bench_serve.py", f"--tokenizer={tiny('llama')}", f"--corpus={corpus}", "--doc_tokens=32"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = run(*args, f"--url=http://127.0.0.1:{server.server_port}/v1", "--requests_at_once=1,4", "--repeats=3")
    finally:
        server.shutdown()
        server.server_close()
    assert "  4 at once  compressed" in said and "prompts of 100 positions" in said
    first = [x["documents"][0] if "documents" in x else x["messages"][-1]["content"].split("\n\n")[0] for x in server.asked]
    first = [re.search(r"\d+ the mayor", text)[0] for text in first]
    assert len(first) == len({*first}) == 2 * (1 + 3) + 2 * (1 + 12)
    assert "has 41 documents of 32 tokens: too few for 58 prompts that begin with different ones" in run(
        *args, "--requests_at_once=1,4,8", "--repeats=2", ok=False)
    assert "has 0 documents of 999 tokens: too few" in run(*args, "--doc_tokens=999", ok=False)
    for wrong in "", "1,a", "0", "1,":
        assert "requests_at_once are numbers with commas" in run(*args, f"--requests_at_once={wrong}", ok=False)

"""
What compression costs and saves, and what its parts cost next to the usual way of doing them, side by side in one run:

    python bench.py                              # FLOPs of one query, next to the paper's; no weights, no GPU
    python bench.py --docs=5,10,20,50 --plot=assets           # and against the number of documents, drawn
    python bench.py --runs=out/toy,out/one --plot=assets      # cost against accuracy of runs of train.py
    python bench.py --what=time --generator=smollm2-135m      # ms a query, compressed and not
    python bench.py --what=train --generator=smollm2-135m     # a training step, next to the ordinary way of writing it
    python bench.py --what=attention --generator=smollm2-135m # of the packed sequence, next to other ways to mask it
    python bench.py --what=lora                               # LoRALinear, next to PEFT's
    python bench.py --what=decode --generator=smollm2-135m    # generation, next to transformers' generate()
    python bench.py --what=prepare --splade=FOLDER --corpus=corpus.jsonl   # encoding and search of prepare.py

Needs requirements-dev.txt, which has what is compared with. Before anything is timed, both sides must give the same.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from functools import partial
from inspect import signature
from itertools import islice
from json import dump, loads
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from checkpoint import read_config
from compressor import compressor_class
from configurator import at_least, attention_for_training, configure, fail, fail_on, fast_dtype, torch_device
from data import document_text
from flops import StepFlops
from formats import read_documents
from generate import Decoder
from lora import LoRALinear, layers, merge
from model import ScaleDown, ScaleDownConfig
from packed import packed_attention
from pretrained import decoder_layers, load_model
from splade import Splade, search, shard_size, write_shard

# -----------------------------------------------------------------------------
what = "flops"  # or time, train, attention, lora, decode, prepare
generator = "mistral-7b"  # a shape by name (SHAPES, below) with random weights, or a model; flops: several, with commas
docs = "10"  # documents a query; flops: or several, 5,10,20 or 1..50
query_tokens = 128
doc_tokens = 128
num_memory_tokens = "8"  # flops: or several
answer_tokens = 32
compressors = "n_layers_8"  # time, train, decode: also n_layers_N, llama_1b, modernbert, several with commas
batch = "1,8"  # time, train, decode: queries at once; attention: the largest of them
ranks = "8,16,32,64"  # lora
hidden = "576,4096"  # lora: of a layer, in and out
json = ""  # write the rows into this file
plot = ""  # flops: draw them into this folder
runs = ""  # flops: out_dirs of train.py, with commas, in place of the paper's compressors: their cost and accuracy
compile = False  # decode: also with the LoRA merged, and with a compiled step besides, on a CPU by its C++ compiler
only = ""  # time, train: run this way alone, once, and print its peak memory (bench.py calls itself so)
# prepare
splade = "naver/splade-v3"  # a name of the hub or a folder
corpus = ""  # texts to encode, in any of prepare.py's formats; the first `texts` documents
texts = 512
passages = 100_000  # of the synthetic index, with 150 words each
queries = 1024  # with 40 words each
batch_tokens = 16384  # in a batch of texts to encode, as in prepare.py
repeats = 5
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = ""  # float32 or bfloat16 (time, train, decode: or both, with a comma); empty: the faster one on this device
# -----------------------------------------------------------------------------

SHAPES = {  # as in their config.json on the hub
    "mistral-7b": MistralConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                                num_key_value_heads=8, vocab_size=32000, sliding_window=None),
    "mistral-24b": MistralConfig(hidden_size=5120, intermediate_size=32768, num_hidden_layers=40, head_dim=128,
                                 num_attention_heads=32, num_key_value_heads=8, vocab_size=131072, sliding_window=None),
    "qwen2-7b": Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                            num_key_value_heads=4, vocab_size=152064),
    "llama-3.2-1b": LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                                num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "smollm2-135m": LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                                num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "modernbert-base": ModernBertConfig(),
}
# Table 1: TFLOP for compression and in all, of Mistral-7B; the paper does not count the query's tokens
PAPER = {"none": (0, 20.33), "n_layers_5_separate_without_query": (3.04, 6.53),
         "n_layers_8_separate_without_query": (4.87, 8.36), "llama_1b_separate_without_query": (2.66, 6.15)}
STYLES = {"none": "k-", "n_layers_8_separate": "C0--", "n_layers_8": "C0-o", "n_layers_5": "C1-o", "llama_1b": "C2:o",
          "modernbert": "C3-o"}


def numbers(setting, text):
    """5 -> [5]; 1,8,32 -> [1, 8, 32]; 1..50 -> [1, 2, .., 50]"""
    try:
        values = [range(int(part.split("..")[0]), int(part.split("..")[-1]) + 1) for part in text.split(",")]
    except ValueError:
        fail(f"{setting} is a number, several with commas, or a range like 1..50, not '{text}'")
    values = [n for part in values for n in part]
    if not values or min(values) < 1:
        fail(f"{setting} must be at least 1, not {text}")
    return values


# ---- models of a shape alone

def shape_folder(root, name):
    """A folder as a model of the hub has it, without weights: config.json and a tokeniser with a token a word."""
    folder = os.path.join(root, name)
    if not os.path.isdir(folder):
        SHAPES[name].save_pretrained(folder)
        words = ["<s>", "</s>", "\n", *(f"w{i}" for i in range(1000))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def random_weights(device):
    """Within it transformers makes models from config.json alone, with random weights, on the device."""
    def made(cls, name, config=None, dtype=torch.float32, **_):
        return cls.from_config(config or AutoConfig.from_pretrained(name), dtype=dtype)
    stack = ExitStack()
    stack.enter_context(torch.device(device))
    for cls in (AutoModel, AutoModelForCausalLM):
        stack.enter_context(patch.object(cls, "from_pretrained", classmethod(made)))
    if device == "meta":  # no numbers to look at
        for name in ("pretrained", "model"):
            stack.enter_context(patch(f"{name}.embedding_std", lambda embed: 1.0))
        stack.enter_context(patch("transformers.masking_utils.is_tracing", lambda *_: True))
        stack.enter_context(patch("torch.is_autocast_enabled", lambda *_: False))  # torch 2.9 knows no meta there
    return stack


# ---- FLOPs

def tflop(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e12


def generator_tflop(model, prompt, answer_tokens):
    """Of reading `prompt` embeddings and writing answer_tokens tokens, the last of which nothing reads. Two of them are
    counted: each looks at one position more than the one before, which costs the same every time."""
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    cache = None

    def read(n):
        nonlocal cache
        cache = model(inputs_embeds=torch.zeros(1, n, model.config.hidden_size, dtype=model.dtype), use_cache=True,
                      logits_to_keep=1, position_ids=torch.zeros(1, n, dtype=torch.long), **{name: cache})[name]
    whole, first, second = (tflop(partial(read, n)) for n in (prompt, 1, 1))
    n = answer_tokens - 1
    return whole + n * first + n * (n - 1) / 2 * (second - first)


def compression_tflop(c, k, d=0):
    """Of reading a query and k documents of as many tokens as there can be, or of d each."""
    q, d = c.config.query_tokens, d or c.config.doc_tokens
    ids = lambda *shape: torch.zeros(*shape, dtype=torch.long)
    mask = lambda *shape: torch.ones(*shape, dtype=torch.bool)
    if not c.packed:
        return tflop(lambda: c(ids=ids(1, k, q + d), mask=mask(1, k, q + d)))
    return tflop(lambda: c(query_ids=ids(1, q), query_mask=mask(1, q), doc_ids=ids(1, k, d), doc_mask=mask(1, k, d)))


def separate_tflop(c, k, query, d=0):
    """The same as transformers makes it: k passes over `query` tokens, a document and the memory tokens."""
    config = deepcopy(c.backbone.config)
    plain = AutoModel.from_config(config, attn_implementation=config._attn_implementation.removeprefix("packed_"))
    memory = torch.zeros(1, k, c.config.num_memory_tokens, config.hidden_size)
    d = d or c.config.doc_tokens
    rows = torch.zeros(k, query + d + c.config.num_memory_tokens, config.hidden_size)
    return tflop(lambda: (plain(inputs_embeds=rows, use_cache=False), c.projection(memory)))


def make_compressor(config, model):
    with fail_on(ValueError):
        return compressor_class(config.compressor_type)(config, model)


def compressors_of(folders, name, model, l):
    """Every compressor of the paper that fits, and ModernBERT."""
    sizes = dict(generator=folders[name], num_memory_tokens=l, query_tokens=query_tokens, doc_tokens=doc_tokens)
    made = {f"n_layers_{n}": ScaleDownConfig(num_layers=n, **sizes) for n in (5, 8, 10)
            if n <= SHAPES[name].num_hidden_layers}
    for kind, other in (("llama_1b", "llama-3.2-1b"), ("modernbert", "modernbert-base")):
        made[kind] = ScaleDownConfig(compressor_type="modernbert", compressor_model=folders[other], **sizes)
    return {kind: make_compressor(config, model) for kind, config in made.items()}


def flops_row(name, kind, compression, generation, full, **sizes):
    total = compression + generation
    return dict(generator=name, name=kind, **sizes, compression_tflop=compression, generator_tflop=generation,
                total_tflop=total, speedup=full / total)


def bench_flops():
    """TFLOP of one query: compression, generation and both, of every way of compressing."""
    rows = []
    with tempfile.TemporaryDirectory() as root, random_weights("meta"):
        folders = {name: shape_folder(root, name) for name in SHAPES}
        if runs:
            return [run_row(out_dir) for out_dir in runs.split(",")]
        for name in generator.split(","):
            model = load_model(AutoModelForCausalLM, folders[name])
            for k in numbers("docs", docs):
                full = generator_tflop(model, k * doc_tokens + query_tokens, answer_tokens)
                for l in numbers("num_memory_tokens", num_memory_tokens):
                    short = generator_tflop(model, k * l + k - 1 + query_tokens, answer_tokens)  # SEPs between them
                    costs = {}
                    for kind, c in compressors_of(folders, name, model, l).items():
                        costs[kind] = compression_tflop(c, k)
                        # in the released models query and document share a budget; a long query leaves no document
                        room = doc_tokens + 3 - query_tokens
                        if kind == "llama_1b" and 2 * room > doc_tokens:
                            costs["llama_1b_as_released"] = separate_tflop(c, k, query_tokens, room)
                            costs["llama_1b_as_released_packed"] = compression_tflop(c, k, room)
                        if c.packed:
                            costs[f"{kind}_separate"] = separate_tflop(c, k, query_tokens)
                            costs[f"{kind}_separate_without_query"] = separate_tflop(c, k, 0)
                            del decoder_layers(c.backbone)[-1].forward  # the whole of the last layer
                            costs[f"{kind}_packed"] = compression_tflop(c, k)
                    sizes = dict(docs=k, query_tokens=query_tokens, doc_tokens=doc_tokens, num_memory_tokens=l,
                                 answer_tokens=answer_tokens)
                    here = [flops_row(name, "none", 0.0, full, full, **sizes),
                            *(flops_row(name, kind, cost, short, full, **sizes) for kind, cost in costs.items())]
                    asked = (name, k, l, query_tokens, doc_tokens, answer_tokens)
                    paper = PAPER if asked == ("mistral-7b", 10, 8, 128, 128, 32) else {}
                    print(f"\n{name}: TFLOP for a query of {query_tokens} tokens, {k} documents of {doc_tokens}, "
                          f"{l} memory tokens, {answer_tokens} tokens written\n"
                          f"{'':34} compression  generator     total   speed-up   paper's compression, total")
                    for row in here:
                        print("{name:34} {compression_tflop:11.2f} {generator_tflop:10.2f} {total_tflop:9.2f} "
                              "{speedup:9.2f}x".format(**row)
                              + ("   {:.2f}, {:.2f}".format(*paper[row["name"]]) if row["name"] in paper else ""))
                    rows += here
    return rows


def run_row(out_dir):
    """What a query costs in a run of train.py, with its own sizes, and the exact match that it reached."""
    with fail_on(ValueError, OSError):
        c = ScaleDownConfig(**read_config(f"{out_dir}/best", ScaleDownConfig)[1])
        if c.mode != "compressed":
            raise ValueError(f"{out_dir} was trained with mode={c.mode}: it compresses nothing")
        k = torch.load(f"{out_dir}/last/optimizer.pt", weights_only=True, mmap=True)["run"]["num_documents"]
        with open(f"{out_dir}/metrics.jsonl") as f:
            scored = [x for x in map(loads, f) if "em" in x]
        model = load_model(AutoModelForCausalLM, c.generator)
        sizes = dict(num_memory_tokens=c.num_memory_tokens, query_tokens=c.query_tokens, doc_tokens=c.doc_tokens)
        compressor = make_compressor(c, model)
        if not hasattr(compressor, "packed"):
            raise ValueError(f"{out_dir}: what compressor_type={c.compressor_type} costs is not known here")
    if not scored:
        fail(f"{out_dir}/metrics.jsonl has no exact match: train with eval_samples")
    full = generator_tflop(model, k * c.doc_tokens + c.query_tokens, c.answer_tokens)
    short = generator_tflop(model, k * (c.num_memory_tokens + 1) - 1 + c.query_tokens, c.answer_tokens)
    row = flops_row(c.generator, out_dir, compression_tflop(compressor, k), short, full, docs=k, **sizes,
                    answer_tokens=c.answer_tokens)
    row["em"] = min(scored, key=lambda x: x["val_loss"])["em"]
    print(f"{out_dir:30} {1000 * row['total_tflop']:.3f} GFLOP a query, {row['speedup']:.2f}x, "
          f"exact match {row['em']:.3f}")
    return row


def draw(rows):
    """Cost against the number of documents, of memory tokens, and against exact match: a figure for each of which the
    rows have several."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaledown"  # the same file from the same rows
    import matplotlib.pyplot as plt

    def save(name, **labels):
        axes = plt.gca()
        axes.set(**labels)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        plt.gcf().set_size_inches(6.5, 4)
        plt.savefig(os.path.join(plot, name), bbox_inches="tight", metadata={"Date": None})
        plt.close()

    os.makedirs(plot, exist_ok=True)
    if runs:
        for row in rows:
            plt.plot(1000 * row["total_tflop"], row["em"], "o")
            plt.annotate(row["name"], (1000 * row["total_tflop"], row["em"]), (6, -3), textcoords="offset points")
        return save("accuracy.svg", xlabel="GFLOP a query", ylabel="exact match", ylim=(0, 1.02))
    for x, label, other in (("docs", "documents", "num_memory_tokens"), ("num_memory_tokens", "memory tokens", "docs")):
        fixed = rows[0][other]
        for name in dict.fromkeys(row["generator"] for row in rows):
            lines = {kind: [(row[x], row["total_tflop"]) for row in rows
                            if (row["generator"], row["name"], row[other]) == (name, kind, fixed)] for kind in STYLES}
            if max(map(len, lines.values())) < 2:
                continue
            for kind, line in lines.items():
                plt.plot(*zip(*line), STYLES[kind], label=kind, markersize=3)
            save(f"{name}_{x}.svg", title=f"{name}: compression and generation", ylim=0, xlim=0,
                 xlabel=f"{label} ({fixed} {'memory tokens' if x == 'docs' else 'documents'})", ylabel="TFLOP a query")


# ---- time and memory: models with weights, random or real

def build(kind, inference=False):
    """ScaleDown with the compressor `kind` and an adapter that does something. inference: all weights in `dtype`."""
    n_layers = kind.removeprefix("n_layers_")
    sizes = dict(num_memory_tokens=int(num_memory_tokens), query_tokens=query_tokens, doc_tokens=doc_tokens,
                 answer_tokens=answer_tokens, lora_dropout=0.1)
    with tempfile.TemporaryDirectory() as root:
        folder = shape_folder(root, generator) if generator in SHAPES else generator
        if n_layers != kind and n_layers.isdigit():
            config = ScaleDownConfig(folder, num_layers=int(n_layers), **sizes)
        elif kind in ("llama_1b", "modernbert"):
            other = shape_folder(root, dict(llama_1b="llama-3.2-1b", modernbert="modernbert-base")[kind])
            config = ScaleDownConfig(folder, "modernbert", compressor_model=other, **sizes)
        else:
            fail(f"compressors are n_layers_N, llama_1b and modernbert, not '{kind}'")
        torch.manual_seed(0)
        with fail_on(ValueError, OSError), random_weights(device) if generator in SHAPES else nullcontext():
            model = ScaleDown(config, dtype=getattr(torch, dtype)).to(device).eval()
    model.stop_ids = []  # all answers have the same length
    with torch.no_grad():
        for _, m in layers(model.generator):
            m.lora_B.normal_(std=0.01)
        if inference:
            for p in model.parameters():
                p.data = p.data.to(getattr(torch, dtype))
    return model


def read_separately(compressor):
    """Turns a compressor, in place, into what the libraries give: a pass a document, transformers' own attention, all
    of the last layer."""
    if compressor.packed:
        compressor.packed, backbone = False, compressor.backbone
        backbone.set_attn_implementation(backbone.config._attn_implementation.removeprefix("packed_"))
        del decoder_layers(backbone)[-1].forward


def with_peft(model):
    """Puts PEFT's LoRA, with the same weights, where ours was."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        for name, m in layers(model.generator):
            parent, _, leaf = name.rpartition(".")
            setattr(model.generator.get_submodule(parent), leaf, m.base)
        model.generator = peft.PeftModel.from_pretrained(model.generator, folder, is_trainable=True)


def examples(n):
    """n queries of query_tokens tokens over `docs` documents of doc_tokens, with answers of answer_tokens."""
    rng = np.random.default_rng(0)
    text = lambda length: " ".join(f"w{i}" for i in rng.integers(0, 1000, length))
    return [dict(query=text(query_tokens), documents=[text(doc_tokens) for _ in range(int(docs))],
                 answer=text(answer_tokens)) for _ in range(n)]


def seconds(ways):
    """ways: {name: function}, each called `repeats` times, in turns, after a call that does not count -> {name: [s]}"""
    taken = {name: [] for name in ways}
    for i in range(repeats + 1):
        for name, way in ways.items():
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if i > 0:
                taken[name].append(time.perf_counter() - start)
    return taken


def spread(values, form):
    return "{} ({} to {})".format(*(format(v, form) for v in (statistics.median(values), min(values), max(values))))


def peak_gb(way):
    """Peak memory of one call: of the device, or (Linux) of this process, torch and transformers left out."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        way()
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform != "linux":
        return float("nan")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # forget the highest so far
    way()
    return memory("VmHWM") - EMPTY


def memory(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024 / 1e9


def alone(name, n, *more):
    """Peak memory in GB of a way, which a process of its own builds and calls; NaN where that does not fit."""
    command = [sys.executable, *sys.argv, f"--only={name}", f"--batch={n}", f"--dtype={dtype}", *more]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode == 0:
        return float(out.stdout.split()[-1])
    if out.stderr.splitlines()[-1:] and out.stderr.splitlines()[-1].startswith("error: "):
        sys.exit(out.stderr.splitlines()[-1])
    return float("nan")


def agree(what, ours, theirs, tolerance):
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{what}: largest difference {difference:.1e} of the largest value")
    if not difference < tolerance:
        fail(f"{what} do not agree")


TOLERANCE = dict(float32=1e-3, bfloat16=0.1)


def answering(name, n, model=None):
    """-> (model, function that answers n queries, function that only compresses them) of a way: none, or a compressor,
    perhaps _separate"""
    kind = compressors.split(",")[0] if name == "none" else name.removesuffix("_separate")
    model = model or build(kind, inference=True)
    if name == "none":
        model.compressor = None
    elif name.endswith("_separate"):
        read_separately(model.compressor)
    asked = [x["query"] for x in examples(n)], [x["documents"] for x in examples(n)]
    mode = "full" if name == "none" else "compressed"
    return model, lambda: model.generate(*asked, answer_tokens, mode=mode), lambda: model.compress(*asked)


def bench_time():
    """Milliseconds and peak memory of a query, answered from full text and from compressed documents."""
    if only:
        return print(peak_gb(answering(only, int(batch))[1]))
    names = ["none", *(f"{kind}{way}" for kind in compressors.split(",") for way in ("", "_separate"))]
    names = [name for name in names if name != "modernbert_separate"]  # it reads separately anyway
    rows, models = [], {}
    print(f"{generator} on {device}, {dtype}: a query of {query_tokens} tokens, {docs} documents of {doc_tokens}, "
          f"{num_memory_tokens} memory tokens, {answer_tokens} tokens written")
    # before this process takes memory of its own
    peaks = {(name, n): alone(name, n) for n in numbers("batch", batch) for name in names}
    for n in numbers("batch", batch):
        whole, compressing = {}, {}
        while len(whole) < len(names):
            try:
                for name in names:
                    models[name], whole[name], compressing[name] = answering(name, n, models.get(name))
                    models[name].decoder.model = models[name].generator = models["none"].generator  # one is enough
                    whole[name]()
            except torch.OutOfMemoryError:
                if n == 1:
                    fail("one query alone does not fit")
                print(f"batch {n} does not fit: half of it")
                n, whole = n // 2, {}
                peaks |= {(name, n): float("nan") for name in names if (name, n) not in peaks}
        for name in names:
            if name.endswith("_separate"):
                kind = name.removesuffix("_separate")
                agree(f"memory embeddings of {kind}, packed and separate,", compressing[kind]()[0],
                      compressing[name]()[0], TOLERANCE[dtype])
        whole, compressing = seconds(whole), seconds({name: compressing[name] for name in names[1:]})
        base = statistics.median(whole["none"])
        for name in names:
            ms, compression = ([1000 * s / n for s in taken.get(name, [0.0])] for taken in (whole, compressing))
            row = dict(name=name, batch=n, ms_a_query=ms, compression_ms_a_query=compression, peak_gb=peaks[name, n],
                       speedup=base / statistics.median(whole[name]))
            rows.append(row)
            print(f"batch {n:3}  {name:20} {spread(ms, '.1f'):>28} ms a query, of it compression "
                  f"{spread(compression, '.1f'):>26} {row['speedup']:6.2f}x   peak {row['peak_gb']:.2f} GB")
    return rows


def training(name, n, kind):
    """-> (model, function that makes a training step on n examples and returns the loss) of a way: ours or ordinary"""
    model = build(kind)
    if name == "ordinary":
        read_separately(model.compressor)
        with_peft(model)
    model.train()
    optimizer = model.configure_optimizers(1e-5, 1e-5, 0.1, (0.9, 0.999))
    batch = model.to_device(model.collate(examples(n), int(docs)))
    ctx = nullcontext() if dtype == "float32" else torch.autocast(device, dtype=torch.bfloat16)

    def ordinary_loss():
        memory, _ = model.compressor(**batch["compressor"])
        x, mask = model.prompt_embeddings(memory, batch)
        labels = F.pad(batch["labels"], (x.shape[1] - batch["labels"].shape[1], 0), value=-100)
        return model.generator(inputs_embeds=x, attention_mask=mask, labels=labels, use_cache=False,
                               position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)).loss

    def step(update=True):
        attention_for_training(device, dtype, model.config, int(docs))
        if name == "ordinary":
            torch.backends.cuda.enable_flash_sdp(True)
        with ctx:
            loss = ordinary_loss() if name == "ordinary" else model(batch)[0]
        loss.backward()
        if update:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()
    return model, step, StepFlops(model).count(batch)[1]


def bench_train():
    """Tokens a second and peak memory of a training step, ours and as one would write it with the libraries."""
    if only:
        return print(peak_gb(training(only, int(batch), compressors.split(",")[0])[1]))
    rows, ways = [], [(kind, n) for kind in compressors.split(",") for n in numbers("batch", batch)]
    peaks = {(name, kind, n): alone(name, n, f"--compressors={kind}")
             for kind, n in ways for name in ("ours", "ordinary")}
    for kind, n in ways:
        ours, our_step, tokens = training("ours", n, kind)
        theirs, their_step, _ = training("ordinary", n, kind)
        print(f"{generator}, {kind}, on {device}, {dtype}: a training step on {n} queries of {query_tokens} "
              f"tokens, {docs} documents of {doc_tokens}, {num_memory_tokens} memory tokens, answers of "
              f"{answer_tokens}")
        ours.eval(), theirs.eval()  # each draws its own dropout
        agree("the losses", our_step(update=False), their_step(update=False), TOLERANCE[dtype] / 10)
        agree("the gradients of the memory tokens", ours.compressor.memory_tokens.grad,
              theirs.compressor.memory_tokens.grad, TOLERANCE[dtype])
        ours.train(), theirs.train()
        taken = seconds({"ours": our_step, "ordinary": their_step})
        for name, s in taken.items():
            row = dict(name=name, compressor=kind, batch=n, tokens_per_s=[tokens / t for t in s],
                       peak_gb=peaks[name, kind, n])
            rows.append(row)
            print(f"{name:10} {spread(row['tokens_per_s'], ',.0f'):>28} tokens/s   peak {row['peak_gb']:.2f} GB")
        faster = statistics.median(taken["ordinary"]) / statistics.median(taken["ours"])
        print(f"ours: {faster:.2f}x the tokens/s, {rows[-2]['peak_gb'] / rows[-1]['peak_gb']:.2f} of the memory")
    return rows


def bench_attention():
    """The packed sequence's attention in one layer of the generator's shape: ours, one mask over the whole, and
    FlexAttention with a block mask. Forward, and forward and backward (FlexAttention has none on a CPU)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape, B, k = SHAPES[generator], max(numbers("batch", batch)), int(docs)
    H, G = shape.num_attention_heads, shape.num_key_value_heads
    c = getattr(shape, "head_dim", None) or shape.hidden_size // H
    Q, S = query_tokens, doc_tokens + int(num_memory_tokens)
    torch.manual_seed(0)
    q, key, value = (torch.randn(B, heads, Q + k * S, c, device=device, dtype=getattr(torch, dtype))
                     for heads in (H, G, G))

    def sees(b, h, i, j):
        return (i >= j) & ((j < Q) | ((i - Q) // S == (j - Q) // S))
    i = torch.arange(Q + k * S, device=device)
    whole = sees(0, 0, i[:, None], i)[None, None]
    mask = torch.ones(B * k, 1, S, Q + S, dtype=torch.bool, device=device).tril(Q)
    block_mask = create_block_mask(sees, None, None, Q + k * S, Q + k * S, device=device)
    flex = torch.compile(flex_attention)
    ways = {
        "ours": lambda: packed_attention(None, q, key, value, mask, eager=False)[0].transpose(1, 2),
        "mask over the whole": lambda: F.scaled_dot_product_attention(q, key, value, whole, enable_gqa=True),
        "FlexAttention": lambda: flex(q, key, value, block_mask=block_mask, enable_gqa=True)}
    rows = []
    for gradients in (False, True):
        for t in (q, key, value):
            t.requires_grad_(gradients)
        if gradients and device == "cpu":
            del ways["FlexAttention"]
        with torch.set_grad_enabled(gradients):
            for name in [*ways][1:]:
                agree(f"ours and {name}", ways["ours"](), ways[name](), TOLERANCE[dtype])
            taken = seconds({name: (lambda way=way: way().sum().backward()) if gradients else way
                             for name, way in ways.items()})
        for name, s in taken.items():
            rows.append(dict(name=name, backward=gradients, ms=[1000 * t for t in s]))
            print(f"forward{' and backward' * gradients:14} {name:20} {spread(rows[-1]['ms'], '.1f')} ms")
    return rows


def bench_lora():
    """LoRALinear next to PEFT's layer, forward and backward over 1,024 tokens."""
    import peft

    def kept(layer, x):
        """Bytes that the forward pass keeps for the backward pass, weights left out."""
        storages, own = {}, {p.untyped_storage().data_ptr() for p in layer.parameters()}
        def pack(t):
            if t.untyped_storage().data_ptr() not in own:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return sum(storages.values())

    rows = []
    ctx = nullcontext() if dtype == "float32" else torch.autocast(device, dtype=torch.bfloat16)
    for d in numbers("hidden", hidden):
        for r in numbers("ranks", ranks):
            torch.manual_seed(0)
            base = torch.nn.Linear(d, d, bias=False, device=device, dtype=getattr(torch, dtype))
            ours = LoRALinear(base, r, 2 * r, dropout=0.1)
            wrapped = peft.get_peft_model(torch.nn.Sequential(base), peft.LoraConfig(
                target_modules=["0"], r=r, lora_alpha=2 * r, lora_dropout=0.1))
            theirs = wrapped.base_model.model[0]
            with torch.no_grad():
                ours.lora_B.normal_(std=0.01)
                theirs.lora_A["default"].weight.copy_(ours.lora_A)
                theirs.lora_B["default"].weight.copy_(ours.lora_B)
            x = torch.randn(1024, d, device=device, requires_grad=True)
            g = torch.randn(1024, d, device=device, dtype=getattr(torch, dtype))

            def step(layer, x=x, g=g):
                with ctx:
                    layer(x).backward(g)
            with torch.no_grad(), ctx:
                ours.eval(), theirs.eval()
                agree(f"hidden {d}, rank {r}, outputs", ours(x), theirs(x), TOLERANCE[dtype])
                ours.train(), theirs.train()
            taken = seconds({"ours": partial(step, ours), "peft": partial(step, theirs)})
            with ctx:
                memory = {"ours": kept(ours, x), "peft": kept(theirs, x)}
            ratios = [a / b for a, b in zip(taken["ours"], taken["peft"])]
            rows.append(dict(hidden=d, rank=r, seconds=taken, kept_bytes=memory, time_ratio=statistics.median(ratios)))
            ms = {name: spread([1000 * t for t in s], ".2f") for name, s in taken.items()}
            print(f"hidden {d:5}, rank {r:3}: ours {ms['ours']} ms, PEFT {ms['peft']} ms; ours / PEFT: time "
                  f"{spread(ratios, '.2f')}, memory kept for the backward pass {memory['ours'] / memory['peft']:.2f}")
    return rows


def bench_decode():
    """Our generation next to transformers' generate(), from the same embeddings."""
    model, rows = build(compressors.split(",")[0], inference=True), []
    model.generator.generation_config.eos_token_id = None  # theirs, too, writes answer_tokens tokens
    model.decoder.num_tokens = model.generator.config.vocab_size  # a shape's tokeniser has fewer, which theirs ignores
    decoders = {"ours": model.decoder}
    if compile:
        merged = deepcopy(model.generator)
        merge(merged)
        decoders |= {name: Decoder(merged, model.decoder.num_tokens) for name in ("merged", "merged and compiled")}
        decoders["merged and compiled"].compile()
    print(f"{generator} on {device}, {dtype}: {answer_tokens} tokens after {docs} compressed documents")
    for n in numbers("batch", batch):
        asked = [x["query"] for x in examples(n)], [x["documents"] for x in examples(n)]
        x, mask = model.embed_prompts(*asked)
        prefix = len(model.before_ids)

        def ours(decoder, x=x, mask=mask, prefix=prefix):
            return decoder.generate(x, mask, answer_tokens, model.stop_ids, prefix=prefix)

        def theirs(x=x, mask=mask):
            with torch.no_grad():
                return model.generator.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=answer_tokens,
                                                do_sample=False, pad_token_id=0).tolist()
        ways = {name: partial(ours, decoder) for name, decoder in decoders.items()} | {"transformers": theirs}
        same = sum(all(answer == row[0] for answer in row) for row in zip(*(way() for way in ways.values())))
        print(f"batch {n}: {same} of {n} answers are the same")
        if dtype == "float32" and same < n:
            fail("the generations do not agree")
        taken = seconds(ways)
        base = statistics.median(taken["transformers"])
        for name, s in taken.items():
            rows.append(dict(name=name, batch=n, tokens_per_s=[n * answer_tokens / t for t in s]))
            print(f"batch {n:3}  {name:19} {spread(rows[-1]['tokens_per_s'], ',.1f'):>28} tokens/s   "
                  f"{base / statistics.median(s):5.2f}x")
    return rows


# ---- prepare.py

def timed(ways, n, unit):
    """ways: {name: function}, each called `repeats` times, in turns after one call that does not count; prints the
    median of n things a second with the least and the most, and how much faster the first way is."""
    taken = seconds(ways)
    first = statistics.median(next(iter(taken.values())))
    for name, s in taken.items():
        median = statistics.median(s)
        print(f"{name:40} {n / median:10,.1f} {unit}/s  ({n / max(s):,.1f} to {n / min(s):,.1f})   "
              f"{median / first:5.2f}x the first's time")


def bench_encoding():
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    documents = [document_text(dict(title=title, text=text))
                 for _, title, text in islice(read_documents(corpus), texts)]
    model = Splade(splade, device, getattr(torch, dtype))
    module = Transformer(splade, transformer_task="fill-mask", model_kwargs=dict(dtype=dtype))
    other = SparseEncoder(modules=[module, SpladePooling("max")], device=device)
    pointers, words, weights = model.encode(documents, batch_tokens)
    theirs = other.encode(documents, convert_to_sparse_tensor=False).float().cpu().numpy()
    ours = np.zeros_like(theirs)
    ours[np.repeat(np.arange(len(documents)), np.diff(pointers)), words] = weights
    print(f"encoding {len(documents)} passages with {splade}: {len(words) / len(documents):.0f} words a passage")
    print(f"largest difference from sentence-transformers: {abs(ours - theirs).max():.1e}")
    if not np.allclose(ours, theirs, atol=1e-4 if dtype == "float32" else 0.1):
        fail("the two encoders do not agree")
    timed({"prepare.py": lambda: model.encode(documents, batch_tokens),
           "sentence-transformers, batch 32 (default)": lambda: other.encode(documents),
           "sentence-transformers, batch 8": lambda: other.encode(documents, batch_size=8)}, len(documents), "passages")


def sparse_matrix(rng, n, words_a_row, vocab_size=30522):
    """Rows of words drawn by a Zipf-like law, as SPLADE's are, and random weights: pointers, words, weights."""
    p = (10 + np.arange(vocab_size)) ** -0.8
    drawn = np.searchsorted(np.cumsum(p / p.sum()), rng.random((n, words_a_row))).clip(max=vocab_size - 1)
    drawn = np.unique(drawn + vocab_size * np.arange(n)[:, None])  # a word once a row
    pointers = np.searchsorted(drawn, vocab_size * np.arange(n + 1))
    weights = rng.gamma(2.0, 0.4, len(drawn)).astype(np.float32)
    return pointers, (drawn % vocab_size).astype(np.int32), weights


def write_index(folder, rng, n):
    """A synthetic index of n passages on disk, in shards as prepare.py makes them; -> their files."""
    size = shard_size(n)
    for i, start in enumerate(range(0, n, size)):
        with open(f"{folder}/{i:06d}", "wb") as f:
            write_shard(f, sparse_matrix(rng, min(size, n - start), 150), 30522, start)
    return sorted(os.path.join(folder, name) for name in os.listdir(folder))


def bench_search():
    import scipy.sparse
    from splade_index.numba.retrieve_utils import _retrieve_numba_functional

    rng, k = np.random.default_rng(0), 50
    q = sparse_matrix(rng, queries, 40)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        shards = write_index(folder, rng, passages)
        rows, columns, values = [], [], []
        for path in shards:
            shard = {key: t.numpy() for key, t in load_file(path).items()}
            columns.append(np.repeat(np.arange(30522), np.diff(shard["pointers"])))
            rows.append(shard["passages"] + shard["span"][0])
            values.append(shard["weights"])
        matrix = scipy.sparse.csr_matrix((np.concatenate(values), (np.concatenate(columns), np.concatenate(rows))),
                                         shape=(30522, passages))  # (V, n)
        del rows, columns, values
        scores = dict(data=matrix.data, indices=matrix.indices, indptr=matrix.indptr, num_docs=passages)
        by_query = np.split(q[1], q[0][1:-1]), np.split(q[2], q[0][1:-1])
        q_matrix = scipy.sparse.csr_matrix((q[2], q[1], q[0]), shape=(queries, 30522))

        def with_scipy():
            out = q_matrix @ matrix
            best = []
            for i in range(queries):
                row = slice(out.indptr[i], out.indptr[i + 1])
                top = np.argpartition(-out.data[row], k)[:k]
                best.append(np.sort(out.data[row][top])[::-1])
            return np.stack(best)

        def with_splade_index():
            return _retrieve_numba_functional(*by_query, scores, k=k, n_threads=threads)[1]

        ours = search(shards, q, 30522, k, device)[1]
        print(f"\nsearching {passages:,} synthetic passages for {queries} queries, the {k} best, {threads} threads: "
              f"{matrix.nnz / passages:.0f} words a passage, {len(q[1]) / queries:.0f} a query")
        differences = [abs(ours - other()).max() for other in (with_scipy, with_splade_index)]
        print("largest difference from scipy.sparse: {:.1e}, from splade-index: {:.1e}".format(*differences))
        if max(differences) > 1e-4:
            fail("the searches do not agree")
        timed({"prepare.py, index on disk": lambda: search(shards, q, 30522, k, device),
               "scipy.sparse, index in memory": with_scipy,
               "splade-index (numba), index in memory": with_splade_index}, queries, "queries")


if __name__ == "__main__":
    EMPTY = memory("VmRSS") if sys.platform == "linux" else 0.0
    configure(globals())
    at_least(globals(), texts=1, passages=100, queries=1, batch_tokens=1, repeats=1, query_tokens=1, doc_tokens=1,
             answer_tokens=1)
    benches = dict(flops=bench_flops, time=bench_time, train=bench_train, attention=bench_attention, lora=bench_lora,
                   decode=bench_decode)
    if what not in (*benches, "prepare"):
        fail(f"what is {', '.join(benches)} or prepare, not '{what}'")
    device = torch_device(device)
    dtypes = (dtype or fast_dtype(device)).split(",")
    if set(dtypes) - set(TOLERANCE) or len(dtypes) > 1 and what not in ("time", "train", "decode"):
        fail(f"dtype is float32 or bfloat16, not '{dtype}'; for time, train and decode also both, with a comma")
    if json and (os.path.isdir(json) or not os.path.isdir(os.path.dirname(json) or ".")):
        fail(f"json={json} is a folder, or in none")
    if plot:
        several = runs or len(numbers("docs", docs) + numbers("num_memory_tokens", num_memory_tokens)) > 2
        if what != "flops" or not several:
            fail("plot takes --what=flops and several docs, num_memory_tokens or runs")
        if os.path.exists(plot) and not os.path.isdir(plot):
            fail(f"plot={plot} is not a folder")
    dtype = dtypes[0]
    if what == "prepare":
        if not os.path.isfile(corpus):
            fail(f"--corpus=FILE: a file of texts to encode ({corpus or 'none given'})")
        bench_encoding()
        bench_search()
        sys.exit()
    for name in generator.split(","):
        shapes = [shape for shape in SHAPES if shape != "modernbert-base"]
        if name not in shapes and (what in ("flops", "attention") or not os.path.isdir(name)):
            fail(f"generator is {', '.join(shapes)} or, but for flops and attention, a model's folder, not '{name}'")
    sizes = numbers("docs", docs) + numbers("num_memory_tokens", num_memory_tokens)
    if what != "flops" and [*map(str, sizes)] != [docs, num_memory_tokens]:
        fail(f"docs is one number, and num_memory_tokens too, but for --what=flops: not {docs} and {num_memory_tokens}")
    rows = []
    for dtype in dtypes:
        rows += [row | dict(dtype=dtype) for row in benches[what]() or ()]
    if json and not only:
        with open(json, "w") as f:
            dump(rows, f, indent=1)
    if plot and what == "flops":
        draw(rows)

"""Tiny random models of every architecture that the tests name, made once a session."""

import json
import multiprocessing
import os
import runpy
import string
import subprocess
import sys
from tempfile import NamedTemporaryFile

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder fails at once instead of asking the hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a core each, of the two

import pytest
import torch.distributed.run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    logging,
)

logging.disable_progress_bar()
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = ["Extract the facts that matter from the background and answer as briefly as possible. Question: who is it?",
        "Mara keeps a red hound near the river. The mayor of Loku is Tuson; the bridge is made of stone.\n\nBackground:"]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
           "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
           "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")
DECODER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=512)
ENCODER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
DEBERTA = dict(relative_attention=True, position_buckets=64, norm_rel_ebd="layer_norm", share_att_key=True,
               pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0)  # as v3's
ENCODERS = ("modernbert", "bert", "roberta", "splade", "cross_encoder", "two_labels")


def save_tokenizer(folder, template=None, encoder=False, sentencepiece=False):
    """Byte-level BPE or, as Mistral's and Llama 2's, SentencePiece's kind, which puts a space before every text."""
    tokenizer = Tokenizer(models.BPE())
    kind = (pre_tokenizers.Metaspace, decoders.Metaspace) if sentencepiece else (pre_tokenizers.ByteLevel, decoders.ByteLevel)
    tokenizer.pre_tokenizer = kind[0]() if sentencepiece else kind[0](add_prefix_space=False)
    tokenizer.decoder = kind[1]()
    special = ["[PAD]", "[CLS]", "[SEP]", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=list(string.printable) if sentencepiece else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    kwargs = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]") if encoder else dict(
        bos_token="<s>", eos_token="</s>", chat_template=template)
    if not encoder:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)
    fast.save_pretrained(folder)
    return len(fast)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """name -> folder of a tiny random model, in the layout of the hub."""
    root = tmp_path_factory.mktemp("models")
    made = {}

    def make(name):
        if name in made:
            return made[name]
        folder = str(root / name)
        template = {"mistral": MISTRAL, "gemma2": MISTRAL, "gpt2": None}.get(name, CHATML)
        auto = {"splade": AutoModelForMaskedLM, "cross_encoder": AutoModelForSequenceClassification,
                "two_labels": AutoModelForSequenceClassification}.get(name, AutoModel if name in ENCODERS else AutoModelForCausalLM)
        encoder = name in ENCODERS
        V = max(300, save_tokenizer(folder, template, encoder, sentencepiece=name == "mistral"))
        ends = dict(bos_token_id=3, eos_token_id=4, pad_token_id=None)
        configs = {
            "llama": lambda: LlamaConfig(vocab_size=V, **DECODER, **ends),
            "llama_small": lambda: LlamaConfig(vocab_size=V, **{**DECODER, "hidden_size": 16}, **ends),
            "mistral": lambda: MistralConfig(vocab_size=V, **DECODER, **ends),
            "qwen2": lambda: Qwen2Config(vocab_size=V, **DECODER, **ends),
            "gemma2": lambda: Gemma2Config(vocab_size=V, head_dim=8, **DECODER, **{**ends, "pad_token_id": 0}),
            "gemma3": lambda: Gemma3TextConfig(vocab_size=V, head_dim=8, sliding_window=256, sliding_window_pattern=2,
                                               **DECODER, **{**ends, "pad_token_id": 0}),
            "gpt2": lambda: GPT2Config(vocab_size=V, n_embd=32, n_layer=4, n_head=4, n_positions=512, **ends),
            "modernbert": lambda: ModernBertConfig(vocab_size=V, **ENCODER, pad_token_id=0, cls_token_id=1,
                                                   sep_token_id=2, global_attn_every_n_layers=2, local_attention=16),
            "bert": lambda: BertConfig(vocab_size=V, **ENCODER),
            "roberta": lambda: RobertaConfig(vocab_size=V, **ENCODER, pad_token_id=0),
            "splade": lambda: BertConfig(vocab_size=V, **ENCODER),
            "cross_encoder": lambda: DebertaV2Config(vocab_size=V, **ENCODER, **DEBERTA, num_labels=1),
            "two_labels": lambda: DebertaV2Config(vocab_size=V, **ENCODER, **DEBERTA, num_labels=2),
        }
        torch.manual_seed([*configs].index(name))  # the same model, whatever was made before
        model = auto.from_config(configs[name]())
        with torch.no_grad():  # larger than the usual 0.02, so that what is wrong shows
            for p in model.parameters():
                if p.dim() >= 2:
                    p.mul_(5)
        model.save_pretrained(folder)
        made[name] = folder
        return folder

    return make


EXAMPLES = [
    dict(query="who is the mayor of Loku?", documents=["The mayor of Loku is Tuson.", {"title": "Loku", "text": "A town."},
         "Mara keeps a red hound near the river."], answer="Tuson", reranking_scores=[3.0, 1.0, -2.0]),
    dict(query="who keeps it?", documents=["Mara keeps a hound; the bridge is made of stone and the river is near."],
         answer="Mara keeps the hound.", reranking_scores=[0.5]),
    dict(query="what is the bridge made of, and who is it that made it?", documents=["stone", "The bridge is stone."],
         answer="stone", reranking_scores=[1.5, 2.5]),
]


@pytest.fixture
def examples():
    return [dict(x) for x in EXAMPLES]


# scripts run in processes forked from one that has imported these: to start one anew takes longer than most tests
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch", "torch.distributed.checkpoint.state_dict", "torch.distributed.run", "transformers",
                              "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
                              "transformers.integrations.finegrained_fp8"])


def be_script(args, cwd, env, out, err):
    for fd, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), fd)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    sys.argv = [*map(str, args)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def script(args, cwd=ROOT):
    """-> exit status, stdout, stderr"""
    with NamedTemporaryFile("r") as out, NamedTemporaryFile("r") as err:
        process = forks.Process(target=be_script, args=(args, cwd, dict(os.environ), out.name, err.name))
        process.start()
        process.join()
        return process.exitcode, out.read(), err.read()


def run(*args, ok=True, cwd=ROOT):
    """-> stdout of a script, or, where it should fail, the one line that it says."""
    status, said, complained = script(args, cwd)
    assert status == (0 if ok else 1), said + complained
    if ok:
        return said
    assert "Traceback" not in complained, complained
    return complained.strip().splitlines()[-1]


def torchrun(n, *args, ok=True):
    """-> stdout of a script in n processes, or, where it should fail, what they say."""
    status, said, complained = script([torch.distributed.run.__file__, "--standalone", f"--nproc_per_node={n}", *args])
    assert (status == 0) == ok, said + complained
    return said if ok else complained


@pytest.fixture(scope="session")
def job(tiny, tmp_path_factory):
    """(arguments of a small training run, its out_dir, the folder of its files)"""
    folder = tmp_path_factory.mktemp("job")
    for name, n in (("train", 20), ("val", 5)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(EXAMPLES[i % 3]) + "\n" for i in range(n)))
    settings = dict(generator=tiny("llama"), train_data=folder / "train.jsonl", val_data=folder / "val.jsonl",
                    out_dir=folder / "out", num_layers=2, num_memory_tokens=2, num_documents=3, answer_tokens=8,
                    enable_reranking=True, batch_size=2, gradient_accumulation_steps=2, epochs=2.0, eval_interval=5,
                    eval_samples=2, log_interval=1, compressor_lr=1e-2, generator_lr=1e-2, device="cpu", dtype="float32")
    return [f"--{k}={v}" for k, v in settings.items()], str(folder / "out"), folder


@pytest.fixture(scope="session")
def trained(job):
    args, out_dir, _ = job
    return run("train.py", *args)


def metrics(out_dir):
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def curve(out_dir):
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in x.items() if k not in ("examples_per_s", "tokens_per_s", "mfu")} for x in metrics(out_dir)]


def losses(out_dir):
    return {x["step"]: x["loss"] for x in metrics(out_dir) if "loss" in x}


# ---- files of invented text, and what it takes to read them

WORDS = "the mayor of Loku is Tuson keeps a red hound near river bridge made stone facts matter question who it".split()


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def sentence(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def peak_memory(code):
    """MiB that a process of this code has had resident at most (ru_maxrss would count the pytest that it comes from)."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc")
    code += "\nprint(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mib = float(done.stdout.splitlines()[-1])
    print(f"{mib:.0f} MiB")
    return mib

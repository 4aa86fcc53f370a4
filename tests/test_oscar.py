"""Checkpoints of the authors' release, and what their own class answers from them (tests/data/oscar_tiny.tar.xz: tiny
random ones of all kinds; embeddings that the cases do not use are zero)."""

import json
import os
import shutil
import tarfile
from functools import partial

import pytest
import torch
from conftest import EXAMPLES, jsonl, metrics, run, torchrun
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import generate
from checkpoint import read_config
from compressor import left_pad
from lora import layers
from model import ScaleDown, ScaleDownConfig

KINDS = ["oscar_mistral", "oscar_qwen", "n_layers", "pisco"]
HERE = os.path.dirname(__file__)


@pytest.fixture(scope="module")
def tiny_oscar(tmp_path_factory):
    """The folder oscar_tiny, with the checkpoints as import_oscar.py writes them in imported/."""
    folder = tmp_path_factory.mktemp("oscar")
    with tarfile.open(f"{HERE}/data/oscar_tiny.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    folder = f"{folder}/oscar_tiny"
    for kind in KINDS:
        run("import_oscar.py", f"--checkpoint={folder}/checkpoints/{kind}", f"--out_dir={folder}/imported/{kind}")
    return folder


def expected(folder, kind):
    with open(f"{folder}/expected/cases.json") as f:
        cases = json.load(f)
    return cases["queries"], cases["documents"], cases["cases"][kind], load_file(f"{folder}/expected/{kind}.safetensors")


def separate(c, queries, documents):
    """The memory of every document by a pass of its own over `query document MEM`, and ids and number of what it read."""
    read, memory = [], []
    for query, texts in zip(queries, documents):
        for text in texts:
            (start,), (rest,) = c.layout.rows([query], [[text]])
            read.append(start + rest)
            ids, mask = left_pad([start + rest])
            memory.append(c.read_rows(c.learned_tokens(), ids[None], mask[None])[0, 0, -len(c.learned_tokens()):])
    return read, c.projection(torch.stack(memory))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_prompt_logits_and_answers_are_the_authors(tiny_oscar, kind, tmp_path):
    model = ScaleDown.from_pretrained(f"{tiny_oscar}/imported/{kind}", dtype=torch.float32)
    queries, documents, case, theirs = expected(tiny_oscar, kind)

    def check(model):
        memory, _ = model.compress(queries, documents)
        torch.testing.assert_close(memory.flatten(0, 1), theirs["memory"], atol=1e-5, rtol=0)
        x, mask = model.embed_prompts(queries, documents)
        logits = generate.last_logits(model.generator, x, mask, 1)[:, 0]
        n = len(model.tokenizer)  # theirs goes on with the special tokens, ours (Qwen2) with rows that no token has
        torch.testing.assert_close(logits[:, :n], theirs["logits"][:, :n], atol=1e-4, rtol=0)
        assert model.decoder.generate(x, mask, 12, model.stop_ids) == theirs["output_ids"].tolist()
        assert model.generate(queries, documents, 12) == case["answers"]
        for b, query in enumerate(queries):  # alone, without padding
            torch.testing.assert_close(model.compress([query], [documents[b]])[0][0], memory[b], atol=1e-5, rtol=0)
        return x, mask

    x, mask = check(model)
    batch = model.collate([dict(query=q, documents=d) for q, d in zip(queries, documents)])
    l, n = model.config.num_memory_tokens, len(model.tokenizer)
    special = [*range(n, n + l), n + l + 2]  # MEM_1 .. MEM_l SEP
    for b in range(2):
        ids = theirs["dec_ids"][b][theirs["dec_mask"][b].bool()].tolist()
        assert model.before_ids.tolist() + 3 * special + batch["tail_ids"][b][batch["tail_mask"][b]].tolist() == ids

    read = [row[m.bool()].tolist() for row, m in zip(theirs["enc_ids"], theirs["enc_mask"])]  # with MEM at the end
    if kind == "pisco":
        ids, mask_ = (t.flatten(0, 1) for t in batch["compressor"].values())
        ours = [[n + l + 1] + row[m].tolist()[1:] for row, m in zip(ids, mask_)]  # <ENC>
    else:
        assert model.compressor.packed
        model.compressor.packed = False
        with torch.no_grad():
            model.compressor.backbone.set_attn_implementation("sdpa")
            layer = model.compressor.backbone.layers[-1]
            del layer.forward
            ours, memory = separate(model.compressor, queries, documents)
            if kind != "n_layers":
                memory = model.compressor.generator_std * model.compressor.scale * memory
        torch.testing.assert_close(memory, theirs["memory"], atol=1e-5, rtol=0)
    assert ours == [row[:-l] for row in read]

    model = ScaleDown.from_pretrained(f"{tiny_oscar}/imported/{kind}", dtype=torch.float32)
    model.save(f"{tmp_path}/saved")
    check(ScaleDown.from_pretrained(f"{tmp_path}/saved", dtype=torch.float32))
    run("evaluate.py", f"--out_dir={tiny_oscar}/imported/{kind}", f"--export={tmp_path}/exported", "--dtype=float32",
        "--device=cpu")
    exported = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/exported", dtype=torch.float32)
    for b in range(2):
        logits = exported(inputs_embeds=x[b:b + 1, mask[b]]).logits[:, -1]
        torch.testing.assert_close(logits[0, :n], theirs["logits"][b, :n], atol=1e-4, rtol=0)


def copied(folder, tmp_path, kind):
    shutil.copytree(f"{folder}/checkpoints/{kind}", f"{tmp_path}/checkpoints/{kind}")
    shutil.copytree(f"{folder}/base", f"{tmp_path}/base")
    return f"{tmp_path}/checkpoints/{kind}"


def with_other_rows(path, n):
    """Makes the last n rows of a file's embeddings random (those of tiny checkpoints are equal) -> the rows."""
    tensors = torch.load(path, weights_only=True)
    table = next(t for name, t in tensors.items() if name.endswith("embed_tokens.weight"))
    with torch.no_grad():
        table[-n:] = torch.randn(n, table.shape[1])
    torch.save(tensors, path)
    return table[-n:].detach()


@pytest.mark.parametrize("kind", KINDS)
def test_each_learned_token_has_its_row(tiny_oscar, kind, tmp_path):
    copy = copied(tiny_oscar, tmp_path, kind)
    l = ScaleDown.from_pretrained(f"{tiny_oscar}/imported/{kind}").config.num_memory_tokens
    *memory, _, enc, sep = with_other_rows(f"{copy}/decoder_first_last_layers.pth", l + 3)  # _ is <AE>
    if kind != "pisco":
        memory = with_other_rows(f"{copy}/compressor/compressor.pth", l)
    run("import_oscar.py", f"--checkpoint={copy}", f"--out_dir={tmp_path}/out")
    model = ScaleDown.from_pretrained(f"{tmp_path}/out", dtype=torch.float32)
    assert torch.equal(model.sep, sep[None]) and torch.equal(model.compressor.memory_tokens, torch.stack([*memory]))
    assert kind != "pisco" or torch.equal(model.compressor.enc_token, enc[None])


def test_pisco_has_one_copy_of_the_weights(tiny_oscar):
    model = ScaleDown.from_pretrained(f"{tiny_oscar}/imported/pisco", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(f"{tiny_oscar}/base/mistral")
    adapter = sum(p.numel() for _, m in layers(model.generator) for p in (m.lora_A, m.lora_B))
    c = model.config
    tokens = (c.num_memory_tokens + 2) * plain.config.hidden_size  # MEM, <ENC>, SEP
    assert sum(p.numel() for p in model.parameters()) == plain.num_parameters() + 2 * adapter + tokens
    before = [p.clone() for _, m in layers(model.generator) for p in (m.lora_A, m.lora_B)]
    model.compress(["x"], [["a document"]])
    assert all(m.other == () for _, m in layers(model.generator))
    assert all(map(torch.equal, before, [p for _, m in layers(model.generator) for p in (m.lora_A, m.lora_B)]))


SETTINGS = {
    "oscar_mistral": ["--compressor_type=modernbert", "--projection_hidden=200", "--compressor_layout=oscar"],
    "n_layers": ["--num_layers=3", "--compressor_norm=False", "--compressor_layout=oscar"],
    "pisco": ["--compressor_type=pisco.PISCOCompressor", "--query_dependent=False", "--compressor_layout=oscar"],
}


def train(folder, kind, tmp_path, *more, launch=run):
    """A run that begins with an imported checkpoint -> its folder."""
    out, examples = f"{tmp_path}/{kind}", jsonl(tmp_path / f"{kind}.jsonl", EXAMPLES)
    launch("train.py", f"--out_dir={out}", f"--init_from={folder}/imported/{kind}", *SETTINGS[kind],
           f"--generator={folder}/base/mistral", f"--compressor_model={folder}/base/llama", f"--train_data={examples}",
           f"--val_data={examples}", "--prompt_style=oscar", "--sep_after_last=True", "--query_tokens=128",
           "--answer_tokens=12", "--batch_size=2", "--gradient_accumulation_steps=2", "--max_iters=4", "--eval_interval=2",
           "--eval_samples=2", "--log_interval=1", "--device=cpu", "--dtype=float32", "--generator_lr=1e-3",
           "--compressor_lr=1e-3", *more)
    return out


@pytest.mark.parametrize("kind", SETTINGS)
def test_training_goes_on_from_an_imported_checkpoint(tiny_oscar, kind, tmp_path):
    out = train(tiny_oscar, kind, tmp_path)
    entries = [x["val_loss"] for x in metrics(out) if "val_loss" in x]
    assert entries[-1] < entries[0] - 0.02
    model = ScaleDown.from_pretrained(f"{out}/last", dtype=torch.float32)
    began = load_file(f"{tiny_oscar}/imported/{kind}/compressor.safetensors")
    for name, p in model.named_parameters():
        if name in began and name != "compressor.scale":
            assert not torch.equal(p, began[name]), name
    assert model.kept_prompt == read_config(f"{tiny_oscar}/imported/{kind}", ScaleDownConfig)[0]["prompt"]


def test_pisco_trains_the_same_in_two_processes(tiny_oscar, tmp_path):
    def new(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    one = metrics(train(tiny_oscar, "pisco", new("one"), "--lora_dropout=0.0"))
    for more in [], ["--fsdp=True"]:
        two = metrics(train(tiny_oscar, "pisco", new(f"two{len(more)}"), "--lora_dropout=0.0", *more,
                            launch=partial(torchrun, 2)))
        for a, b in zip(one, two, strict=True):
            for name in a.keys() & {"loss", "val_loss", "grad_norm"}:
                assert a[name] == pytest.approx(b[name], rel=1e-5)


@pytest.mark.parametrize("settings, message", [
    (["--query_dependent=True"], "query_dependent=False"),
    (["--doc_tokens=40000"], "are longer than the generator's 32768 positions: lower doc_tokens"),
    (["--gradient_checkpointing=True"], "gradient_checkpointing=True does not go with compressor_type=pisco"),
    (["--compressor_layout=scaledown"], "was trained with compressor_layout=oscar, this is scaledown"),
    (["--sep_after_last=False"], "was trained with sep_after_last=True, this is False"),
    (["--prompt_style=x"], "compressor_layout and prompt_style are scaledown or oscar, not 'x'")])
def test_settings_that_do_not_fit_are_said(tiny_oscar, tmp_path, settings, message):
    def launch(*args):
        assert message in run(*args, *settings, ok=False)

    train(tiny_oscar, "pisco", tmp_path, launch=launch)


def test_both_layouts_and_prompts_can_be_trained_from_scratch(tiny_oscar):
    torch.manual_seed(0)
    for kind in dict(num_layers=2), dict(compressor_type="modernbert", compressor_model=f"{tiny_oscar}/base/llama",
                                         projection_hidden=200), dict(num_layers=2, query_dependent=False):
        c = ScaleDownConfig(generator=f"{tiny_oscar}/base/mistral", compressor_layout="oscar", prompt_style="oscar",
                            sep_after_last=True, **kind)
        model = ScaleDown(c)
        x = [dict(query="who keeps bees?", documents=["Tolara keeps bees."], answer="Tolara")]
        loss, _ = model(model.collate(x))
        loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad), kind
        # a batch of the largest shape (XLA) means the same
        torch.testing.assert_close(model(model.collate(x, 2, fixed=True))[0], model(model.collate(x, 2))[0])


# ---- what cannot be imported

def damaged(folder, tmp_path, kind, change):
    copy = copied(folder, tmp_path, kind)
    change(copy)
    err = run("import_oscar.py", f"--checkpoint={copy}", f"--out_dir={tmp_path}/out", ok=False)
    assert not os.path.exists(f"{tmp_path}/out")
    return err


def settings(**changes):
    def change(copy):
        with open(f"{copy}/config.json") as f:
            config = json.load(f)
        config = {name: v for name, v in (config | changes).items() if v != "DELETE"}
        with open(f"{copy}/config.json", "w") as f:
            json.dump(config, f)
    return change


def other_weights(copy):
    """Another generator of the same shape."""
    path = f"{copy}/../../base/mistral/model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] *= 1.1
    save_file(tensors, path, metadata=dict(format="pt"))


@pytest.mark.parametrize("kind, change, message", [
    ("oscar_mistral", other_weights, "was trained with another generator than"),
    ("oscar_mistral", lambda c: os.remove(f"{c}/config.json"), "it has no config.json"),
    ("oscar_mistral", lambda c: os.remove(f"{c}/compressor/mlp.pth"), "it has no compressor/mlp.pth"),
    ("oscar_mistral", lambda c: os.truncate(f"{c}/adapters.pth", 5000), "adapters.pth is damaged: "),
    ("oscar_mistral", settings(compr_rate="DELETE"), "is not of an OSCAR or PISCO model: it has no compr_rate"),
    ("n_layers", settings(compr_n_layers="DELETE"), "is not of an OSCAR or PISCO model: it has no compr_n_layers"),
    ("oscar_mistral", settings(compr_use_mlp="DELETE"), "is not of an OSCAR or PISCO model: it has no compr_use_mlp"),
    ("oscar_mistral", settings(quantization="int4"), "has quantization=int4: only no is supported"),
    ("oscar_mistral", settings(sep=False), "has sep=False: only True is supported"),
    ("oscar_mistral", settings(lora_r=8), "down_proj.lora_A.weight is (16, 160) there and (8, 160) here"),
    ("oscar_mistral", settings(decoder_model_name="base/qwen"), "was trained with another generator than"),
    ("oscar_mistral", settings(decoder_model_name="base/none"), "base/none cannot be loaded"),
    ("oscar_mistral", settings(compr_model_name="base/qwen"), "compressor.pth does not fit"),
    ("oscar_mistral", settings(compr_rate=32), "was trained with another generator than"),
    ("n_layers", settings(compr_n_layers=2), "layers.2.input_layernorm.weight is (64,) there and missing here"),
    ("n_layers", settings(compr_base_model_name="base/qwen"), "not of its generator"),
    ("n_layers", settings(compr_rms_norm=True), "norm.weight is missing there"),
    ("oscar_qwen", settings(compr_model_name=None), "adapters.pth holds no encoder_adapter")])
def test_what_cannot_be_imported_is_said_in_a_line(tiny_oscar, tmp_path, kind, change, message):
    assert message in damaged(tiny_oscar, tmp_path, kind, change)


def test_a_name_that_is_nowhere_is_said_in_a_line(tmp_path):
    err = run("import_oscar.py", "--checkpoint=naver/no-such-model", f"--out_dir={tmp_path}/out", ok=False)
    assert "naver/no-such-model is neither a folder nor to be had from the hub" in err

"""Our LoRA against PEFT's."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import lora
from lora import load_lora, save_lora


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def randomise(model):
    with torch.no_grad():
        for _, m in lora.layers(model):
            m.lora_B.normal_(std=0.2)


@pytest.fixture(params=["llama", "mistral", "qwen2", "gemma2", "gpt2"])
def pair(request, tiny, tmp_path):
    """Our adapted model and PEFT's, loaded from the folder that we saved."""
    folder = tiny(request.param)
    ours = load(folder)
    lora.apply_lora(ours, r=4, alpha=6, dropout=0.0)
    randomise(ours)
    save_lora(ours, tmp_path, folder)
    theirs = peft.PeftModel.from_pretrained(load(folder), tmp_path, is_trainable=True)
    return ours.eval(), theirs.eval()


IDS = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def test_peft_loads_our_folder_and_gives_the_same_logits(pair):
    ours, theirs = pair
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)


def test_gradients_are_pefts(pair):
    ours, theirs = pair
    read_out = torch.randn(ours(IDS).logits.shape)
    for model in pair:
        (model(IDS).logits * read_out).sum().backward()
    theirs_by_name = {n.replace("base_model.model.", "").replace(".default.weight", ""): p
                      for n, p in theirs.named_parameters() if p.requires_grad}
    ours_by_name = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, p in ours_by_name.items():
        scale = theirs_by_name[name].grad.abs().max()
        torch.testing.assert_close(p.grad / scale, theirs_by_name[name].grad / scale, atol=1e-4, rtol=0)


def test_adapts_what_pefts_all_linear_adapts(tiny):
    for name in ("llama", "gpt2"):
        ours, theirs = load(tiny(name)), load(tiny(name))
        lora.apply_lora(ours)
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        assert len(lora.layers(ours)) == sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in theirs.modules())


def test_loads_what_peft_saves(tiny, tmp_path):
    theirs = peft.get_peft_model(load(tiny("llama")), peft.LoraConfig(
        r=4, lora_alpha=10, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    ours = load(tiny("llama"))
    lora.apply_lora(ours, r=4, alpha=1)
    load_lora(ours, tmp_path)
    torch.testing.assert_close(ours.eval()(IDS).logits, theirs.eval()(IDS).logits)


def test_refuses_an_adapter_of_another_rank_or_model(tiny, tmp_path):
    ours = load(tiny("llama"))
    lora.apply_lora(ours, r=4)
    save_lora(ours, tmp_path, "llama")
    for name, r in (("llama", 8), ("gpt2", 4)):
        other = load(tiny(name))
        lora.apply_lora(other, r=r)
        with pytest.raises(ValueError, match="does not fit this model: base_model"):
            load_lora(other, tmp_path)


def test_refuses_what_is_not_plain_lora(tiny, tmp_path):
    theirs = peft.get_peft_model(load(tiny("llama")), peft.LoraConfig(
        r=4, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    ours = load(tiny("llama"))
    lora.apply_lora(ours, r=4)
    with pytest.raises(ValueError, match="use_rslora=True, which is not plain LoRA"):
        load_lora(ours, tmp_path)


def test_refuses_to_load_into_merged_weights_and_a_damaged_file(tiny, tmp_path):
    ours = load(tiny("llama"))
    lora.apply_lora(ours, r=4)
    save_lora(ours, tmp_path, "llama")
    lora.merge(ours)
    with pytest.raises(RuntimeError, match="unmerge"):
        load_lora(ours, tmp_path)
    lora.unmerge(ours)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        load_lora(ours, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merge_unmerge_and_switching_off(tiny, name):
    base, model = load(tiny(name)), load(tiny(name))
    lora.apply_lora(model, r=4, dropout=0.5)
    torch.testing.assert_close(model.eval()(IDS).logits, base(IDS).logits)  # B = 0: nothing has changed yet
    randomise(model)
    adapted = model(IDS).logits
    assert (adapted - base(IDS).logits).abs().max() > 0.1
    with lora.adapter_off(model):
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits, rtol=0, atol=0)
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=0, atol=0)
    lora.merge(model)
    torch.testing.assert_close(model(IDS).logits, adapted, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="unmerge"):
        with lora.adapter_off(model):
            pass
    lora.unmerge(model)
    torch.testing.assert_close(model(IDS).logits, adapted, atol=1e-4, rtol=1e-4)


def test_dropout_is_on_the_input_of_the_adapter_only():
    torch.manual_seed(0)
    layer = lora.LoRALinear(torch.nn.Linear(64, 64, bias=False), r=64, alpha=64, dropout=0.5)
    torch.nn.init.eye_(layer.lora_A), torch.nn.init.eye_(layer.lora_B)
    x = torch.ones(1000, 64)
    update = layer(x) - layer.base(x)  # = dropout(x)
    torch.testing.assert_close(update.round().unique(), torch.tensor([0.0, 2.0]))
    assert abs(update.mean() - 1) < 0.02


@pytest.mark.parametrize("p", [0.1, 0.25, 0.999, 1.0, 0.0])
def test_dropout_has_the_statistics_and_the_seed_of_torchs(p):
    ours, theirs, x = lora.Dropout(p), torch.nn.Dropout(p), torch.randn(999, 333, requires_grad=True)
    torch.manual_seed(7)
    first, second = ours(x), ours(x)
    torch.manual_seed(7)
    assert ours(x).equal(first) and (p in (0, 1) or not second.equal(first))
    kept = first != 0
    assert abs(kept.double().mean() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-5
    torch.testing.assert_close(first, torch.where(kept, x / (1 - p) if p < 1 else x, 0.0))
    g = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(first, x, g)[0], torch.where(kept, g / (1 - p) if p < 1 else g, 0.0))
    for dim in (0, 1):  # no row or column is dropped more than chance has it
        assert abs(kept.double().mean(dim) - theirs(torch.ones_like(x)).ne(0).double().mean(dim).mean()).max() < 5 * (0.25 / 333) ** 0.5
    assert ours.eval()(x) is x


def test_base_in_bfloat16_with_and_without_autocast():
    torch.manual_seed(0)
    layer = lora.LoRALinear(torch.nn.Linear(32, 16).bfloat16(), r=4, dropout=0.0)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 32)
    exact = x @ layer.base.weight.float().T + layer.base.bias.float() + 2 * 4 * (x @ layer.lora_A.T @ layer.lora_B.T)
    plain = layer(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = layer(x)
    for y in (plain, autocast):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact, atol=0.2, rtol=0.05)


def test_keeps_no_more_for_the_backward_pass_than_peft():
    def kept(layer, x):
        storages = {}
        def pack(t):
            if not any(t.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in layer.parameters()):
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x).sum()
        return sum(storages.values())

    for dtype in (torch.float32, torch.bfloat16):  # bfloat16: under autocast, as in training on a GPU
        linear = torch.nn.Sequential(torch.nn.Linear(256, 512).to(dtype))
        theirs = peft.get_peft_model(linear, peft.LoraConfig(target_modules=["0"], r=16, lora_dropout=0.1)).train()
        ours = lora.LoRALinear(torch.nn.Linear(256, 512).to(dtype), r=16, dropout=0.1)
        x = torch.randn(100, 256, requires_grad=True).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert kept(ours, x) <= kept(theirs, x)


@pytest.mark.parametrize("kwargs", [dict(init_lora_weights="olora"), dict(init_lora_weights="pissa_niter_2"), dict(use_dora=True),
                                    dict(alora_invocation_tokens=[1, 2]), dict(lora_bias=True), dict(bias="all"),
                                    dict(rank_pattern={"q_proj": 2}), dict(modules_to_save=["embed_tokens"]),
                                    dict(layer_replication=[[0, 4], [2, 4]]), dict(trainable_token_indices=[3])])
def test_every_adapter_of_pefts_that_is_more_than_lora_is_refused_by_name(tiny, tmp_path, kwargs):
    theirs = peft.get_peft_model(load(tiny("llama")), peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **kwargs))
    theirs.save_pretrained(tmp_path)
    ours = load(tiny("llama"))
    lora.apply_lora(ours, r=4)
    with pytest.raises(ValueError, match=f"{[*kwargs][0]}=.*not plain LoRA"):
        load_lora(ours, tmp_path)


@pytest.mark.parametrize("kwargs", [{}, dict(init_lora_weights="gaussian"), dict(init_lora_weights="orthogonal"), dict(exclude_modules=["lm_head"]),
                                    dict(init_lora_weights=False), dict(task_type=None), dict(revision="main")])
def test_plain_adapters_of_pefts_load(tiny, tmp_path, kwargs):
    theirs = peft.get_peft_model(load(tiny("llama")), peft.LoraConfig(
        **dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM") | kwargs)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = load(tiny("llama"))
    lora.apply_lora(ours, r=4)
    load_lora(ours, tmp_path)
    ids = torch.tensor([[5, 6, 7, 30, 40]])
    torch.testing.assert_close(ours.eval()(ids).logits, theirs(ids).logits)


def test_it_begins_as_the_paper_and_peft_do():
    """B = 0, A uniform within 1 / sqrt(in); rank, alpha and dropout of the paper's Table 7."""
    torch.manual_seed(0)
    m = lora.LoRALinear(torch.nn.Linear(400, 300))
    assert m.lora_A.shape == (16, 400) and m.scaling == 2.0 and m.dropout.p == 0.1 and not m.lora_B.any()
    assert 0.049 < m.lora_A.abs().max() <= 0.05


def test_merge_and_unload_leaves_an_ordinary_model(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    kinds, ids = [type(m) for m in model.modules()], torch.arange(5, 25)[None]
    lora.apply_lora(model, 4, dropout=0.0)
    with torch.no_grad():
        for _, m in lora.layers(model):
            m.lora_B.normal_()
        adapted = model(ids).logits
        lora.merge_and_unload(model)
        torch.testing.assert_close(model(ids).logits, adapted, atol=1e-4, rtol=1e-4)
    assert [type(m) for m in model.modules()] == kinds

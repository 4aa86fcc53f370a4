"""The packed compressor against separate passes, the first N layers against the whole model, padding against none."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPTNeoConfig, Lfm2Config

from compressor import ModernBERTCompressor, NLayersCompressor, left_pad
from model import ScaleDownConfig

QUERIES = ["who is the mayor of Loku?", "it?"]
DOCUMENTS = [["The mayor of Loku is Tuson.", "red", "Mara keeps a hound near the river. The bridge is made of stone."],
             ["the bridge"]]
DECODERS = ["llama", "mistral", "qwen2", "gemma2", "gemma3", "gpt2"]


def n_layers(folder, **kwargs):
    torch.manual_seed(0)
    sizes = {**dict(num_layers=2, num_memory_tokens=3, enable_reranking=True), **kwargs}
    return NLayersCompressor(ScaleDownConfig(generator=folder, **sizes), None).eval()


def modernbert(folder, d, projection_hidden=20, generator_std=1.0, **sizes):
    """For a generator of hidden size d."""
    generator = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(9, d))
    config = ScaleDownConfig(compressor_model=folder, projection_hidden=projection_hidden, **sizes)
    c = ModernBERTCompressor(config, generator)
    c.generator_std = generator_std
    return c


def plain(c):
    """The backbone as transformers has it, with its own attention and all of its last layer."""
    config = copy.deepcopy(c.backbone.config)
    attention = config._attn_implementation.removeprefix("packed_")
    model = AutoModel.from_config(config, attn_implementation=attention).eval()
    model.load_state_dict(c.backbone.state_dict())
    return model


def separate(c, backbone, query, document):
    """One causal pass over [query document MEM RR], without mask, positions or padding of ours."""
    (start,), (rest,) = c.layout.rows([query], [[document]])
    ids = start + rest
    x = torch.cat([c.backbone.get_input_embeddings()(torch.tensor([ids])), c.learned_tokens()[None]], dim=1)
    h = backbone(inputs_embeds=x).last_hidden_state[:, len(ids):]
    return h[0, :-1], c.score_head(h[0, -1])


@pytest.mark.parametrize("name", DECODERS)
def test_packed_equals_separate_passes(tiny, name):
    c = n_layers(tiny(name))
    assert c.packed
    backbone = plain(c)
    memory, scores = c(**c.tokenize(QUERIES, DOCUMENTS, k=4))  # rows of unequal length and missing documents
    assert memory.shape == (2, 4, 3, 32) and scores.shape == (2, 4)
    assert memory.isfinite().all() and scores.isfinite().all()
    for b in range(2):
        for i, document in enumerate(DOCUMENTS[b]):
            m, s = separate(c, backbone, QUERIES[b], document)
            torch.testing.assert_close(memory[b, i], m, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(scores[b, i], s[0], atol=1e-4, rtol=1e-4)
    alone, _ = c(**c.tokenize(QUERIES[:1], [DOCUMENTS[0][:1]], k=1))  # no padding at all
    torch.testing.assert_close(alone[0, 0], memory[0, 0], atol=1e-4, rtol=1e-4)


def test_packed_gradients_equal_separate_ones(tiny):
    c = n_layers(tiny("llama"))
    c.backbone.requires_grad_()  # embeddings as well
    read_out = torch.randn(3, 3, 32)
    memory, _ = c(**c.tokenize(QUERIES[:1], DOCUMENTS[:1], k=3))
    packed = torch.autograd.grad((memory[0] * read_out).sum(), [c.memory_tokens, *c.backbone.parameters()])
    backbone = plain(c)
    c.backbone.embed_tokens = backbone.embed_tokens
    one_by_one = torch.stack([separate(c, backbone, QUERIES[0], d)[0] for d in DOCUMENTS[0]])
    apart = torch.autograd.grad((one_by_one * read_out).sum(), [c.memory_tokens, *backbone.parameters()])
    for p, a in zip(packed, apart):
        torch.testing.assert_close(p / a.abs().max(), a / a.abs().max(), atol=1e-4, rtol=0)


def test_a_copy_reads_with_its_own_weights(tiny):
    c = n_layers(tiny("llama"))
    batch = c.tokenize(QUERIES, DOCUMENTS, k=3)
    twin = copy.deepcopy(c)
    torch.testing.assert_close(twin(**batch)[0], c(**batch)[0])
    with torch.no_grad():
        c.backbone.layers[-1].mlp.down_proj.weight.zero_()
    assert (twin(**batch)[0] - c(**batch)[0]).abs().max() > 1e-3


def test_nothing_of_a_pass_stays_in_memory(tiny):
    """Without the garbage collector, which comes late: on a GPU that is memory, on XLA another graph."""
    c = n_layers(tiny("llama"))
    batch = c.tokenize(QUERIES, DOCUMENTS, k=3)
    def alive():
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    c(**batch)[0].sum().backward()  # gradients stay
    gc.collect()
    gc.disable()
    before = alive()
    for _ in range(3):
        c(**batch)[0].sum().backward()
    gc.enable()
    assert alive() == before


@pytest.mark.parametrize("name", DECODERS)
def test_first_layers_are_the_whole_models(tiny, name):
    c = n_layers(tiny(name))
    whole = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32).eval()
    ids = torch.randint(5, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    hidden = whole(ids, output_hidden_states=True).hidden_states[2]  # after the second layer
    norm = getattr(whole.base_model, "norm", None) or whole.base_model.ln_f
    torch.testing.assert_close(plain(c)(ids).last_hidden_state, norm(hidden), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["modernbert", "bert", "roberta", "llama_small"])
def test_modernbert_rows_equal_plain_passes_without_padding(tiny, name):
    torch.manual_seed(0)
    c = modernbert(tiny(name), 24, num_memory_tokens=3, enable_reranking=True).eval()
    memory, scores = c(**c.tokenize(QUERIES, DOCUMENTS, k=4))
    assert memory.shape == (2, 4, 3, 24) and memory.isfinite().all() and scores.isfinite().all()
    backbone = AutoModel.from_pretrained(tiny(name), dtype=torch.float32).eval()
    t = c.tokenizer
    for b in range(2):
        for i, document in enumerate(DOCUMENTS[b]):
            if name == "llama_small":
                ids = t(QUERIES[b] + "\n").input_ids + t(document, add_special_tokens=False).input_ids
            else:
                q, d = (t(text, add_special_tokens=False).input_ids for text in (QUERIES[b], document))
                ids = [t.cls_token_id, *q, t.sep_token_id, *d, t.sep_token_id]
            x = torch.cat([backbone.get_input_embeddings()(torch.tensor([ids])), c.learned_tokens()[None]], dim=1)
            h = backbone(inputs_embeds=x).last_hidden_state[0, len(ids):]
            torch.testing.assert_close(memory[b, i], c.projection(h[:-1]), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(scores[b, i], c.score_head(h[-1])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "modernbert"])
def test_documents_alone(tiny, name):
    """Without query_dependent a document is read by itself, whatever is asked, in one pass and exactly."""
    kwargs = dict(num_memory_tokens=3, query_dependent=False)
    c = (modernbert(tiny(name), 24, **kwargs) if name == "modernbert" else
         n_layers(tiny(name), **kwargs, enable_reranking=False)).eval()
    c.layout.start = [] if name == "qwen2" else c.layout.start  # whose tokeniser has no BOS
    memory, _ = c(**c.tokenize(QUERIES, DOCUMENTS, k=4))
    other, _ = c(**c.tokenize(QUERIES[::-1], DOCUMENTS, k=4, fixed=True))
    backbone = AutoModel.from_pretrained(tiny(name)).eval() if name == "modernbert" else plain(c)
    for b in range(2):
        for i, document in enumerate(DOCUMENTS[b]):
            ids = torch.tensor([c.layout.start + c.layout.tokens([document], 128)[0] + c.layout.end])
            x = torch.cat([c.backbone.get_input_embeddings()(ids), c.learned_tokens()[None]], dim=1)
            alone = c.projection(backbone(inputs_embeds=x).last_hidden_state[0, -3:])
            torch.testing.assert_close(memory[b, i], alone, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(other[b, i], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["n_layers", "modernbert"])
def test_query_and_document_do_not_share_their_tokens(tiny, kind):
    """A query and a document at their limits are read whole, what goes beyond is not."""
    sizes = dict(num_memory_tokens=2, query_tokens=4, doc_tokens=6)
    c = (n_layers(tiny("llama"), **sizes) if kind == "n_layers" else
         modernbert(tiny("bert"), 24, **sizes)).eval()
    words = "a b c d e f g h i j".split()
    def memory(q, d):
        return c(**c.tokenize([" ".join(words[:q])], [[" ".join(words[:d])]], k=1))[0]
    tokens = [len(c.layout.tokens([" ".join(words[:n])], 99)[0]) for n in range(11)]
    q, d = tokens.index(4), tokens.index(6)
    torch.testing.assert_close(memory(q, d), memory(10, 10))
    for shorter in (memory(q - 1, d), memory(q, d - 1)):
        assert (shorter - memory(q, d)).abs().max() > 1e-3


def test_no_space_slips_in_between_query_and_document(tiny):
    c = n_layers(tiny("mistral"))
    assert c.tokenizer.convert_ids_to_tokens(c.layout.between) == ["\n"]
    assert c.tokenizer.convert_ids_to_tokens(c.tokenizer("\n", add_special_tokens=False).input_ids) == ["▁", "\n"]


def test_num_layers_beyond_the_backbone(tiny):
    with pytest.raises(ValueError, match="num_layers=5, but .* has 4 layers"):
        n_layers(tiny("llama"), num_layers=5)


def test_documents_longer_than_the_attention_window_are_read_in_rows(tiny):
    c = n_layers(tiny("gemma3"), doc_tokens=300)  # the window has 256
    assert not c.packed
    documents = ["the bridge is made of stone " * 60, "Mara keeps a hound."]
    memory, _ = c(**c.tokenize(QUERIES[:1], [documents], k=2))
    for i, document in enumerate(documents):
        torch.testing.assert_close(memory[0, i], separate(c, plain(c), QUERIES[0], document)[0], atol=1e-4, rtol=1e-4)
    assert len(c.layout.tokens(documents[:1], 999)[0]) > 256


def test_a_document_longer_than_the_learned_positions_is_refused(tiny):
    for build, n in ((lambda **k: n_layers(tiny("gpt2"), **k), 512),
                     (lambda **k: modernbert(tiny("bert"), 24, **k), 512),
                     (lambda **k: modernbert(tiny("roberta"), 24, **k), 511)):  # counts from 1
        with pytest.raises(ValueError, match=f"are longer than the compressor's {n} positions"):
            build(doc_tokens=500)
        most = n - build(doc_tokens=1).longest + 1  # as long as can be
        c = build(doc_tokens=most).eval()
        assert c.longest == n
        c(**c.tokenize(["who is it? " * 90], [["the bridge " * 300]], k=1))


def test_layers_that_no_mask_decides_are_refused(tmp_path):
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=4)
    for kind, config in (("conv", Lfm2Config(**sizes, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                                             layer_types=["conv", "full_attention"] * 2)),
                         ("local", GPTNeoConfig(**sizes, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]))):
        AutoModel.from_config(config).save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=f"layers of type {kind}"):
            n_layers(str(tmp_path / kind))


def test_left_pad():
    ids, mask = left_pad([[5], [6, 7, 8], []])
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8], [0, 0, 0]]
    assert mask.tolist() == [[False, False, True], [True] * 3, [False] * 3]


@pytest.mark.parametrize("d", [24, 40])
def test_the_projection_begins_as_an_isometry(tiny, d):
    c = modernbert(tiny("bert"), d, 70, num_memory_tokens=3, generator_std=0.25)
    h = c.backbone(inputs_embeds=c.memory_tokens[None]).last_hidden_state  # (1, 3, 32)
    torch.testing.assert_close(c.projection(h), torch.nn.functional.pad(h, (0, d - 32)), atol=1e-5, rtol=1e-4)
    memory, _ = c(**c.tokenize(QUERIES, DOCUMENTS, k=4))
    c.scale.data *= 2
    torch.testing.assert_close(c(**c.tokenize(QUERIES, DOCUMENTS, k=4))[0], 2 * memory)
    ids = c.tokenize(QUERIES, DOCUMENTS, k=4)
    h = c.read(c.learned_tokens(), **ids)  # (2, 4, 3, 32)
    torch.testing.assert_close(memory, 0.25 * c.projection(h))


@pytest.mark.parametrize("name", ["modernbert", "bert"])
def test_memory_tokens_begin_near_the_encoders_mask(tiny, tmp_path, name):
    encoder = AutoModel.from_pretrained(tiny(name))
    encoder.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny(name), mask_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    c = modernbert(str(tmp_path), 24, 70, num_memory_tokens=5)
    torch.manual_seed(0)
    without = modernbert(tiny(name), 24, 70, num_memory_tokens=5)  # its tokeniser has no mask
    table = encoder.get_input_embeddings().weight
    mask = tokenizer.convert_tokens_to_ids("</s>")
    assert (torch.cdist(c.memory_tokens, table).argmin(dim=1) == mask).all()
    assert not (torch.cdist(without.memory_tokens, table).argmin(dim=1) == mask).all()
    torch.testing.assert_close(c.memory_tokens - table[mask], 0.3 * without.memory_tokens)  # and differ as those do
    assert c.memory_tokens.requires_grad

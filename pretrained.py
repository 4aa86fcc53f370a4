"""
Pretrained models and tokenisers of other people: loaded without running code of theirs, refused in one line where they
cannot work here, and given text from outside (documents, queries, answers) that stays text.
"""

import os
import re
import sys
from hashlib import sha256
from inspect import signature
from zlib import crc32

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, logging

from configurator import first_line, under_torchrun

# What adapter_config.json may say of an adapter that is LoRALinear's and nothing more: settings that change nothing in
# what the file's A and B mean, whatever their value, and the values that others may have. All further ones must be off.
NEUTRAL = {*"""auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern
    layers_to_transform lora_alpha lora_dropout megatron_core peft_version qalora_group_size r revision runtime_config
    target_modules task_type""".split()}
PLAIN = dict(peft_type=("LORA",), bias=("none",), init_lora_weights=(True, False, "gaussian", "orthogonal"))
OFF = (None, False, "", [], {})


class ModelError(ValueError):
    """A model that cannot be loaded, or cannot work here, in one line."""


def note(line):
    """One line to the user, next to what a script prints; under torchrun from the first process alone."""
    if not under_torchrun() or os.environ["RANK"] == "0":
        print(line, file=sys.stderr)


def pretrained(load, name, **kwargs):
    """load(name), a from_pretrained(), with kwargs. Code that comes with the model is never run, nor asked about.
    Raises ModelError in one line that names the model, whatever went wrong."""
    try:
        return load(name, trust_remote_code=False, **kwargs)
    except Exception as e:  # transformers raises nearly every kind for a folder that it cannot make sense of
        raise ModelError(f"{name} cannot be loaded: {first_line(e)}") from e


def load_config(name):
    """The config of a model whose weights are plain text-only ones. Raises ModelError for others, in one line."""
    config = pretrained(AutoConfig.from_pretrained, name)
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "in an unknown way") if isinstance(
            config.quantization_config, dict) else type(config.quantization_config).__name__
        raise ModelError(f"{name} has quantised weights ({method}): the plain (float) model is needed")
    if config.get_text_config() is not config and not config.is_encoder_decoder:
        raise ModelError(f"{name} is a model of more than text ({config.model_type}, with a text_config): save its "
                         "language model alone in a folder of its own")
    return config


def load_model(auto, name, config=None, **kwargs):
    """auto.from_pretrained() of a model that load_config() takes. Raises ModelError in one line."""
    return pretrained(auto.from_pretrained, name, config=config or load_config(name), **kwargs)


def load_tokenizer(name):
    """A tokeniser that cuts and pads on the right, whatever its tokenizer_config.json says: a text's beginning is what
    is kept. Raises ModelError for one without offsets (no tokenizer.json, and none can be made)."""
    # with vLLM comes mistral_common, whose tokenisers have no offsets
    tokenizer = pretrained(AutoTokenizer.from_pretrained, name, mistral_format=False)
    if not tokenizer.is_fast:
        raise ModelError(f"{name} has a slow tokeniser ({type(tokenizer).__name__}): one with a tokenizer.json is "
                         "needed, which tells where in a text its tokens stand")
    tokenizer.truncation_side = tokenizer.padding_side = "right"
    return tokenizer


def plain_text(tokenizer):
    """Makes a function text -> the same text, in which nothing is a control token of the tokeniser's (end of turn,
    [SEP], ..) any more: a space stands after the first character of what would be one. Control tokens: those marked as
    special, and those that the chat template writes, marked or not."""
    added, template = tokenizer.added_tokens_decoder.values(), str(tokenizer.chat_template or "")
    control = {t.content for t in added if t.special or t.content in template and not t.content.isalnum()}
    control = {t for t in control | set(tokenizer.all_special_tokens) if len(t.strip()) > 1}
    if not control:
        return lambda text: text
    # whatever the case: a tokeniser may look for them after it has lowered it
    pattern = re.compile("|".join(re.escape(t) for t in sorted(control, key=len, reverse=True)), re.IGNORECASE)

    def plain(text):
        while pattern.search(text):
            text = pattern.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
        return text

    return plain


def first_position(model):
    """The position id of a text's first token: RoBERTa and its kin count from padding_idx + 1."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    return 0 if getattr(table, "padding_idx", None) is None else table.padding_idx + 1


def max_positions(model):
    """How many positions a model has; a million where its config does not say."""
    return getattr(model.config, "max_position_embeddings", None) or 1 << 20


def longest_text(model, tokenizer):
    """The largest number of tokens that a model and its tokeniser take."""
    return min(tokenizer.model_max_length, max_positions(model) - first_position(model))


def embedding_std(embed):
    """How large the embeddings are that a model is used to: learned ones start so too. Asked of the module, not of its
    weight, because some models (Gemma) scale inside it."""
    with torch.no_grad():
        return embed(torch.arange(min(1000, embed.num_embeddings))).float().std().item()


def decoder_layers(model):
    """The list of a transformer's layers."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList)
                and len(m) == model.config.num_hidden_layers)


def other_layers(config):
    """The kinds of layers that are not attention decided by a mask and position ids: a recurrence or a convolution
    would carry one document over into the next."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", [])
    return {*kinds} - {"full_attention", "sliding_attention", "global"}


def first_layers(name, n, norm=True):
    """The first n layers of a causal LM, without head, in float32; norm: with its final norm. Raises ValueError where n
    is not within its layers, or these are not all of attention that a mask and position ids decide."""
    config = load_config(name)
    if not 1 <= n <= config.num_hidden_layers:
        raise ValueError(f"num_layers={n}, but {name} has {config.num_hidden_layers} layers")
    config.num_hidden_layers = n
    if getattr(config, "layer_types", None):  # models that mix full and sliding attention name each layer's kind
        config.layer_types = config.layer_types[:n]
    if other := other_layers(config):
        raise ValueError(f"{name} has layers of type {other.pop()}: n_layers needs plain attention in all")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or a table of the layers after the first n, which are left out on purpose
    try:
        model = load_model(AutoModel, name, config, dtype=torch.float32)
    finally:
        logging.set_verbosity(verbosity)
    if not norm:
        final = [child for child, m in model.named_children() if "norm" in type(m).__name__.lower()]
        if len(final) != 1:
            raise ValueError(f"compressor_norm=False, but {name} has not one final norm but {len(final)}")
        setattr(model, final[0], nn.Identity())
    return model


def load_backbone(name):
    """An encoder or a decoder without head, in float32. Raises ValueError for what is both."""
    config = load_config(name)
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder ({config.model_type}): a compressor is one or the other")
    model = load_model(AutoModel, name, config, dtype=torch.float32)
    if hasattr(model, "pooler"):  # BERT's, for [CLS]: it would never get a gradient here
        model.pooler = None
    return model


def fingerprint(model):
    """Fingerprint of a frozen model, independent of its folder's path, its dtype and its parameters' names: a digest of
    the checksums of all its weights in bfloat16 (4 GB/s on one core)."""
    shape = model.config
    sums = sorted(crc32(p.detach().cpu().bfloat16().flatten().view(torch.int16).numpy()) for p in model.parameters())
    return dict(model_type=shape.model_type, num_hidden_layers=shape.num_hidden_layers,
                hidden_size=model.get_input_embeddings().embedding_dim, vocab_size=shape.vocab_size,
                weights_crc32=sha256(repr(sums).encode()).hexdigest()[:16])


def load_generator(name, dtype):
    """A causal LM of plain attention that takes position ids. Raises ValueError for others."""
    model = load_model(AutoModelForCausalLM, name, dtype=dtype)
    if "position_ids" not in signature(model.forward).parameters or getattr(model.config, "alibi", False):
        raise ValueError(f"{name} takes no position ids (ALiBi, or a recurrence), which are needed here")
    if other := other_layers(model.config):
        raise ValueError(f"{name} has layers of type {other.pop()}: all must be of plain attention")
    if experts := sum(p.numel() for p in model.parameters() if p.dim() == 3):
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        note(f"{name}: {experts:,} weights of experts, fused to one tensor a layer, get no LoRA"
             + ("; PEFT cannot load this adapter: it takes the names of shared and dense layers for those of the "
                "experts" if linear & {"gate_proj", "up_proj", "down_proj"} else ""))
    return model


def probe_compressor(compressor, name):
    """Reads a document alone and next to a longer one: both must give the same hidden states, or padding or the
    neighbour is seen. Parameters of rows' backbones that this does not use (Longformer's global attention) are frozen:
    they would never get a gradient, which DDP waits for. Raises ValueError in one line, before any work."""
    c = compressor
    read = lambda *docs: c.read(c.learned_tokens(), **c.tokenize(["x"], [[*docs]], len(docs)))[0, 0]
    try:
        with torch.no_grad():
            together = read("x", "x " * min(16, c.config.doc_tokens))
        with torch.set_grad_enabled(not c.packed):
            alone = read("x")
        if not c.packed:
            alone.sum().backward()
    except Exception as e:  # each architecture fails in its own way
        raise ValueError(f"{name} cannot be a compressor: {first_line(e)}") from e
    if not torch.allclose(alone, together, rtol=0, atol=1e-3 * together.abs().max().item()):
        raise ValueError(f"{name} cannot be a compressor: next to a longer document it reads one differently than "
                         "alone, as it does not heed the attention mask")
    for p in c.backbone.parameters() if not c.packed else ():
        p.requires_grad_(p.grad is not None)
    c.zero_grad()


def check_memory(memory, scores, config, d):
    """Raises ValueError, before any work, where a compressor has made something else of one query and one document than
    what Compressor.forward() has to return. d: the generator's hidden size."""
    for name, found, shape in (("memory", memory, (1, 1, config.num_memory_tokens, d)),
                               *([("scores", scores, (1, 1))] if config.enable_reranking else [])):
        made = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if made != shape:
            raise ValueError(f"compressor_type={config.compressor_type} returns {made} as {name} of one query and one "
                             f"document, not {shape}")


def check_plain_lora(config, folder):
    """Raises ValueError for an adapter_config.json of anything more than plain LoRA, by the setting's name."""
    for name, value in config.items():
        if name not in NEUTRAL and value not in PLAIN.get(name, OFF):
            raise ValueError(f"the adapter in {folder} has {name}={value}, which is not plain LoRA: not supported")

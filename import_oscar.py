"""
Makes a checkpoint of ours from a released model of the paper's authors:

    python import_oscar.py --checkpoint=naver/oscar-mistral-7B --out_dir=out/oscar-mistral
    python sample.py --out_dir=out/oscar-mistral --query="who wrote Emma?" --docs=passages.txt

Three kinds are read: with a compressor model of its own (naver/oscar-*), with the generator's first N layers, and
PISCO (naver/pisco-*). No code that comes with a checkpoint is run. What is written holds the weights that were trained;
the generator, and for its shape the compressor model, are read from where they lie.

The weights are NAVER's and under their licence (Creative Commons, for non-commercial use by one of the two pages that
name it): read the model's page before you use them.
"""

import os
import pickle

import torch

from checkpoint import find_folders
from configurator import configure, fail, fail_on, first_line
from files import must_fit, read_json, replacing_folder
from lora import layers
from model import ScaleDown, ScaleDownConfig

# -----------------------------------------------------------------------------
checkpoint = "naver/oscar-mistral-7B"  # a name on the Hugging Face hub, or a folder
out_dir = "out/oscar-mistral"
generator = ""  # where the generator lies, if not where the checkpoint says
compressor_model = ""  # likewise, of a compressor model
# -----------------------------------------------------------------------------
configure(globals())

# settings of theirs that ScaleDown has no counterpart of, with the values that it takes
ONLY = dict(sep=True, different_mem_tokens=True, quantization="no", lora=True, lora_compressor=False)


def find_checkpoint():
    """The folder with the checkpoint's files, fetched from the hub where it is no folder here."""
    if os.path.isdir(checkpoint):
        return checkpoint
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(checkpoint, allow_patterns=["config.json", "*.pth", "compressor/*.pth"])
    except Exception as e:  # an unknown name, no network, a model that must be requested: each raises another
        fail(f"{checkpoint} is neither a folder nor to be had from the hub: {first_line(e)}")


def read_settings(folder):
    """config.json as a dict."""
    path = f"{folder}/config.json"
    if not os.path.isfile(path):
        raise ValueError(f"{folder} is no checkpoint: it has no config.json")
    settings = read_json(path)
    needed = {"decoder_model_name", "compr_model_name", "compr_rate", "doc_max_length", "lora_r"}
    if settings.get("compr_model_name") == "mistral_trimmed":
        needed |= {"compr_base_model_name", "compr_n_layers", "compr_rms_norm"}
    elif settings.get("compr_model_name"):
        needed |= {"compr_use_mlp", "compr_mlp_hidden_dim"}
    if missing := needed - settings.keys():
        raise ValueError(f"{path} is not of an OSCAR or PISCO model: it has no {sorted(missing)[0]}")
    for name, value in ONLY.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path} has {name}={settings[name]}: only {value} is supported")
    return settings


def make_config(settings, folder):
    """Their settings -> ours."""
    s, own = settings, settings["compr_model_name"] not in (None, "mistral_trimmed")
    if own and not s["compr_use_mlp"]:
        raise ValueError(f"{folder} has a compressor model without a projection: not supported")
    if s["compr_model_name"] == "mistral_trimmed" and s["compr_base_model_name"] != s["decoder_model_name"]:
        raise ValueError(f"{folder} has the first layers of {s['compr_base_model_name']} as compressor, not of "
                         f"its generator {s['decoder_model_name']}: not supported")
    kind = (dict(compressor_type="modernbert", compressor_model=s["compr_model_name"],
                 projection_hidden=s["compr_mlp_hidden_dim"]) if own else
            dict(compressor_type="pisco.PISCOCompressor", query_dependent=False) if not s["compr_model_name"] else
            dict(num_layers=s["compr_n_layers"], compressor_norm=s["compr_rms_norm"]))
    config = ScaleDownConfig(
        generator=s["decoder_model_name"], num_memory_tokens=s["doc_max_length"] // s["compr_rate"],
        doc_tokens=s["doc_max_length"], query_tokens=s["doc_max_length"], lora_r=s["lora_r"],
        lora_alpha=2 * s["lora_r"], compressor_layout="oscar", prompt_style="oscar", sep_after_last=True, **kind)
    find_folders(config, folder)
    config.generator = generator or config.generator
    config.compressor_model = compressor_model or config.compressor_model
    return config


def load(folder, name):
    """The dict in one of the checkpoint's files."""
    path = f"{folder}/{name}"
    if not os.path.isfile(path):
        raise ValueError(f"{folder} is not complete: it has no {name}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path} is damaged: {first_line(e)}") from e


def copy(own, theirs, path):
    """Copies tensors into those of the same names, which must have their shapes."""
    must_fit(path, theirs, own)
    for name, tensor in own.items():
        tensor.copy_(theirs[name])


def copy_adapter(pairs, name):
    """Copies an adapter of adapters.pth. pairs: A and B of each adapted layer."""
    path = f"{folder}/adapters.pth"
    adapters = load(folder, "adapters.pth")
    if name not in adapters:
        raise ValueError(f"{path} holds no {name}")
    own = {f"{layer}.lora_{part}.weight": t for (layer, _), pair in zip(layers(model.generator), pairs)
           for part, t in zip("AB", pair)}
    copy(own, {key: t for key, t in adapters[name].items() if "lora_" in key}, path)


def special_rows(folder):
    """The embeddings (l + 3, d) of <MEM0> .. <MEM(l-1)>, <AE>, <ENC>, <SEP>, which stand after those of the generator's
    own tokens. Those were not trained: where they differ, the generator is another one."""
    table = load(folder, "decoder_first_last_layers.pth").get("model.embed_tokens.weight")  # (n + l + 3, d)
    if table is None:
        raise ValueError(f"{folder}/decoder_first_last_layers.pth holds no model.embed_tokens.weight")
    n, ours = len(model.tokenizer), model.generator.get_input_embeddings().weight  # (V, d)
    same = (table.shape == (n + model.config.num_memory_tokens + 3, ours.shape[1])
            and torch.allclose(table[:n].float(), ours[:n].float(), rtol=1e-2, atol=1e-5))
    if not same:
        raise ValueError(f"{checkpoint} was trained with another generator than {model.config.generator}: its "
                         "embeddings are others")
    return table[n:]


def copy_compressor(folder, rows):
    c, l = model.compressor, model.config.num_memory_tokens
    if model.config.compressor_type == "pisco.PISCOCompressor":
        c.memory_tokens.copy_(rows[:l])
        c.enc_token.copy_(rows[-2:-1])
        return copy_adapter([*zip(c.lora_A, c.lora_B)], "encoder_adapter")
    path = f"{folder}/compressor/compressor.pth"
    tensors = {name.removeprefix("custom_model.").removeprefix("model."): t
               for name, t in load(folder, "compressor/compressor.pth").items() if "lm_head" not in name}
    own = c.backbone.state_dict()
    table, embed = tensors.get("embed_tokens.weight"), own["embed_tokens.weight"]
    if table is None or table.shape[1:] != embed.shape[1:] or not l < len(table) <= len(embed) + l:
        raise ValueError(f"{path} does not fit its model: embed_tokens.weight is "
                         f"{'missing' if table is None else tuple(table.shape)} there and {tuple(embed.shape)} here")
    c.memory_tokens.copy_(table[-l:])
    tensors["embed_tokens.weight"] = torch.cat([table[:-l], embed[len(table) - l:]])  # theirs ends with the tokens
    copy(own, tensors, path)
    c.backbone.get_input_embeddings().requires_grad_()  # theirs were trained, and are not the generator's any more
    if model.config.compressor_type == "modernbert":
        copy(c.projection.state_dict(), load(folder, "compressor/mlp.pth"), f"{folder}/compressor/mlp.pth")
        c.scale.fill_(1 / c.generator_std)  # theirs is not scaled


with torch.no_grad(), fail_on(ValueError, OSError):
    if os.path.exists(out_dir):
        fail(f"{out_dir} is there already: choose another --out_dir, or delete it")
    folder = find_checkpoint()
    config = make_config(read_settings(folder), folder)
    model = ScaleDown(config, dtype="auto")  # the generator in the dtype of its files
    rows = special_rows(folder)
    model.sep.copy_(rows[-1:])
    copy_adapter([(m.lora_A, m.lora_B) for _, m in layers(model.generator)], "decoder_adapter")
    copy_compressor(folder, rows)
    os.makedirs(os.path.dirname(os.path.abspath(out_dir)), exist_ok=True)
    with replacing_folder(out_dir) as new:
        model.save(new)
print(f"{out_dir}: {checkpoint}, for the generator {config.generator}")

"""
Pretrained models and tokenisers of other people: loaded without running code of theirs, refused in one line where they
cannot work here, and given text from outside (documents, queries, answers) that stays text.
"""

import os
import re
import sys

from transformers import AutoConfig, AutoTokenizer

from configurator import under_torchrun


class ModelError(ValueError):
    """A model that cannot be loaded, or cannot work here, in one line."""


def note(line):
    """One line to the user, next to what a script prints; under torchrun from the first process alone."""
    if not under_torchrun() or os.environ["RANK"] == "0":
        print(line, file=sys.stderr)


def first_line(error):
    """An exception in one line: its first line with words, after its type unless it is one that speaks to users."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = " ".join(lines[:3] if lines and lines[0].endswith(":") else lines[:1])
    return line if isinstance(error, (ValueError, OSError)) and line else f"{type(error).__name__}: {line}"


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
    tokenizer = pretrained(AutoTokenizer.from_pretrained, name)
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


def longest_text(model, tokenizer):
    """The largest number of tokens that a model and its tokeniser take."""
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    return min(tokenizer.model_max_length, positions - first_position(model))

"""corpus.py: documents cut into chunks."""

import random

from conftest import WORDS
from transformers import AutoTokenizer

from corpus import chunk
from data import document_text
from prompt import Prompt


def test_chunks_lose_nothing(tiny):
    rng = random.Random(0)
    for name in ("llama", "mistral"):  # byte-level, SentencePiece's kind (this one knows ASCII only)
        tokenizer = AutoTokenizer.from_pretrained(tiny(name))
        alphabet = [*"abc d. \n", "  ", *(["é", "語", "🙂", "👩‍👩‍👧"] if name == "llama" else [])]
        for _ in range(100):
            text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 80)))
            title = rng.choice(["", "a b", "a very long title " * 5])
            chunks = chunk(tokenizer, [("7", title, text)], 12)
            assert "".join("".join(c["text"] for c in chunks).split()) == "".join(text.split())
            assert [c["_id"] for c in chunks] == [f"7#{i}" for i in range(len(chunks))]
            assert all(title.startswith(c["title"]) and c["text"] == c["text"].strip() for c in chunks)
            assert all(c["text"] for c in chunks) or len(chunks) == 1 and title and not text.strip()
            assert all(c["title"] == title for c in chunks if len(title) < 4)
            # nothing is left for the models to cut
            assert all(Prompt(tokenizer).cut([document_text(c)], 12) == [document_text(c)] for c in chunks)


def test_chunks_fill_their_tokens(tiny):
    """Words of one token each: title and text together have exactly as many tokens as there is room."""
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    words = [w for w in WORDS if len(tokenizer(" " + w, add_special_tokens=False).input_ids) == 1]
    text = "".join(" " + words[i % len(words)] for i in range(100))
    for title in ("", "is it"):
        chunks = chunk(tokenizer, [("7", title, text)], 20)
        lengths = [len(tokenizer(" " + c["text"], add_special_tokens=False).input_ids) for c in chunks]
        room = 20 - (len(tokenizer(title + "\n", add_special_tokens=False).input_ids) if title else 0)
        # a word that has lost the space before it is up to three tokens here
        assert all(room - 2 <= n <= room for n in lengths[:-1]) and 0 < lengths[-1] <= room and len(lengths) > 4

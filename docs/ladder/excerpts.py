"""
Makes data/ladder/excerptN.jsonl: the last 400 dev questions, each with the N successive tokens of its passage among
which the most of the question's tokens occur, in place of the passage.

    python docs/ladder/excerpts.py 32
"""

import json
import sys

from transformers import AutoTokenizer


def best_start(ids, words, n):
    """Where the n successive of ids begin among which the most of the set words occur."""
    return max(range(max(1, len(ids) - n + 1)), key=lambda i: len(words & {*ids[i:i + n]}))


def main():
    n, tokenizer = int(sys.argv[1]), AutoTokenizer.from_pretrained("smollm2")
    with open(f"data/ladder/excerpt{n}.jsonl", "w") as f:
        for x in map(json.loads, open("data/ladder/gold.last400.jsonl")):
            texts = x["query"], " " + x["query"]
            question = {i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids}
            document = x["documents"][0]
            text = f"{document['title']}\n{document['text']}" if document["title"] else document["text"]
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, at = found.input_ids[:128], found.offset_mapping
            start = best_start(ids, question, n)
            x["documents"] = [text[at[start][0]:at[min(start + n, len(ids)) - 1][1]].strip()]
            f.write(json.dumps(x) + "\n")


if __name__ == "__main__":
    main()

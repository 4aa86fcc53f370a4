"""
Training data that others have published, in place of what prepare.py would make: questions with their documents and a
teacher's answers, as PISCO's (maxoul/pisco_finetuning_data) or CLaRa's (apple/ml-clara). What a row may call them,
formats.py says. Notable: nothing is held in memory but a number for each example.
"""

import json
import os
from array import array
from hashlib import sha256
from itertools import islice
from pathlib import Path

from configurator import fail, fail_on, first_line, import_or_fail
from data import Examples, check_example
from files import file_sha256, read_json, replacing
from formats import examples_of, to_line
from parts import progress


def table_rows(name):
    """Yields the examples of a Parquet file or of a data set of the hub. Exits with one line that names a broken row,
    by its number from 0."""
    datasets = import_or_fail("datasets", f"examples={name}")
    datasets.disable_progress_bars()
    try:
        table = (datasets.load_dataset("parquet", data_files=name, split="train") if os.path.exists(name) else
                 datasets.load_dataset(name, split="train"))
    except Exception as e:  # no network, a damaged file, an unknown name: each raises another
        fail(f"{name} cannot be loaded: {first_line(e)}")
    for i, row in enumerate(table):
        for x in examples_of(row):
            if wrong := check_example(x, need_answer=True, need_scores=False):
                fail(f"{name}, row {i}: {wrong}")
            yield x


def example_files(source):
    """The files of a source: itself, or all .jsonl, .json and .parquet files in a folder; none of a data set of the
    hub."""
    if not os.path.isdir(source):
        return [source] * os.path.exists(source)
    about = ("manifest.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
    files = sorted(str(path) for path in Path(source).rglob("*")
                   if path.suffix in (".jsonl", ".json", ".parquet") and path.name not in about)
    if not files:
        fail(f"{source} holds no .jsonl, .json or .parquet file")
    return files


def read_examples(source):
    """Yields the examples of a file (.parquet, or JSON Lines, or one JSON list), of all such files in a folder, or of a
    data set of the Hugging Face hub. Exits with one line that names file and row of a broken one."""
    if not os.path.exists(source):
        yield from table_rows(source)
    for path in example_files(source):
        if path.endswith(".parquet"):
            yield from table_rows(path)
            continue
        with fail_on(ValueError, OSError):
            examples = Examples(path)
        yield from map(examples.__getitem__, range(len(examples)))


def fraction(query):
    """A number from 0 to 1 that depends on the query's text alone: an example is for validation where it is at most
    val_fraction, so that no query is both trained on and validated, and none changes sides when others come or go.
    (If no example is at most val_fraction, the one with the smallest number is taken, and a later example can take its
    place.)"""
    return int(sha256(query.encode()).hexdigest()[:8], 16) / 2**32


def copy_examples(folder, source, val_fraction, max_queries, overwrite):
    """Writes train.jsonl and val.jsonl into a folder, in our own form, of the first max_queries examples (0: of all),
    and manifest.json, which says of what; without counts while the two files are replaced."""
    manifest, files = f"{folder}/manifest.json", [f"{folder}/train.jsonl", f"{folder}/val.jsonl"]
    former, settings = {}, dict(examples=source, val_fraction=val_fraction, max_queries=max_queries,
                                sha256=[file_sha256(path) for path in example_files(source)])
    if os.path.exists(manifest):
        with fail_on(ValueError):
            former = read_json(manifest)
    if "stages" in former:
        fail(f"{folder} was made of a corpus and queries: choose another --dataset")
    if "counts" in former and all(map(os.path.exists, files)) and not overwrite:
        was = settings | dict(max_queries=0) | former["settings"]  # an older manifest has neither that nor sha256
        changed = [f"another content of {source}" if name == "sha256" else f"{name}={was[name]}, now {settings[name]}"
                   for name in settings if was[name] != settings[name]]
        if changed:
            fail(f"{folder} was made with {', '.join(changed)}: --overwrite=True makes it anew, another --dataset "
                 "keeps both")
        print(f"{folder}: there already")
        return
    if not former and any(map(os.path.exists, files)):
        fail(f"{folder} holds examples that are not made by this command: choose another --dataset")
    if os.path.realpath(folder) in [os.path.realpath(source), *map(str, Path(os.path.realpath(source)).parents)]:
        fail(f"{source} is what would be written over: choose another --dataset")
    fractions, counts = array("d"), dict(train=0, val=0, without_answer=0)
    for x in progress("checking", iterable=islice(read_examples(source), max_queries or None), unit=""):
        if x["answer"].strip():
            fractions.append(fraction(x["query"]))
    if not fractions:
        fail(f"{source} holds no example with an answer")
    limit = max(val_fraction, min(fractions))  # at least one is for validation
    with replacing(files[0]) as train, replacing(files[1]) as val:
        for x in progress("examples", iterable=islice(read_examples(source), max_queries or None), unit=""):
            kind = "without_answer" if not x["answer"].strip() else "val" if fraction(x["query"]) <= limit else "train"
            counts[kind] += 1
            if kind != "without_answer":
                (val if kind == "val" else train).write(to_line(x))
        if not counts["train"]:
            fail(f"{source} leaves no training example: {counts['val']} for validation, {counts['without_answer']} "
                 "without an answer")
        with replacing(manifest, "w") as f:
            json.dump(dict(settings=settings), f, indent=2)
    with replacing(manifest, "w") as f:
        json.dump(dict(settings=settings, counts=counts), f, indent=2)
    print(f"{folder}: " + ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in counts.items()))

"""
The field's file formats: corpora and queries as BEIR, MS MARCO, DPR and KILT have them, and TREC runs.

A file is known by what is in it, not by its name; it may be compressed with gzip. Whatever is wrong with one ends the
program in a single line that names the file and the line.
"""

import gzip
import json
import math
import re
import zlib
from itertools import groupby, islice

from configurator import fail
from files import read_lines


def lines(path, bar=None):
    """Yields (line number, line without its end) of every line that is not blank of a text file or .gz; bar counts the
    file's bytes."""
    try:
        with open(path, "rb") as raw, gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw as f:
            for number, line in enumerate(read_lines(f), 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as e:
                    fail(f"{path}, line {number}: not UTF-8: {e.reason} at byte {e.start} of the line")
                if bar is not None and number % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
                if text.strip():
                    yield number, text
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        fail(f"{path}: a damaged gzip file: {e}")


def file_format(path):
    """json (JSON Lines), tsv or text, by what the first lines of a file look like."""
    first = [line for _, line in islice(lines(path), 10)]
    if first and first[0].lstrip()[0] in "{[":
        return "json"
    return "tsv" if all("\t" in line for line in first) or path.removesuffix(".gz").endswith(".tsv") else "text"


# ---- records: JSON objects, or rows of columns


# what a header may call the columns of a .tsv
COLUMNS = {name: key for key, names in dict(
    _id="_id id docid doc_id docno did pid passage_id corpus_id corpus-id qid query_id query-id", url="url",
    title="title", text="text body passage contents passage_text query query_text question",
).items() for name in names.split()}


def columns_of(line):
    """The names of a .tsv's columns, by its first line, and whether that is a header: a line of known names, or one
    that begins with a name for an id. Without one: id, text (and title), as MS MARCO's passages and queries, or id,
    url, title, body, as its documents."""
    cells = [cell.strip().lower() for cell in line.split("\t")]
    if len(cells) > 1 and (COLUMNS.get(cells[0]) == "_id" or all(cell in COLUMNS for cell in cells)):
        return [COLUMNS.get(cell, cell) for cell in cells], True
    if len(cells) == 4 and re.match(r"https?://|www\.", cells[1]):
        return ["_id", "url", "title", "text"], False
    return ["_id", "text", "title"], False


def unquoted(cell):
    """A cell without csv's quotes, where it has them, as the passages of DPR do."""
    inner = cell[1:-1].replace('""', "")
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner
    return cell[1:-1].replace('""', '"') if quoted else cell


def tsv_record(where, line, names, has_header):
    cells = line.split("\t")
    if len(cells) == 1:
        fail(f"{where}: no tab: a .tsv file holds id, text on a line")
    if len(cells) > len(names):
        fail(f"{where}: {len(cells)} columns, but the first line has only "
             f"{', '.join(name.strip('_') for name in names)}")
    return dict(zip(names, map(unquoted, cells) if has_header else cells))


def check_unicode(x):
    """Raises ValueError for half a surrogate pair in the strings of x: good JSON, but no tokeniser takes it."""
    try:
        json.dumps(x, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"half a surrogate pair, which is no text: {e}") from e


def json_record(where, line):
    try:
        x = json.loads(line)
        if "\\ud" in line.lower():
            check_unicode(x)
    except ValueError as e:
        fail(f"{where}: broken JSON: {e}")
    if not isinstance(x, dict):
        fail(f"{where}: not a JSON object")
    return x


def records(path, bar=None):
    """Yields ("FILE, line N", object) of every line of a file of JSON Lines or of columns between tabs."""
    kind = file_format(path)
    number, first = next(lines(path), (0, ""))
    if kind == "text":
        fail(f"{path}, line {number}: neither a JSON object nor columns between tabs")
    names, has_header = columns_of(first)
    if kind == "tsv" and "text" not in names:
        fail(f"{path}, line {number}: a header without a name for the text, such as text: {', '.join(names)}")
    for i, (number, line) in enumerate(lines(path, bar)):
        where = f"{path}, line {number}"
        if kind == "json":
            yield where, json_record(where, line)
        elif i > 0 or not has_header:
            yield where, tsv_record(where, line, names, has_header)


def check_id(where, id):
    """The id as a string. Exits unless it is a single word: TREC runs have white space between their columns."""
    if id in (None, ""):
        fail(f"{where}: '_id' is missing or empty")
    if isinstance(id, bool) or not isinstance(id, (str, int)) or str(id).split() != [str(id)]:
        fail(f"{where}: _id {id!r} is no word or number")
    return str(id)


# ---- corpora, queries


def document_id(x):
    return x.get("_id", x.get("wikipedia_id"))


def kilt_text(paragraphs, title):
    """The text of a page of KILT's: its first paragraph repeats the title, headings and list items carry a mark."""
    paragraphs = [re.sub(r"^(Section::::|BULLET::::-?\s*)", "", p).strip() for p in paragraphs]
    return "\n".join(p for i, p in enumerate(paragraphs) if p and (i > 0 or p != title))


def read_documents(path, bar=None):
    """Yields (id, title, text) of every document of a corpus."""
    for where, x in records(path, bar):
        title = x.get("title", x.get("wikipedia_title")) or ""
        text = x["text"] or "" if "text" in x else None  # null is an empty text
        if isinstance(text, list) and all(isinstance(p, str) for p in text):
            text = kilt_text(text, title)
        for name, value in (("text", text), ("title", title)):
            if not isinstance(value, str):
                fail(f"{where}: '{name}' is missing or no string")
        yield check_id(where, document_id(x)), title.strip(), text


def read_queries(path):
    """Yields ("FILE, line N", {"_id", "text", "answers"}) of every query; without ids a query's line number is its
    id."""
    if file_format(path) == "text":
        for number, line in lines(path):
            yield f"{path}, line {number}", dict(_id=str(number), text=line.strip(), answers=[])
        return
    for where, x in records(path):
        text, metadata = x.get("text"), x.get("metadata")
        if not isinstance(text, str) or not text.strip():
            fail(f"{where}: 'text' is missing or empty")
        answers = metadata.get("answers") or [] if isinstance(metadata, dict) else []
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            fail(f"{where}: metadata.answers is not a list of strings")
        yield where, dict(_id=check_id(where, x.get("_id")), text=text.strip(),
                          answers=[a for a in answers if a.strip()])


# ---- training data of others


def examples_of(row):
    """The examples in a row of training data, under our names. Rows of two public data sets are known by their own:
    PISCO's (query, docs, mistral_label) and CLaRa's (question, docs, gold_answer or answers), where a list of questions
    with a list of their answers is as many examples."""
    if not isinstance(row, dict):
        return [row]
    names = dict(question="query", docs="documents", mistral_label="answer", gold_answer="answer")
    theirs = {name for name in names if row.get(name) is not None and row.get(names[name]) is None}  # Parquet has nulls
    if not theirs:
        return [row]
    x = {name: value for name, value in row.items() if name not in theirs} | {names[name]: row[name] for name in theirs}
    queries, answers = x.get("query"), x.get("answer") or x.get("answers")
    if isinstance(queries, list) and isinstance(answers, list) and len(queries) == len(answers) > 1:
        rest = {name: value for name, value in x.items() if name not in ("query", "answer", "answers")}
        return [one_answer({**rest, "query": q, "answer": a}) for q, a in zip(queries, answers)]
    if isinstance(queries, list) and len(queries) == 1:
        x["query"] = queries[0]
    return [one_answer(x if answers is None else {**x, "answer": answers})]


def one_answer(x):
    """An example whose answer is perhaps a list of gold answers, with the first of them as its answer."""
    golds = x.get("answer")
    return {**x, "answer": golds[0] if golds else "", "answers": golds} if isinstance(golds, list) else x


# ---- TREC runs: a line is query, Q0, passage, rank, score, tag


def run_lines(query, passages, scores, tag):
    """The lines of a query, as bytes. Scores have all their digits: they become targets."""
    return b"".join(f"{query} Q0 {p} {i} {s} {tag}\n".encode() for i, (p, s) in enumerate(zip(passages, scores), 1))


def read_run(path):
    """Yields (query id, [(passage id, score), ..]) of a run of our own: the lines of a query stand together, best
    first."""
    rows = (line.split() for _, line in lines(path))
    for query, group in groupby(rows, key=lambda row: row[0]):
        yield query, [(row[2], float(row[4])) for row in group]


def read_others_run(path, bar):
    """Yields ("FILE, line N", query id, passage id, score) of every line of any run, in any order. As trec_eval, it
    does not look at the ranks."""
    for number, line in lines(path, bar):
        where, columns = f"{path}, line {number}", line.split()
        try:
            query, _, passage, _, score, _ = columns
            score = float(score)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            fail(f"{where}: not a line of a TREC run: query Q0 passage rank score tag, with a number as score")
        yield where, query, passage, score


# ---- files of our own


def to_line(x):
    """An object as a line of JSON Lines, as bytes; what is no JSON, such as the dates of a table, as a string."""
    return json.dumps(x, ensure_ascii=False, default=str).encode() + b"\n"

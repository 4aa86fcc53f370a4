"""formats.py: corpora and queries as others write them. Broken files: test_prepare.py."""

import gzip
from pathlib import Path

import pytest
from conftest import jsonl, write

from formats import read_documents, read_queries


def test_corpus_formats(tmp_path):
    want = [("1", "Loku", "A town.\nHistory.\nold stone"), ("2", "", "the river")]
    kilt = [{"_id": "1", "wikipedia_id": 1, "wikipedia_title": "Loku",
             "text": ["Loku\n", "A town.\n", "Section::::History.\n", "BULLET::::- old stone\n", " "], "anchors": []},
            {"wikipedia_id": 2, "wikipedia_title": "", "text": ["the river"]}]
    assert list(read_documents(jsonl(tmp_path / "kilt.json", kilt))) == want
    beir = [dict(_id=id, title=title, text=text) for id, title, text in want]
    path = jsonl(tmp_path / "beir.jsonl", beir)
    assert list(read_documents(path)) == want
    write(tmp_path / "beir.jsonl.gz", gzip.compress(Path(path).read_bytes()))
    assert list(read_documents(f"{path}.gz")) == want
    assert list(read_documents(write(tmp_path / "a.tsv", "1\tA town.\tLoku\r\n\n2\tthe \"river\"\n"))) == [
        ("1", "Loku", "A town."), ("2", "", 'the "river"')]


def test_query_formats(tmp_path):
    def read(name, text):
        return [(x["_id"], x["text"], x["answers"]) for _, x in read_queries(write(tmp_path / name, text))]

    assert read("q.tsv", "1048585\twhat is it\n2\t who \n") == [("1048585", "what is it", []), ("2", "who", [])]
    assert read("q.txt", "\ufeffwhat is it\n\nwho\tis\n") == [("1", "what is it", []), ("3", "who\tis", [])]
    assert read("q.jsonl", '{"_id": 3, "text": "é", "metadata": {"answers": ["a"]}}\n{"_id": "4", "text": "b", "metadata": []}\n'
                ) == [("3", "é", ["a"]), ("4", "b", [])]
    assert read("h.tsv", "qid\tquery\n7\twho\n") == [("7", "who", [])]
    assert read("q.tsv.gz", gzip.compress(b"1\twho\n")) == [("1", "who", [])]
    # by what is in them, whatever they are called
    assert read("topics.txt", "12\twho is it\n13\twho\n") == [("12", "who is it", []), ("13", "who", [])]
    assert read("q.ndjson", '{"_id": 3, "text": "b", "metadata": {"answers": null}}\n') == [("3", "b", [])]
    assert read("q.gz", gzip.compress(b'{"_id": 3, "text": "b"}\n')) == [("3", "b", [])]
    assert read("cr.txt", "who is it\rwho\r") == [("1", "who is it", []), ("2", "who", [])]
    assert read("long.tsv", f"1\twho\r{'o' * 10000}\n2\tb\n") == [("1", "who\r" + "o" * 10000, []), ("2", "b", [])]
    assert read("crlf", "query_id\ttext\r\n7\twho\r\n") == [("7", "who", [])]
    assert read("not_gzipped.tsv.gz", "1\twho\n") == [("1", "who", [])]
    with pytest.raises(SystemExit, match="qa.txt, line 1: _id 'who is it' is no word or number"):  # not a question with its answer
        read("qa.txt", "who is it\tMara\nwho was it\tLoku\n")
    assert read("gold.jsonl", '{"_id": 1, "text": "b", "metadata": {"answers": [" ", "a"]}}\n') == [("1", "b", ["a"])]


def test_columns_of_passages(tmp_path):
    read = lambda text: list(read_documents(write(tmp_path / "passages.tsv", text)))
    dpr = 'id\ttext\ttitle\n1\t"The ""red"" mill, by Mara"\t"Loku, the town"\n2\t"a" or "b"\tMill\n'
    assert read(dpr) == [("1", "Loku, the town", 'The "red" mill, by Mara'), ("2", "Mill", '"a" or "b"')]
    assert read("D1\thttp://x.y/z\tThe mill\tIt burnt.\r\n") == [("D1", "The mill", "It burnt.")]
    assert read("docid\turl\ttitle\tbody\nD1\tx.y\tThe mill\tIt burnt.\n") == [("D1", "The mill", "It burnt.")]
    assert read("docno\tlanguage\ttext\n1\ten\ta\n") == [("1", "", "a")]  # a column that is not known
    assert read('1\t"quoted"\r2\tb\r') == [("1", "", '"quoted"'), ("2", "", "b")]

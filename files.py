"""
Files that a crash at any moment leaves whole: written next to their place, flushed to disk and renamed into it; their
checksums; the lines of text files, whatever ends them; settings as JSON; and tensors that have to fit.
"""

import errno
import json
import os
import shutil
from contextlib import contextmanager, suppress
from hashlib import sha256

from safetensors import SafetensorError
from safetensors.torch import load_file


def to_disk(path):
    """Flushes a file or folder to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:  # some file systems flush no folder
        if not os.path.isdir(path) or e.errno in (errno.EIO, errno.ENOSPC):
            raise
    os.close(fd)


@contextmanager
def naming(path):
    """Adds the file's name to an OSError that has none: a full disk does not say which file it was."""
    try:
        yield
    except OSError as e:
        if e.errno and not e.filename:
            e.filename = str(path)
        raise


@contextmanager
def replacing(path, mode="wb"):
    """Within it the file PATH.tmp is written; it gets its name when it is complete and on the disk."""
    with naming(path):
        with open(f"{path}.tmp", mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)


@contextmanager
def replacing_folder(path, previous=None):
    """Within it the folder PATH.tmp is filled; with checksums, and on the disk, it gets its name. The folder that had
    it is kept as `previous`, or removed."""
    path = os.path.normpath(path)
    new, old = f"{path}.tmp", previous or f"{path}.old"
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    yield new
    sums = "".join(f"{file_sha256(f'{new}/{name}')}  {name}\n" for name in sorted(os.listdir(new)))
    with open(f"{new}/SHA256SUMS", "w") as f:
        f.write(sums)
    for name in os.listdir(new):
        with suppress(OSError):  # some file systems know no permissions
            os.chmod(f"{new}/{name}", 0o644)  # safetensors makes files that only their owner can read
        to_disk(f"{new}/{name}")
    to_disk(new)
    if os.path.isdir(path):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(new, path)
    to_disk(os.path.dirname(path) or ".")
    if not previous:
        shutil.rmtree(old, ignore_errors=True)


def file_sha256(path):
    digest = sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_lines(file):
    """The lines of a binary file, with their ends: LF, CR LF or, where its beginning has no LF, CR alone."""
    start, head = file.tell(), file.read(1 << 20)
    file.seek(start)
    if b"\n" in head or b"\r" not in head:
        yield from file
        return
    rest = b""
    while block := file.read(1 << 20):
        *whole, rest = (rest + block).split(b"\r")
        yield from (line + b"\r" for line in whole)
    if rest:
        yield rest


def read_json(path):
    """A file that is one JSON object. Raises ValueError in one line that names it where it is not, and OSError."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object")
    return found


def read_tensors(path):
    """The tensors of a safetensors file. Raises ValueError for a broken file, OSError for a missing one."""
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged: {e}") from e


def load_tensors(path, own):
    """read_tensors() of a file that must have the names and shapes of `own` (a dict of tensors). Raises ValueError for
    one that has not."""
    tensors = read_tensors(path)
    must_fit(path, tensors, own)
    return tensors


def must_fit(path, tensors, own):
    """Raises ValueError unless the tensors of a file have the names and shapes of `own`."""
    for name in sorted(own.keys() | tensors.keys()):
        there, here = (tuple(t[name].shape) if name in t else "missing" for t in (tensors, own))
        if there != here:
            raise ValueError(f"{path} does not fit this model: {name} is {there} there and {here} here")

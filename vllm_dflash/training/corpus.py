# SPDX-License-Identifier: Apache-2.0
"""The training text: Python's own standard library, split by file, with code snippets as conversations.

Everything downstream (tokenizer, target, responses, drafter) reads training documents only; held-out documents are for
prompts of the evaluation. The split is a hash of the relative path, so it needs no list and never moves.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PER_MILLE = 40
MAX_FILE_BYTES = 400_000
# Third-party code, deliberately broken sources, character tables: nothing a language model should learn to continue.
SKIPPED_PARTS = frozenset(("site-packages", "lib2to3", "encodings", "idlelib", "data", "encoded_modules"))
DOCS_FILE = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """One source file (or one help topic of it)."""

    path: str  # relative to the corpus root, with forward slashes
    text: str
    held_out: bool


@dataclass(frozen=True)
class Snippet:
    """A function or class cut in two at a line boundary: the user shows `head`, the assistant writes `tail`."""

    path: str
    head: str
    tail: str


def default_root() -> Path:
    """The standard library of the running interpreter (PSF licence)."""
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(path: str) -> bool:
    """True for about 4 % of relative paths, the same ones on every machine."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % 1000 < HELD_OUT_PER_MILLE


def load_documents(root: Path, max_characters: float = float("inf")) -> list[Document]:
    """Read every usable `*.py` under `root`, sorted by path, exact duplicates dropped, until `max_characters` are read.

    Raises ValueError when `root` holds no Python file.
    """
    documents: list[Document] = []
    seen: set[str] = set()
    characters = 0
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if SKIPPED_PARTS & set(path.split("/")):
            continue
        if characters >= max_characters:
            break
        for text in _texts(file, path):
            if text not in seen:
                seen.add(text)
                documents.append(Document(path, text, is_held_out(path)))
                characters += len(text)
    if not documents:
        raise ValueError(f"--corpus {root}: no usable .py file there")
    return documents


def training_documents(documents: list[Document]) -> list[Document]:
    """The documents that anything trained may be derived from."""
    return [document for document in documents if not document.held_out]


def held_out_documents(documents: list[Document]) -> list[Document]:
    """The documents reserved for evaluation prompts."""
    return [document for document in documents if document.held_out]


def snippets(document: Document, rng: random.Random) -> Iterator[Snippet]:
    """Functions and classes of one document, dedented, each cut after its docstring or after its first lines."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):  # help topics, or sources that are broken on purpose
        return
    lines = document.text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.end_lineno is None:
            continue
        block = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).splitlines()
        cut = _cut(node, len(block), rng)
        if cut is not None:
            yield Snippet(document.path, "\n".join(block[:cut]), "\n".join(block[cut:]))


def _cut(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, length: int, rng: random.Random) -> int | None:
    """How many of the block's lines the user shows, or None for a block too short to continue."""
    signature = node.body[0].lineno - node.lineno
    if ast.get_docstring(node, clean=False) is not None:
        signature = (node.body[0].end_lineno or node.lineno) - node.lineno + 1
    shortest = max(1, signature)
    if length - shortest < 2:
        return None
    # Half of the heads stop at the signature, the others run some way into the body.
    return shortest if rng.random() < 0.5 else rng.randint(shortest, length - 2)


def _texts(file: Path, path: str) -> list[str]:
    raw = file.read_bytes()
    if path == DOCS_FILE:
        return _help_topics(raw.decode())
    if not 64 <= len(raw) <= MAX_FILE_BYTES:
        return []
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:  # a few test fixtures use other encodings on purpose
        return []
    # Tables of characters and escapes would fill the small vocabulary with rare bytes.
    plain = text.isprintable() or sum(map(str.isascii, text)) > 0.98 * len(text)
    return [text.replace("\r\n", "\n")] if plain and text.count("\\x") < 500 else []


def _help_topics(raw: str) -> list[str]:
    for node in ast.parse(raw).body:
        if isinstance(node, ast.Assign):
            return [text for text in ast.literal_eval(node.value).values() if len(text) > 200]
    return []

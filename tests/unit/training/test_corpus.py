# SPDX-License-Identifier: Apache-2.0
"""The corpus: a split that never moves, and snippets that are cut where they should be."""

import random

import pytest

from vllm_dflash.training.corpus import (
    Document,
    default_root,
    held_out_documents,
    is_held_out,
    load_documents,
    snippets,
    training_documents,
)

SOURCE = '''class Point:
    """A point."""

    def shift(self, by):
        """Move it."""
        self.x += by
        self.y += by
        return self
'''


def test_split_is_fixed():
    # sha256 of the path modulo 1000, worked out outside the package: 39, and 41 just past the bound of 40.
    assert is_held_out("multiprocessing/process.py")
    assert not is_held_out("re/_compiler.py")


def test_split_is_disjoint_and_about_four_percent():
    documents = load_documents(default_root())
    held_out = {document.path for document in held_out_documents(documents)}
    training = {document.path for document in training_documents(documents)}
    assert held_out and training and not held_out & training
    assert {document.path for document in documents} == held_out | training
    assert 0.02 < len(held_out) / len(documents) < 0.06
    held_out_texts = {document.text for document in held_out_documents(documents)}
    assert not held_out_texts & {document.text for document in training_documents(documents)}
    assert not any("site-packages" in path for path in held_out | training)


def test_unusable_files_are_left_out(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n" * 20)
    (tmp_path / "copy.py").write_text("x = 1\n" * 20)
    (tmp_path / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1") * 20)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("y = 1\n" * 20)
    assert [document.path for document in load_documents(tmp_path)] == ["copy.py"]  # the first by name of two equal


def test_empty_corpus_names_flag_and_folder(tmp_path):
    with pytest.raises(ValueError, match=f"--corpus {tmp_path}"):
        load_documents(tmp_path)


def test_snippets_are_dedented_and_cut_after_the_docstring():
    found = list(snippets(Document("point.py", SOURCE, False), random.Random(0)))
    assert len(found) == 2
    lines = SOURCE.splitlines()
    assert f"{found[0].head}\n{found[0].tail}" == SOURCE.rstrip("\n")
    assert found[0].head.splitlines()[:2] == lines[:2]
    method = [line[4:] for line in lines[3:]]
    assert f"{found[1].head}\n{found[1].tail}".splitlines() == method
    assert found[1].head.splitlines()[:2] == ["def shift(self, by):", '    """Move it."""']
    assert len(found[1].tail.splitlines()) >= 2


def test_text_that_is_not_python_has_no_snippets():
    assert list(snippets(Document("topic", "The statement\n*****", False), random.Random(0))) == []

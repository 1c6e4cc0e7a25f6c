"""The folder to publish: one place for the packed files and the card, with or without hard links."""

import os

import pytest

from tasks.report import gather
from tasks.store import MANIFEST


@pytest.fixture
def packed(tmp_path):
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "awq_meta.json").write_text("{}")
    (folder / MANIFEST).write_text("{}")
    (tmp_path / "README.md").write_text("card")
    return folder


def contents(model) -> dict[str, str]:
    return {file.name: file.read_text() for file in model.iterdir()}


def test_files_are_linked(packed, tmp_path):
    gather(packed, tmp_path / "README.md", tmp_path / "model")
    assert contents(tmp_path / "model") == {"awq_meta.json": "{}", "README.md": "card"}
    assert (tmp_path / "model" / "awq_meta.json").samefile(packed / "awq_meta.json")


def test_where_the_file_system_has_no_links_files_are_copied(packed, tmp_path, monkeypatch):
    def refuse(source, place):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    gather(packed, tmp_path / "README.md", tmp_path / "model")
    assert contents(tmp_path / "model") == {"awq_meta.json": "{}", "README.md": "card"}

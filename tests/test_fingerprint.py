"""Digests of a model directory: each part is noticed, and large files are read once."""

import os

import pytest

from tsopsd_jax.model import fingerprint as module
from tsopsd_jax.model.fingerprint import difference, fingerprint


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"first half")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"second half")
    (folder / "config.json").write_text('{"rope_theta": 10000}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_every_part_that_decides_a_result_is_noticed(folder):
    before = fingerprint(folder)
    assert difference(before, fingerprint(folder)) is None
    assert before["template"] == before["generation_config"] == ""
    changes = {
        "weights": ("model-00002-of-00002.safetensors", "second hale"),
        "config": ("config.json", '{"rope_theta": 20000}'),
        "generation_config": ("generation_config.json", '{"eos_token_id": 3}'),
        "tokenizer": ("added_tokens.json", "{}"),
        "template": ("chat_template.jinja", "{{ messages }}"),
    }
    for part, (name, text) in changes.items():
        old = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_text(text)
        assert difference(before, fingerprint(folder)) == part
        (folder / name).unlink() if old is None else (folder / name).write_bytes(old)
    (folder / "README.md").write_text("a card decides nothing")
    assert fingerprint(folder) == before


def test_halves_that_change_places_are_noticed(folder):
    before = fingerprint(folder)
    one, two = sorted(folder.glob("*.safetensors"))
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    assert difference(before, fingerprint(folder)) == "weights"


def test_large_files_are_hashed_once_and_again_when_they_change(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "READ_BYTES", 4)
    cache, hashed = tmp_path / "cache" / "digests.json", []
    original = module._digest
    monkeypatch.setattr(module, "_digest", lambda file, *rest: hashed.append(file.name) or original(file, *rest))
    first = fingerprint(folder, cache=cache)
    weights = [name for name in hashed if name.endswith("safetensors")]
    assert len(weights) == 2
    hashed.clear()
    assert fingerprint(folder, cache=cache) == first
    assert hashed == ["tokenizer.json"], "two bytes: not worth a cache"
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(b"other half")  # as long as before
    os.utime(file, ns=(1, 1))
    assert difference(first, fingerprint(folder, cache=cache)) == "weights"
    cache.write_text("torn")
    assert fingerprint(folder, cache=cache) == fingerprint(folder)


def test_blocks_are_joined_in_order(folder, monkeypatch):
    monkeypatch.setattr(module, "READ_BYTES", 3)
    file = folder / "model-00001-of-00002.safetensors"
    before = fingerprint(folder)
    file.write_bytes(b"st firhalf")  # the same blocks of three bytes, in another order
    assert difference(before, fingerprint(folder)) == "weights"

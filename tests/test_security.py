"""What comes with a model, a data set or a run is data: it runs no code, takes its share and no more, and names no file
of others. docs/security.md."""

import json
import time

import byte_model
import pytest

from tsopsd_jax.data import Tokenizer, chat, chat_worker
from tsopsd_jax.model import load_pretrained
from tsopsd_jax.model.hf import save_pretrained
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.rewards.workers import WorkerPool

BENIGN = "{% for m in messages %}{{ m.content }};{% endfor %}"


def load_with(template: str, folder) -> Tokenizer:
    return Tokenizer.load(byte_model.write(folder / "model", template=template), chat="direct")


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{% set _ = messages.append({'role': 'user', 'content': 'more'}) %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_chat_template_does_not_leave_its_sandbox(escape, tmp_path):
    benign = load_with(BENIGN, tmp_path / "benign")
    assert benign.decode(benign.encode("a")) == "a;"
    with pytest.raises(ValueError, match=r"chat template of .*: (cannot be rendered|expected)"):
        load_with(escape + BENIGN, tmp_path)


def test_a_chat_template_has_a_limit_of_time(tmp_path, monkeypatch):
    pool = WorkerPool(chat._workers().command, wall_s=2.0, environment={})
    monkeypatch.setattr(chat, "_workers", lambda: pool)
    loop = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    pool.start()
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be rendered \(it took more than 2 s\)"):
        load_with(loop + BENIGN, tmp_path)
    assert time.monotonic() - began < 60
    assert pool.cut_off == 1
    assert load_with(BENIGN, tmp_path / "next").frame is not None, "the next one has a new worker"
    pool.close()


DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


@pytest.mark.parametrize("bomb", ["{% set x = 'x' * 10 ** 10 %}", DOUBLING, "{{ '%10000000000d' % 1 }}"])
def test_a_chat_template_has_a_limit_of_memory(bomb, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be rendered \((MemoryError|it ended its process)"):
        load_with(bomb + BENIGN, tmp_path)
    assert load_with(BENIGN, tmp_path / "next").frame is not None


def test_a_chat_template_and_its_turn_have_a_limit_of_size(tmp_path):
    with pytest.raises(ValueError, match="expected a template of at most 1,000,000 characters, got 1,000,0"):
        load_with(BENIGN + "x" * chat_worker.LONGEST_TURN, tmp_path)
    with pytest.raises(ValueError, match="it makes 1,000,009 characters, expected at most 1,000,000"):
        # A space, and two messages of three characters that stand for a text and a semicolon: 10 ** 6 + 1 + 2 * 4.
        load_with("{{ 'x' * 1000000 }}" + " " + BENIGN, tmp_path)


@pytest.fixture
def marked(tmp_path):
    """A model directory with code in it that would leave a mark."""
    folder = byte_model.write(tmp_path / "model")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "tokenizer.py"):
        (folder / name).write_text(code)
    auto = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.C"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    named = json.loads((folder / "tokenizer_config.json").read_text())
    auto = {"AutoTokenizer": ["tokenization_evil.C", "tokenization_evil.C"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"auto_map": auto}))
    return folder


def test_code_in_a_model_directory_is_not_run(marked):
    read_config(marked / "config.json")
    Tokenizer.load(marked, chat="direct")
    assert not (marked.parent / "ran").exists()


def test_pickled_weights_are_not_read(marked):
    (marked / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ValueError, match=r"expected model.safetensors or model.safetensors.index.json, found neither"):
        load_pretrained(marked)


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_names_no_file_outside_of_its_directory(shard, tiny, tmp_path):
    """Not even where there is one."""
    model, params = tiny
    save_pretrained(tmp_path / "other", model, params)
    byte_model.write(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed": shard}}))
    with pytest.raises(ValueError, match="model.safetensors.index.json: expected weight_map to be|no such file"):
        load_pretrained(tmp_path / "model")


def test_an_export_does_not_write_through_a_link(tiny, tmp_path):
    """A link in the place of the weights is replaced, and what it points to stays as it is."""
    model, params = tiny
    save_pretrained(tmp_path / "out", model, params)
    treasure = tmp_path / "treasure.safetensors"
    (tmp_path / "out" / "model.safetensors").rename(treasure)
    before = treasure.read_bytes()
    (tmp_path / "out" / "model.safetensors").symlink_to(treasure)
    save_pretrained(tmp_path / "out", model, params)
    assert treasure.read_bytes() == before
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()

"""Our models against transformers' (random weights, float32), and our directories read by transformers."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax import data
from tsopsd_jax.model import load_pretrained, save_pretrained

torch = pytest.importorskip("torch", reason="torch (the `parity` extra) is the oracle of these tests")
pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40)).astype(np.int32)


def quietly(function, *args, **options):
    """Call into transformers with its own deprecation and resource warnings, and only those, silenced."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, ResourceWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        return function(*args, **options)


def make_reference(folder: Path, *, family="Qwen3", dtype=torch.float32, max_shard_size="5GB", **shape):
    """A random model by transformers, saved to `folder`; norm scales are far from their default, 1."""

    def build():
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()
        sizes = {
            "vocab_size": 61,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
        }
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**(sizes | shape))
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else 0.2 * torch.randn_like(p))
        model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        return model

    return quietly(build)


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return quietly(model, torch.from_numpy(TOKENS).long()).logits.numpy()


def load_theirs(folder: Path):
    def load():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return quietly(load)


def assert_close(ours, theirs, tolerance: float = 1e-5) -> None:
    """Largest difference, relative to the largest |logit|."""
    assert np.abs(theirs).max() > 1, "the reference's logits are too small to tell anything"
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


YARN = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "gqa2": {},
    "gqa1_theta1e4": {"num_key_value_heads": 4, "rope_theta": 1e4},
    "gqa4_theta5e6_tied": {"num_key_value_heads": 1, "rope_theta": 5e6, "tie_word_embeddings": True},
    "head_dim_is_hidden_over_heads": {"head_dim": 6, "rms_norm_eps": 1e-3},
    # Qwen3's own setting for long contexts, made short: components 1 and 2 of 5 are mixtures.
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 16},
    "yarn_exact_bounds": {
        "rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5},
        "max_position_embeddings": 64,
    },
    "yarn_llama": {"family": "Llama", "rope_parameters": YARN | {"factor": 8.0}, "max_position_embeddings": 128},
    "llama": {"family": "Llama", "rope_theta": 1e4},
    "llama_gqa3_tied": {
        "family": "Llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "qwen2": {"family": "Qwen2", "head_dim": 6},
    "qwen2_gqa4_tied": {"family": "Qwen2", "num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=CASES)
def reference(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_reference(folder, **CASES[request.param]), CASES[request.param]


def test_logits_agree_and_our_directory_is_theirs(reference, tmp_path):
    folder, theirs, shape = reference
    model, params = load_pretrained(folder)
    expected = their_logits(theirs)
    assert_close(model.logits(params, jnp.asarray(TOKENS)), expected)
    assert ("head" in params) != shape.get("tie_word_embeddings", False)

    save_pretrained(tmp_path / "ours", model, params)
    read_back = load_theirs(tmp_path / "ours")
    assert type(read_back) is type(theirs)
    assert_close(their_logits(read_back), expected)
    again, same = load_pretrained(tmp_path / "ours")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files_in_shards(dtype, tmp_path):
    make_reference(tmp_path / "theirs", dtype=dtype, max_shard_size="8KB")
    # Read back as float32: converting the model itself would leave its rotary frequencies rounded to 16 bits.
    theirs = load_theirs(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    model, params = load_pretrained(tmp_path / "theirs")
    assert_close(model.logits(params, jnp.asarray(TOKENS)), their_logits(theirs))
    # Back in the stored dtype, in our own shards: nothing is lost, so transformers sees the same model.
    ours = tmp_path / "ours"
    save_pretrained(ours, model, params, dtype=str(dtype).removeprefix("torch."), max_shard_bytes=8000)
    assert len(list(ours.glob("model-*.safetensors"))) > 2
    for name, value in load_theirs(ours).state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_older_config_spelling(reference, tmp_path):
    """transformers 4 wrote rope_theta at the top level and rope_scaling null."""
    folder, _, _ = reference
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    raw = json.loads((old / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    scaled = rope["rope_type"] != "default"
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if scaled else None}
    (old / "config.json").write_text(json.dumps(raw))
    assert load_pretrained(old)[0].config == load_pretrained(folder)[0].config


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_sizes_that_a_config_leaves_out(family, tmp_path):
    """Qwen2 and older Llama files have no head_dim, the oldest Llama no num_key_value_heads:
    transformers fills them in."""
    theirs = make_reference(tmp_path, family=family, head_dim=6, num_key_value_heads=4)
    left_out = ["head_dim", "max_position_embeddings"] + (["num_key_value_heads"] if family == "Llama" else [])
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in left_out}))
    model, params = load_pretrained(tmp_path)
    read_back = load_theirs(tmp_path)
    assert model.config.max_position_embeddings == read_back.config.max_position_embeddings
    assert_close(model.logits(params, jnp.asarray(TOKENS)), their_logits(theirs))


def test_tokenizer_and_generation_config_come_along(tmp_path):
    def make_tokenizer(folder: Path):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(models.WordLevel({"<eos>": 0, "one": 1, "two": 2}, unk_token="<eos>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        tokenizer.save_pretrained(folder)

    make_reference(tmp_path / "theirs", eos_token_id=7, bos_token_id=5)
    quietly(make_tokenizer, tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", model, params, tokenizer_from=tmp_path / "theirs")

    def load():
        from transformers import AutoTokenizer, GenerationConfig

        return AutoTokenizer.from_pretrained(tmp_path / "ours"), GenerationConfig.from_pretrained(tmp_path / "ours")

    tokenizer, generation = quietly(load)
    assert tokenizer("two one")["input_ids"] == [2, 1]
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert generation.eos_token_id == 7
    assert load_theirs(tmp_path / "ours").config.bos_token_id == 5


CHAT = "{% for m in messages %}<turn>{{ m.content }}<done>{% endfor %}{% if add_generation_prompt %}<turn>{% endif %}"


@pytest.mark.parametrize("chat", ["direct", "none"])
def test_an_exported_policy_stops_where_training_did(chat, tmp_path):
    """A policy that always says <done>, which its base model's files do not name:
    generation by transformers ends there."""
    from tokenizers import Tokenizer, models

    base, out = tmp_path / "base", tmp_path / "ours"
    make_reference(base, vocab_size=8, eos_token_id=6)
    words = {word: at for at, word in enumerate(("one", "two", "?", "??", "<pad>", "<turn>", "<end>", "<done>"))}
    inner = Tokenizer(models.WordLevel(words))
    inner.add_special_tokens(["<pad>", "<turn>", "<end>", "<done>"])
    inner.save(str(base / "tokenizer.json"))
    named = {"eos_token": "<end>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (base / "tokenizer_config.json").write_text(json.dumps(named))
    (base / "chat_template.jinja").write_text(CHAT)
    model, params = load_pretrained(base)
    # Hidden states are positive, the same everywhere: no layer adds to an embedding of ones.
    params = jax.tree.map(jnp.zeros_like, params) | {"embed": jnp.ones_like(params["embed"])}
    params |= {"final_norm": jnp.ones_like(params["final_norm"]), "head": params["head"].at[:, 7].set(1.0)}
    stop_ids = data.Tokenizer.load(base, chat=chat).stop_ids
    save_pretrained(out, model, params, tokenizer_from=base, stop_ids=stop_ids)

    def generated() -> list[int]:
        from transformers import AutoTokenizer

        theirs: Any = load_theirs(out)
        tokenizer = AutoTokenizer.from_pretrained(out)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "two"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return theirs.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=4)[0].tolist()

    prompt = [5, 1, 7, 5]
    if chat == "direct":
        assert stop_ids == (7, 6)
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [7, 6]
        assert quietly(generated) == [*prompt, 7]
    else:
        assert stop_ids == (6,)
        assert quietly(generated) == [*prompt, 7, 7, 7, 7]

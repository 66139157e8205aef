"""Hugging Face directories in and out: exact round trips, bounded host memory, errors that say where."""

import dataclasses
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tsopsd_jax.distributed.sharding import make_mesh, tree_shardings
from tsopsd_jax.model import Qwen3, Qwen3Config, load_pretrained, save_pretrained
from tsopsd_jax.model.qwen3 import Yarn

CONFIG = Qwen3Config(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope_theta=12345.0,
    max_position_embeddings=77,
)


def random_params(model: Qwen3, seed: int = 0, dtype=np.float32):
    """Every leaf its own noise, made on the host: no two entries are alike, norms included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape).astype(dtype)), model.param_shapes())


def assert_same(a, b):
    def same(x, y):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype

    jax.tree.map(same, a, b)


@pytest.fixture(scope="module")
def model():
    return Qwen3(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


@pytest.fixture(scope="module")
def saved(model, params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(folder, model, params)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_config(folder: Path, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def edit_tensors(folder: Path, **changes):
    """`...` removes a tensor; `__` in a name stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not ...}, folder / "model.safetensors")


# -------------------------------------------------------------------------------- layout and round trip


def test_stored_layout_by_hand(saved, params):
    """torch's Linear stores [out, in]; a head is a run of head_dim consecutive output rows."""
    q, o = np.asarray(params["layers"]["q"]), np.asarray(params["layers"]["o"])
    with safe_open(saved / "model.safetensors", framework="numpy") as file:
        assert file.metadata()["format"] == "pt"  # transformers refuses a file without it
        stored_q = file.get_tensor("model.layers.1.self_attn.q_proj.weight")
        stored_o = file.get_tensor("model.layers.1.self_attn.o_proj.weight")
        head = file.get_tensor("lm_head.weight")
    # Head 2, component 3 is row 2 * 6 + 3 = 15.
    assert stored_q.shape == (24, 16)
    assert stored_q[15, 5] == q[1, 5, 2, 3]
    assert stored_o.shape == (16, 24)
    assert stored_o[5, 15] == o[1, 2, 3, 5]
    assert head[7, 3] == np.asarray(params["head"])[3, 7]


def test_stored_bias_by_hand(tmp_path):
    """A bias is one row of numbers in the order of the projection's output rows."""
    model = Qwen3(dataclasses.replace(CONFIG, architecture="Qwen2ForCausalLM"))
    params = random_params(model)
    save_pretrained(tmp_path / "m", model, params)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    # Head 1, component 3 of layer 1 is entry 1 * 6 + 3 = 9.
    for name in ("k", "v"):
        bias = stored[f"model.layers.1.self_attn.{name}_proj.bias"]
        assert bias.shape == (12,)
        assert bias[9] == np.asarray(params["layers"][f"{name}_bias"])[1, 1, 3]
    assert not any("q_norm" in name or "o_proj.bias" in name for name in stored)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "qwen2"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(
    ("architecture", "tied"),
    [("Qwen3ForCausalLM", False), ("Qwen3ForCausalLM", True), ("LlamaForCausalLM", True), ("Qwen2ForCausalLM", False)],
)
def test_round_trip_is_exact(tmp_path, dtype, architecture, tied):
    model = Qwen3(dataclasses.replace(CONFIG, architecture=architecture, tie_word_embeddings=tied))
    params = random_params(model, dtype=dtype)
    save_pretrained(tmp_path / "m", model, params, max_shard_bytes=3000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == count * np.dtype(dtype).itemsize
    again, same = load_pretrained(tmp_path / "m", dtype=dtype)
    assert again.config == model.config
    assert again.compute_dtype == dtype
    assert_same(same, params)


def test_loading_in_another_dtype(saved, params):
    model, halved = load_pretrained(saved, dtype=jnp.bfloat16)
    assert_same(halved, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert model.logits(halved, jnp.zeros((1, 3), jnp.int32)).dtype == jnp.float32


def test_biases_lie_with_their_heads(tmp_path):
    model = Qwen3(dataclasses.replace(CONFIG, architecture="Qwen2ForCausalLM"))
    params = random_params(model)
    save_pretrained(tmp_path / "m", model, params)
    _, placed = load_pretrained(tmp_path / "m", mesh=make_mesh(fsdp=4, tensor=2))
    assert_same(placed, params)
    assert placed["layers"]["q_bias"].addressable_shards[0].data.shape == (2, 2, 6)
    assert placed["layers"]["v_bias"].addressable_shards[0].data.shape == (2, 1, 6)


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_mesh_placement(saved, model, params, sizes, tmp_path):
    mesh = make_mesh(**sizes)
    _, placed = load_pretrained(saved, mesh=mesh)
    expected = tree_shardings(model.param_axes(), model.param_shapes(), mesh)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding} is not {s}"), placed, expected)
    assert_same(placed, params)
    save_pretrained(tmp_path / "m", model, placed)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_host_memory_is_bounded(tmp_path):
    """Loading holds one stacked parameter (one shard of it on a mesh) on the host, saving one tensor."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    config = Qwen3Config(**(vars(CONFIG) | sizes))
    model = Qwen3(config)
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), model.param_shapes())
    tensor = 256 * 1024 * 4
    stacked, total = 8 * tensor, sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert total > 3 * stacked

    def peak(function):
        """Highest traced bytes beyond what the result keeps (a CPU buffer may be a numpy array's memory)."""
        tracemalloc.start()
        try:
            result = function()
            kept, highest = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        del result
        return highest - (kept if kept > tensor else 0)

    folder = tmp_path / "m"
    assert peak(lambda: save_pretrained(folder, model, params, dtype=jnp.bfloat16)) < 3 * tensor
    load_pretrained(folder)  # what it imports for the first time is not what a model needs
    assert peak(lambda: load_pretrained(folder)) < stacked + 2 * tensor
    assert peak(lambda: load_pretrained(folder, mesh=make_mesh(fsdp=4, tensor=2))) < stacked / 8 + 2 * tensor


def test_tied_checkpoint_may_carry_the_head(tmp_path):
    model = Qwen3(Qwen3Config(**(vars(CONFIG) | {"tie_word_embeddings": True})))
    params = random_params(model)
    save_pretrained(tmp_path / "m", model, params)
    edit_tensors(tmp_path / "m", lm_head__weight=np.asarray(params["embed"]))
    assert_same(load_pretrained(tmp_path / "m")[1], params)
    edit_tensors(tmp_path / "m", lm_head__weight=np.asarray(params["embed"]) + 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_pretrained(tmp_path / "m")


# -------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({}, 12345.0),
        ({"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7}, "rope_theta": ...}, 7.0),
        ({"rope_parameters": ..., "rope_theta": ...}, 1e4),  # transformers' default
        ({"rope_parameters": ..., "rope_theta": 3e4, "rope_scaling": {"type": "default"}}, 3e4),
    ],
)
def test_rope_spellings(copy, changes, theta):
    edit_config(copy, **changes)
    assert load_pretrained(copy)[0].config.rope_theta == theta


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_yarn_is_read_and_written(copy, tmp_path):
    """From the older section, beside the newer one that says nothing of it; the context is that which it is for."""
    edit_config(copy, rope_scaling=YARN)
    model, params = load_pretrained(copy)
    assert model.config.yarn == Yarn(factor=4.0, original_max_position_embeddings=64)
    assert (model.config.rope_theta, model.config.max_position_embeddings) == (12345.0, 4 * 64)
    save_pretrained(tmp_path / "again", model, params)
    assert load_pretrained(tmp_path / "again")[0].config == model.config


def test_windows_that_are_not_in_use_are_accepted(copy):
    edit_config(copy, use_sliding_window=True, sliding_window=64, max_window_layers=2)
    load_pretrained(copy)
    edit_config(copy, sliding_window=4096, use_sliding_window=False, max_window_layers=0)
    load_pretrained(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, r"Qwen3ForCausalLM, Qwen2.*, LlamaForCausalLM, got .*Mistral"),
        ({"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}, r"architectures to be one of"),
        ({"architectures": ...}, r"Qwen3ForCausalLM.*None"),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True},
            r"attention_bias True",
        ),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": True}, r"mlp_bias True"),
        ({"model_type": "qwen3_moe"}, r"expected model_type 'qwen3', that of Qwen3ForCausalLM, got 'qwen3_moe'"),
        ({"model_type": ...}, r"expected model_type 'qwen3'.* got None"),
        ({"rope_scaling": LLAMA3}, r"rope_type 'llama3' is not supported"),
        ({"num_attention_heads": 0}, r"num_attention_heads"),
        ({"hidden_size": ...}, r"hidden_size.*positive integer.*None"),
        ({"head_dim": "8"}, r"head_dim.*positive integer.*'8'"),
        ({"num_key_value_heads": 3}, r"config\.json: num_attention_heads 4.*num_key_value_heads 3"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps.*'small'"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings.*'no'"),
        ({"attention_bias": True}, r"attention_bias True"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            r"transformers refuses.*rope_type'='yarn': {'factor'}",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": ...}, r"rope_type 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_type 'dynamic' is not supported"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, r"YaRN: expected factor and .* of at least 1, got 0\.5 and 64"),
        ({"rope_scaling": YARN | {"factor": "4"}}, r"expected factor of YaRN to be float, got '4'"),
        ({"rope_scaling": YARN | {"beta_fast": 1}}, r"YaRN: expected beta_fast > beta_slow > 0, got 1\.0 and 1\.0"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, r"mscale of YaRN is not supported"),
        # The section that is obeyed says nothing of the other's theta.
        ({"rope_scaling": YARN, "rope_theta": ...}, r"rope_scaling replaces rope_parameters and its rope_theta 12345"),
        ({"layer_types": ["full_attention"]}, r"num_hidden_layers.*2.*must be equal to the number of `layer_types`.*1"),
        ({"layer_types": ["full_attention", "other"]}, r"layer_types 'other' is not supported"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, r"layer_types 'chunked_attention' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"rope_parameters.*flat"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": -1}}, r"rope_theta.*-1"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, r"use_sliding_window"),
        # transformers has a window of 4,096 where none is given.
        ({"use_sliding_window": True, "sliding_window": ..., "max_window_layers": 1}, r"use_sliding_window"),
    ],
)
def test_config_errors(copy, changes, message):
    edit_config(copy, **changes)
    check_error(copy, message)


# -------------------------------------------------------------------------------- damaged directories


def check_error(folder: Path, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_missing_directory_and_config(copy, tmp_path):
    check_error(tmp_path / "absent", "no such directory")
    (copy / "config.json").write_text("{")
    check_error(copy, r"config\.json: expected JSON")
    (copy / "config.json").write_text("[]")
    check_error(copy, r"config\.json: expected a JSON object, got a list")
    (copy / "config.json").unlink()
    check_error(copy, r"config\.json: no such file")


Q = "model__layers__1__self_attn__q_proj__weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q: ...}, r"missing tensor model\.layers\.1\.self_attn\.q_proj\.weight"),
        ({"lm_head__weight": ...}, r"missing tensor lm_head\.weight"),
        ({"extra__bias": np.zeros(3, np.float32)}, r"surplus tensor extra\.bias"),
        # Transposed: the same number of elements.
        ({Q: np.zeros((16, 24), np.float32)}, r"q_proj\.weight: expected shape \(24, 16\).*got \(16, 24\)"),
        ({Q: np.zeros((24, 16), np.int8)}, r"q_proj\.weight: expected a dtype.*F32.*got I8"),
        ({Q: np.zeros((24, 16), np.float64)}, r"q_proj\.weight: expected a dtype.*got F64"),
    ],
)
def test_tensor_errors(copy, changes, message):
    edit_tensors(copy, **changes)
    check_error(copy, message)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(model, params, dtype, bad, tmp_path):
    save_pretrained(tmp_path / "m", model, params, dtype=dtype)
    weights = load_file(tmp_path / "m" / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"].copy()
    weights[7, 5] = bad
    edit_tensors(tmp_path / "m", **{Q: weights})
    check_error(
        tmp_path / "m", r"m: model\.layers\.1\.self_attn\.q_proj\.weight: expected finite numbers, got nan or inf"
    )
    weights[7, 5] = ml_dtypes.finfo(dtype).max
    edit_tensors(tmp_path / "m", **{Q: weights})
    load_pretrained(tmp_path / "m")


def test_frequencies_that_old_checkpoints_store_are_skipped(copy, params):
    frequency = np.ones(3, np.float32)
    edit_tensors(
        copy, model__layers__0__self_attn__rotary_emb__inv_freq=frequency, model__rotary_emb__inv_freq=frequency
    )
    assert_same(load_pretrained(copy)[1], params)
    # In shards, with and without an entry of the index.
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    names = [
        name for name in load_file(copy / "model-00001-of-00001.safetensors") if not name.startswith("model.rotary")
    ]
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load_pretrained(copy)[1], params)


def test_eight_bit_floats_are_refused(copy):
    """Rename the dtype in the header, which is JSON behind its size in 8 bytes: numpy itself has no fp8."""
    edit_tensors(copy, **{Q: np.zeros((24, 16), np.int8)})
    path = copy / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].replace(b'"I8"', b'"F8_E4M3"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    check_error(copy, r"q_proj\.weight: expected a dtype.*got F8_E4M3")


@pytest.mark.parametrize("size", [0, 20, -1], ids=["empty", "cut header", "cut data"])
def test_truncated_file(copy, size):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    check_error(copy, r"model\.safetensors: truncated or corrupt")


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    check_error(copy, r"expected model\.safetensors or model\.safetensors\.index\.json")


def test_index_errors(model, params, tmp_path):
    folder = tmp_path / "m"
    save_pretrained(folder, model, params, max_shard_bytes=3000)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shards = sorted(set(good["weight_map"].values()))

    def with_map(weight_map):
        index.write_text(json.dumps(good | {"weight_map": weight_map}))

    with_map(good["weight_map"] | {"model.norm.weight": "model-00009-of-00009.safetensors"})
    check_error(folder, r"model-00009-of-00009\.safetensors: no such file")
    with_map(good["weight_map"] | {"model.norm.weight": shards[0]})
    check_error(folder, rf"{shards[0]}: tensor model\.norm\.weight is missing")
    with_map({k: v for k, v in good["weight_map"].items() if k != "model.norm.weight"})
    check_error(folder, r"surplus tensor model\.norm\.weight")
    with_map(good["weight_map"] | {"model.norm.weight": "../elsewhere.safetensors"})
    check_error(folder, r"index\.json: expected weight_map")
    with_map([1])
    check_error(folder, r"index\.json: expected weight_map")
    # The same tensor in a second shard, where the index does not look for it.
    with_map(good["weight_map"])
    first, twice = load_file(folder / shards[0]), load_file(folder / shards[1])
    name = next(iter(first))
    save_file(twice | {name: first[name] + 1}, folder / shards[1])
    check_error(folder, rf"{shards[1]}: tensor {re.escape(name)} is in {shards[0]} too, where .*index\.json places it")
    save_file(twice, folder / shards[1])
    with_map([1])
    check_error(folder, r"index\.json: expected weight_map")
    (folder / shards[1]).unlink()
    with_map(good["weight_map"])
    check_error(folder, rf"{shards[1]}: no such file")


def test_dtype_of_load(saved):
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, got int32"):
        load_pretrained(saved, dtype=jnp.int32)


# -------------------------------------------------------------------------------- saving


def test_saving_replaces_only_its_own(model, params, tmp_path):
    folder = tmp_path / "m"
    save_pretrained(folder, model, params, max_shard_bytes=3000)
    other = random_params(model, seed=1)
    save_pretrained(folder, model, other)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert_same(load_pretrained(folder)[1], other)

    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt was not written by save_pretrained"):
        save_pretrained(folder, model, params)
    (folder / "notes.txt").unlink()
    edit_tensors(folder)  # rewritten by another program: the same names, but not ours any more
    with pytest.raises(ValueError, match=r"model\.safetensors was not written by save_pretrained"):
        save_pretrained(folder, model, params)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a directory"):
        save_pretrained(tmp_path / "file", model, params)


def test_a_failed_save_leaves_what_was_there(model, params, tmp_path):
    folder = tmp_path / "m"
    save_pretrained(folder, model, params)
    before = (folder / "model.safetensors").read_bytes()
    huge = params | {"final_norm": params["final_norm"] + 1e6}
    with pytest.raises(ValueError, match=r"model\.norm\.weight: a value exceeds float16"):
        save_pretrained(folder, model, huge, dtype=jnp.float16)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_parameters_that_do_not_fit(model, params, tmp_path):
    with pytest.raises(ValueError, match=r"\['head'\] is missing from"):
        save_pretrained(tmp_path / "m", model, {k: v for k, v in params.items() if k != "head"})
    with pytest.raises(ValueError, match=r"\['more'\] is unknown in"):
        save_pretrained(tmp_path / "m", model, params | {"more": params["head"]})
    with pytest.raises(ValueError, match=r"\['head'\]: expected shape \(16, 40\), got \(40, 16\)"):
        save_pretrained(tmp_path / "m", model, params | {"head": params["head"].T})
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, got int32"):
        save_pretrained(tmp_path / "m", model, params, dtype=jnp.int32)
    with pytest.raises(ValueError, match="max_shard_bytes"):
        save_pretrained(tmp_path / "m", model, params, max_shard_bytes=0)
    assert not (tmp_path / "m").exists()


def test_a_card_is_replaced_beside_our_weights_only(model, params, tmp_path):
    for text in ("first", "second"):
        save_pretrained(tmp_path / "m", model, params, card=text)
        assert (tmp_path / "m" / "README.md").read_text() == text
    save_pretrained(tmp_path / "m", model, params)
    assert not (tmp_path / "m" / "README.md").exists()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty, and README\.md was not written by save_pretrained"):
        save_pretrained(tmp_path / "project", model, params, card="text")
    assert (tmp_path / "project" / "README.md").read_text() == "mine"


def test_carried_files(model, params, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(ValueError, match=r"source: expected tokenizer files"):
        save_pretrained(tmp_path / "m", model, params, tokenizer_from=source)
    names = ["chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json"]
    for name in names:
        (source / name).write_text(f'{{"from": "{name}"}}')
    (source / "README.md").write_text("not carried")
    (source / "config.json").write_text('{"eos_token_id": 9, "hidden_size": 1}')
    for _ in range(2):  # the second time from the directory that is being replaced
        save_pretrained(tmp_path / "m", model, params, tokenizer_from=source)
        source = tmp_path / "m"
    assert sorted(p.name for p in source.iterdir()) == sorted([*names, "config.json", "model.safetensors"])
    assert (source / "tokenizer.json").read_text() == '{"from": "tokenizer.json"}'
    written = json.loads((source / "config.json").read_text())
    assert (written["eos_token_id"], written["hidden_size"]) == (9, 16)


def test_stop_ids_are_exported(model, params, tmp_path):
    """Those of training: the end of a chat's turn, which the base model's own file does not name."""
    source, out = tmp_path / "source", tmp_path / "m"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")

    def exported(stop_ids):
        save_pretrained(out, model, params, tokenizer_from=source, stop_ids=stop_ids)
        return json.loads((out / "generation_config.json").read_text())

    assert exported([9]) == {"eos_token_id": 9}
    (source / "generation_config.json").write_text('{"eos_token_id": 8, "top_k": 20}')
    assert exported([9, 8]) == {"eos_token_id": [9, 8], "top_k": 20}
    assert exported([8]) == {"eos_token_id": 8, "top_k": 20}
    assert (out / "generation_config.json").read_text() == (source / "generation_config.json").read_text()

"""The model's mathematics: by hand, causality, decoding against the full forward, sharded initialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.distributed.sharding import DECODE_RULES, make_mesh, tree_shardings
from tsopsd_jax.model import Qwen3, Qwen3Config, decoding
from tsopsd_jax.model.attention import attention
from tsopsd_jax.model.qwen3 import Yarn, rms_norm, rope, rope_frequency

CONFIG = Qwen3Config(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def model():
    return Qwen3(CONFIG)


@pytest.fixture(scope="module")
def initial(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def params(initial):
    return shaken(initial)


def shaken(params):
    """Random, norm scales and biases included: at their initial values, 1 and 0, a forgotten one would not show."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return treedef.unflatten([x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for x in leaves])


def tokens_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape), jnp.int32)


# -------------------------------------------------------------------------------- by hand


def test_rms_norm_by_hand():
    # mean([9, 16]) = 12.5, plus eps 3.5 = 16, root 4: [3/4, 4/4] * [2, -1] = [1.5, -1].
    out = rms_norm(jnp.asarray([[3.0, 4.0]]), jnp.asarray([2.0, -1.0]), 3.5)
    np.testing.assert_allclose(out, [[1.5, -1.0]], rtol=1e-6)
    # 300^2 overflows float16 (65504): the mean must be taken in float32. 300 / sqrt(90000) = 1.
    half = rms_norm(jnp.full((1, 2), 300.0, jnp.float16), jnp.ones(2), 0.0)
    assert half.dtype == jnp.float16
    np.testing.assert_array_equal(half, np.ones((1, 2), np.float16))


def test_rope_by_hand():
    # head_dim 4, theta 100: frequencies 100^0 = 1 and 100^(-1/2) = 0.1; pairs are (x0, x2) and (x1, x3).
    # At position 3 the pairs turn by 3 and 0.3: (1, 0) -> (cos 3, sin 3), (0, 2) -> (-2 sin 0.3, 2 cos 0.3).
    x = jnp.asarray([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    out = rope(x, jnp.asarray([[3]], jnp.int32), 100.0).reshape(4)
    expected = [-0.9899925, -0.5910404, 0.1411200, 1.9106730]
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_array_equal(rope(x, jnp.asarray([[0]], jnp.int32), 100.0), x)


def test_rope_at_far_positions():
    """Angles stay those of float64 frequencies, to the rounding of one float32 product: 32767 * 6e-8 * 2."""
    position, theta, half = 32767, 1e6, 32
    x = jnp.concatenate([jnp.ones((1, 1, 1, half)), jnp.zeros((1, 1, 1, half))], axis=-1)
    out = rope(x, jnp.asarray([[position]], jnp.int32), theta).reshape(2, half)
    angle = position * theta ** (-np.arange(half) / half)
    np.testing.assert_allclose(out, [np.cos(angle), np.sin(angle)], atol=4e-3)


def test_yarn_by_hand():
    # head_dim 8, theta 10^4: frequencies 1, 0.1, 0.01, 0.001. In 100 positions component i turns 100 * 10^-i / (2 pi)
    # times: 2 times at i = log10(100 / (4 pi)) = 0.90079, 1/4 times at i = log10(100 / (pi / 2)) = 1.80388, widened to
    # 0 and 2. So components 0, 1, 2, 3 keep 1, 1/2, 0, 0 of their frequency, and a fifth of the rest: 1,
    # 0.1 * (1/2 + 1/10), 0.002, 0.0002.
    yarn = Yarn(factor=5.0, original_max_position_embeddings=100, beta_fast=2.0, beta_slow=0.25)
    np.testing.assert_allclose(rope_frequency(8, 1e4, yarn), [1.0, 0.06, 0.002, 0.0002], rtol=1e-6)
    # Not widened, from 0.90079 to 1.80388: component 1 keeps 0.80388 / 0.90309 = 0.890144,
    # so 0.1 * (0.890144 + 0.109856 / 5).
    exact = dataclasses.replace(yarn, truncate=False)
    np.testing.assert_allclose(rope_frequency(8, 1e4, exact), [1.0, 0.0912115, 0.002, 0.0002], rtol=1e-5)
    # Queries and keys are longer by 0.1 ln 5 + 1 = 1.1609438, or by what the config says.
    x = jnp.asarray([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 8)
    for given, scale in ((None, 1.1609438), (3.0, 3.0)):
        out = rope(x, jnp.asarray([[2]], jnp.int32), 1e4, dataclasses.replace(yarn, attention_factor=given)).reshape(8)
        turned = [np.cos(2), 0, 0, -2 * np.sin(0.0004), np.sin(2), 0, 0, 2 * np.cos(0.0004)]
        np.testing.assert_allclose(out, scale * np.asarray(turned), rtol=1e-6)


def test_attention_by_hand():
    # One KV head shared by two query heads, head_dim 4 (scale 1/2), two slots; the query sits at position 1.
    # Head 0: scores [2 ln 3, 0] / 2 = [ln 3, 0] -> weights [3/4, 1/4]; head 1: zero query -> [1/2, 1/2].
    q = jnp.zeros((1, 1, 2, 4)).at[0, 0, 0, 0].set(2 * np.log(3.0))
    k = jnp.zeros((1, 3, 1, 4)).at[0, 0, 0, 0].set(1.0)
    v = jnp.zeros((1, 3, 1, 4)).at[0, 0, 0, 0].set(4.0).at[0, 1, 0, 1].set(8.0).at[0, 2].set(1e9)
    out = attention(q, k, v, jnp.asarray([[[True, True, False]]]))
    # The third slot, 1e9, lies after the query and is not seen.
    np.testing.assert_allclose(out[0, 0], [[3.0, 2.0, 0.0, 0.0], [2.0, 4.0, 0.0, 0.0]], rtol=1e-6)


def test_query_heads_share_the_kv_head_of_their_group():
    # 4 query heads over 2 KV heads: heads 0, 1 read KV head 0 and heads 2, 3 read KV head 1.
    v = jnp.asarray([10.0, 20.0]).reshape(1, 1, 2, 1)
    out = attention(jnp.ones((1, 1, 4, 1)), jnp.ones((1, 1, 2, 1)), v, jnp.ones((1, 1, 1), bool))
    np.testing.assert_array_equal(out.reshape(4), [10.0, 10.0, 20.0, 20.0])


def test_config_errors():
    with pytest.raises(ValueError, match="num_attention_heads 4 is not a multiple of num_key_value_heads 3"):
        dataclasses.replace(CONFIG, num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"head_dim must be even.*7"):
        dataclasses.replace(CONFIG, head_dim=7)
    with pytest.raises(ValueError, match=r"one of Qwen3ForCausalLM, .*got 'GPT2LMHeadModel'"):
        dataclasses.replace(CONFIG, architecture="GPT2LMHeadModel")


# -------------------------------------------------------------------------------- the whole model


def test_logical_axes(model):
    layers = {
        "attention_norm": ("layers", "norm"),
        "q": ("layers", "embed", "heads", "head_dim"),
        "k": ("layers", "embed", "kv_heads", "head_dim"),
        "v": ("layers", "embed", "kv_heads", "head_dim"),
        "q_norm": ("layers", "norm"),
        "k_norm": ("layers", "norm"),
        "o": ("layers", "heads", "head_dim", "embed"),
        "mlp_norm": ("layers", "norm"),
        "gate": ("layers", "embed", "mlp"),
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "mlp", "embed"),
    }
    expected = {"embed": ("vocab", "embed"), "final_norm": ("norm",), "layers": layers}
    assert model.param_axes() == expected | {"head": ("embed", "vocab")}
    assert Qwen3(dataclasses.replace(CONFIG, tie_word_embeddings=True)).param_axes() == expected
    llama = {name: axes for name, axes in layers.items() if name not in ("q_norm", "k_norm")}
    heads = {"q_bias": "heads", "k_bias": "kv_heads", "v_bias": "kv_heads"}
    biases = {name: ("layers", axis, "head_dim") for name, axis in heads.items()}
    for architecture, of_layers in (("LlamaForCausalLM", llama), ("Qwen2ForCausalLM", llama | biases)):
        neighbour = Qwen3(dataclasses.replace(CONFIG, architecture=architecture))
        assert neighbour.param_axes()["layers"] == of_layers
    sizes = {"vocab": 32, "embed": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 24}

    def check(shape, axes):
        assert shape.dtype == jnp.float32
        known = [size for size, axis in zip(shape.shape, axes, strict=True) if axis != "norm"]
        assert known == [sizes[axis] for axis in axes if axis != "norm"]

    jax.tree.map(check, model.param_shapes(), model.param_axes())


def test_layers_are_initialised_apart(initial):
    leaves = [initial["layers"][name] for name in ("q", "k", "v", "o", "gate", "up", "down")]
    for leaf in [*leaves, initial["embed"][None], initial["head"][None]]:
        assert abs(float(jnp.std(leaf)) - CONFIG.initializer_range) < 0.05
        assert len(leaf) == 1 or not np.array_equal(leaf[0], leaf[1])
    assert not np.array_equal(initial["layers"]["k"], initial["layers"]["v"])


def test_a_later_token_changes_no_earlier_logit(model, params):
    tokens = tokens_of((2, 9))
    changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % CONFIG.vocab_size)
    before, after = model.logits(params, tokens), model.logits(params, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 1e-3).all()


def test_tied_logits_use_the_embedding(params):
    model = Qwen3(dataclasses.replace(CONFIG, tie_word_embeddings=True))
    tied = {k: v for k, v in params.items() if k != "head"}
    hidden = model.hidden(tied, tokens_of((1, 4)))
    expected = np.asarray(hidden) @ np.asarray(params["embed"]).T
    np.testing.assert_allclose(model.logits(tied, tokens_of((1, 4))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [("Qwen3ForCausalLM", False), ("Qwen3ForCausalLM", True), ("LlamaForCausalLM", False), ("Qwen2ForCausalLM", False)],
)
def test_prefill_and_decode_equal_the_full_forward(architecture, tied):
    """The rollout view, a prompt's cache and one token more, against the training forward of the same tokens."""
    yarn = Yarn(factor=4.0, original_max_position_embeddings=9, beta_fast=2.0) if tied else None
    model = Qwen3(dataclasses.replace(CONFIG, architecture=architecture, tie_word_embeddings=tied, yarn=yarn))
    params = shaken(model.init(jax.random.key(0)))
    tokens, n = tokens_of((3, 7)), 6
    view = decoding.rollout_view(model, params)
    cache = decoding.prefill(model, view, tokens[:, :n])
    assert {keys.shape for keys, _ in cache} == {(3, 2, 8, n)}

    traced = []

    def attend(q_BTNH, k_BTKH, v_BTKH, cache):
        traced.append(q_BTNH.shape)
        keys, values = cache
        k_BSKH = jnp.concatenate([jnp.moveaxis(keys, 3, 1), k_BTKH], axis=1)
        v_BSKH = jnp.concatenate([jnp.moveaxis(values, 2, 1), v_BTKH], axis=1)
        return attention(q_BTNH, k_BSKH, v_BSKH, jnp.ones((3, 1, n + 1), bool)), (k_BSKH[:, n:], v_BSKH[:, n:])

    logits, new = decoding.decode(model, view, tokens[:, n], jnp.full((3,), n, jnp.int32), attend, cache)
    np.testing.assert_allclose(logits, model.logits(params, tokens)[:, n], rtol=1e-4, atol=1e-5)
    assert len(traced) == 1 < len(new), "layers are traced once"
    after = decoding.prefill(model, view, tokens)
    for (key, value), (keys, values) in zip(new, after, strict=True):
        np.testing.assert_allclose(key[:, 0], keys[..., n], atol=1e-5)
        np.testing.assert_allclose(value[:, 0], values[:, :, n], atol=1e-5)


LAYERED = dataclasses.replace(CONFIG, num_hidden_layers=6)


def kept_floats(model: Qwen3) -> int:
    """Numbers that a layer keeps for its backward pass, of 2 rows of 10 tokens."""
    tokens = jnp.ones((2, 10), jnp.int32)
    made = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(model.hidden(p, tokens))))(model.param_shapes())
    forward = next(e for e in made.jaxpr.eqns if e.primitive.name == "scan")
    stacked = [v.aval for v in forward.outvars if v.aval.shape[:1] == (model.config.num_hidden_layers,)]
    return sum(x.size for x in stacked) // model.config.num_hidden_layers


def test_a_layer_keeps_what_is_costly_to_make_again():
    """none: its input, queries, keys and values before their norms, scores (as many as positions of each head), what
    attention gives, the sum with it, gate and up; dots: no scores, nothing of attention. Each once: no weight of the
    softmax, no half of a rotation, no sigmoid."""
    c = LAYERED
    queries, keys, scores = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, 10
    products = c.hidden_size + queries + 2 * keys + c.hidden_size + 2 * c.intermediate_size
    with_attention = products + c.num_attention_heads * scores + queries
    for remat, floats in (("none", with_attention), ("dots", products), ("full", c.hidden_size)):
        assert kept_floats(Qwen3(c, remat=remat)) == 20 * floats, remat


def test_remat_changes_no_gradient_of_a_loop_over_layers():
    model = Qwen3(LAYERED)
    params = model.init(jax.random.key(0))
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, CONFIG.vocab_size)), jnp.float32)

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.sum(weight * model.logits(p, tokens_of((2, 5))))))(params)

    none, full = (gradient(dataclasses.replace(model, remat=remat)) for remat in ("none", "full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), none, full)


def test_remat_changes_no_gradient(model, params):
    def gradient(model):
        weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, CONFIG.vocab_size)), jnp.float32)
        return jax.jit(jax.grad(lambda p: jnp.sum(weight * model.logits(p, tokens_of((2, 5))))))(params)

    plain = gradient(model)
    for remat in ("dots", "full"):
        recomputed = gradient(dataclasses.replace(model, remat=remat))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, recomputed)
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
        assert float(jnp.abs(leaf).max()) > 1e-3, f"no gradient reaches {jax.tree_util.keystr(path)}"


def test_bfloat16_compute(model, params):
    low = dataclasses.replace(model, compute_dtype=jnp.bfloat16)
    tokens = tokens_of((2, 6))
    logits, exact = low.logits(params, tokens), model.logits(params, tokens)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: a few times 2^-8 of the largest logit, and not the same numbers.
    assert 0 < float(jnp.abs(logits - exact).max()) < 0.06 * float(jnp.abs(exact).max())
    view = jax.eval_shape(lambda: decoding.rollout_view(low, params))
    cache = jax.eval_shape(lambda: decoding.prefill(low, decoding.rollout_view(low, params), tokens))
    matrices = [leaf for leaf in jax.tree.leaves(view) if leaf.ndim > 1]
    assert {leaf.dtype for leaf in [*matrices, *jax.tree.leaves(cache)]} == {jnp.dtype(jnp.bfloat16)}
    assert view["final_norm"].dtype == view["layers"][0]["q_norm"].dtype == jnp.float32


def test_view_of_biases_on_a_mesh():
    """One key-value head, with its queries and their biases, on each of two devices."""
    model = Qwen3(dataclasses.replace(CONFIG, architecture="Qwen2ForCausalLM"))
    params = shaken(model.init(jax.random.key(0)))
    mesh = make_mesh(fsdp=4, tensor=2)
    view = decoding.rollout_view(model, params)
    shardings = tree_shardings(decoding.view_axes(model), view, mesh, DECODE_RULES)
    placed = jax.device_put(view, shardings)
    part = placed["layers"][0]["qkv_bias"].addressable_shards[0].data
    # [K, G + 2, H]: of the first key-value head the biases of query heads 0 and 1, of its key and of its value.
    layer = jax.tree.map(lambda x: x[0], params["layers"])
    expected = jnp.stack([layer["q_bias"][0], layer["q_bias"][1], layer["k_bias"][0], layer["v_bias"][0]])
    np.testing.assert_array_equal(part, expected[None])


def test_sharded_model_equals_one_device(model, initial):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = tree_shardings(model.param_axes(), model.param_shapes(), mesh)
    sharded = model.init(jax.random.key(0), shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, initial, sharded)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(sharded)} == {8}
    assert sharded["layers"]["q"].addressable_shards[0].data.shape == (2, 8, 2, 8)
    tokens = tokens_of((4, 5))
    ours = jax.jit(model.logits)(sharded, tokens)
    np.testing.assert_allclose(ours, model.logits(initial, tokens), rtol=1e-4, atol=1e-5)

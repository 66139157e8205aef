"""A decoding step's attention: every implementation against numpy, slot by slot; the kernel for GPUs interpreted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.model import Qwen3
from tsopsd_jax.rollout import Engine, Sampling, paged_attention, programs, triton_attention
from tsopsd_jax.rollout.paged_attention import Owners, Walk, owners, pages_per_step, walk
from tsopsd_jax.rollout.schedule import PageTable
from tsopsd_jax.rollout.slot_attention import Seen, SlotAttention
from tsopsd_jax.types import Prompts

S, B, K, G, H, R, HOME = 2, 3, 2, 3, 16, 16, 32
PAGES = 9
# Slot 2 of the first shard and slot 1 of the second have no page; no page has two slots.
ALONE = (((7, 2), (8, 0, 3, 6, 4), ()), ((1, 0, 3, 6, 8, 7), (), (4,)))
# Pages 3 and 8 of the first shard, 6 and 0 of the second stand in several lists, at different places.
TOGETHER = (((3, 8, 2), (8, 3, 0, 6, 4), (3,)), ((6, 0, 3), (), (1, 6, 0)))


def table_of(lists) -> PageTable:
    """Each slot's list of pages as a table, with junk behind it."""
    count = np.array([[len(slot) for slot in shard] for shard in lists], np.int32)
    page = np.full((*count.shape, count.max() + 1), 5, np.int32)
    for shard, slots in enumerate(lists):
        for slot, of in enumerate(slots):
            page[shard, slot, : len(of)] = of
    return PageTable(page, count)


REST = np.array([0, 5, 31, 16, 1, 0])
NEWEST = HOME + 3


def numbers(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def given():
    """Queries, tails and pages of S x B slots."""
    q = 2 * numbers(0, S * B, K * G, H)
    tail = numbers(1, S * B, K, H, HOME + R), numbers(2, S * B, K, HOME + R, H)
    pages = numbers(3, S, PAGES, K, H, R), numbers(4, S, PAGES, K, R, H)
    return q, tail, pages


def by_hand(q, tail, pages, shard_of, lists) -> np.ndarray:
    """The softmax of each slot over the keys that are its own, in float64."""
    out = []
    for slot in range(len(q)):
        shard, local = divmod(slot, shard_of)
        mine = () if pages is None else lists[shard][local]
        places = [*range(REST[slot]), *range(HOME, NEWEST + 1)]
        keys = [*(np.asarray(pages[0][shard, i]) for i in mine), np.asarray(tail[0][slot])[:, :, places]]
        values = [*(np.asarray(pages[1][shard, i]) for i in mine), np.asarray(tail[1][slot])[:, places]]
        keys, values = np.concatenate(keys, -1).astype(np.float64), np.concatenate(values, 1).astype(np.float64)
        scores = np.einsum("kgh,khc->kgc", np.asarray(q[slot]).reshape(K, G, H), keys) / 4  # the root of H = 16
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(np.einsum("kgc,kch->kgh", weight / weight.sum(-1, keepdims=True), values).reshape(K * G, H))
    return np.stack(out)


def seen() -> Seen:
    place = np.arange(HOME + R)[None, :]
    mask = ((place < REST[:, None]) & (place < HOME)) | ((place >= HOME) & (place <= NEWEST))
    return Seen(jnp.asarray(REST), jnp.int32(NEWEST), jnp.asarray(mask))


MESH = {"fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("lists", [ALONE, TOGETHER, None], ids=["alone", "together", "no-pages"])
@pytest.mark.parametrize("programs_wanted", [1, 16, 10_000])
@pytest.mark.parametrize(("implementation", "mesh"), [("xla", None), ("pallas", MESH), ("triton", MESH)])
def test_every_implementation_is_the_softmax_over_a_slots_own(
    given, implementation, mesh, programs_wanted, lists, monkeypatch
):
    """Slots with six pages, two and none, of their own or of several, whole or divided among programs (some with
    nothing to do)."""
    if implementation == "xla" and lists is TOGETHER:
        pytest.skip("XLA's way gives a page to one slot")
    monkeypatch.setattr(triton_attention, "PROGRAMS", programs_wanted)
    q, tail, pages = given
    pages = pages if lists else None
    on = mesh and make_mesh(**mesh, devices=jax.devices()[:4])
    attention = SlotAttention(implementation, on, interpret=True)

    def run(q, tail, pages):
        prepared = attention.prepare(table_of(lists), pages, HOME + R) if lists else None
        return attention.attend(q, tail, seen(), HOME, pages, prepared)

    if on is not None:
        put = NamedSharding(on, P(("data", "fsdp")))
        q, tail, pages = jax.tree.map(lambda x: jax.device_put(x, put), (q, tail, pages))
    np.testing.assert_allclose(jax.jit(run)(q, tail, pages), by_hand(*given[:2], pages, B, lists), rtol=2e-5, atol=2e-6)


def test_the_kernel_in_bfloat16_on_one_device(given):
    """Weights are rounded to the values' type, as the formula does; sums stay float32."""
    q, tail, pages = jax.tree.map(lambda x: x.astype(jnp.bfloat16), given)
    q, tail, pages = q[:B], jax.tree.map(lambda x: x[:B], tail), jax.tree.map(lambda x: x[:1], pages)
    some = jax.tree.map(lambda x: x[:B] if x.ndim else x, seen())
    made = {}
    for name in ("xla", "triton"):
        attention = SlotAttention(name, None, interpret=True)
        prepared = attention.prepare(table_of(ALONE[:1]), pages, HOME + R)
        made[name] = attention.attend(q, tail, some, HOME, pages, prepared)
        assert made[name].dtype == jnp.bfloat16
    apart = np.abs(np.asarray(made["xla"], np.float32) - np.asarray(made["triton"], np.float32))
    assert apart.max() <= 2**-7 * 4  # a unit of the last place at the largest values
    np.testing.assert_allclose(
        np.asarray(made["triton"], np.float32), by_hand(q, tail, pages, B, ALONE[:1]), rtol=0.02, atol=0.02
    )


def test_a_table_is_turned_around_and_walked():
    """By hand, the first shard: a page's one slot, and the pages slot by slot, the last again behind the end."""
    assert owners(table_of(ALONE), PAGES).slot[0].tolist() == [1, -1, 0, 1, 1, -1, 1, 0, 1]
    found = walk(PageTable(*(x[0] for x in table_of(TOGETHER))), 4)
    assert found.count == 4
    assert found.slot[:4].tolist() == [0, 1, 1, 2]
    assert found.pages[:4].tolist() == [3, 4, 1, 1]
    assert found.paged.all()
    assert walk(PageTable(*(x[0] for x in table_of(ALONE))), 4).paged.tolist() == [True, True, False]
    # A place without a page keeps that of the step before, where there is one.
    assert found.page[:4].tolist() == [[3, 8, 2, 0], [8, 3, 0, 6], [4, 3, 0, 6], [3, 3, 0, 6]]
    assert found.page.max() < PAGES
    assert not found.pages[4:].any()


def test_only_kernels_share_pages():
    """... and a shape that the kernel does not take falls back to XLA, without sharing."""
    assert SlotAttention("pallas").shares((8, 96, 24), 25, 2)
    assert SlotAttention("triton").shares((8, 128, 64), 128, 2)
    assert not SlotAttention("triton").shares((8, 96, 64), 128, 2)
    assert not SlotAttention("triton").shares((8, 128, 24), 128, 2)
    assert not SlotAttention("xla").shares((8, 128, 64), 128, 2)


@pytest.mark.parametrize(
    ("page", "item_bytes", "pages"),
    [
        ((8, 128, 128), 4, 4),  # Qwen3
        ((32, 64, 128), 2, 4),  # SmolLM2 1.7B: values take whole lanes of 128
        ((32, 64, 128), 4, 2),
        ((32, 128, 128), 2, 2),
        ((32, 128, 128), 4, 1),
        ((64, 128, 128), 4, 0),
    ],
)
def test_the_tpu_kernel_takes_as_many_pages_as_fit_into_fast_memory(page, item_bytes, pages):
    assert pages_per_step(page, item_bytes) == pages


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_pages_that_are_large_are_taken_one_by_one_or_by_xla(given, n, monkeypatch):
    """Heads are counted on a device. What takes no kernel shares no page."""
    q, tail, pages = given
    on = make_mesh(**MESH, devices=jax.devices()[:4])
    local = 2 * (K // 2) * (H * 128 + R * 128) * 4
    monkeypatch.setattr(paged_attention, "VMEM_BYTES", n * local)
    attention = SlotAttention("pallas", on, interpret=True)
    prepared = attention.prepare(table_of(ALONE), pages, HOME + R)
    assert isinstance(prepared, Walk if n else Owners)
    if isinstance(prepared, Walk):
        assert prepared.page.shape[-1] == n
    assert attention.shares((K, H, R), HOME + R, 4) == (n > 0)
    put = NamedSharding(on, P(("data", "fsdp")))
    args = jax.tree.map(lambda x: jax.device_put(x, put), given)
    run = jax.jit(lambda q, tail, pages: attention.attend(q, tail, seen(), HOME, pages, prepared))
    np.testing.assert_allclose(run(*args), by_hand(q, tail, pages, B, ALONE), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas", "triton"])
def test_what_is_no_number_stays_in_its_own_slot(given, implementation):
    """A page of the first slot holds NaN; the others have fewer pages, whose places in a step hold that page."""
    q, tail, (keys, values) = given
    lists = (((7, 2), (8,), (0, 3, 6)), ((1, 0), (3,), (4,)))
    for broken in ((keys.at[:, 2].set(jnp.nan), values), (keys, values.at[:, 2].set(jnp.nan))):
        attention = SlotAttention(implementation, interpret=True)
        one = jax.tree.map(lambda x: x[:B], (q, tail)), jax.tree.map(lambda x: x[:1], broken)
        (q_B, tail_B), pages = one
        of_slots = jax.tree.map(lambda x: x[:B] if x.ndim else x, seen())
        prepared = attention.prepare(table_of(lists[:1]), pages, HOME + R)
        out = np.asarray(attention.attend(q_B, tail_B, of_slots, HOME, pages, prepared))
        assert np.isnan(out).any(axis=(1, 2)).tolist() == [True, False, False]


def test_a_pool_too_large_for_the_kernel_is_refused(given, monkeypatch):
    """Its pages may have several slots, which nothing else reads. Heads are counted on a device."""
    monkeypatch.setattr(triton_attention, "LARGEST", PAGES * K * H * R)
    keys = given[2]
    with pytest.raises(ValueError, match="a pool of 4608 elements is too large .* decode fewer rows at once"):
        SlotAttention("triton").prepare(table_of(ALONE), keys, HOME + R)
    halved = SlotAttention("triton", make_mesh(**MESH, devices=jax.devices()[:4]))
    assert isinstance(halved.prepare(table_of(ALONE), keys, HOME + R), PageTable)


@pytest.mark.parametrize(
    ("slots", "heads", "pages", "splits"), [(256, 8, 2000, 1), (8, 8, 2000, 4), (1, 8, 2000, 16), (1, 8, 3, 2)]
)
def test_few_slots_fill_a_gpu_too(slots, heads, pages, splits):
    assert triton_attention.splits_of(slots, heads, pages) == splits


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((128, 128, (300, 8, 128, 64)), ""),
        ((128, 128, None), ""),
        ((96, 128, None), "head_dim 96"),
        ((8, 128, None), "head_dim 8"),
        ((128, 25, None), "a tail of 25 places"),
        ((128, 128, (300, 8, 128, 24)), "a page of 24 tokens"),
        ((128, 128, (40_000, 8, 128, 64)), "too large for 32-bit"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(shape, says):
    assert says in triton_attention.refuses(*shape)
    assert bool(says) == bool(triton_attention.refuses(*shape))


def test_an_unknown_implementation_is_refused(given):
    q, tail, _ = given
    with pytest.raises(ValueError, match="expected one of xla, pallas, triton, got 'cuda'"):
        SlotAttention("cuda").attend(q, tail, seen(), HOME, None, None)


def test_the_sampler_draws_the_same_tokens_with_the_kernels(monkeypatch):
    """Continuous batching over pages, prompts of more than one page that their rows copy or share: tokens equal,
    log-probabilities to rounding."""
    mesh = make_mesh(devices=jax.devices()[:1])
    model = Qwen3(dataclasses.replace(TINY, head_dim=16), mesh=mesh)
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(5)))
    rng = np.random.default_rng(0)
    length = np.array([40, 40, 3, 3, 21, 21])
    tokens = np.repeat(rng.integers(2, 37, size=(3, 40)).astype(np.int32), 2, axis=0)
    prompts = Prompts(tokens, length, np.arange(6, dtype=np.uint32))
    asked, drawn = [], {}
    refuses = triton_attention.refuses

    def noted(*shape):
        asked.append(refuses(*shape))
        return asked[-1]

    monkeypatch.setattr(triton_attention, "refuses", noted)
    for name in ("xla", "triton", "pallas"):
        attention = SlotAttention(name, None, interpret=True)
        monkeypatch.setattr(programs, "SlotAttention", lambda *_, chosen=attention: chosen)
        engine = Engine(
            model,
            mesh,
            sampling=Sampling(),
            max_prompt_tokens=40,
            max_response_tokens=200,
            stop_ids=(0,),
            slots=4,
            segment=16,
        )
        assert engine.on_device.shares == (name != "xla")
        drawn[name] = engine.run(engine.view(params), prompts, jax.random.key(1), group=2)
    assert asked
    assert set(asked) == {""}
    for name in ("triton", "pallas"):
        np.testing.assert_array_equal(drawn["xla"].tokens, drawn[name].tokens)
        np.testing.assert_allclose(drawn["xla"].logp, drawn[name].logp, atol=2e-5)
    assert np.max(np.asarray(drawn["xla"].length) - length) > 3 * 16  # pages of drawn tokens too

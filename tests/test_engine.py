"""Continuous batching: the same rows whatever the slots, pages, order and devices; and the schedule by itself."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.distributed.sharding import make_mesh, tree_shardings
from tsopsd_jax.rollout import Engine, Sampling, sample
from tsopsd_jax.rollout.admission import pieces, placement
from tsopsd_jax.rollout.schedule import Admitted, Geometry, Schedule
from tsopsd_jax.types import Prompts

WIDTH, LIMIT = 8, 13
STOPS = (3, 17)


@pytest.fixture(scope="module")
def prompts():
    """Six groups of two rows; prompts of 1 to 8 tokens."""
    rng = np.random.default_rng(5)
    length = np.repeat(np.array([8, 1, 3, 6, 5, 4], np.int32), 2)
    tokens = np.repeat(rng.integers(0, 37, size=(6, WIDTH)), 2, axis=0).astype(np.int32)
    return Prompts(tokens=tokens, length=length, row_id=np.arange(12, dtype=np.uint32) + 5)


@pytest.fixture(scope="module")
def whole(tiny, prompts):
    """The same rows from the sampler inside jit: every row at once, no pages."""
    model, params = tiny
    run = functools.partial(sample, model, sampling=Sampling(), max_response_tokens=LIMIT, stop_ids=STOPS)
    rollout = jax.jit(run)(params, jax.tree.map(jnp.asarray, prompts), jax.random.key(11))
    return jax.tree.map(np.asarray, rollout)


EXACT = Sampling()


def engine_of(model, *, slots, segment, devices=1, sampling=EXACT, entropy=False, **mesh):
    return Engine(
        model,
        make_mesh(**(mesh or {"fsdp": 1}), devices=jax.devices()[:devices]),
        sampling=sampling,
        entropy=entropy,
        max_prompt_tokens=WIDTH,
        max_response_tokens=LIMIT,
        stop_ids=STOPS,
        slots=slots,
        segment=segment,
    )


def same(a, b):
    for name in ("tokens", "prompt_length", "length", "stopped"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


@pytest.mark.parametrize(
    ("slots", "segment", "group"),
    [(12, LIMIT, 1), (12, LIMIT, 2), (3, LIMIT, 2), (3, 2, 2), (5, 4, 1), (1, 3, 2), (64, 4, 2)],
)
def test_slots_pages_and_groups_change_nothing(tiny, prompts, whole, slots, segment, group):
    model, params = tiny
    assert 2 <= whole.stopped.sum() <= 10, "the case must show both ends"
    engine = engine_of(model, slots=slots, segment=segment)
    rollout = engine.run(engine.view(params), prompts, jax.random.key(11), group=group)
    same(rollout, whole)
    assert engine.progress.finished == 12
    assert engine.progress.tokens == whole.response_length.sum()


def test_any_arrangement_of_rows(tiny, prompts, whole):
    """Rows in another order, and some of them alone: a row's tokens follow from key, row id and prompt."""
    model, params = tiny
    engine = engine_of(model, slots=4, segment=3)
    order = np.array([7, 2, 11, 0, 9, 4, 1])
    some = jax.tree.map(lambda x: x[order], prompts)
    rollout = engine.run(engine.view(params), some, jax.random.key(11))
    same(rollout, jax.tree.map(lambda x: x[order], whole))


def test_eight_devices_sample_what_one_does(tiny, prompts):
    model = dataclasses.replace(tiny[0], config=dataclasses.replace(tiny[0].config, vocab_size=40))  # splits in two
    params = jax.tree.map(lambda x: x * 10 if x.ndim > 2 else x, model.init(jax.random.key(1)))
    rollouts = []
    for devices, mesh in ((1, {"fsdp": 1}), (8, {"data": 2, "fsdp": 2, "tensor": 2})):
        engine = engine_of(model, slots=4, segment=3, devices=devices, **mesh)
        layout = tree_shardings(model.param_axes(), model.param_shapes(), engine.mesh)
        view = engine.view(jax.device_put(params, layout))
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(view)} == {devices}
        rollouts.append(engine.run(view, prompts, jax.random.key(11), group=2))
    same(*rollouts)


def test_rows_come_as_they_end_and_progress_is_told(tiny, prompts, whole):
    model, params = tiny
    engine = engine_of(model, slots=6, segment=3)
    told = []
    view, key = engine.view(params), jax.random.key(11)
    seen = list(engine.stream(view, prompts, key, on_progress=lambda p: told.append((p.finished, p.tokens))))
    assert sorted(done.row for done in seen) == list(range(12))
    for done in seen:
        start, end = whole.prompt_length[done.row], whole.length[done.row]
        np.testing.assert_array_equal(done.tokens, whole.tokens[done.row, start:end])
    assert [t[0] for t in told] == sorted(t[0] for t in told)
    assert told[-1][0] == 12
    assert told[-1][1] == whole.response_length.sum()
    again = [done.row for done in engine.stream(view, prompts, key)]
    assert again == [done.row for done in seen], "the schedule must repeat"


def test_entropy_is_the_policys_own_at_the_tokens_drawn(tiny, prompts):
    """Against full forward passes: that of softmax(z) before each response token,
    not of what top-p and temperature leave."""
    model, params = tiny
    sampling = Sampling(sampling_temperature=0.5, top_p=0.6)
    engine = engine_of(model, slots=4, segment=3, sampling=sampling, entropy=True)
    seen = list(engine.stream(engine.view(params), prompts, jax.random.key(11), group=2))
    assert max(len(done.tokens) for done in seen) > 6, "some must take several segments, and slots change hands"
    rows = np.zeros((12, WIDTH + LIMIT), np.int32)
    for done in seen:
        start = prompts.length[done.row]
        rows[done.row, :start] = prompts.tokens[done.row, :start]
        rows[done.row, start : start + len(done.tokens)] = done.tokens
    logp = jax.nn.log_softmax(jax.jit(model.logits)(params, jnp.asarray(rows)))
    entropy = np.asarray(-jnp.sum(jnp.exp(logp) * logp, axis=-1))
    for done in seen:
        start = prompts.length[done.row] - 1
        want = entropy[done.row, start : start + len(done.tokens)].mean()
        assert done.entropy_nats == pytest.approx(want, abs=1e-5)


def test_greedy_decoding_follows_the_policys_likeliest_token(tiny, prompts):
    model, params = tiny
    engine = engine_of(model, slots=4, segment=3, sampling=Sampling(sampling_temperature=0.0, top_p=0.9))
    rollout = engine.run(engine.view(params), prompts, jax.random.key(11), group=2)
    likeliest = np.argmax(jax.jit(model.logits)(params, jnp.asarray(rollout.tokens)), axis=-1)
    np.testing.assert_array_equal(rollout.tokens[:, 1:][rollout.mask[:, 1:]], likeliest[:, :-1][rollout.mask[:, 1:]])
    assert not rollout.logp.any()


def test_a_prompt_is_prefilled_once_per_group(tiny, prompts):
    """Groups of two rows, three slots: the second row of a group often finds its slot a segment later."""
    model, params = tiny
    engine = engine_of(model, slots=3, segment=3)
    prefilled = []
    original = engine.on_device.prefill

    def seen(view, tokens):
        prefilled.extend(np.asarray(tokens).tolist())
        return original(view, tokens)

    vars(engine.on_device)["prefill"] = seen
    list(engine.stream(engine.view(params), prompts, jax.random.key(11), group=2))
    real = [row for row in prefilled if any(row)]
    assert len(real) == 6, "six groups, each once"


def test_a_prompts_cache_stays_where_it_is_continued(tiny, prompts):
    """Prefill gives each shard the cache of its own prompts, and placing them moves nothing between shards.
    Groups of two,
    two slots a shard: every group once, on one shard."""
    model = dataclasses.replace(tiny[0], config=dataclasses.replace(tiny[0].config, vocab_size=40))  # splits in two
    params = model.init(jax.random.key(1))
    engine = engine_of(model, slots=8, segment=3, devices=8, data=2, fsdp=2, tensor=2)
    compiled = {}

    def watch(name):
        original = getattr(engine.on_device, name)

        def call(*args):
            program = original.lower(*args).compile()
            compiled.setdefault(name, []).append((program.as_text(), args[-1].shape))
            return original(*args)

        setattr(engine.on_device, name, call)

    watch("prefill")
    watch("place")
    layout = tree_shardings(model.param_axes(), model.param_shapes(), engine.mesh)
    view = engine.view(jax.device_put(params, layout))
    list(engine.stream(view, prompts, jax.random.key(11), group=2))
    assert sum(shape[0] for _, shape in compiled["prefill"]) >= 6
    assert any("dynamic-slice" in text or "gather" in text for text, _ in compiled["place"])
    for text, _ in compiled["place"]:
        assert not re.findall(r"all-\w+|collective-\w+|reduce-scatter", text)
    for text, _ in compiled["prefill"]:
        assert not re.findall(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
        assert "all-reduce" in text, "sums over tensor are expected: was the right program read?"


def test_pieces_prefill_what_each_shard_needs():
    """Two shards, at most two prompts of each at a time; the prompt carried on is not prefilled again."""
    group = [0, 0, 1, 1, 2, 2, 3, 3, 4]
    shard = [0, 0, 0, 0, 0, 1, 1, 0, 0]
    admitted = [
        Admitted(row, shard[row], shard[:row].count(shard[row]), np.arange(10 * row, 10 * row + row % 3))
        for row in range(9)
    ]
    carried = [0, -1]
    first, second = pieces(admitted, group, carried, most=2)
    assert first.new == [[1, 2], [2, 3]]
    assert second.new == [[3, 4], []]
    assert [[prompt for _, prompt in mine] for mine in first.entries] == [[0, 0, 1, 1, 2], [1, 2]]
    assert [[prompt for _, prompt in mine] for mine in second.entries] == [[1, 2], []]
    assert carried == [4, 3]
    assert first.rows == second.rows == 2
    to = placement(first, slots=7, pool=99, r=5)
    np.testing.assert_array_equal(to.home, [[0, 0, 1, 1, 2, -1, -1], [1, 2, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(to.start, [[0, 5, 10, 0, 5, 0, 0], [10, 0, 0, 0, 0, 0, 0]])
    pages, prompt, part = to.table.transpose(1, 0, 2)
    np.testing.assert_array_equal(pages, [[10, 20, 21, 40], [50, 51, 99, 99]])
    np.testing.assert_array_equal(prompt, [[0, 1, 1, 2], [1, 1, 0, 0]])
    np.testing.assert_array_equal(part, [[0, 0, 1, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(to.keep, [2, 2])
    np.testing.assert_array_equal(placement(second, slots=7, pool=99, r=5).keep, [2, 0])
    again = Admitted(9, 1, 0, np.arange(0))
    (third,) = pieces([again], [*group, 3], carried, most=2)
    assert (third.new, third.rows) == ([[], []], 0)


def test_a_groups_rows_share_a_shard():
    """Four shards of eight slots, groups of four: whole groups, evenly; what comes later goes where slots are idle."""
    group = np.repeat(np.arange(20), 4)
    schedule = Schedule(np.ones(80, int), slots=32, geometry=Geometry(8, 1, 8, 4), group=group)
    schedule.admit()
    of_row = {row: shard for shard, rows in enumerate(schedule.row.tolist()) for row in rows}
    assert [len({of_row[row] for row in range(4 * g, 4 * g + 4)}) for g in range(8)] == [1] * 8
    gone = np.isin(schedule.row, [0, 1, 2, 9, 10])  # three of one shard, two of another
    schedule.advance(np.ones(gone.shape, np.int32), gone)
    came = schedule.admit()
    assert [(entry.row, entry.shard) for entry in came] == [
        (32, of_row[0]),
        (33, of_row[0]),
        (34, of_row[0]),
        (35, of_row[9]),
        (36, of_row[9]),
    ]


def test_no_weight_is_gathered_while_decoding(tiny, prompts):
    """FSDP shards are gathered when the view is made; a decoding step moves nothing over fsdp."""
    model, params = tiny
    engine = engine_of(model, slots=8, segment=3, devices=8, fsdp=8)
    layout = tree_shardings(model.param_axes(), model.param_shapes(), engine.mesh)
    sharded = jax.device_put(params, layout)
    assert "all-gather" in engine.on_device.view.lower(sharded).compile().as_text()
    texts = []
    original = engine.on_device.decode_segment

    def watched(*args):
        texts.append(original.lower(*args).compile().as_text())
        return original(*args)

    vars(engine.on_device)["decode_segment"] = watched
    list(engine.stream(engine.view(sharded), prompts, jax.random.key(11)))
    for text in texts:
        moved = re.findall(r"= (\S+) (all-gather|all-to-all|collective-permute|reduce-scatter)\(", text)
        assert not moved, moved
        # What is left is the loop's condition: does any slot still run?
        assert {shape for shape, _ in re.findall(r"= (\S+) (all-reduce)\(", text)} <= {"pred[]", "s32[]"}


def test_nobody_reads_the_engines_private_parts():
    package = Path(__file__).resolve().parents[1] / "tsopsd_jax"
    found = [
        f"{file.name}: {line.strip()}"
        for file in sorted(package.rglob("*.py"))
        for line in file.read_text().splitlines()
        if re.search(r"\b(engine|on_device|sampler)\._[a-z]", line)
    ]
    assert not found, "\n".join(found)


def test_wrong_prompts_are_refused(tiny, prompts):
    engine = engine_of(tiny[0], slots=3, segment=3)
    with pytest.raises(ValueError, match="group 5 does not divide 12 rows"):
        engine.run(None, prompts, jax.random.key(0), group=5)
    narrow = Prompts(prompts.tokens[:, :5], np.minimum(prompts.length, 5), prompts.row_id)
    with pytest.raises(ValueError, match="prompts are 5 wide, expected max_prompt_tokens 8"):
        engine.run(None, narrow, jax.random.key(0))


# ----------------------------------------------------------------- the schedule


def check_pages(schedule, prompt_length, group):
    """A page has one slot, or it is one of a prompt whose rows in that shard have it at the same place, and is counted
    as often."""
    found = {}
    for shard, slot in np.argwhere(schedule.live).tolist():
        row = schedule.row[shard, slot]
        for at, page in enumerate(schedule.table.page[shard, slot, : schedule.table.count[shard, slot]].tolist()):
            of_prompt = at < schedule.geometry.prompt_pages(int(prompt_length[row]))
            whose = ("prompt", int(group[row])) if schedule.shares and of_prompt else ("row", int(row))
            found.setdefault((shard, page), []).append((*whose, at))
    for uses in found.values():
        assert len(set(uses)) == 1, uses
    uses = np.zeros_like(schedule.uses)
    for (shard, page), slots in found.items():
        uses[shard, page] = len(slots)
    np.testing.assert_array_equal(schedule.uses, uses)


def simulate(lengths, *, slots, geometry, prompt_length, shares=False):
    """Run a schedule with given response lengths, four rows a group; checks its invariants at every turn."""
    group = np.arange(len(lengths)) // 4
    schedule = Schedule(prompt_length, slots=slots, geometry=geometry, group=group, shares=shares)
    ended, sizes = [], set()
    while not schedule.over:
        schedule.grow()
        if schedule.live.any() and geometry.row_pages:
            page = schedule.commit()
            assert (page[schedule.live] < schedule.pool).all()
        schedule.shrink()
        schedule.admit()
        sizes.add((schedule.row.shape[1], schedule.pool))
        rows = schedule.row[schedule.live]
        assert len(set(rows.tolist())) == len(rows)
        for shard, slot in np.argwhere(schedule.live).tolist():
            row, pages = schedule.row[shard, slot], int(schedule.table.count[shard, slot])
            due = (
                geometry.prompt_pages(int(prompt_length[row])) + schedule.drawn[shard, slot] // geometry.segment_tokens
            )
            assert pages == due, "a row has a page for each segment drawn and for each of its prompt's"
        check_pages(schedule, prompt_length, group)
        left = np.where(schedule.live, lengths[schedule.row] - schedule.drawn, 0)
        count = np.minimum(left, geometry.segment_tokens)
        limit = geometry.max_response_tokens
        stopped = schedule.live & (left <= geometry.segment_tokens) & (lengths[schedule.row] < limit)
        ended += [row for row, _, _ in schedule.advance(count, stopped)]
    assert sorted(ended) == list(range(len(lengths)))
    assert schedule.kept_tokens == lengths.sum()
    assert not schedule.uses.any()
    return schedule, sizes


@pytest.mark.parametrize("shards", [1, 4])
def test_the_schedule_of_long_tailed_lengths(shards):
    """Log-normal lengths of mean 1,000 with a limit of 8,192: slots are used, memory fits, few programs."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(1000) - 0.5, 1.0, 2048).astype(int), 1, 8192)
    geometry = Geometry(64, 512, 8192, shards)
    schedule, sizes = simulate(lengths, slots=128, geometry=geometry, prompt_length=rng.integers(20, 512, 2048))
    assert schedule.kept_tokens / schedule.slot_steps > 0.9
    assert max(slots * shards for slots, _ in sizes) == 128
    assert max(pages for _, pages in sizes) < 0.4 * (128 // shards) * geometry.row_pages
    assert len(sizes) <= 16


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(("slots", "segment", "shards"), [(1, 1, 1), (3, 5, 1), (7, 64, 1), (50, 8, 1), (12, 4, 3)])
def test_the_schedule_keeps_its_books(slots, segment, shards, shares):
    rng = np.random.default_rng(slots)
    lengths = rng.integers(1, 41, 23)
    prompt_length = np.repeat(rng.integers(1, 31, 6), 4)[:23]
    geometry = Geometry(segment, 30, 40, shards)
    simulate(lengths, slots=slots, geometry=geometry, prompt_length=prompt_length, shares=shares)


def test_rows_of_a_group_share_the_pages_of_their_prompt():
    """By hand: prompts of two pages, R 4; three rows of one group, one of another, three slots."""
    schedule = Schedule(np.full(4, 9), slots=3, geometry=Geometry(4, 9, 8), group=np.array([0, 0, 0, 1]), shares=True)
    assert schedule.grow() == schedule.pool == 2, "two pages are enough for three rows"
    first = schedule.admit()
    assert [entry.pages.tolist() for entry in first] == [[0, 1]] * 3
    assert [entry.new for entry in first] == [True, False, False], "written once"
    assert schedule.uses.tolist() == [[3, 3]]
    schedule.advance(np.full((1, 3), 4), np.array([[True, False, False]]))
    assert schedule.uses[0, :2].tolist() == [2, 2], "the others still read them"
    schedule.grow()
    schedule.commit()
    (other,) = schedule.admit()
    assert (other.row, other.new) == (3, True)
    assert set(other.pages.tolist()).isdisjoint({0, 1})
    schedule.advance(np.full((1, 3), 4), np.array([[False, True, True]]))
    assert schedule.uses[0, :2].tolist() == [0, 0], "nobody reads them any more"


def test_a_prompt_that_nobody_reads_any_more_is_written_anew():
    """By hand: the first two rows of the second group end together; a page of their prompt is taken by the other row
    before the third one comes."""
    schedule = Schedule(np.full(4, 9), slots=3, geometry=Geometry(4, 9, 8), group=np.array([0, 1, 1, 1]), shares=True)
    schedule.grow()
    assert [entry.pages.tolist() for entry in schedule.admit()] == [[0, 1], [2, 3], [2, 3]]
    schedule.advance(np.full((1, 3), 4), np.array([[False, True, True]]))
    schedule.grow()
    assert schedule.commit()[0, 0] == 2
    (last,) = schedule.admit()
    assert last.new
    assert set(last.pages.tolist()).isdisjoint({0, 1, 2})


def test_sharing_saves_what_copies_of_prompts_take():
    """Groups of 16 with prompts of 1,500 tokens and responses of about 1,000: the most pages in use fall by a third or
    more."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(1000) - 0.5, 1.0, 1024).astype(int), 1, 4096)
    prompt_length = np.repeat(rng.integers(1200, 1800, 64), 16)
    most = {}
    for shares in (False, True):
        group, geometry = np.arange(1024) // 16, Geometry(64, 2048, 4096)
        schedule = Schedule(prompt_length, slots=128, geometry=geometry, group=group, shares=shares)
        most[shares] = 0
        while not schedule.over:
            schedule.grow()
            if schedule.live.any():
                schedule.commit()
            schedule.shrink()
            schedule.admit()
            most[shares] = max(most[shares], int((schedule.uses > 0).sum()))
            left = np.where(schedule.live, lengths[schedule.row] - schedule.drawn, 0)
            schedule.advance(np.minimum(left, 64), schedule.live & (left <= 64))
    assert most[True] < 2 / 3 * most[False], most

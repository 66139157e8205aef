"""Several updates of one rollout: mini-batches, what a step reports, what a step is, knobs, holding, select by the
sampler."""

import dataclasses
import os
import signal

import jax
import numpy as np
import optax
import pytest
from tiny_run import MODEL, facts, finish, reheat_phase, rl_phase, same

from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.judge.groups import RewardRule
from tsopsd_jax.learn.mini_batches import Reported, mini_batch_rows, together
from tsopsd_jax.learn.update import make_optimizer, make_update, warm_up
from tsopsd_jax.objectives import adaptive_entropy_bonus, clip_cov, dapo, kl_cov, top_entropy, ts_opsd, with_start_kl
from tsopsd_jax.rollout import Sampling
from tsopsd_jax.rundir.log import read_metrics
from tsopsd_jax.rundir.run_state import RunProgress
from tsopsd_jax.testing import check_objective
from tsopsd_jax.train.phase import StopRule
from tsopsd_jax.train.phase_update import Updater
from tsopsd_jax.train.rollout_updates import take_updates
from tsopsd_jax.train.signals import Interrupted
from tsopsd_jax.types import Batch, TrainState

PLAIN = RewardRule()
"""One generation batch a step, as it is."""


def rows_of(**changes):
    settings = {"groups": 6, "responses": 2, "updates": 3, "passes": 1, "seed": 0, "step": 0} | changes
    return [list(rows) for rows in mini_batch_rows(**settings)]


# ---------------------------------------------------------------- mini-batches


def test_a_pass_takes_each_group_once_and_whole():
    found = rows_of(passes=2)
    assert [len(rows) for rows in found] == [4] * 6
    for one_pass in (found[:3], found[3:]):
        assert sorted(row for rows in one_pass for row in rows) == list(range(12))
        for rows in one_pass:  # rows 2g and 2g + 1 are a group
            assert [row % 2 for row in rows] == [0, 1, 0, 1]
            assert rows[0] + 1 == rows[1]
            assert rows[2] + 1 == rows[3]
    assert found[:3] != found[3:], "each pass has an order of its own"


def test_seed_step_and_pass_decide_the_order():
    """Pinned, since another order would be another run: numpy permutes six groups to 1 4, 5 3, 2 0 under the seed [0,
    0, 1]."""
    pinned = [[2, 3, 8, 9], [10, 11, 6, 7], [4, 5, 0, 1]]
    assert rows_of() == pinned
    assert rows_of() == rows_of(passes=2)[:3]
    others = [rows_of(seed=1), rows_of(step=1), rows_of(passes=2)[3:]]
    assert all(other != pinned for other in others)
    assert rows_of(updates=1, passes=2) == [list(range(12))] * 2, "the whole batch stays as it stands"


def test_filler_groups_are_spread():
    """The informative groups come first: uncut by chance, the last update would have nothing to learn from."""
    filled = set(range(32, 64))  # rows of the last half
    for step in range(5):
        parts = rows_of(groups=16, responses=4, updates=4, step=step)
        assert sum(bool(filled & set(rows)) for rows in parts) >= 3


# ------------------------------------------------------- what a step reports


def report(weights=None, **metrics):
    base = {"policy/entropy_nats": 1.0, "loss/total": 0.0, "optim/grad_norm": 1.0, "optim/skipped": 0.0}
    named = {name.replace("__", "/"): float(x) for name, x in metrics.items()}
    return Reported(base | named, weights or {})


def test_a_single_update_reports_as_it_is():
    one = report(policy__clipped_fraction=0.1)
    assert together([one]) == one.metrics


def test_means_are_over_the_tokens_of_all_updates():
    # 0.3 over 10 tokens and 0.1 over 30: (3 + 3) / 40 = 0.15, where the mean of means is 0.2. Norms 2 and 4: 3.
    name = "policy/clipped_fraction"
    found = together(
        [
            report({name: 10.0}, policy__clipped_fraction=0.3, optim__grad_norm=2),
            report({name: 30.0}, policy__clipped_fraction=0.1, optim__grad_norm=4),
        ]
    )
    assert found[name] == pytest.approx(0.15)
    assert found["optim/grad_norm"] == 3.0
    assert found["last_update/clipped_fraction"] == 0.1
    assert found["optim/updates"] == 2
    assert "last_update/grad_norm" not in found


def test_what_the_policy_that_sampled_was_is_the_first_updates():
    found = together(
        [
            report(policy__entropy_nats=0.5, rollout__logp_gap_max_nats=0.001, rollout__logp_gap_mean_nats=1e-5),
            report(policy__entropy_nats=0.9, rollout__logp_gap_max_nats=2.0, rollout__logp_gap_mean_nats=1.0),
        ]
    )
    assert (found["policy/entropy_nats"], found["last_update/entropy_nats"]) == (0.5, 0.9)
    assert (found["rollout/logp_gap_max_nats"], found["rollout/logp_gap_mean_nats"]) == (0.001, 1e-5)


def test_skipped_updates_are_counted_and_left_out_of_means():
    nan = float("nan")
    bad = report(loss__total=nan, optim__grad_norm=nan, optim__skipped=1)
    found = together([report(loss__total=1.0), bad, bad, report(loss__total=2.0)])
    assert (found["optim/skipped"], found["loss/total"], found["optim/grad_norm"]) == (2, 1.5, 1.0)
    assert np.isnan(together([bad, bad])["loss/total"])


@pytest.mark.parametrize(
    ("before", "skipped", "row"),
    [(1, [True], 2), (1, [False], 0), (1, [True, True], 3), (1, [True, False], 0), (1, [False, True], 1)],
)
def test_skipped_updates_in_a_row_go_on_over_steps(before, skipped, row):
    progress = RunProgress(skipped_in_row=before)
    after = progress.after_step(entropy_nats=1.0, skipped=skipped, window_steps=1, baseline_steps=1)
    assert after.skipped_in_row == row


# ------------------------------------------------------------- taking updates


@pytest.fixture(scope="module")
def batch(tiny):
    """8 groups of 2 rows with random responses and old log-probabilities a little off."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tiny[0].vocab_size, (16, 7)).astype(np.int32)
    length = rng.integers(3, 8, 16)
    mask = (np.arange(7) >= 2) & (np.arange(7) < length[:, None])
    advantage = np.repeat(rng.normal(size=(16, 1)), 7, axis=1).astype(np.float32)
    made = Batch.of(tokens=tokens, mask=mask, advantage=advantage, old_logp=np.full((16, 7), -3.0, np.float32))
    return made, length


OPTIMIZER = make_optimizer(learning_rate=1e-2)


def state_of(tiny):
    params = jax.tree.map(jax.numpy.copy, tiny[1])
    return TrainState(jax.numpy.asarray(4, jax.numpy.int32), params, OPTIMIZER.init(params))


@pytest.fixture(scope="module")
def dapo_update(tiny):
    return jax.jit(make_update(tiny[0], dapo(), OPTIMIZER))


def taken(tiny, batch, update, *, control=None, limit=np.inf, passes=1, knobs=None):
    """(state, what was learnt, share, seen): four updates a pass; `seen` are the limit and the knobs of each."""
    seen = []

    def one(state, part, length, hold_above_nats, turned):
        seen.append((float(hold_above_nats), {k: float(v) for k, v in turned.items()}))
        assert part.tokens.shape[0] == len(length) == 4
        np.testing.assert_array_equal(length, 7 - np.argmax(np.asarray(part.mask)[:, ::-1], axis=1), "these rows' own")
        return *update(state, jax.device_put(part), hold_above_nats, turned), 0.5

    rows = mini_batch_rows(groups=8, responses=2, updates=4, passes=passes, seed=3, step=4)
    state, learnt, share = take_updates(
        one,
        state_of(tiny),
        *batch,
        rows,
        hold_above_nats=limit,
        knobs=knobs or {},
        control=control,
        beside={},
        mesh=make_mesh(devices=jax.devices()[:1]),
    )
    return state, learnt, share, seen


def test_updates_of_a_rollout_are_updates_of_its_mini_batches(tiny, batch, dapo_update):
    """Bit for bit what the update makes of rows written here by hand; the step rises by one."""
    state, learnt, share, _ = taken(tiny, batch, dapo_update)
    order = np.random.default_rng([3, 4, 1]).permutation(8)
    by_hand = state_of(tiny)
    for i in range(4):
        a, b = order[2 * i], order[2 * i + 1]
        rows = np.array([2 * a, 2 * a + 1, 2 * b, 2 * b + 1])
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch[0])
        by_hand, _ = dapo_update(by_hand, part, np.float32(np.inf), {})
    assert same((state.params, state.opt_state), (by_hand.params, by_hand.opt_state))
    assert (int(state.step), int(by_hand.step)) == (5, 8)
    (_, count), *_ = optax.tree.get_all_with_path(state.opt_state, "count")
    assert int(count) == 4, "the optimizer counts updates"
    assert learnt.metrics["optim/updates"] == 4
    assert learnt.skipped == (False,) * 4
    assert share == 0.5


def test_the_limit_is_the_first_updates_and_the_policy_kept_is_the_policy_measured(tiny, batch, dapo_update):
    state, learnt, _, seen = taken(tiny, batch, dapo_update, limit=0.0)
    start = state_of(tiny)
    assert same((state.params, state.opt_state), (start.params, start.opt_state))
    assert (int(state.step), len(seen), learnt.metrics["optim/held"]) == (5, 1, 1.0)
    entropy = learnt.metrics["policy/entropy_nats"]
    *_, seen = taken(tiny, batch, dapo_update, limit=entropy * 1.001)  # later ones may measure more
    assert [limit for limit, _ in seen] == [pytest.approx(entropy * 1.001), np.inf, np.inf, np.inf]


def test_knobs_turn_between_updates(tiny, batch):
    """Far below the target the coefficient rises by 0.01 an update; both passes have four."""
    bonus = adaptive_entropy_bonus(target_nats=9.0, step=0.01, initial=0.02)
    seen_metrics = []

    def spy(knobs, metrics):
        seen_metrics.append(metrics["policy/entropy_nats"])
        return bonus.control.update(knobs, metrics)

    update = jax.jit(make_update(tiny[0], bonus, OPTIMIZER), donate_argnums=0)
    control = bonus.control._replace(update=spy)
    _, learnt, _, seen = taken(tiny, batch, update, control=control, passes=2, knobs={"coefficient": 0.02})
    turned = [knobs["coefficient"] for _, knobs in seen]
    assert turned == pytest.approx([0.02 + 0.01 * i for i in range(8)])
    assert learnt.knobs["coefficient"] == pytest.approx(0.1)
    assert len(set(seen_metrics)) == 8, "each update's own metrics"


# -------------------------------------------------------- select by the sampler


def test_the_samplers_logp_is_selected_by_where_that_is_asked(tiny, batch):
    """The statistics that `select` is shown: the sampler's own, or those of a forward pass (these old ones are made
    up)."""
    shown = []

    def select(stats, part):
        shown.append(jax.device_get(stats))
        return dataclasses.replace(part, weight=part.mask.astype(jax.numpy.float32))

    for sampler_selects in (True, False):
        objective = clip_cov()._replace(select=select)
        made = make_update(tiny[0], objective, OPTIMIZER, sampler_selects=sampler_selects)
        made(state_of(tiny), batch[0])
    assert [set(stats) for stats in shown] == [{"logp"}, {"logp"}]
    np.testing.assert_array_equal(shown[0]["logp"], batch[0].old_logp)
    assert np.abs(shown[1]["logp"] - shown[0]["logp"]).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, True),
        ({"objective": kl_cov()}, True),
        ({"objective": top_entropy()}, False),  # reads the entropy
        ({"objective": dapo()}, False),  # selects nothing
        ({"updates_per_rollout": 2}, False),  # the second update's policy is another
        ({"passes_per_rollout": 2}, False),
        ({"sampling": Sampling(sampling_temperature=0.7)}, False),
        ({"sampling": Sampling(top_p=0.9)}, False),
        ({"objective": clip_cov()._replace(policy_temperature=None)}, False),
        ({"reward": RewardRule(max_generation_batches=4, surplus="keep")}, False),  # rows of an older policy
        ({"reward": RewardRule(max_generation_batches=4, surplus="drop")}, True),
    ],
)
def test_when_the_samplers_logp_is_the_policys(changes, asked):
    assert rl_phase(**({"objective": clip_cov(), "reward": PLAIN} | changes)).sampler_selects is asked


def test_a_run_selects_by_the_sampler(trainer_in, tmp_path):
    """The same tokens as by a forward pass (the gap is rounding), and no forward pass: `select` is traced on
    `old_logp`."""
    dropped, own = {}, []
    covariance = clip_cov(fraction=0.2, cov_low=-9.0, cov_high=9.0)

    def select(stats, part):
        own.append(stats["logp"] is part.old_logp)
        assert covariance.select is not None
        return covariance.select(stats, part)

    for reads in (("logp",), None):
        phase = rl_phase(
            objective=covariance._replace(select=select, select_reads=reads), reward=PLAIN, stop=StopRule(steps=1)
        )
        finish(trainer_in(tmp_path / str(reads), phases=(phase,)))
        dropped[reads] = read_metrics(tmp_path / str(reads))[0]
        assert own[-1] is (reads is not None)
    for name in ("policy/covariance_dropped_fraction", "loss/total", "optim/grad_norm"):
        assert dropped["logp",][name] == pytest.approx(dropped[None][name], rel=1e-3, abs=1e-6), name


def test_select_is_given_what_it_says_it_reads():
    check_objective(clip_cov())
    with pytest.raises(ValueError, match=r"covariance.py:\d+, select: raised KeyError: 'logp'"):
        check_objective(clip_cov()._replace(select_reads=("entropy",)))


# ------------------------------------------------------------------- whole runs

SIXTEEN = {"prompts_per_step": 16, "rows_at_once": 32, "reward": PLAIN}


def test_after_several_updates_the_ratio_has_left_one(trainer_in, tmp_path):
    trainer = trainer_in(tmp_path, phases=(rl_phase(updates_per_rollout=16, stop=StopRule(steps=2), **SIXTEEN),))
    state = finish(trainer)
    assert int(state.step) == 2
    for line in read_metrics(tmp_path):
        assert line["optim/updates"] == 16
        assert line["policy/clipped_fraction"] > 0.01
        assert line["policy/ratio_variance"] > 1e-3
        assert line["last_update/ratio_variance"] > 1e-3
        assert line["rollout/logp_gap_max_nats"] < 1e-4, "the first update's: sampler and learner are one policy"
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    with_one = rl_phase(stop=StopRule(steps=1), **SIXTEEN)
    finish(trainer_in(tmp_path / "one", phases=(with_one,)))
    (line,) = read_metrics(tmp_path / "one")
    assert line["policy/clipped_fraction"] == 0
    assert not [name for name in line if name.startswith("last_update/") or name == "optim/updates"]


def test_warm_up_counts_updates_and_everything_else_steps(trainer_in, tmp_path):
    # 4 updates a step, a warm-up of 8: rates of 1/8 .. 4/8, mean 2.5/8; then 5/8 .. 8/8, mean 6.5/8; then 1.
    settings = {"learning_rate": 1e-3, "warmup_steps": 8}
    phase = rl_phase(optimizer=make_optimizer(**settings), learning_rate=warm_up(**settings), updates_per_rollout=4)
    state = finish(trainer_in(tmp_path, phases=(phase,)))
    rates = [line["optim/learning_rate"] / 1e-3 for line in read_metrics(tmp_path)]
    assert rates == pytest.approx([2.5 / 8, 6.5 / 8, 1.0])
    assert int(state.step) == 3


PHASES = (
    rl_phase(updates_per_rollout=2, passes_per_rollout=2),
    reheat_phase(updates_per_rollout=2, objective=with_start_kl(ts_opsd()), reference="start"),
)


class Killed(Exception):
    """As if the process had been killed."""


def at_update(trainer, number, act):
    """Call `act` before update `number` of the run (from 0), in whichever step that is."""
    calls = iter(range(10**9))
    original = trainer.steps.of

    def of(at):
        step = original(at)
        update = step.update

        def one(*args, reference):
            if next(calls) == number:
                act()
            return update(*args, reference=reference)

        step.update = one
        return step

    trainer.steps.of = of


@pytest.mark.parametrize(
    "number", [5, 14]
)  # the second update of step 2; of the reheater's step 4 (3 x 4 updates before)
def test_a_step_killed_between_its_updates_is_taken_again(number, trainer_in, tmp_path):
    whole = finish(trainer_in(tmp_path / "whole", phases=PHASES))
    run = tmp_path / "killed"
    first = trainer_in(run, phases=PHASES, every=1)

    def die():
        raise Killed

    at_update(first, number, die)
    with pytest.raises(Killed):
        first.run()
    again = trainer_in(run, phases=PHASES)
    assert int(again.state.step) == (1 if number == 5 else 4)
    assert same(whole, finish(again))
    assert facts(tmp_path / "whole") == facts(run)


def test_a_signal_between_updates_lets_the_step_finish(trainer_in, tmp_path):
    whole = finish(trainer_in(tmp_path / "whole", phases=PHASES))
    run = tmp_path / "asked"
    first = trainer_in(run, phases=PHASES)
    at_update(first, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM: saved step 2$"):
        first.run()
    assert same(whole, finish(trainer_in(run, phases=PHASES)))
    assert facts(tmp_path / "whole") == facts(run)


def test_micro_batches_and_packing_change_nothing_of_several_updates(trainer_in, tmp_path):
    found = {}
    smooth = make_optimizer(learning_rate=1e-2, epsilon=1e-2)
    for pieces, pack in ((1, False), (4, True), (4, False)):
        phase = rl_phase(
            updates_per_rollout=2, micro_batches=pieces, pack=pack, stop=StopRule(steps=1), optimizer=smooth
        )
        folder = tmp_path / f"{pieces}-{pack}"
        trainer = trainer_in(folder, phases=(phase,), width=30)
        found[pieces, pack] = finish(trainer).params, read_metrics(folder)[0]
    (one, line), *others = found.values()
    for params, other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, params)
        for name in ("loss/total", "optim/grad_norm", "policy/ratio_variance", "last_update/ratio_mean"):
            assert other[name] == pytest.approx(line[name], rel=1e-3, abs=1e-6), name
    assert found[4, True][1]["learner/useful_fraction"] > found[4, False][1]["learner/useful_fraction"]


def test_eight_devices_take_the_same_updates(trainer_in, tmp_path):
    smooth = make_optimizer(learning_rate=1e-2, epsilon=1e-2)
    phase = rl_phase(updates_per_rollout=4, optimizer=smooth, stop=StopRule(steps=2), **SIXTEEN)
    one = finish(trainer_in(tmp_path / "one", phases=(phase,)))
    eight = finish(trainer_in(tmp_path / "eight", phases=(phase,), data=8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, eight.params)
    assert int(eight.step) == 2


def test_micro_batches_are_chosen_for_an_update():
    """Rows of 11 positions, 2,048 on a CPU: 1,024 rows take 8 pieces, the 256 rows of each of four updates take 2."""
    mesh = make_mesh(devices=jax.devices()[:1])
    made = {}
    for updates in (1, 4):
        phase = rl_phase(prompts_per_step=512, micro_batches=None, updates_per_rollout=updates)
        made[updates] = Updater(MODEL, phase, mesh, max_prompt_tokens=6, limit_bytes=None)
    assert {updates: updater.micro_batches for updates, updater in made.items()} == {1: 8, 4: 2}
    (_, batch, *_), _ = made[4].lowered().in_avals
    assert batch.tokens.shape == (256, 11)


def test_several_updates_are_one_program(trainer_in, tmp_path):
    trainer = trainer_in(tmp_path, phases=PHASES)
    steps = []
    original = trainer.steps.of
    trainer.steps.of = lambda at: steps.append(original(at)) or steps[-1]
    trainer.run()
    assert [step.update.programs for step in steps] == [1, 1]
    assert [step.program for step in steps] == [None, None], "the reheater's step is taken in stages"
    lines = read_metrics(tmp_path)
    assert [line["optim/updates"] for line in lines] == [4, 4, 4, 2, 2]


def test_a_reheater_of_several_updates_keeps_the_policy_that_it_measured(trainer_in, tmp_path):
    phase = reheat_phase(updates_per_rollout=2, stop=StopRule(recovered_above_nats=0.12))
    trainer = trainer_in(tmp_path, phases=(phase,))
    before = jax.device_get(trainer.state.params)
    trainer.run()  # a random policy is above the threshold at once
    (line,) = read_metrics(tmp_path)
    assert (line["optim/held"], int(trainer.state.step)) == (1.0, 1)
    assert same(before, jax.device_get(trainer.state.params))

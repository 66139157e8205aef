"""Schedules: rounds of a cycle, rules relative to the run's early entropy, looking ahead, the learning rate's
controller."""

import dataclasses
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import MODEL, facts, finish, reheat_phase, rl_phase, same, trainers

from tsopsd_jax.learn.update import make_optimizer, make_update, warm_up
from tsopsd_jax.objectives import ts_opsd
from tsopsd_jax.rundir.log import read_evaluations, read_metrics
from tsopsd_jax.rundir.run_state import RunProgress
from tsopsd_jax.rundir.status import read_status
from tsopsd_jax.train.controllers import RateController
from tsopsd_jax.train.cycle import ONCE, Cycle, Place, without_round
from tsopsd_jax.train.phase import Guard, GuardError
from tsopsd_jax.train.signals import Interrupted
from tsopsd_jax.train.stopping import StopRule
from tsopsd_jax.types import Batch, TrainState

# ------------------------------------------------------------------ stop rules


@pytest.mark.parametrize(
    ("rule", "step", "entropies", "baseline", "over"),
    [
        # a quarter of the early 0.4 nats is 0.1: collapsed under it, in the mean of the window
        (StopRule(collapsed_below_fraction=0.25, window_steps=2), 9, (0.11, 0.088), 0.4, "collapsed"),  # mean 0.099
        (StopRule(collapsed_below_fraction=0.25, window_steps=2), 9, (0.12, 0.08), 0.4, None),  # mean 0.1: not under it
        (StopRule(collapsed_below_fraction=0.25), 9, (0.0,), None, None),  # the early entropy is not known yet
        (StopRule(recovered_above_fraction=0.5), 9, (0.2,), 0.4, "recovered"),
        (StopRule(recovered_above_fraction=0.5), 9, (0.199,), 0.4, None),
        (StopRule(recovered_above_fraction=0.4), 9, (9.0,), None, None),
        # the least length
        (StopRule(collapsed_below_nats=0.1, min_steps=3), 2, (0.05,), None, None),
        (StopRule(collapsed_below_nats=0.1, min_steps=3), 3, (0.05,), None, "collapsed"),
        (StopRule(collapsed_below_nats=0.1, min_steps=3, steps=2), 2, (0.05,), None, "2 steps"),
        # looking ahead to 0.12: from 0.08 the limit is (0.24 + 0.08) / 3 = 0.10667
        (StopRule(recovered_above_nats=0.12, look_ahead=True), 9, (0.08, 0.107), None, "recovered"),  # then 0.134
        (StopRule(recovered_above_nats=0.12, look_ahead=True), 9, (0.08, 0.106), None, None),  # then 0.132: nearer
        (StopRule(recovered_above_nats=0.12, look_ahead=True), 9, (0.107,), None, None),  # no step before
        (StopRule(recovered_above_nats=0.12, look_ahead=True), 9, (0.13, 0.12), None, "recovered"),
        (StopRule(recovered_above_fraction=0.3, look_ahead=True), 9, (0.08, 0.107), 0.4, "recovered"),
    ],
)
def test_rules_on_entropy(rule, step, entropies, baseline, over):
    said = rule.reason(phase_step=step, epochs=0.0, entropies_nats=entropies, baseline_nats=baseline)
    assert (said and said.split(":")[0]) == over


@pytest.mark.parametrize("gain", [0.001, 0.004, 0.0123, 0.03, 0.079])
@pytest.mark.parametrize("start", [0.03, 0.041, 0.0999])
def test_looking_ahead_ends_within_half_a_step_of_the_limit(gain, start):
    """Entropy rises by the same gain each step; the policy that is kept is the one measured when the phase ends."""
    rule, entropies = StopRule(recovered_above_nats=0.12, look_ahead=True), [start - gain, start]
    while rule.entropy_reason(phase_step=len(entropies), entropies_nats=entropies) is None:
        entropies.append(entropies[-1] + gain)
    assert abs(entropies[-1] - 0.12) <= gain / 2 + 1e-9


def test_what_is_held_is_what_ends_the_phase():
    """Step t is held at the entropy from which `reason` says that the phase is over: the policy kept is the one
    measured."""
    ahead = StopRule(recovered_above_nats=0.12, look_ahead=True)
    held = ahead.hold_above_nats(phase_step=5, before_nats=0.09, baseline_nats=None)
    assert held == pytest.approx(0.11)  # (2 x 0.12 + 0.09) / 3
    assert ahead.entropy_reason(phase_step=5, entropies_nats=(0.09, held)) is not None
    assert ahead.entropy_reason(phase_step=5, entropies_nats=(0.09, held - 1e-6)) is None
    relative = StopRule(recovered_above_fraction=0.5)
    assert relative.hold_above_nats(phase_step=1, before_nats=None, baseline_nats=0.4) == pytest.approx(0.2)
    assert relative.hold_above_nats(phase_step=1, before_nats=None, baseline_nats=None) == math.inf
    late = StopRule(recovered_above_nats=0.12, min_steps=4)
    assert [late.hold_above_nats(phase_step=n, before_nats=None, baseline_nats=None) for n in (3, 4)] == [
        math.inf,
        0.12,
    ]
    assert (
        StopRule(recovered_above_nats=0.12, window_steps=2).hold_above_nats(
            phase_step=9, before_nats=None, baseline_nats=None
        )
        == math.inf
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"collapsed_below_nats": 0.1, "collapsed_below_fraction": 0.2},
            "collapsed_below_nats or collapsed_below_fraction",
        ),
        ({"collapsed_below_fraction": 0.4, "recovered_above_fraction": 0.4}, "must be under recovered_above_fraction"),
        ({"steps": 3, "look_ahead": True}, "look_ahead"),
        ({"recovered_above_nats": 0.1, "look_ahead": True, "window_steps": 2}, "look_ahead"),
        ({"steps": 3, "min_steps": -1}, "positive"),
    ],
)
def test_rules_that_contradict_themselves(rule, message):
    with pytest.raises(ValueError, match=message):
        StopRule(**rule)


def test_the_baseline_is_the_mean_of_the_runs_first_steps_and_stays():
    run = RunProgress()
    for entropy in (0.5, math.nan, 0.3, 0.1, 0.1, 0.1):  # an objective that reports none adds none
        run = run.after_step(entropy_nats=entropy, skipped=[False], window_steps=2, baseline_steps=2)
    assert run.baseline_nats == pytest.approx(0.4)  # (0.5 + 0.3) / 2
    assert run.next_phase(phase=1, round=1, stage="x").baseline_nats == run.baseline_nats
    begun = RunProgress().after_step(entropy_nats=0.5, skipped=[False], window_steps=2, baseline_steps=2)
    begun = begun.next_phase(phase=1, round=1, stage="x")
    assert begun.baseline_nats is None
    assert begun.after_step(entropy_nats=0.3, skipped=[False], window_steps=2, baseline_steps=2).baseline_nats == 0.4


# ------------------------------------------------------------------------ cycle


def test_rounds_of_a_cycle():
    """Four phases, of which 1 and 2 may be taken three times."""
    cycle, place, seen = Cycle(first=1, last=2, times=3), Place(0, 1), []
    while place.phase < 4:
        seen.append(tuple(place))
        place = cycle.after(place, missed_collapse=False)
    assert seen == [(0, 1), (1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (2, 3), (3, 1)]


def test_a_cycle_is_left_where_nothing_collapsed():
    cycle = Cycle(first=0, last=1, times=3)
    assert cycle.after(Place(0, 2), missed_collapse=True) == Place(2, 1), "not to the reheater"
    assert cycle.after(Place(2, 1), missed_collapse=True) == Place(3, 1), "outside of the cycle it says nothing"
    assert ONCE.after(Place(0, 1), missed_collapse=True) == Place(1, 1)


def test_names_have_their_round_in_a_cycle():
    cycle = Cycle(first=1, last=1, times=2)
    assert [cycle.named("rl", Place(at, 2)) for at in (0, 1)] == ["rl", "rl#2"]
    assert [without_round(name) for name in ("rl", "rl#12", "a#b")] == ["rl", "rl", "a#b"]


# ------------------------------------------------------------------- controller


def test_the_rate_is_turned_by_the_fourth_root_of_wanted_by_seen():
    controller = RateController(gain_nats=0.016, min_factor=0.1, max_factor=8.0)
    assert controller.turned(1.0, 0.001) == pytest.approx(2.0)  # 16 ** 0.25
    assert controller.turned(1.0, 0.016 * 16) == pytest.approx(0.5)
    assert controller.turned(3.0, 0.016) == 3.0
    assert controller.turned(1.0, 1e-9) == 2.0, "at most doubled"
    assert controller.turned(1.0, 1e9) == 0.5, "at most halved"
    assert controller.turned(1.0, -0.01) == 2.0, "the wrong direction: more"
    assert controller.turned(1.0, 0.0) == 2.0
    assert controller.turned(7.0, 0.001) == 8.0
    assert controller.turned(0.12, 9.0) == 0.1
    assert controller.turned(1.5, math.nan) == 1.5
    cooling = RateController(gain_nats=-0.016, min_factor=0.1, max_factor=8.0)
    assert cooling.turned(1.0, -0.001) == pytest.approx(2.0)


def test_the_controller_finds_the_rate_without_swinging():
    """The gain is 0.004 nats at factor 1, proportional to it, and seen a step late; 0.001 is wanted: a factor of
    1/4."""
    controller = RateController(gain_nats=0.001, min_factor=1e-3, max_factor=1e3)
    factors = [1.0, 1.0]
    for _ in range(12):
        factors.append(controller.turned(factors[-1], 0.004 * factors[-2]))
    assert factors[-1] == pytest.approx(0.25, rel=0.02)
    assert min(factors) > 0.25 * 0.99, "it comes from above and does not pass"


def test_a_phase_turns_its_rate_only_by_what_its_own_updates_did():
    phase = reheat_phase(rate_controller=RateController(gain_nats=0.016, min_factor=0.1, max_factor=8.0))
    first = RunProgress(phase_step=0)
    assert phase.turned_rate(first, 0.5) == 1.0
    then = RunProgress(phase_step=1, entropies_nats=(0.5,), learning_rate_factor=1.5)
    assert phase.turned_rate(then, 0.501) == pytest.approx(3.0)
    assert phase.turned_rate(dataclasses.replace(then, skipped_in_row=1), 0.501) == 1.5
    assert reheat_phase().turned_rate(then, 0.501) == 1.0


def test_the_factor_is_the_optimizers_rate():
    """An update at half the factor is the update of an optimizer with half the rate, decay and warm-up included."""
    model = MODEL
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 100)
    mask = jnp.ones((2, 6), bool).at[:, 0].set(False)
    batch = Batch.of(tokens=tokens, mask=mask, advantage=jnp.zeros((2, 6)), old_logp=jnp.zeros((2, 6)))

    def updated(rate, knobs):
        settings = {"learning_rate": rate, "warmup_steps": 2}
        optimizer = make_optimizer(**settings, weight_decay=0.1)
        state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
        update = make_update(model, ts_opsd(), optimizer, learning_rate=warm_up(**settings))
        return jax.jit(update)(state, batch, np.float32(np.inf), knobs)

    half, half_out = updated(1e-2, {"learning_rate_factor": np.float32(0.5)})
    whole, whole_out = updated(5e-3, {})
    assert float(half_out.metrics["optim/learning_rate"]) == pytest.approx(
        2.5e-3
    )  # 5e-3, and half of it by the warm-up
    assert float(whole_out.metrics["optim/learning_rate"]) == pytest.approx(2.5e-3)
    for a, b, start in zip(*map(jax.tree.leaves, (half.params, whole.params, params)), strict=True):
        np.testing.assert_allclose(a - start, b - start, rtol=1e-3, atol=1e-8)


# ----------------------------------------------------------------- whole runs

ROUNDS = {
    "phases": (
        # A random policy lies far under 99 nats: the second step collapses, in the window of two.
        rl_phase(outcome="collapsed", stop=StopRule(collapsed_below_nats=99.0, window_steps=2), reset_optimizer=True),
        reheat_phase(
            outcome="reheated",
            stop=StopRule(steps=3),
            rate_controller=RateController(gain_nats=0.01, min_factor=0.5, max_factor=4.0),
            learning_rate=warm_up(learning_rate=1e-2),
        ),
        rl_phase("again", stop=StopRule(steps=1)),
    ),
    "cycle": Cycle(first=0, last=1, times=2),
    "baseline_steps": 3,
}
NAMES = ["rl#1"] * 2 + ["reheat#1"] * 3 + ["rl#2"] * 2 + ["reheat#2"] * 3 + ["again"]


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """A run through two rounds, not interrupted: (directory, state at its end, its notes, trainer)."""
    folder, said = tmp_path_factory.mktemp("whole"), []
    trainer = trainers(tokenizer)(folder, evaluate=True, every=1, **ROUNDS)
    trainer.table.note = lambda text: said.append(text)
    return folder, finish(trainer), said, trainer


def test_two_rounds_are_logged_with_their_reasons(whole):
    folder, _, said, trainer = whole
    lines = read_metrics(folder)
    assert [line["phase"] for line in lines] == NAMES
    ends = [(line["step"], line["phase_end"].split(":")[0]) for line in lines if "phase_end" in line]
    assert ends == [(2, "collapsed"), (5, "3 steps"), (7, "collapsed"), (10, "3 steps"), (11, "1 steps")]
    told = read_status(folder)["phases"]
    assert [(end["step"], end["reason"]) for end in told] == [
        (line["step"], line["phase_end"]) for line in lines if "phase_end" in line
    ]
    assert [record["stage"] for record in read_evaluations(folder)] == [
        *("base", "collapsed#1", "reheated#1", "collapsed#2", "reheated#2", "after again"),
    ]
    assert "the cycle ends after round 2 of 2 allowed" in said
    early = [line["policy/entropy_nats"] for line in lines[:3]]
    assert trainer.progress.baseline_nats == pytest.approx(sum(early) / 3)


def test_the_rate_is_turned_within_a_round_and_begins_anew_in_the_next(whole):
    """The reheater's first two updates have the optimizer's rate: what the first one did is seen at the second step."""
    rates = [line["optim/learning_rate"] for line in read_metrics(whole[0]) if line["phase"].startswith("reheat")]
    assert [*rates[:2], *rates[3:5]] == pytest.approx([1e-2] * 4)
    assert all(abs(rate - 1e-2) > 1e-3 for rate in (rates[2], rates[5]))


def test_a_cycles_steps_are_made_once(whole):
    steps = whole[3].steps
    assert steps.of(0) is steps.of(0)
    assert steps.of(0).update.programs == 1, "the second round compiled nothing"


@pytest.mark.parametrize("at", [4, 6, 9])
def test_a_run_resumes_in_its_round_bit_for_bit(at, whole, trainer_in, tmp_path):
    first = trainer_in(tmp_path, evaluate=True, every=1, **ROUNDS)
    write = first.log.write

    def stops(line):
        write(line)
        if line["step"] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    first.log.write = stops
    with pytest.raises(Interrupted):
        first.run()
    again = trainer_in(tmp_path, evaluate=True, every=1, **ROUNDS)
    assert (again.progress.round, again.run_state.step) == (1 if at < 5 else 2, at)
    assert same(whole[1], finish(again))
    assert facts(whole[0]) == facts(tmp_path)
    assert [r["stage"] for r in read_evaluations(tmp_path)] == [r["stage"] for r in read_evaluations(whole[0])]


def test_a_cycle_without_a_collapse_goes_on_behind_it(trainer_in, tmp_path):
    phases = (
        rl_phase(stop=StopRule(collapsed_below_nats=1e-6, steps=1)),
        reheat_phase(),
        rl_phase("again", stop=StopRule(steps=1)),
    )
    trainer_in(tmp_path, phases=phases, cycle=Cycle(first=0, last=1, times=5)).run()
    assert [line["phase"] for line in read_metrics(tmp_path)] == ["rl#1", "again"]


def test_responses_that_are_cut_off_stop_the_reheater(trainer_in, tmp_path):
    phase = reheat_phase(guard=Guard(max_truncated_fraction=0.25))  # random responses of five tokens: nearly all
    with pytest.raises(
        GuardError, match=r"phase 'reheat' stopped: \d+\.\d % of its responses were cut off .* at most 25 %"
    ):
        trainer_in(tmp_path, phases=(phase,)).run()
    line = read_metrics(tmp_path)[0]
    assert line["phase_end"].startswith("phase 'reheat' stopped")
    assert line["rollout/truncated_fraction"] > 0.25


def test_a_controlled_rate_compiles_nothing_again(trainer_in, tmp_path):
    phase = reheat_phase(
        stop=StopRule(steps=4),
        rate_controller=RateController(gain_nats=5.0, min_factor=0.5, max_factor=3.0),
        learning_rate=warm_up(learning_rate=1e-2),
    )
    trainer = trainer_in(tmp_path, phases=(phase,))
    taken, original = [], trainer.steps.of
    trainer.steps.of = lambda at: taken.append(original(at)) or taken[-1]
    trainer.run()
    assert taken[0].program._cache_size() == 1
    rates = [line["optim/learning_rate"] for line in read_metrics(tmp_path)]
    assert rates == pytest.approx([1e-2, 1e-2, 2e-2, 3e-2])  # doubled, then at its limit

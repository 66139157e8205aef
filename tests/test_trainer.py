"""The loop: resume equals uninterrupted, signals, guards, skipped updates, evaluation between phases."""

import dataclasses
import functools
import gc
import itertools
import json
import os
import resource
import signal
import threading
import time

import jax
import numpy as np
import optax
import pytest
from tiny_run import (
    MODEL,
    SCHEDULE,
    even,
    facts,
    finish,
    interrupting,
    reheat_phase,
    rl_phase,
    same,
)

from tsopsd_jax.data import Problem
from tsopsd_jax.data.encode import encode_prompts
from tsopsd_jax.distributed import heartbeat
from tsopsd_jax.judge.groups import RewardRule
from tsopsd_jax.learn.reference import ReferenceSource
from tsopsd_jax.learn.update import make_optimizer
from tsopsd_jax.objectives import (
    Control,
    Objective,
    adaptive_entropy_bonus,
    clip_cov,
    dapo,
    opd,
    ts_opsd,
    with_start_kl,
)
from tsopsd_jax.objectives.dapo import tempered_stats
from tsopsd_jax.rewards import RewardError, Rewards
from tsopsd_jax.rewards.math import WORKERS
from tsopsd_jax.rundir.checkpoints import SaveError
from tsopsd_jax.rundir.log import read_evaluations, read_metrics, read_samples
from tsopsd_jax.train import phase_update
from tsopsd_jax.train.phase import Guard, GuardError
from tsopsd_jax.train.phase_step import PhaseStep
from tsopsd_jax.train.signals import Interrupted
from tsopsd_jax.train.stopping import StopRule

MEASURED = tuple(
    dataclasses.replace(phase, objective=with_start_kl(phase.objective), reference="start") for phase in SCHEDULE
)
"""Checkpoints carry the start policy too."""


def test_a_run_says_at_all_times_what_it_does(trainer_in, tmp_path):
    """One after the other, compilations and making room left out; the time left is known from the second step on."""
    phases = (rl_phase(), reheat_phase())
    trainer = trainer_in(tmp_path, phases=phases, evaluate=True)
    said, left, logged = [], [], []
    trainer.after_step = lambda: logged.append(len(read_metrics(tmp_path)))
    vars(trainer.table)["step"] = lambda line, left_s: left.append((line["phase_step"], left_s is not None))
    with heartbeat.heard_by(said.append):
        finish(trainer)
    now_and_then = ("(compiling)", "making room for the update")
    told = [text for text, _ in itertools.groupby(text for text in said if not text.endswith(now_and_then))]
    steps = [[f"step {n}", f"step {n}: sampling", f"step {n}: verifying", f"step {n}: updating"] for n in (1, 2, 3)]
    again = [text for step in steps for text in step]  # dynamic sampling may ask for more in a step
    assert [text for text in dict.fromkeys(told) if "step" in text][: len(again)] == again
    reheats = [
        text for n in (4, 5) for text in (f"step {n}", f"step {n}: sampling and updating", f"step {n}: verifying")
    ]
    at = told.index("preparing phase reheat")
    assert told[at - 2 : at] == ["saving a checkpoint", "evaluating after rl"]
    assert told[at + 1 : at + 7] == reheats
    assert told[-1] == "writing the last checkpoint"
    assert any(text == "step 1: updating (compiling)" for text in said)
    assert left == [(1, False), (2, True), (3, True), (1, False), (2, True)]
    assert logged == [1, 2, 3, 4, 5]
    assert trainer.phase_name is None


def test_resume_equals_uninterrupted_bit_for_bit(trainer_in, tmp_path):
    whole = finish(trainer_in(tmp_path / "whole", phases=MEASURED, evaluate=True))
    assert int(whole.step) == 7
    # Interrupt in the first phase, then again in the third; the surplus groups of dynamic sampling are then alive.
    run = tmp_path / "broken"
    first = trainer_in(run, phases=MEASURED, evaluate=True, verify=interrupting(20))
    with pytest.raises(Interrupted, match="SIGTERM: (saved|left the rollout after) step"):
        first.run()
    taken = int(first.state.step)
    assert 0 < taken < 3
    assert first.run_state.leftover is not None, "the interruption should find groups left over, or it tests too little"
    second = trainer_in(run, phases=MEASURED, evaluate=True)
    assert int(second.state.step) == taken
    assert same(first.run_state.leftover, second.run_state.leftover)
    assert same(first.run_state.start, second.run_state.start)
    broken = finish(second)
    assert same(whole, broken)
    assert facts(tmp_path / "whole") == facts(run)
    assert [r["stage"] for r in read_evaluations(run)] == ["base", "after rl", "after reheat", "after again"]
    assert read_evaluations(tmp_path / "whole") == read_evaluations(run)


def cooling(objective: Objective, *, stats) -> Objective:
    """The objective, sampled at 1, 1.5, 2, ...: `stats` takes the temperature."""

    def turn(knobs, _):
        return {"sampling_temperature": knobs["sampling_temperature"] + 0.5}

    return objective._replace(stats=stats, control=Control({"sampling_temperature": 1.0}, turn))


def heedless(logits, tokens, *, sampling_temperature):
    """Statistics of the reheater, which is right at any temperature."""
    del sampling_temperature
    return ts_opsd().stats(logits, tokens)


def test_a_turned_temperature_reaches_sampler_and_ratio_and_compiles_nothing(trainer_in, tmp_path):
    """... nor does it change what a run makes of an interruption. The sampler's log-probabilities are the learner's
    only where both are at the temperature of the step; the reheater's one program, which is at none, sees the sampler's
    move away."""
    heated, reheated = cooling(dapo(), stats=tempered_stats), cooling(ts_opsd(), stats=heedless)
    phases = (rl_phase(objective=heated, reward=RewardRule(overlong_buffer_tokens=2)), reheat_phase(objective=reheated))
    whole = trainer_in(tmp_path / "whole", phases=phases)
    finished = finish(whole)
    lines = read_metrics(tmp_path / "whole")
    assert [line["control/sampling_temperature"] for line in lines] == [1.0, 1.5, 2.0, 1.0, 1.5]
    assert [line["rollout/programs"] for line in lines[1:3]] == [lines[0]["rollout/programs"]] * 2
    assert all(line["rollout/logp_gap_max_nats"] < 1e-4 for line in lines[:4])
    assert lines[4]["rollout/logp_gap_max_nats"] > 0.1
    # Interrupted in the rl phase: the temperature of the next step comes from the checkpoint.
    run = tmp_path / "broken"
    first = trainer_in(run, phases=phases, verify=interrupting(12))
    with pytest.raises(Interrupted):
        first.run()
    assert 0 < int(first.state.step) < 3
    second = trainer_in(run, phases=phases)
    assert second.progress.knobs == {"sampling_temperature": 1.0 + 0.5 * int(first.state.step)}
    assert same(finished, finish(second))
    assert facts(tmp_path / "whole") == facts(run)


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_signal_leaves_the_rollout_and_no_step_is_lost(at, trainer_in, tmp_path):
    """In the first step nothing is saved; in the third groups are left over; in the fifth the reheater samples in
    stages."""
    phases = (rl_phase(), reheat_phase(rows_at_once=4))
    whole = finish(trainer_in(tmp_path / "whole", phases=phases))
    run = tmp_path / "left"
    trainer = trainer_in(run, phases=phases)

    def terminate(_):
        if int(trainer.state.step) == at and trainer.signals.number is None:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.table.sampling = terminate
    with pytest.raises(Interrupted, match=rf"SIGTERM: left the rollout after step {at}$"):
        trainer.run()
    assert int(trainer.state.step) == len(read_metrics(run)) == at
    assert trainer.checkpoints.latest() == (at or None)
    again = trainer_in(run, phases=phases)
    assert again.progress == dataclasses.replace(trainer.progress, elapsed_s=again.progress.elapsed_s)
    assert same(trainer.run_state.leftover, again.run_state.leftover)
    assert same(whole, finish(again))
    assert facts(tmp_path / "whole") == facts(run)


@pytest.mark.parametrize(("phase", "when"), [(0, "sampling"), (1, "sampling"), (0, "scoring"), (2, "scoring")])
def test_a_signal_during_an_evaluation_takes_no_step(phase, when, trainer_in, tmp_path):
    phases = (reheat_phase(stop=StopRule(steps=1)), rl_phase(stop=StopRule(steps=1)))
    whole = finish(trainer_in(tmp_path / "whole", phases=phases, evaluate=True))
    run, stepping, scored = tmp_path / "broken", [], []

    def terminate(during: str) -> None:
        if during == when and trainer.progress.phase == phase and not stepping and trainer.signals.number is None:
            os.kill(os.getpid(), signal.SIGTERM)

    def verify(response, gold):
        scored.append(response)
        if len(scored) % 12 == 0:  # the last of an evaluation's 3 x 4 responses
            terminate("scoring")
        return even(response, gold)

    def run_phase(of, original):
        stepping.append(of)
        original(of)
        stepping.clear()
        scored.clear()

    trainer = trainer_in(run, phases=phases, evaluate=True, verify=verify)
    trainer._run_phase = functools.partial(run_phase, original=trainer._run_phase)
    trainer.table.sampling = lambda _: terminate("sampling")
    if phase < 2:
        said = "left the evaluation of" if when == "sampling" else "took no step after"
        with pytest.raises(Interrupted, match=rf"SIGTERM: {said} step {phase}$"):
            trainer.run()
    else:
        trainer.run()  # nothing is left to do: it may end
    assert int(trainer.state.step) == phase
    assert len(read_evaluations(run)) == phase + (when == "scoring"), "an evaluation that was left has no record"
    assert same(whole, finish(trainer_in(run, phases=phases, evaluate=True)))
    assert facts(tmp_path / "whole") == facts(run)
    assert read_evaluations(tmp_path / "whole") == read_evaluations(run)


def test_evaluation_within_phases_changes_nothing_and_is_not_repeated(trainer_in, tmp_path):
    """Every second of 3 + 2 + 2 steps: 2 in the first phase and 4 in the second; step 6 in the third."""
    plain = finish(trainer_in(tmp_path / "plain"))
    whole = finish(trainer_in(tmp_path / "whole", evaluate=True, evaluate_every=2))
    assert same(plain, whole)
    assert facts(tmp_path / "plain") == facts(tmp_path / "whole")
    records = read_evaluations(tmp_path / "whole")
    during = [("during rl", 2, 2), ("during reheat", 4, 1), ("during again", 6, 1)]
    assert [(r["stage"], r["step"], r["phase_step"]) for r in records if r["phase_step"]] == during
    assert [r["step"] for r in records] == [0, 2, 3, 4, 5, 6, 7]
    assert all(0 < r["entropy_nats"] < 5 for r in records)
    # Asked to stop in the midst of step 4's evaluation: the step is saved, and only that evaluation is made again.
    run = tmp_path / "broken"
    trainer = trainer_in(run, evaluate=True, evaluate_every=2)

    def terminate(_):
        if int(trainer.state.step) == 4 and len(read_evaluations(run)) == 3 and trainer.signals.number is None:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.table.sampling = terminate
    with pytest.raises(Interrupted, match="SIGTERM: left the evaluation of step 4$"):
        trainer.run()
    assert [r["step"] for r in read_evaluations(run)] == [0, 2, 3]
    again = trainer_in(run, evaluate=True, evaluate_every=2)
    assert int(again.state.step) == 4
    assert same(whole, finish(again))
    assert read_evaluations(run) == records
    assert facts(run) == facts(tmp_path / "whole")


def test_a_control_goes_on_where_the_run_does(trainer_in, tmp_path):
    """The coefficient rises by 0.01 a step below the target; a phase that begins starts it anew; a resumed run goes on
    with it."""
    bonus = adaptive_entropy_bonus(target_nats=9.0, step=0.01, initial=0.02)
    schedule = (rl_phase(objective=bonus), rl_phase("again", objective=bonus, stop=StopRule(steps=2)))
    whole = finish(trainer_in(tmp_path / "whole", phases=schedule, every=1))
    turned = [line["control/coefficient"] for line in read_metrics(tmp_path / "whole")]
    assert turned == pytest.approx([0.02, 0.03, 0.04, 0.02, 0.03])
    run = tmp_path / "stopped"
    first = trainer_in(run, phases=schedule, every=1)
    write = first.log.write

    def stops(line):
        write(line)
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    first.log.write = stops
    with pytest.raises(Interrupted):
        first.run()
    assert same(whole, finish(trainer_in(run, phases=schedule, every=1)))
    assert facts(tmp_path / "whole") == facts(run)


def test_killed_run_takes_the_lost_steps_again(trainer_in, tmp_path):
    whole = finish(trainer_in(tmp_path / "whole"))
    run = tmp_path / "killed"

    class Killed(Exception):
        pass

    calls = iter(range(10**9))

    def dies(response, gold):
        if next(calls) == 40:
            raise Killed
        return even(response, gold)

    first = trainer_in(run, verify=dies)
    with pytest.raises(Killed):
        first.run()
    lost = len(read_metrics(run))
    second = trainer_in(run)
    assert int(second.state.step) == 0 < lost, "steps were logged and not saved"
    assert same(whole, finish(second))
    assert facts(tmp_path / "whole") == facts(run)
    samples = read_samples(run)
    assert read_samples(tmp_path / "whole") == samples, "those of steps that are taken again stand there once"
    # Of step 1, four groups of two: 5 tokens at most, the penalty's ramp the last two. Where both are right and as
    # long, both are equal, and the first is the best.
    assert [(each["step"], each["phase"], each["which"]) for each in samples] == [
        (1, "rl", "best"),
        (1, "rl", "worst"),
    ] * 4
    assert all(best["reward"] >= worst["reward"] for best, worst in zip(samples[::2], samples[1::2], strict=True))
    assert any(best["reward"] > worst["reward"] for best, worst in zip(samples[::2], samples[1::2], strict=True))
    for each in samples:
        assert each["accuracy"] == even(each["response"], "")
        assert each["prompt"].split()[0] == each["answer"]
        assert each["reward"] == each["accuracy"] - {5: 1.0, 4: 0.5}.get(each["length_tokens"], 0.0)


def test_named_rewards_are_logged_and_their_sum_is_learnt_from(trainer_in, tmp_path):
    def graded(response, answer, _row):
        return {"brief": 1.0 / (1 + len(response)), "answer": float(answer)}

    trainer = trainer_in(tmp_path, phases=(rl_phase(stop=StopRule(steps=1), reward=RewardRule()),))
    functions = {"right": lambda response, answer, _row: even(response, answer), "style": graded}
    rewards = Rewards(functions, weights={"answer": 0.5, "brief": 2.0})
    trainer.shared.task.__dict__["rewards"] = rewards
    trainer.run()
    (line,) = read_metrics(tmp_path)
    parts = [line[f"reward/{name}_mean"] for name in ("right", "brief", "answer")]
    assert line["reward/mean"] == pytest.approx(parts[0] + 2.0 * parts[1] + 0.5 * parts[2], rel=1e-5)
    assert line["reward/accuracy_fraction"] == parts[0]
    assert parts[2] > 1, "answers are 1 to 11"
    assert line["reward/failed_fraction"] == 0.0
    first = read_samples(tmp_path)[0]
    assert list(first["rewards"]) == ["right", "brief", "answer"]


def test_rewards_that_fail_stop_the_run_before_it_learns_from_them(trainer_in, tmp_path):
    def fails(_response, _answer):
        raise RewardError("r.py:f, line 3: raised KeyError: 'x'")

    trainer = trainer_in(tmp_path, phases=(rl_phase(),), verify=fails)
    before = jax.device_get(trainer.state)
    with pytest.raises(GuardError, match=r"phase 'rl' stopped: rewards of 8 of 8 responses failed .* r.py:f, line 3"):
        trainer.run()
    assert same(before, jax.device_get(trainer.state))
    assert read_metrics(tmp_path) == []


def test_a_few_rewards_that_fail_are_counted_and_told(trainer_in, tmp_path):
    calls = iter(range(10**9))

    def fails(response, answer):
        if next(calls) == 0:
            raise RewardError("r.py:f, line 3: raised KeyError: 'x'")
        return even(response, answer)

    trainer = trainer_in(tmp_path, phases=(rl_phase(stop=StopRule(steps=1), reward=RewardRule()),), verify=fails)
    notes = []
    trainer.table.note = notes.append
    trainer.run()
    (line,) = read_metrics(tmp_path)
    assert line["reward/failed_fraction"] == 1 / 8
    words = "warning: step 1: rewards of 1 of 8 responses failed and count as 0: r.py:f, line 3: raised KeyError: 'x'"
    assert words in notes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that Orbax leaves
@pytest.mark.parametrize("of", [rl_phase, reheat_phase])
def test_a_full_disk_stops_the_run_at_the_save_and_it_goes_on_when_there_is_room(of, trainer_in, tmp_path):
    phases = (of(stop=StopRule(steps=5)),)
    whole = finish(trainer_in(tmp_path / "whole", phases=phases))
    run = tmp_path / "full"
    trainer = trainer_in(run, phases=phases, every=1)
    trainer._before_update = lambda: None  # as on an accelerator: a CPU waits for the save there, and sees it
    save = trainer.checkpoints.save

    def saves(state):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if state.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            save(state)
            while trainer.checkpoints._manager.is_saving_in_progress():
                time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    trainer.checkpoints.save = saves
    with pytest.raises(SaveError, match="step 3 could not be saved to .* File too large.* goes on from step 2$"):
        trainer.run()
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3], "no step was taken after it"
    trainer = None
    gc.collect()  # here, where the warning is expected
    again = trainer_in(run, phases=phases)
    assert int(again.state.step) == 2
    assert same(whole, finish(again))
    assert facts(tmp_path / "whole") == facts(run)


def test_a_phase_whose_rule_was_changed_below_what_it_took_is_over_at_once(trainer_in, tmp_path):
    """Stopped after step 3 of 5; going on, the phase has at most 2 steps, and the one after it follows step 3."""
    phases = (rl_phase(stop=StopRule(steps=5)), reheat_phase(stop=StopRule(steps=1)))
    trainer = trainer_in(tmp_path, phases=phases, every=1)

    def terminate(_):
        if trainer.run_state.step == 3 and trainer.signals.number is None:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.table.sampling = terminate
    with pytest.raises(Interrupted, match="left the rollout after step 3$"):
        trainer.run()
    again = trainer_in(tmp_path, phases=(rl_phase(stop=StopRule(steps=2)), phases[1]))
    again.run()
    lines = [(line["step"], line["phase"]) for line in read_metrics(tmp_path)]
    assert lines == [(1, "rl"), (2, "rl"), (3, "rl"), (4, "reheat")]
    assert (again.progress.phase, again.run_state.step) == (2, 4)


def test_a_finished_run_stays_as_it_is(trainer_in, tmp_path):
    state = finish(trainer_in(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = trainer_in(tmp_path)
    assert again.progress.phase == len(SCHEDULE)
    assert same(state, finish(again))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_metrics_have_the_contracts_keys(trainer_in, tmp_path):
    calls = iter(range(10**9))

    def verify(response: str, gold: str) -> float:
        WORKERS.pool.cut_off += next(calls) == 0  # as if the first response had cost the verifier a worker
        return even(response, gold)

    trainer_in(tmp_path, phases=SCHEDULE[:2], verify=verify).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["judge/verifier_killed"] for line in lines] == [1, 0, 0, 0, 0]
    keys = {
        "step", "phase", "phase_step", "time_s", "policy/entropy_nats", "reward/mean", "loss/total", "optim/grad_norm",
        "rollout/length_mean_tokens", "rollout/truncated_fraction", "rollout/logp_gap_mean_nats",
        "rollout/logp_gap_max_nats", "rollout/tokens_per_s", "time/rollout_s", "time/judge_s", "time/update_s",
    }  # fmt: skip
    for line in lines:
        assert keys | {"rollout/groups_kept_fraction"} <= set(line)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["phase_step"] for line in lines] == [1, 2, 3, 1, 2]
    # On-policy rows only in the reheating phase: there the gap is rounding alone.
    assert lines[-1]["rollout/logp_gap_max_nats"] < 1e-4


def test_a_phase_tells_how_far_it_moved_from_its_start(trainer_in, tmp_path):
    trainer = trainer_in(tmp_path / "run", phases=MEASURED)
    finish(trainer)
    assert trainer.run_state.start is None, "a phase that is over holds no copy of a policy"
    moved = {(m["phase"], m["phase_step"]): m["policy/start_kl_nats"] for m in read_metrics(tmp_path / "run")}
    for phase in MEASURED:
        assert abs(moved[phase.name, 1]) < 1e-9, "the first responses are drawn from the start policy itself"
        assert moved[phase.name, 2] > 1e-6
    assert moved["rl", 3] > moved["rl", 2]


RENEWED = (
    rl_phase(
        objective=dapo(kl_coefficient=0.5, kl_estimator="exact"),
        reference="start",
        reference_every_steps=2,
        stop=StopRule(steps=5),
    ),
    reheat_phase(objective=ts_opsd(teacher="frozen", teacher_temperature=2.0), reference="start"),
)


def test_a_reference_is_renewed_and_resumes_bit_for_bit(trainer_in, tmp_path):
    """Copies before steps 1, 3 and 5: there the policy is its own reference. Left in the rollout after step 2 and after
    step 3."""
    whole = finish(trainer_in(tmp_path / "whole", phases=RENEWED))
    lines = read_metrics(tmp_path / "whole")
    apart = [line["policy/reference_kl_nats"] for line in lines[:5]]
    assert max(abs(apart[i]) for i in (0, 2, 4)) < 1e-9
    assert min(apart[1], apart[3]) > 1e-6
    assert lines[5]["distil/top1_agreement_fraction"] == 1.0, "the reheater's teacher is the policy that it began with"
    assert lines[6]["distil/forward_kl_nats"] < lines[5]["distil/forward_kl_nats"]
    run = tmp_path / "left"
    for at in (2, 3):
        trainer = trainer_in(run, phases=RENEWED)

        def terminate(_, trainer=trainer, at=at):
            if int(trainer.state.step) == at and trainer.signals.number is None:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer.table.sampling = terminate
        with pytest.raises(Interrupted, match=rf"left the rollout after step {at}$"):
            trainer.run()
    again = trainer_in(run, phases=RENEWED)
    assert same(trainer.run_state.start, again.run_state.start)
    assert same(whole, finish(again))
    assert facts(tmp_path / "whole") == facts(run)


def test_another_model_is_loaded_once_and_stands_in_no_checkpoint(trainer_in, tmp_path):
    other = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, num_hidden_layers=2, hidden_size=24))
    loaded = []

    def load():
        loaded.append(1)
        return other.init(jax.random.key(5))

    phase = reheat_phase(
        objective=opd(), reference="teacher", stop=StopRule(steps=3), optimizer=make_optimizer(learning_rate=1e-3)
    )
    trainer = trainer_in(tmp_path / "run", phases=(phase,), references={"teacher": ReferenceSource(other, load)})
    trainer.run()
    assert loaded == [1]
    assert trainer.run_state.start is None
    distances = [line["distil/reverse_kl_nats"] for line in read_metrics(tmp_path / "run")]
    assert distances[2] < distances[0]


def test_the_data_cursor_goes_through_epochs(trainer_in, tmp_path):
    trainer = trainer_in(tmp_path, phases=(reheat_phase(stop=StopRule(epochs=1.0)),))
    trainer.run()
    # 4 prompts a step, 11 problems, one per group: 3 steps pass one epoch.
    assert int(trainer.state.step) == 3
    assert trainer.progress.position == 12


def test_eight_devices_train_like_one(trainer_in, tmp_path):
    # A large epsilon: AdamW would turn a gradient of pure rounding into a step of full size.
    smooth = make_optimizer(learning_rate=1e-2, epsilon=1e-2)
    phases = (rl_phase(optimizer=smooth), reheat_phase(optimizer=smooth))
    one = finish(trainer_in(tmp_path / "one", phases=phases))
    eight = finish(trainer_in(tmp_path / "eight", phases=phases, data=8))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    names = ("policy/entropy_nats", "reward/mean", "rollout/length_mean_tokens")
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "eight"), strict=True):
        np.testing.assert_allclose([a[n] for n in names], [b[n] for n in names], rtol=1e-4)


def test_the_reheater_refuses_a_policy_that_is_not_collapsed(trainer_in, tmp_path):
    phase = reheat_phase(guard=Guard(max_start_entropy_nats=0.12))
    trainer = trainer_in(tmp_path, phases=(phase,))
    before = jax.device_get(trainer.state.params)
    with pytest.raises(GuardError, match=r"refuses to start: entropy \d+\.\d+ nats"):
        trainer.run()
    assert same(before, jax.device_get(trainer.state.params)), "a refused policy must not be touched"
    assert trainer.checkpoints.latest() is None


def test_recovery_keeps_the_policy_that_was_measured(trainer_in, tmp_path):
    phase = reheat_phase(stop=StopRule(recovered_above_nats=0.12))
    trainer = trainer_in(tmp_path, phases=(phase,))
    before = jax.device_get(trainer.state.params)
    trainer.run()  # a random policy is above the threshold at once
    assert int(trainer.state.step) == 1
    assert read_metrics(tmp_path)[0]["optim/held"] == 1.0
    assert same(before, jax.device_get(trainer.state.params))


def test_a_shortage_of_informative_groups_stops_like_a_guard(trainer_in, tmp_path):
    rule = RewardRule(max_generation_batches=2)
    trainer = trainer_in(tmp_path, phases=(rl_phase(reward=rule),), verify=lambda *_: 1.0)
    with pytest.raises(GuardError, match=r"phase 'rl' stopped: dynamic sampling: 0 of 4 groups .* reward.on_shortage"):
        trainer.run()


@pytest.mark.parametrize(
    ("limit", "named"),
    [
        ({"stop": StopRule(collapsed_below_nats=0.1, steps=3)}, "stop.collapsed_below_nats"),
        ({"guard": Guard(runaway_entropy_nats=5.0)}, "guard.runaway_entropy_nats"),
    ],
)
def test_limits_of_the_entropy_need_an_objective_that_reports_it(limit, named, trainer_in, tmp_path):
    objective = dapo()
    silent = objective._replace(loss=lambda stats, batch: dataclasses.replace(objective.loss(stats, batch), metrics={}))
    with pytest.raises(GuardError, match=rf"{named} expects its objective to report policy/entropy_nats"):
        trainer_in(tmp_path, phases=(rl_phase(objective=silent, **limit),)).run()
    assert read_metrics(tmp_path) == [], "it refuses before a step is logged"


def test_a_runaway_stops(trainer_in, tmp_path):
    trainer = trainer_in(tmp_path, phases=(reheat_phase(guard=Guard(runaway_entropy_nats=1.0)),))
    with pytest.raises(GuardError, match="ran over 1.0 nats"):
        trainer.run()


def test_updates_that_are_not_finite_are_skipped_and_end_the_run(trainer_in, tmp_path):
    broken = optax.chain(make_optimizer(learning_rate=1e-2))
    objective = dapo()

    def loss(stats, batch):
        out = objective.loss(stats, batch)
        return type(out)(type(out.loss)(out.loss.total * np.float32("nan"), out.loss.count), out.metrics)

    phase = rl_phase(objective=objective._replace(loss=loss), optimizer=broken, guard=Guard(max_skipped_in_row=2))
    trainer = trainer_in(tmp_path, phases=(phase,))
    before = jax.device_get(trainer.state.params)
    with pytest.raises(GuardError, match="2 updates in a row were not finite"):
        trainer.run()
    assert [line["optim/skipped"] for line in read_metrics(tmp_path)] == [1.0, 1.0]
    assert same(before, jax.device_get(trainer.state.params))


def test_no_step_is_compiled_twice(trainer_in, tmp_path):
    trainer = trainer_in(tmp_path, phases=(rl_phase(stop=StopRule(steps=5)), reheat_phase(stop=StopRule(steps=4))))
    taken: list[PhaseStep] = []
    original = trainer.steps.of
    trainer.steps.of = lambda at: taken.append(original(at)) or taken[-1]
    trainer.run()
    rl, reheat = taken
    assert (rl.update.programs, reheat.program._cache_size()) == (1, 1)
    assert reheat.engine.programs == reheat.update.programs == 0, "the reheater's step is one program"
    programs = [line["rollout/programs"] for line in read_metrics(tmp_path) if line["phase"] == "rl"]
    assert programs[1:] == programs[1:2] * 4, "the sampler compiled after the first step"


LOWERED = "/jaxpr_to_mlir_module_duration"  # also where the compiled program is then found in the persistent cache


@pytest.mark.parametrize("data", [1, 2])
def test_later_phases_are_compiled_while_the_first_runs(data, trainer_in, tmp_path):
    """When such a phase begins, none of its large programs is lowered or compiled: in stages, as one program, and
    RL."""
    later = (reheat_phase(rows_at_once=4), reheat_phase(), rl_phase("again", max_response_tokens=4, micro_batches=2))
    trainer = trainer_in(tmp_path, phases=(rl_phase(), *later), data=data)
    original, begun, compiled = trainer.steps.of, [], []

    def begins(at):
        if at:
            trainer.steps._ahead[at].result(timeout=600)  # the phase before was as long as that
        begun.append(at)
        return original(at)

    def seen(event, _seconds, **facts):
        here = threading.current_thread() is threading.main_thread()
        if here and begun and begun[-1] and event.endswith(LOWERED):
            compiled.append((begun[-1], facts["fun_name"]))

    trainer.steps.of = begins
    jax.monitoring.register_event_duration_secs_listener(seen)
    try:
        trainer.run()
    finally:
        jax.monitoring.unregister_event_duration_listener(seen)
    assert begun == [0, 1, 2, 3]
    large = {f"jit({name})" for name in ("update", "reheat_step", "decode_segment", "rollout_view")}
    assert "jit(prefill)" in {name for _, name in compiled}, (
        "the listener hears of other shapes: these prompts are short"
    )
    assert [(phase, name) for phase, name in compiled if name in large] == []


def test_a_phase_that_could_not_be_compiled_ahead_is_compiled_when_it_begins(trainer_in, tmp_path, monkeypatch):
    whole = finish(trainer_in(tmp_path / "whole"))

    def fails(_):
        raise RuntimeError("the compiler's server went away")

    monkeypatch.setattr(PhaseStep, "compile", fails)
    assert same(whole, finish(trainer_in(tmp_path / "again")))


def test_an_objective_that_sees_the_batch_trains_the_same_in_micro_batches(trainer_in, tmp_path):
    """`select` before the gradient, in one piece and in four, packed. One step: behind it the policies differ by
    rounding, and other tokens are drawn."""
    found = {}
    for pieces in (1, 4):
        objective = clip_cov(fraction=0.2, cov_low=-9.0, cov_high=9.0)
        phases = (rl_phase(objective=objective, micro_batches=pieces, stop=StopRule(steps=1)),)
        finish(trainer_in(tmp_path / str(pieces), phases=phases))
        found[pieces] = read_metrics(tmp_path / str(pieces))
    for one, four in zip(found[1], found[4], strict=True):
        assert one["policy/covariance_dropped_fraction"] > 0
        for name in ("loss/total", "optim/grad_norm", "policy/covariance_dropped_fraction"):
            assert one[name] == pytest.approx(four[name], rel=1e-3, abs=1e-5), name


def test_packed_rows_give_the_same_run(trainer_in, tmp_path):
    """Four micro-batches of two rows: with several responses in a row fewer of them are computed."""
    runs = {}
    for pack in (True, False):
        folder = tmp_path / str(pack)
        phases = (rl_phase(micro_batches=4, pack=pack), reheat_phase(micro_batches=2, rows_at_once=4, pack=pack))
        state = finish(trainer_in(folder, phases=phases, width=30))
        runs[pack] = (state, read_metrics(folder))
    for packed, padded in zip(runs[True][1], runs[False][1], strict=True):
        for name in ("loss/total", "policy/entropy_nats", "optim/grad_norm", "loss/tokens"):
            assert packed[name] == pytest.approx(padded[name], rel=1e-4, abs=1e-6), name
        gaps = [line["rollout/logp_gap_max_nats"] for line in (packed, padded)]  # off-policy: groups left over are used
        assert gaps[0] == pytest.approx(gaps[1], abs=1e-4)
        assert packed["learner/useful_fraction"] >= padded["learner/useful_fraction"]
    assert runs[True][1][0]["learner/useful_fraction"] > 1.9 * runs[False][1][0]["learner/useful_fraction"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), runs[True][0].params, runs[False][0].params)


def test_reheating_in_stages_is_the_same_step(trainer_in, tmp_path):
    """Fewer slots than rows: continuous batching and an update, instead of one program."""
    whole = finish(trainer_in(tmp_path / "one", phases=(reheat_phase(),)))
    stages = finish(trainer_in(tmp_path / "stages", phases=(reheat_phase(rows_at_once=3),)))
    one, other = facts(tmp_path / "one"), facts(tmp_path / "stages")
    for a, b in zip(one, other, strict=True):
        for name in ("policy/entropy_nats", "loss/total", "rollout/tokens", "reward/accuracy_fraction"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)
        assert 0.3 < b["rollout/slot_use_fraction"] <= 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), whole.params, stages.params)


def test_reheating_in_one_program_packs_its_rows(trainer_in, tmp_path, monkeypatch):
    """Where rows are wide: the same step as unpacked, to rounding, and the program has segments."""
    monkeypatch.setattr(phase_update, "LEAST_WIDTH", 1)
    runs, texts = {}, {}
    for pack in (True, False):
        trainer = trainer_in(tmp_path / str(pack), phases=(reheat_phase(pack=pack, micro_batches=2),))
        (lowered,) = trainer.steps.of(0).lowered()
        texts[pack] = lowered.as_text()
        runs[pack] = finish(trainer), facts(tmp_path / str(pack))
    for a, b in zip(runs[True][1], runs[False][1], strict=True):
        assert a["rollout/tokens"] == b["rollout/tokens"]
        for name in ("policy/entropy_nats", "loss/total"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), runs[True][0].params, runs[False][0].params)
    assert texts[True].count("scatter") > texts[False].count("scatter"), "one of them packs"


def test_prompts_that_are_too_long_are_named(tokenizer):
    with pytest.raises(ValueError, match="prompt 'p3' has 6 tokens, expected 1 to 5"):
        encode_prompts([Problem("p3", "1 2 3 -> 4 :", "")], tokenizer, max_prompt_tokens=5)


@pytest.mark.parametrize(
    ("rule", "facts_", "over"),
    [
        (StopRule(steps=3), (3, 0.0, ()), True),
        (StopRule(steps=3), (2, 0.0, ()), False),
        (StopRule(epochs=2.0), (9, 2.0, ()), True),
        (StopRule(epochs=2.0), (9, 1.99, ()), False),
        (StopRule(collapsed_below_nats=0.08, window_steps=2), (9, 0.0, (0.5, 0.09, 0.069)), True),  # mean 0.0795
        (StopRule(collapsed_below_nats=0.08, window_steps=2), (9, 0.0, (0.01, 0.09, 0.08)), False),  # mean 0.085
        (StopRule(collapsed_below_nats=0.08, window_steps=2), (1, 0.0, (0.01,)), False),  # the window is not full
        (StopRule(collapsed_below_nats=0.08), (9, 0.0, (0.08,)), False),  # under, not at
        (StopRule(recovered_above_nats=0.12), (9, 0.0, (0.12,)), True),  # "0.12 nats or more"
        (StopRule(recovered_above_nats=0.12), (9, 0.0, (0.119,)), False),
    ],
)
def test_stop_rules(rule, facts_, over):
    step, epochs, entropies = facts_
    assert (rule.reason(phase_step=step, epochs=epochs, entropies_nats=entropies) is not None) == over


def test_stop_rules_must_end_sometime():
    with pytest.raises(ValueError, match="at least one of"):
        StopRule()

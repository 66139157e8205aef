"""Numbers that are not finite: located, kept for study within a bound, skipped, counted, and a stop where they persist.
And numbers at the edge that must stay finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import MODEL, even, finish, reheat_phase, rl_phase, same

from tsopsd_jax.judge.groups import RewardRule
from tsopsd_jax.objectives import OBJECTIVES
from tsopsd_jax.rollout.distribution import Sampling, draw
from tsopsd_jax.rundir.log import read_metrics
from tsopsd_jax.rundir.status import read_status
from tsopsd_jax.train.phase import Guard, GuardError
from tsopsd_jax.train.stopping import StopRule


def with_params(trainer, change):
    """The trainer with changed parameters: {path: function of the array}."""

    def changed(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return change[name](leaf) if name in change else leaf

    state = trainer.state
    params = jax.tree_util.tree_map_with_path(changed, state.params)
    trainer.run_state = trainer.run_state._replace(state=dataclasses.replace(state, params=params))
    return trainer


def names() -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(MODEL.param_shapes())
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def test_a_weight_that_is_not_finite_is_named_skipped_counted_and_stops_the_run(trainer_in, tmp_path):
    name = next(each for each in names() if "down" in each)
    trainer = trainer_in(tmp_path, phases=(reheat_phase(stop=StopRule(steps=9), guard=Guard(max_skipped_in_row=2)),))
    with_params(trainer, {name: lambda w: w.at[0, 0, 0].set(jnp.nan)})
    before = jax.device_get(trainer.state.params)
    notes = []
    trainer.table.note = notes.append
    with pytest.raises(GuardError, match="2 updates in a row were not finite and were skipped"), trainer.told():
        trainer.run()
    assert all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(trainer.state.params)), strict=True)
    )
    assert [line["optim/skipped"] for line in read_metrics(tmp_path)] == [1.0, 1.0]
    assert read_status(tmp_path)["skipped_updates"] == 2
    said = [note for note in notes if "was not finite" in note]
    assert len(said) == 2
    assert said[0].startswith(f"warning: step 1 was not finite: weight {name} of layers 0: 1 values; ")
    assert "gradient of" in said[0]
    with np.load(tmp_path / "nonfinite" / "step-1.npz") as kept:  # no pickle
        assert str(kept["found"]) in said[0]
        assert kept["tokens"].shape[0] == kept["row"].size <= 8
        assert not np.isfinite(kept["logp"]).all(axis=1).any()
    assert (tmp_path / "nonfinite" / "step-1.npz").stat().st_size < 100_000


def test_an_advantage_that_is_not_finite_is_named_by_its_row_and_learning_goes_on(trainer_in, tmp_path, monkeypatch):
    """The one in the second step alone; the third step learns again, from the policy that the first one left."""
    from tsopsd_jax.judge import groups
    from tsopsd_jax.train import phase_step

    calls, make = [], groups.to_batch

    def to_batch(judged, **options):
        batch = make(judged, **options)
        calls.append(len(calls))
        if len(calls) in (2, 3):  # the second step's, and once more where it is located
            batch = dataclasses.replace(batch, advantage=np.where(np.arange(8)[:, None] == 5, np.inf, batch.advantage))
        return batch

    monkeypatch.setattr(phase_step, "to_batch", to_batch)
    rule = RewardRule(max_generation_batches=0)
    trainer = trainer_in(tmp_path, phases=(rl_phase(reward=rule, stop=StopRule(steps=3)),))
    notes = []
    trainer.table.note = notes.append
    finish(trainer)
    assert [line["optim/skipped"] for line in read_metrics(tmp_path)] == [0.0, 1.0, 0.0]
    [said] = [note for note in notes if "was not finite" in note]
    assert "step 2 was not finite: advantage of rows 5, first at token " in said
    assert "weight" not in said
    with np.load(tmp_path / "nonfinite" / "step-2.npz") as kept:
        assert kept["row"].tolist() == [5]


def test_no_more_than_three_are_kept(trainer_in, tmp_path):
    name = next(each for each in names() if "down" in each)
    trainer = trainer_in(tmp_path, phases=(reheat_phase(stop=StopRule(steps=5), guard=Guard(max_skipped_in_row=99)),))
    with_params(trainer, {name: lambda w: w * jnp.nan})
    finish(trainer)
    assert sorted(path.name for path in (tmp_path / "nonfinite").iterdir()) == [f"step-{i}.npz" for i in (1, 2, 3)]


# ------------------------------------------------------------------------------------------------ the edge


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "tampo" and not OBJECTIVES[name]().reference])
def test_a_vocabulary_row_of_minus_infinity_has_probability_nothing(name):
    """By hand: softmax(0, 0, -inf) = (1/2, 1/2, 0), whose entropy is log 2; all gradients are finite, and 0 there."""
    objective = OBJECTIVES[name]()
    logits, token = jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([1])

    def total(logits):
        found = objective.stats(logits, token)
        return sum(jnp.sum(x) for x in found.values()), found

    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    np.testing.assert_allclose(found["logp"], [-np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(found.get("entropy", jnp.log(jnp.array([2.0]))), [np.log(2)], rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert gradient[0, 2] == 0.0


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-24])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.5), Sampling(sampling_temperature=0.01)])
def test_a_token_of_minus_infinity_is_never_drawn(uniform, sampling):
    logits = jnp.array([[-jnp.inf, 0.0, 1.0, -jnp.inf]])
    token, logp = draw(logits, jnp.array([uniform], jnp.float32), sampling)
    assert int(token[0]) in (1, 2)
    assert np.isfinite(logp).all()


@pytest.mark.parametrize("phase", [rl_phase, reheat_phase])
def test_a_whole_step_of_a_policy_that_has_collapsed(phase, trainer_in, tmp_path):
    """Logits a thousand times as far apart: entropy under 1e-4 nats, and all that is logged is finite."""
    rule = {"reward": RewardRule(max_generation_batches=0)} if phase is rl_phase else {}
    trainer = with_params(
        trainer_in(tmp_path, phases=(phase(stop=StopRule(steps=2), **rule),)), {"final_norm": lambda w: 1000.0 * w}
    )
    state = finish(trainer)
    for line in read_metrics(tmp_path):
        assert line["policy/entropy_nats"] < 1e-4
        assert line["optim/skipped"] == 0.0
        assert [
            k for k, v in line.items() if v is None and k not in ("time/rollout_s", "learner/useful_fraction")
        ] == []
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("changes", "verify"),
    [
        ({"max_response_tokens": 1, "reward": RewardRule(max_generation_batches=0)}, even),
        ({"reward": RewardRule(max_generation_batches=0)}, lambda *_: 1.0),  # all groups equal: no advantage at all
        ({"reward": RewardRule(max_generation_batches=0)}, lambda *_: 0.0),
        ({"prompts_per_step": 1, "responses_per_prompt": 8, "reward": RewardRule(max_generation_batches=0)}, even),
    ],
    ids=["responses of one token", "all right", "all wrong", "one group"],
)
def test_steps_at_the_edge_are_finite(changes, verify, trainer_in, tmp_path):
    trainer = trainer_in(tmp_path, phases=(rl_phase(stop=StopRule(steps=2), **changes),), verify=verify)
    start = jax.device_get(trainer.state)
    state = finish(trainer)
    lines = read_metrics(tmp_path)
    assert [line["optim/skipped"] for line in lines] == [0.0, 0.0]
    assert all(np.isfinite(line["loss/total"]) and np.isfinite(line["optim/grad_norm"]) for line in lines)
    if verify is not even:  # nothing is learnt where nothing differs (weight decay is 0)
        assert [line["optim/grad_norm"] for line in lines] == [0.0, 0.0]
        assert same(state.params, start.params)


def test_prompts_at_their_limit(trainer_in, tmp_path):
    """The longest prompts of the toy take six tokens of six: with seven allowed the run is the same, bit for bit."""
    phases = (rl_phase(stop=StopRule(steps=2), reward=RewardRule(max_generation_batches=0)),)
    longest = [finish(trainer_in(tmp_path / str(width), phases=phases, width=width)).params for width in (6, 7)]
    for a, b in zip(*map(jax.tree.leaves, longest), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

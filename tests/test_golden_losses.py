"""What verl's and TRL's own functions, and those of methods' authors,
make of the same numbers (tests/golden/policy_losses.json).

The file says which versions they are and how it was made; it holds numbers alone. All agree to 1e-5 in float32.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax import advantages, losses
from tsopsd_jax.objectives import make_objective
from tsopsd_jax.objectives.aent import clamped_entropy
from tsopsd_jax.types import Batch, Mean

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "policy_losses.json").read_text(encoding="utf-8"))
INPUTS, VALUES = GOLDEN["inputs"], GOLDEN["values"]
LENGTH = np.asarray(INPUTS["length_tokens"])
LOGP, OLD_LOGP, LOGITS = (jnp.asarray(INPUTS[name], jnp.float32) for name in ("logp", "old_logp", "logits"))
MASK = np.arange(LOGP.shape[1])[None, :] < LENGTH[:, None]
NO_DUAL_CLIP = {"clip_ratio_c": 1e9}

CASES = {
    "verl vanilla": ("dapo", {"clip_ratio_c": 10.0}),
    "verl vanilla c 3": ("dapo", {"clip_ratio_c": 3.0}),
    "verl clip_cov": ("clip_cov", {"fraction": 0.9, "cov_low": 0.3, "cov_high": 5.0}),  # all candidates: nothing random
    "verl kl_cov": ("kl_cov", {"fraction": 0.2, "coefficient": 0.7}),
    "verl gspo": ("examples/gspo.py:gspo", {"clip_low": 0.1, "clip_high": 0.15}),
    "verl cispo": ("examples/cispo.py:cispo", {"ratio_low": 0.0, "ratio_high": 2.5}),
    "verl sapo": ("examples/sapo.py:sapo", {}),
    "trl dapo": ("dapo", NO_DUAL_CLIP),
    "trl bnpo": ("dapo", NO_DUAL_CLIP),
    "trl dapo delta 10": ("dapo", {"clip_ratio_c": 10.0}),
    "trl dr_grpo": ("examples/dr_grpo.py:dr_grpo", {"max_tokens": 8, "clip_high": 0.28}),
    "trl cispo": ("examples/cispo.py:cispo", {"ratio_high": 2.5}),
    "trl sapo": ("examples/sapo.py:sapo", {}),
    "trl grpo sequence": ("examples/gspo.py:gspo", {"clip_low": 0.1, "clip_high": 0.15}),
    # 16 tokens: the top 4. (TRL takes those at or above a quantile, here int(fraction x tokens) of them.)
    "trl dapo top 25 percent": ("top_entropy", {"fraction": 0.25, **NO_DUAL_CLIP}),
    "trl dapo entropy": ("entropy_bonus", {"coefficient": 0.01, **NO_DUAL_CLIP}),
    "BAPO target 0.25": ("bapo", {"target": 0.25}),
    "BAPO target 0.33": ("bapo", {"target": 0.33}),
    "BAPO target 9": ("bapo", {"target": 9.0}),
}
OTHERS = {
    "verl entropy",
    "verl kl_penalty k1",
    "verl kl_penalty k2",
    "verl kl_penalty k3",
    "verl agg_loss token-mean",
    "verl agg_loss seq-mean-token-mean",
    "verl agg_loss seq-mean-token-sum-norm",
    "verl grpo advantage",
    "verl grpo advantage without std",
    "AReaL clamped entropy",
}


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def batch():
    return Batch.of(
        tokens=np.zeros(MASK.shape, np.int32),
        mask=MASK,
        advantage=np.broadcast_to(np.asarray(INPUTS["advantage"], np.float32), MASK.shape),
        old_logp=OLD_LOGP,
    )


def of_objective(name, settings):
    """(mean loss, gradients of it into logp and entropy, metrics, the batch that `select` left)."""
    objective = make_objective(f"{ROOT}/{name}" if name.startswith("examples/") else name, settings)
    stats = {"logp": LOGP, "entropy": losses.entropy(LOGITS)}
    made = batch() if objective.select is None else objective.select(stats, batch())

    def mean(stats):
        out = objective.loss(stats, made)
        return out.loss.total / out.loss.count, out

    (value, out), gradient = jax.value_and_grad(mean, has_aux=True)(stats)
    return value, gradient, {name: float(m.value) for name, m in out.metrics.items()}, made


def test_every_golden_value_is_compared():
    assert set(CASES) | OTHERS == set(VALUES)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of(case):
    want = VALUES[case]
    value, gradient, metrics, made = of_objective(*CASES[case])
    close(value, want["loss"])
    close(gradient["logp"], want["gradient"])
    if "entropy_gradient" in want:
        close(gradient["entropy"], want["entropy_gradient"])
    if "ratio_low" in want:
        close([made.knobs["ratio_low"], made.knobs["ratio_high"]], [want["ratio_low"], want["ratio_high"]])
    if CASES[case][0] == "dapo" and "metrics" in want and CASES[case][1]["clip_ratio_c"] == 10.0:
        close(metrics["policy/clipped_fraction"], want["metrics"]["actor/pg_clipfrac"])
        close(metrics["policy/dual_clipped_fraction"], want["metrics"]["actor/pg_clipfrac_lower"])


def test_entropy_is_verls():
    want = VALUES["verl entropy"]
    close(losses.entropy(LOGITS), want["per_token"])
    mean, gradient = jax.value_and_grad(lambda z: Mean.of(losses.entropy(z), jnp.asarray(MASK)).value)(LOGITS)
    close(mean, want["token_mean"])
    close(gradient, want["gradient"])


def test_clamped_entropy_is_that_of_aents_authors():
    want = VALUES["AReaL clamped entropy"]
    value, pull = jax.vjp(lambda z: clamped_entropy(z, fraction=0.3), LOGITS)
    close(value, want["per_token"])
    close(pull(jnp.ones_like(value))[0], want["gradient"])


def test_divergence_from_the_sampler_is_verls_k3():
    *_, metrics, _ = of_objective("dapo", {})
    close(metrics["policy/sampler_kl_nats"], VALUES["verl kl_penalty k3"]["mean"])
    apart = np.asarray(losses.log_ratio(LOGP, OLD_LOGP))  # k1 and k2 follow from the log-ratio
    close(-np.mean(apart[MASK]), VALUES["verl kl_penalty k1"]["mean"])
    close(np.mean(np.square(apart[MASK])) / 2, VALUES["verl kl_penalty k2"]["mean"])


def test_means_over_tokens_and_rows_are_verls():
    old = np.asarray(batch().old_logp)
    close(Mean.of(batch().old_logp, batch().mask).value, VALUES["verl agg_loss token-mean"]["value"])
    per_row = np.sum(old, axis=1) / LENGTH.astype(np.float32)
    close(np.mean(per_row), VALUES["verl agg_loss seq-mean-token-mean"]["value"])
    close(np.mean(np.sum(old, axis=1)) / MASK.shape[1], VALUES["verl agg_loss seq-mean-token-sum-norm"]["value"])


@pytest.mark.parametrize("normalize_std", [True, False])
def test_group_relative_advantages_are_verls(normalize_std):
    want = VALUES["verl grpo advantage" + ("" if normalize_std else " without std")]["advantage"]
    rewards = jnp.asarray(INPUTS["rewards"], jnp.float32)
    close(advantages.group_relative(rewards, normalize_std=normalize_std), want)


def test_a_case_that_would_pass_whatever_the_numbers_is_none():
    """Of the inputs: ratios beyond every bound of the cases, on both sides, at advantages of both signs."""
    ratio = np.exp(np.asarray(LOGP - OLD_LOGP))[MASK]
    advantage = np.asarray(batch().advantage)[MASK]
    for sign in (1, -1):
        assert (ratio[advantage * sign > 0] > 1.28).any()
        assert (ratio[advantage * sign > 0] < 0.8).any()
    assert (ratio[advantage < 0] > 10).any()

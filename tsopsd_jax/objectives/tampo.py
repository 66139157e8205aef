# pyright: strict, reportUnknownMemberType=false
"""TAMPO: the rollout temperature is chosen by what high advantages were likeliest under (arXiv 2602.11779)."""

import random
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tsopsd_jax import losses
from tsopsd_jax.objectives.base import Control, Knobs, Objective
from tsopsd_jax.objectives.dapo import Clip, tempered_stats
from tsopsd_jax.types import SAMPLING_TEMPERATURE, Batch, LossOutput, Mean

CHOICES = "choices"
"""The knob that counts the temperatures drawn so far, from which the next draw's random number follows."""


def tampo(
    *,
    temperatures: Sequence[float | int] = (0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
    initial: float = 1.0,
    ema: float = 0.05,
    nucleus: float = 0.7,
    seed: int = 0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_ratio_c: float = 10.0,
) -> Objective:
    """DAPO's surrogate at a sampling temperature that is drawn anew for each rollout, from a grid.

    With l_k the mean log-probability of a response's tokens at temperature T_k under the policy that is updated, and A
    its advantage, the update credits T_k with the mean over responses of sparsemax(l)_k x A. A moving average of that,
    moved to the least 0 and divided by the sum over the grid, is the probability of T_k; where all averages are equal,
    all are as likely. The next temperature is drawn from the nucleus of these probabilities.

    Source: TAMPO (arXiv 2602.11779), of which summaries could be had, not the text: they give sparsemax, the average's
    0.05, min-max and the nucleus 0.7. The grid (the range 0.9 to 1.5 that the paper compares itself with) and the first
    temperature were chosen here.

    Args:
        temperatures: the grid; each costs the update a pass over the logits.
        initial: the first of them; the phase's `sampling_temperature`.
        ema: weight of the latest update in the average.
        nucleus: least mass of the likeliest temperatures that are drawn from; 0: the likeliest alone.
        seed: of the draws.
        clip_low, clip_high, clip_ratio_c: see `dapo`.

    Raises:
        ValueError: fewer than two temperatures, one that is not positive or occurs twice, `initial` not among them,
            `ema` outside (0, 1] or `nucleus` outside [0, 1].
    """
    grid = tuple(float(t) for t in temperatures)
    if len(grid) < 2 or len({f"{t:g}" for t in grid}) < len(grid) or min(grid) <= 0 or initial not in grid:
        raise ValueError(
            "tampo expects two different positive temperatures or more, and initial among them, got "
            f"temperatures={list(grid)}, initial={initial}"
        )
    if not (0 < ema <= 1 and 0 <= nucleus <= 1):
        raise ValueError(f"tampo expects 0 < ema <= 1 and 0 <= nucleus <= 1, got ema={ema}, nucleus={nucleus}")
    clip = Clip("tampo", clip_low, clip_high, clip_ratio_c).checked()
    names = [f"{t:g}" for t in grid]

    def stats(logits: Array, tokens: Array, *, sampling_temperature: Array) -> dict[str, Array]:
        fixed = jax.lax.stop_gradient(logits)
        found = tempered_stats(logits, tokens, sampling_temperature=sampling_temperature)
        at = {f"logp_at_{name}": losses.token_logp(fixed / t, tokens) for name, t in zip(names, grid, strict=True)}
        return found | at

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        tokens = jnp.sum(batch.mask, axis=1, dtype=jnp.float32)

        def of_row(x: Array) -> Float[Array, " B"]:
            return jnp.sum(jnp.where(batch.mask, x, 0.0), axis=1) / jnp.maximum(tokens, 1.0)

        likelihood = jnp.stack([of_row(stats[f"logp_at_{name}"]) for name in names], axis=1)
        credit = jax.lax.stop_gradient(sparsemax(likelihood) * of_row(batch.advantage)[:, None])
        credits = {f"tampo/credit_at_{name}": Mean.of(credit[:, k], tokens > 0) for k, name in enumerate(names)}
        return LossOutput(Mean.of(clip.surrogate(stats, batch), batch.mask), clip.metrics(stats, batch) | credits)

    def turn(knobs: Knobs, metrics: Mapping[str, float]) -> Knobs:
        averages = [(1 - ema) * knobs[f"credit_at_{n}"] + ema * metrics[f"tampo/credit_at_{n}"] for n in names]
        uniform = random.Random(f"{seed} {knobs[CHOICES]:.0f}").random()
        chosen = grid[drawn_index(probabilities(averages), nucleus=nucleus, uniform=uniform)]
        kept = {f"credit_at_{name}": average for name, average in zip(names, averages, strict=True)}
        return {SAMPLING_TEMPERATURE: chosen, CHOICES: knobs[CHOICES] + 1, **kept}

    first = {SAMPLING_TEMPERATURE: float(initial), CHOICES: 0.0, **{f"credit_at_{name}": 0.0 for name in names}}
    return Objective(stats, loss, control=Control(first, turn), policy_temperature=float(initial))


def sparsemax(z: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """The point of the simplex that is nearest to each row of z (Martins and Astudillo, arXiv 1602.02068): max(z - tau,
    0), with tau such that a row adds up to 1."""
    falling = -jnp.sort(-z, axis=1)
    total = jnp.cumsum(falling, axis=1)
    rank = jnp.arange(1, z.shape[1] + 1, dtype=jnp.int32)[None, :]
    support = jnp.sum(1.0 + rank.astype(z.dtype) * falling > total, axis=1, keepdims=True, dtype=jnp.int32)
    tau = (jnp.take_along_axis(total, support - 1, axis=1) - 1.0) / support.astype(z.dtype)
    return jnp.maximum(z - tau, 0.0)


def probabilities(averages: Sequence[float]) -> list[float]:
    """(average - least) / sum of that; all the same where all averages are."""
    above = [average - min(averages) for average in averages]
    total = sum(above)
    return [x / total for x in above] if total > 0 else [1 / len(averages)] * len(averages)


def drawn_index(probability: Sequence[float], *, nucleus: float, uniform: float) -> int:
    """Draw from the nucleus, the shortest prefix in order of falling probability (equal ones in order of index) whose
    mass reaches `nucleus`; `uniform` in [0, 1) inverts its cumulative distribution in that order."""
    order = sorted(range(len(probability)), key=lambda k: -probability[k])
    kept, mass = [order[0]], probability[order[0]]
    for k in order[1:]:
        if mass >= nucleus:
            break
        kept.append(k)
        mass += probability[k]
    goal = uniform * mass
    for k in kept:
        goal -= probability[k]
        if goal < 0:
            return k
    return kept[-1]

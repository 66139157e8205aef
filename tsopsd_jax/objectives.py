"""What a phase optimises: an `Objective` is a pair of pure functions, and `OBJECTIVES` a plain dict of factories.

To write your own, return an `Objective` from a function of keyword-only hyperparameters and name it in the YAML as
`path/to/file.py:function`; it runs sharded, chunked and micro-batched like these.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from tsopsd_jax import losses
from tsopsd_jax.head import Loss, Stats
from tsopsd_jax.logit_stats import LibraryStats
from tsopsd_jax.types import Batch, LossOutput, Mean


class Objective(NamedTuple):
    """stats: (logits [..., V], tokens [...]) -> {name: [...]}, the only code that sees the vocabulary.
    loss: ({name: [B, L]}, Batch) -> LossOutput, sees whole sequences and no vocabulary.

    tokenwise: the loss of a token follows from the statistics and the batch at that token alone. Then it may be asked
    about any tokens in any arrangement, [1, n] at a time: the head forms gradients in one pass, and rows are packed.

    A statistic called `logp` (log-probability of the token) lets the learner measure the sampler against itself.
    """

    stats: Stats
    loss: Loss
    tokenwise: bool = False


def dapo(*, clip_low: float = 0.2, clip_high: float = 0.28, clip_ratio_c: float = 10.0) -> Objective:
    """DAPO (arXiv 2503.14476): clip-higher, dual clip, token-mean. No KL term, no entropy bonus.

    Args:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_ratio_c: dual clip: bound on the ratio where the advantage is negative.

    Raises:
        ValueError: for clip ranges outside 0 <= clip_low <= 1, 0 <= clip_high, 1 + clip_high <= clip_ratio_c.
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0 and clip_ratio_c >= 1 + clip_high):
        raise ValueError(
            "dapo expects 0 <= clip_low <= 1, clip_high >= 0 and clip_ratio_c >= 1 + clip_high, got "
            f"clip_low={clip_low}, clip_high={clip_high}, clip_ratio_c={clip_ratio_c}"
        )

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        per_token = losses.clipped_surrogate(
            stats["logp"],
            batch.old_logp,
            batch.advantage,
            clip_low=clip_low,
            clip_high=clip_high,
            clip_ratio_c=clip_ratio_c,
        )
        log_ratio = losses.log_ratio(stats["logp"], batch.old_logp)
        ratio = jnp.exp(log_ratio)
        up, down = batch.advantage > 0, batch.advantage < 0
        clipped = (up & (ratio > 1 + clip_high)) | (down & (ratio < 1 - clip_low))
        dual = down & (ratio > clip_ratio_c)
        return LossOutput(
            loss=Mean.of(per_token, batch.mask),
            metrics={
                "policy/entropy_nats": Mean.of(stats["entropy"], batch.mask),
                "policy/ratio_mean": Mean.of(ratio, batch.mask),
                "policy/ratio_variance": Mean.of(jnp.square(ratio - 1), batch.mask),
                # r - 1 - log r >= 0, whose mean over the sampler's tokens is KL(sampler || policy)
                "policy/sampler_kl_nats": Mean.of(jnp.expm1(log_ratio) - log_ratio, batch.mask),
                "policy/clipped_fraction": Mean.of(clipped.astype(jnp.float32), batch.mask),
                "policy/dual_clipped_fraction": Mean.of(dual.astype(jnp.float32), batch.mask),
            },
        )

    return Objective(LibraryStats(("logp", "entropy")), loss, tokenwise=True)


def ts_opsd(*, direction: str = "forward", teacher_temperature: float = 1.2) -> Objective:
    """TS-OPSD, the reheater: full-vocabulary KL to the self-teacher softmax(stop_gradient(z) / T), token-mean.

    Args:
        direction: `forward`: KL(teacher || student), gradient p - q; `reverse`: KL(student || teacher), entropy ascent.
        teacher_temperature: T > 1 heats, T < 1 cools, T = 1 is exactly nothing. The student stays at temperature 1
            and there is no T^2 factor.

    Raises:
        ValueError: for another direction, or a temperature that is not positive.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"ts_opsd: direction must be 'forward' or 'reverse', got {direction!r}")
    asked = LibraryStats(("logp", "entropy", f"{direction}_kl"), teacher_temperature)

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        kl = Mean.of(stats[f"{direction}_kl"], batch.mask)
        return LossOutput(
            loss=kl,
            metrics={
                "policy/entropy_nats": Mean.of(stats["entropy"], batch.mask),
                f"distil/{direction}_kl_nats": kl,
            },
        )

    return Objective(asked, loss, tokenwise=True)


OBJECTIVES: dict[str, Callable[..., Objective]] = {"dapo": dapo, "ts_opsd": ts_opsd}
"""Name in a configuration -> factory."""


def make_objective(name: str, hyperparameters: dict[str, Any]) -> Objective:
    """The objective called `name`: an entry of OBJECTIVES, or `path/to/file.py:function` for one of your own.

    Raises:
        ValueError: unknown name; a file or function that is missing or fails; hyperparameters that the factory does not
            take; a factory that returns something else.
    """
    if ":" in name:
        file, _, function = name.rpartition(":")
        factory = _function_of(Path(file), function)
    elif name in OBJECTIVES:
        factory = OBJECTIVES[name]
    else:
        raise ValueError(f"objective {name!r} is unknown; known: {', '.join(OBJECTIVES)}, or path/to/file.py:function")
    try:
        made = factory(**hyperparameters)
    except ValueError:
        raise
    except TypeError as error:
        raise ValueError(f"objective {name!r}: {error}") from error
    except Exception as error:
        raise ValueError(f"objective {name!r}: its function raised {type(error).__name__}: {error}") from error
    if not (isinstance(made, Objective) and callable(made.stats) and callable(made.loss)):
        raise ValueError(
            f"objective {name!r}: expected its function to return an Objective of two functions, got {made!r}; "
            "return tsopsd_jax.objectives.Objective(stats, loss)"
        )
    return made


def _function_of(file: Path, function: str) -> Callable[..., Objective]:
    if not file.is_file():
        raise ValueError(f"objective file {file} does not exist (paths are relative to the working directory)")
    if file.suffix != ".py":
        raise ValueError(f"objective file {file}: expected a Python file, path/to/file.py:function; rename it")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"objective file {file}: importing it raised {type(error).__name__}: {error}") from error
    if not callable(vars(module).get(function)):
        raise ValueError(f"objective file {file} has no function {function!r}")
    return vars(module)[function]

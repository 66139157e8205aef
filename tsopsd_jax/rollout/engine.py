"""The sampling engine: prompts in, a Rollout out, inside jit, on the parameters that the learner updates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tsopsd_jax.model.qwen3 import Qwen3
from tsopsd_jax.rollout.distribution import Sampling, draw
from tsopsd_jax.types import AnyArray, Prompts, PyTree, Rollout


def row_keys(key: Array, row_id: AnyArray) -> Array:
    """One key per row: fold_in(key, row_id). With key = fold_in(run key, step) a sample depends on nothing else."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_id)


def sample(
    model: Qwen3,
    params: PyTree,
    prompts: Prompts,
    key: Array,
    *,
    sampling: Sampling,
    max_response_tokens: int,
    stop_ids: tuple[int, ...],
    rows_at_once: int | None = None,
) -> Rollout:
    """Continue every prompt until a stop token or `max_response_tokens`. Pure; to be called under jit.

    Args:
        model, params: the policy.
        prompts: B prompts of at most P tokens, right-padded.
        key: the key of the step; the randomness of a row depends on it and on the row's id alone.
        sampling: temperature, top-p, top-k.
        max_response_tokens: responses are cut at this length (stop token included).
        stop_ids: a response ends with the first of these.
        rows_at_once: decode this many rows together, one batch after the other; None: all.

    Returns:
        A Rollout of width L = P + max_response_tokens.

    Raises:
        ValueError: if `rows_at_once` does not divide the number of rows.
    """
    b = prompts.tokens.shape[0]

    def some(prompts: Prompts) -> Rollout:
        return _sample(model, params, prompts, key, sampling, max_response_tokens, stop_ids)

    if rows_at_once is None or rows_at_once >= b:
        return some(prompts)
    if b % rows_at_once:
        raise ValueError(f"rows_at_once {rows_at_once} does not divide {b} rows")
    # Strided, so that every piece is spread over all devices.
    split = jax.tree.map(lambda x: x.reshape(rows_at_once, -1, *x.shape[1:]).swapaxes(0, 1), prompts)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, *x.shape[2:]), jax.lax.map(some, split))


def _sample(model, params, prompts: Prompts, key, sampling: Sampling, max_tokens: int, stop_ids) -> Rollout:
    b, p = prompts.tokens.shape
    rows = jnp.arange(b)
    keys = row_keys(key, prompts.row_id)
    stops = jnp.asarray(stop_ids, jnp.int32)
    prompt_length = prompts.length.astype(jnp.int32)
    in_prompt = jnp.arange(p, dtype=jnp.int32)[None, :] < prompt_length[:, None]
    tokens = jnp.pad(jnp.where(in_prompt, prompts.tokens, 0).astype(jnp.int32), ((0, 0), (0, max_tokens)))
    hidden, cache = model.prefill(params, tokens[:, :p], slots=p + max_tokens)
    last = jnp.take_along_axis(hidden, (prompt_length - 1)[:, None, None], axis=1)[:, 0]

    def running(carry):
        t, _, _, _, _, stopped, _ = carry
        return (t < max_tokens) & ~jnp.all(stopped)

    def step(carry):
        t, tokens, logp, length, hidden, stopped, cache = carry
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t)))(keys)
        token, token_logp = draw(model.project(params, hidden), uniform, sampling)
        # A row that has stopped idles: it writes zeros beyond its end.
        token = jnp.where(stopped, 0, token)
        at = prompt_length + t
        tokens = tokens.at[rows, at].set(token)
        logp = logp.at[rows, at].set(jnp.where(stopped, 0.0, token_logp))
        length = jnp.where(stopped, length, at + 1)
        stopped = stopped | jnp.any(token[:, None] == stops[None, :], axis=1)
        hidden, cache = model.decode(params, token, at, cache)
        return t + 1, tokens, logp, length, hidden, stopped, cache

    start = (
        jnp.zeros((), jnp.int32),
        tokens,
        jnp.zeros(tokens.shape, jnp.float32),
        prompt_length,
        last,
        jnp.zeros((b,), bool),
        cache,
    )
    _, tokens, logp, length, _, stopped, _ = jax.lax.while_loop(running, step, start)
    return Rollout(tokens=tokens, prompt_length=prompt_length, length=length, logp=logp, stopped=stopped)

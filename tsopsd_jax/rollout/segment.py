"""The segment, up to R decoding steps of B slots inside one program, and the sampler inside jit, which is one segment.

A slot's cache has two parts. *Pages*, in a pool that all slots share, hold whole runs of R tokens; they are read only
during a segment. The slot's own *tail*, [K, H, C] with C = C0 + R, holds what is left of its prompt (fewer than R
tokens, in the first C0 places) and the tokens of the segment, each written where all slots write theirs: one update of
a block, in place. Between segments the R tokens become one page.
"""

from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tsopsd_jax import losses
from tsopsd_jax.model.decoding import LayerCache, decode, prefill, rollout_view
from tsopsd_jax.model.qwen3 import Qwen3
from tsopsd_jax.rollout.distribution import Sampling, draw
from tsopsd_jax.rollout.schedule import PageTable
from tsopsd_jax.rollout.slot_attention import BY_XLA, Seen, SlotAttention
from tsopsd_jax.types import AnyArray, Prompts, PyTree, Rollout

STEPS = "decoding_steps"
"""Name of the loop over tokens in profiles and compiled programs."""


class Slots(NamedTuple):
    """The facts of each slot that a segment needs, int32 [B] (`row_id` uint32)."""

    token: Int[AnyArray, " B"]  # the last token, not yet in the cache
    position: Int[AnyArray, " B"]  # its position in the row
    tail: Int[AnyArray, " B"]  # prompt tokens in the first C0 places of the slot's tail
    row_id: Int[AnyArray, " B"]  # the id of its row, for its randomness
    drawn: Int[AnyArray, " B"]  # response tokens drawn in earlier segments
    left: Int[AnyArray, " B"]  # response tokens still allowed; 0: the slot is idle


class Pool(NamedTuple):
    """The pages of S shards, of each layer keys [S, Q, K, H, R] and values [S, Q, K, R, H], and who reads which."""

    pages: tuple[LayerCache, ...]
    table: PageTable


class Segment(NamedTuple):
    """The tokens that a segment drew: step t of slot b at [t, b]; zero beyond `count[b]`."""

    tokens: Int[Array, "R B"]
    logp: Float[Array, "R B"]
    count: Int[Array, " B"]
    stopped: Array
    entropy: Float[Array, " B"] | None  # nats, summed over the slot's tokens; None where it was not asked for


def row_keys(key: Array, row_id: AnyArray) -> Array:
    """Make one key per row, fold_in(key, row_id). With key = fold_in(run key, step) samples depend on nothing else."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_id)


def uniforms(key: Array, row_id: AnyArray, drawn: AnyArray, steps: int) -> Float[Array, "R B"]:
    """Draw the numbers in [0, 1) of the next `steps` tokens of each row: that of token t from fold_in(row's key, t)."""

    def of_row(row_key, first):
        t_R = first + jnp.arange(steps, dtype=jnp.int32)
        return jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(row_key, t)))(t_R)

    return jax.vmap(of_row, out_axes=1)(row_keys(key, row_id), drawn)


def decode_segment(
    model: Qwen3,
    view: PyTree,
    tails: tuple[LayerCache, ...],
    pool: Pool | None,
    slots: Slots,
    key: Array,
    sampling_temperature: Float[Array, ""] | None = None,
    *,
    sampling: Sampling,
    steps: int,
    stop_ids: tuple[int, ...],
    attention: SlotAttention = BY_XLA,
    entropy: bool = False,
) -> tuple[Segment, tuple[LayerCache, ...]]:
    """Draw up to `steps` tokens for every slot that is not idle; ends sooner when all rows have.

    Args:
        model, view: the policy (`rollout_view`).
        tails: the slots' own caches, [B, K, H, C] and [B, K, C, H] per layer, C - steps places for the prompt's rest.
        pool: pages of the shared cache, or None where no slot has any.
        slots: the state of each slot.
        key: the key of the step.
        sampling_temperature: in place of that of `sampling`, where it changes from rollout to rollout.
        sampling, steps, stop_ids: what is drawn, how many, what ends a row.
        attention: over tails and pages.
        entropy: measure the exact entropy of softmax(logits) too, whatever the sampling settings.
    """
    stops = jnp.asarray(stop_ids, jnp.int32)
    uniform_RB = uniforms(key, slots.row_id, slots.drawn, steps)
    b, places = slots.token.shape[0], tails[0][0].shape[-1]
    home = places - steps
    pages = (None,) * len(tails) if pool is None else pool.pages
    prepared = None if pool is None else attention.prepare(pool.table, pool.pages[0], places)
    place_C = jnp.arange(places, dtype=jnp.int32)
    in_home_BC = (place_C[None, :] < home) & (place_C[None, :] < slots.tail[:, None])

    def running(carry):
        t, _, count, stopped, *_ = carry
        return (t < steps) & jnp.any((count == t) & ~stopped & (count < slots.left))

    def step(carry):
        t, token, count, stopped, tokens, logp, nats, tails = carry
        mask_BC = in_home_BC | ((place_C >= home) & (place_C <= home + t))[None, :]
        seen = Seen(slots.tail, home + t, mask_BC)

        def attend(q_BTNH, k_BTKH, v_BTKH, cache):
            (keys, values), pages = cache
            k_BKHT = einops.rearrange(k_BTKH, "B T K H -> B K H T")
            keys = jax.lax.dynamic_update_slice(keys, k_BKHT, (0, 0, 0, home + t))
            v_BKTH = einops.rearrange(v_BTKH, "B T K H -> B K T H")
            values = jax.lax.dynamic_update_slice(values, v_BKTH, (0, 0, home + t, 0))
            out_BNH = attention.attend(q_BTNH[:, 0], (keys, values), seen, home, pages, prepared)
            return out_BNH[:, None], (keys, values)

        caches = tuple(zip(tails, pages, strict=True))
        logits_BV, tails = decode(model, view, token, slots.position + t, attend, caches)
        drawn, drawn_logp = draw(logits_BV, uniform_RB[t], sampling, sampling_temperature)
        live = (count == t) & ~stopped & (count < slots.left)
        drawn = jnp.where(live, drawn, 0)
        tokens = jax.lax.dynamic_update_slice(tokens, drawn[None], (t, 0))
        logp = jax.lax.dynamic_update_slice(logp, jnp.where(live, drawn_logp, 0.0)[None], (t, 0))
        if nats is not None:
            nats = nats + jnp.where(live, losses.entropy(logits_BV), 0.0)
        stopped = stopped | (live & jnp.any(drawn[:, None] == stops[None, :], axis=1))
        return t + 1, drawn, count + live.astype(jnp.int32), stopped, tokens, logp, nats, tails

    zero = jnp.zeros((), jnp.int32)
    start = (
        zero,
        slots.token,
        jnp.zeros((b,), jnp.int32),
        jnp.zeros((b,), bool),
        jnp.zeros((steps, b), jnp.int32),
        jnp.zeros((steps, b), jnp.float32),
        jnp.zeros((b,), jnp.float32) if entropy else None,
        tails,
    )
    with jax.named_scope(STEPS):
        _, _, count, stopped, tokens, logp, nats, tails = jax.lax.while_loop(running, step, start)
    return Segment(tokens, logp, count, stopped, nats), tails


def sample(
    model: Qwen3,
    params: PyTree,
    prompts: Prompts,
    key: Array,
    sampling_temperature: Float[Array, ""] | None = None,
    *,
    sampling: Sampling,
    max_response_tokens: int,
    stop_ids: tuple[int, ...],
    group: int = 1,
) -> Rollout:
    """Continue every prompt until a stop token or `max_response_tokens`. Pure; to be called under jit.

    All rows decode side by side in one segment, over a cache of the full length: the sampler of a step that is one
    program. `engine.Engine` samples the same rows with continuous batching and pages.

    Args:
        model, params: the policy.
        prompts: B prompts of at most P tokens, right-padded.
        key: the key of the step; the randomness of a row depends on it and on the row's id alone.
        sampling_temperature: in place of that of `sampling`, where it changes from rollout to rollout.
        sampling: temperature, top-p, top-k.
        max_response_tokens: responses are cut at this length (stop token included).
        stop_ids: a response ends with the first of these.
        group: rows come in groups of this many equal prompts; each is prefilled once.

    Returns:
        A Rollout of width L = P + max_response_tokens.

    Raises:
        ValueError: if `group` does not divide the number of rows.
    """
    b, p = prompts.tokens.shape
    if b % group:
        raise ValueError(f"group {group} does not divide {b} rows")
    length = prompts.length.astype(jnp.int32)
    in_prompt = jnp.arange(p, dtype=jnp.int32)[None, :] < length[:, None]
    tokens = jnp.where(in_prompt, jnp.asarray(prompts.tokens, jnp.int32), 0)
    view = rollout_view(model, params)
    tails = prefill(model, view, tokens[::group, : p - 1]) if p > 1 else empty_tails(model, b // group, 0)

    def widen(cache: Array, axis: int) -> Array:
        pad = [(0, 0)] * 4
        pad[axis] = (0, max_response_tokens)
        return jnp.pad(jnp.repeat(cache, group, axis=0), pad)

    slots = Slots(
        token=jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0],
        position=length - 1,
        tail=length - 1,
        row_id=prompts.row_id,
        drawn=jnp.zeros((b,), jnp.int32),
        left=jnp.full((b,), max_response_tokens, jnp.int32),
    )
    segment, _ = decode_segment(
        model,
        view,
        tuple((widen(k, 3), widen(v, 2)) for k, v in tails),
        None,
        slots,
        key,
        sampling_temperature,
        sampling=sampling,
        steps=max_response_tokens,
        stop_ids=stop_ids,
    )
    # Token j of a row is its prompt's, or response token j - length.
    at_BL = jnp.arange(p + max_response_tokens, dtype=jnp.int32)[None, :] - length[:, None]
    response = (at_BL >= 0) & (at_BL < segment.count[:, None])
    index = jnp.clip(at_BL, 0, max_response_tokens - 1)
    drawn = jnp.take_along_axis(segment.tokens.T, index, axis=1)
    logp = jnp.take_along_axis(segment.logp.T, index, axis=1)
    return Rollout(
        tokens=jnp.where(response, drawn, jnp.pad(tokens, ((0, 0), (0, max_response_tokens)))),
        prompt_length=length,
        length=length + segment.count,
        logp=jnp.where(response, logp, 0.0),
        stopped=segment.stopped,
    )


def empty_tails(model: Qwen3, slots: int, places: int) -> tuple[LayerCache, ...]:
    """Make zeroed tails of the model's shapes."""
    c = model.config
    keys = jnp.zeros((slots, c.num_key_value_heads, c.head_dim, places), model.compute_dtype)
    return ((keys, keys.swapaxes(2, 3)),) * c.num_hidden_layers

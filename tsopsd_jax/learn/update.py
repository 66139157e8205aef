"""One update of the policy: micro-batches, one division, clip, AdamW; and the reheater's whole step as one function."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tsopsd_jax.distributed.sharding import AnyMesh, replicated, tree_shardings
from tsopsd_jax.head import Reference, batch_loss, batch_stats
from tsopsd_jax.head_tiles import TILE_TOKENS
from tsopsd_jax.metric_names import (
    ENTROPY,
    GRAD_NORM,
    HELD,
    LEARNING_RATE,
    LEARNING_RATE_FACTOR,
    LOGP_GAP_MAX,
    LOSS,
    SKIPPED,
)
from tsopsd_jax.model.qwen3 import Qwen3
from tsopsd_jax.objectives import Objective
from tsopsd_jax.types import SAMPLING_TEMPERATURE, Batch, Prompts, PyTree, Rollout, TrainState

MICRO_BATCHES = "micro_batches"
"""Name of the loop over micro-batches in profiles and compiled programs."""


class UpdateOut(NamedTuple):
    """What an update reports: scalars named `group/name_unit`; `finite` is False where the update was skipped;
    `weights` are the counts of those metrics that are means, by which the means of several updates are joined."""

    metrics: dict[str, Float[Array, ""]]
    finite: Array
    weights: dict[str, Float[Array, ""]]


Update = Callable[..., tuple[TrainState, UpdateOut]]


def warm_up(*, learning_rate: float, warmup_steps: int = 0) -> optax.Schedule:
    """The rate of an update by how many went before it: a linear rise to `learning_rate` over `warmup_steps`, then
    constant."""

    def rate(count):
        return learning_rate * jnp.minimum(1.0, (count.astype(jnp.float32) + 1.0) / max(warmup_steps, 1))

    return rate


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    momentum_dtype: DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Make AdamW behind a global-norm clip, at the rate of `warm_up`.

    Weight decay spares the norms' scales and the biases: decaying a scale towards 0 is not decay towards a simpler
    function. `momentum_dtype` is that of the stored first moment. The second stays float32: at beta2 = 0.999 bfloat16
    would round its changes away.
    """
    rate = warm_up(learning_rate=learning_rate, warmup_steps=warmup_steps)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay, mask=decay_mask, mu_dtype=momentum_dtype
        ),
    )


def decay_mask(params: PyTree) -> PyTree:
    """Mark the parameters that weight decay applies to: all but norms and biases."""

    def decays(path, _):
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(decays, params)


def abstract_state(model: Qwen3, optimizer: optax.GradientTransformation, mesh: AnyMesh) -> TrainState:
    """Describe the train state by ShapeDtypeStructs with shardings; the optimizer's moments lie where their parameters
    do."""
    shapes = model.param_shapes()
    shardings = tree_shardings(model.param_axes(), shapes, mesh)
    by_path = {jax.tree_util.keystr(path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings)}

    def struct(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def moment(path, leaf):
        name = jax.tree_util.keystr(path)
        return struct(leaf, next((s for key, s in by_path.items() if name.endswith(key)), replicated(mesh)))

    with jax.numpy_dtype_promotion("standard"):
        moments = jax.eval_shape(optimizer.init, shapes)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(
        step=step,
        params=jax.tree.map(struct, shapes, shardings),
        opt_state=jax.tree_util.tree_map_with_path(moment, moments),
    )


def fresh_optimizer_state(optimizer: optax.GradientTransformation, like: TrainState, params: PyTree) -> PyTree:
    """Make the optimizer's initial state, laid out as in `like` (from `abstract_state`)."""
    layout = jax.tree.map(lambda x: x.sharding, like.opt_state)
    return jax.jit(optimizer.init, out_shardings=layout)(params)


class ReferencePolicy(NamedTuple):
    """A frozen policy that `stats` is shown beside the one that learns: its functions and its parameters (any
    dtype)."""

    model: Qwen3
    params: PyTree

    def of(self, batch: Batch) -> Reference:
        """Its hidden states of a batch. No gradient reaches it."""
        params = jax.lax.stop_gradient(self.params)
        hidden = self.model.hidden(params, batch.tokens, batch.segment)
        return Reference(jax.lax.stop_gradient(hidden), self.model.unembed(params))


def per_token_stats(
    model: Qwen3,
    params: PyTree,
    batch: Batch,
    objective: Objective,
    *,
    reference: ReferencePolicy | None = None,
    tile_tokens: int = TILE_TOKENS,
) -> dict[str, Array]:
    """Compute the objective's statistics of every response token under the learner's own forward pass, {name: [B,
    L]}."""
    return batch_stats(
        objective.stats,
        model.hidden(params, batch.tokens, batch.segment),
        model.unembed(params),
        batch,
        reference=reference and reference.of(batch),
        tile_tokens=tile_tokens,
        mesh=model.mesh,
    )


class MicroBatches(NamedTuple):
    """The micro-batches of a batch: [micro-batch, rows, L], and how many of them hold a response token."""

    rows: Batch
    knobs: dict[str, Array]
    used: Int[Array, ""]

    def take(self, i) -> Batch:
        """Micro-batch i."""
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), self.rows)
        return dataclasses.replace(part, knobs=self.knobs)


def cut_up(batch: Batch, micro_batches: int) -> MicroBatches:
    """Strided rows (number i: rows i, i + micro_batches, ...), so that each micro-batch lies on all devices."""
    rows = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch.bare)
    holds = jnp.any(rows.mask, axis=(1, 2))
    used = jnp.max(jnp.where(holds, jnp.arange(1, micro_batches + 1, dtype=jnp.int32), 0))
    return MicroBatches(rows, batch.knobs, used)


def whole_stats(
    model: Qwen3,
    params: PyTree,
    batch: Batch,
    objective: Objective,
    *,
    reference: ReferencePolicy | None = None,
    micro_batches: int,
    tile_tokens: int,
) -> dict[str, Array]:
    """`per_token_stats` of a whole batch, micro-batch by micro-batch: what `select` sees. No gradient passes
    through."""

    def one(part: Batch):
        return per_token_stats(model, params, part, objective, reference=reference, tile_tokens=tile_tokens)

    params = jax.lax.stop_gradient(params)
    if micro_batches == 1:
        return one(batch)
    parts = cut_up(batch, micro_batches)

    def more(i, found):
        return jax.tree.map(
            lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, i, 0), found, one(parts.take(i))
        )

    like = jax.eval_shape(one, parts.take(0))
    zero = jax.tree.map(lambda s: jnp.zeros((micro_batches, *s.shape), s.dtype), like)
    found = jax.lax.fori_loop(0, parts.used, more, zero)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, x.shape[-1]), found)


def make_gradient(model: Qwen3, objective: Objective, *, micro_batches: int = 1, tile_tokens: int = TILE_TOKENS):
    """Make the function (params, batch, reference=None) -> (gradient, LossOutput, largest |sampler's - learner's
    log-prob|), averaged once.

    gradient = sum over micro-batches of d(total) / sum of count, so that splitting changes nothing but memory.
    Micro-batches are strided rows (number i: rows i, i + micro_batches, ...), each on all devices; those after the last
    one that holds a response token are not computed.
    """

    def total(params, part: Batch, reference: ReferencePolicy | None):
        hidden = model.hidden(params, part.tokens, part.segment)
        found = batch_loss(
            objective.stats,
            objective.loss,
            hidden,
            model.unembed(params),
            part,
            tokenwise=objective.tokenwise,
            reference=reference and reference.of(part),
            tile_tokens=tile_tokens,
            mesh=model.mesh,
        )
        return found.out.loss.total, found

    def gradient(params, batch: Batch, reference: ReferencePolicy | None = None):
        def one(params, part: Batch):
            return jax.grad(total, has_aux=True)(params, part, reference)

        if micro_batches == 1:
            grads, found = one(params, batch)
        else:
            parts = cut_up(batch, micro_batches)

            def more(i, carry):
                grads, found = one(params, parts.take(i))
                return jax.tree.map(jnp.add, carry[0], grads), carry[1] + found

            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, params, parts.take(0)))
            with jax.named_scope(MICRO_BATCHES):
                grads, found = jax.lax.fori_loop(0, parts.used, more, zero)
        count = jnp.maximum(found.out.loss.count, 1.0)
        return jax.tree.map(lambda g: g / count.astype(g.dtype), grads), found.out, found.gap

    return gradient


def make_update(
    model: Qwen3,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    tile_tokens: int = TILE_TOKENS,
    learning_rate: optax.Schedule | None = None,
    reference_model: Qwen3 | None = None,
    sampler_selects: bool = False,
) -> Update:
    """Make update(state, batch, hold_above_nats=inf, knobs={}, reference=None) -> (state, UpdateOut): pure, to be
    jitted with a donated state.

    The objective's `select` sees the whole batch first. `knobs` are the numbers that its `control` turned. `reference`
    are the parameters of `reference_model`.

    A knob `learning_rate_factor` multiplies AdamW's step, decay included, which is proportional to its rate.

    A gradient that is not finite leaves parameters and optimizer as they were and advances only the step; so does a
    policy whose mean token entropy has reached `hold_above_nats`. A stop rule on entropy then keeps the policy that it
    measured, not one that is an update further.

    Args:
        micro_batches: number of equal strided parts of the batch's rows, whose gradients are added.
        tile_tokens: tokens whose logits exist at once, on each device.
        learning_rate: the optimizer's own, to be reported by the update.
        reference_model: the functions of the frozen reference; None: those of `model`.
        sampler_selects: `select` is given the sampler's `logp` in place of a forward pass. Right for an objective whose
            `select_reads` is `logp` alone, if the policy of the update drew the rows at its policy temperature.
    """
    gradient = make_gradient(model, objective, micro_batches=micro_batches, tile_tokens=tile_tokens)
    cut = {"micro_batches": micro_batches, "tile_tokens": tile_tokens}

    def update(
        state: TrainState,
        batch: Batch,
        hold_above_nats: Array | float = float("inf"),
        knobs: Mapping[str, Array] | None = None,
        reference: PyTree | None = None,
    ) -> tuple[TrainState, UpdateOut]:
        knobs = dict(knobs or {})
        factor = knobs.pop(LEARNING_RATE_FACTOR, None)
        batch = dataclasses.replace(batch, knobs=knobs)
        if objective.reference and reference is None:
            raise ValueError(
                "the objective compares with a reference: expected its parameters, got none; pass reference="
            )
        frozen = None if reference is None else ReferencePolicy(reference_model or model, reference)
        if objective.select is not None:
            if sampler_selects:
                found = {"logp": batch.old_logp}
            else:
                found = whole_stats(model, state.params, batch, objective, reference=frozen, **cut)
            batch = objective.select(objective.read(found), batch)
        if batch.tokens.shape[0] % micro_batches:
            raise ValueError(f"{batch.tokens.shape[0]} rows do not split into {micro_batches} micro-batches")
        grads, out, gap = gradient(state.params, batch, frozen)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(out.loss.total)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on implicit promotion
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        if factor is not None:
            updates = jax.tree.map(lambda change: factor * change, updates)
        params = optax.apply_updates(state.params, updates)
        held = jnp.zeros((), bool)
        if ENTROPY in out.metrics:
            held = out.metrics[ENTROPY].value >= hold_above_nats
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite & ~held, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = {name: mean.value for name, mean in out.metrics.items()}
        metrics |= {
            LOSS: out.loss.value,
            GRAD_NORM: norm,
            SKIPPED: 1.0 - finite.astype(jnp.float32),
            HELD: held.astype(jnp.float32),
            LOGP_GAP_MAX: gap,
            "loss/tokens": out.loss.count,
        }
        if learning_rate is not None:
            (_, count), *_ = optax.tree.get_all_with_path(state.opt_state, "count")
            metrics[LEARNING_RATE] = learning_rate(count) * (1.0 if factor is None else factor)
        weights = {name: mean.count for name, mean in out.metrics.items()} | {LOSS: out.loss.count}
        return TrainState(state.step + 1, params, opt_state), UpdateOut(metrics, finite, weights)

    return update


def distillation_batch(rollout: Rollout) -> Batch:
    """Make the batch of an objective without advantages: the responses, with advantage 0."""
    return Batch.of(
        tokens=rollout.tokens,
        mask=rollout.mask,
        advantage=jnp.zeros_like(rollout.logp),
        old_logp=rollout.logp,
    )


def make_reheat_step(
    sample: Callable[..., Rollout],
    update: Update,
    arrange: Callable[[Batch, Array], Batch] | None = None,
) -> Callable[..., tuple[TrainState, UpdateOut, Rollout]]:
    """Make the reheater's whole step one function of (state, prompts, run key, hold_above_nats, knobs, reference), to
    be jitted with a donated state: sample on-policy, self-teacher, full-vocabulary KL, update. No host round trip.

    Args:
        sample: (params, prompts, key) -> Rollout; where there is the knob `sampling_temperature`, it is a fourth
            argument.
        update: from `make_update`.
        arrange: (batch of one sequence a row, their lengths [B]) -> the batch that is learnt from, such as
            `packing.pack_in_program` makes; None: as it is.
    """

    def reheat_step(
        state: TrainState,
        prompts: Prompts,
        run_key: Array,
        hold_above_nats: Array | float,
        knobs: Mapping[str, Array] | None = None,
        reference: PyTree | None = None,
    ):
        key, temperature = jax.random.fold_in(run_key, state.step), (knobs or {}).get(SAMPLING_TEMPERATURE)
        given = () if temperature is None else (temperature,)
        rollout = sample(state.params, prompts, key, *given)
        batch = distillation_batch(rollout)
        if arrange is not None:
            batch = arrange(batch, jnp.asarray(rollout.length))
        state, out = update(state, batch, hold_above_nats, knobs, reference)
        return state, out, rollout

    return reheat_step

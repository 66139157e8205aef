"""The distribution that is sampled: temperature, then top-k, then top-p; and one exact draw from it per row.

Logits are centred before they are divided by the temperature: the likeliest token's weight is then exactly 1, however
a compiler rounds the division and however often it computes it. (Divided first, x / T and the maximum of x / T may be
rounded apart, for all but powers of two.)

The vocabulary is never sorted and needs no noise of its own. A draw inverts the cumulative distribution at one uniform
number a row, in two levels: sums of blocks first, then inside one block. Top-k and the nucleus are cut at a weight
found by bisection over float32 bit patterns: each pass counts or adds what stands above a candidate.
"""

import dataclasses
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tsopsd_jax import losses

SMALLEST_TEMPERATURE = 1e-6
"""Sampling is exact from here on; below there is greedy decoding, 0, only."""

EDT_BASE = 0.8
"""N of EDT, as in the paper."""


def checked_temperature(sampling_temperature: float) -> float:
    """Return a temperature that a control chose for a rollout.

    Raises:
        ValueError: if it is not a number of at least `SMALLEST_TEMPERATURE`.
    """
    if not SMALLEST_TEMPERATURE <= sampling_temperature < float("inf"):
        raise ValueError(
            f"the knob sampling_temperature must be a number of at least {SMALLEST_TEMPERATURE:g}, got "
            f"{sampling_temperature}; "
            "the objective's control turned it"
        )
    return sampling_temperature


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    `sampling_temperature` 1, `top_p` 1, `top_k` 0 (off) is the policy itself; `sampling_temperature` 0 is greedy
    decoding. `edt_theta` (None: off; nats) makes the temperature of each token follow the entropy H of the policy
    there: sampling_temperature x 0.8^(edt_theta / H), so that confident tokens are sampled colder (EDT, arXiv
    2403.14541; it is at least `SMALLEST_TEMPERATURE` here, at which H = 0 stands).

    Raises:
        ValueError: for a temperature that is neither 0 nor at least `SMALLEST_TEMPERATURE`, for a top-p or top-k that
            cuts off everything, and for an `edt_theta` that is not positive or meets greedy decoding.
    """

    sampling_temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    edt_theta: float | None = None

    def __post_init__(self):
        temperature = self.sampling_temperature
        if temperature != 0 and not SMALLEST_TEMPERATURE <= temperature < float("inf"):
            raise ValueError(
                f"sampling_temperature must be 0 (greedy decoding) or a number of at least {SMALLEST_TEMPERATURE:g}, "
                f"got {temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if self.edt_theta is not None and not 0 < self.edt_theta < float("inf"):
            raise ValueError(f"edt_theta must be null (off) or a positive number of nats, got {self.edt_theta}")
        if self.edt_theta is not None and temperature == 0:
            raise ValueError(
                f"edt_theta {self.edt_theta:g} scales the sampling_temperature; expected a positive one, got 0 (greedy "
                "decoding)"
            )

    def facts(self) -> dict[str, float]:
        """Its settings by name, those that are off (None) left out: what a record says of it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class Cut(NamedTuple):
    """The tokens of each row that are kept: all of weight above `weight`, and of those equal to it the first `ties`."""

    weight: Float[Array, " B"]
    ties: Int[Array, " B"]


def draw(
    logits: Float[Array, "B V"],
    uniform: Float[Array, " B"],
    sampling: Sampling,
    sampling_temperature: Float[Array, ""] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token per row; returns it and its log-probability (nats) under the distribution sampled.

    The token is the first whose cumulative weight exceeds uniform x total, so tokens of weight zero are never drawn. At
    temperature 0 it is the likeliest (of equal ones the first), whose log-probability is then 0.

    Args:
        logits: float32.
        uniform: in [0, 1), one a row.
        sampling: divides the logits by the temperature, keeps the `top_k` likeliest, then of these the nucleus: the
            shortest prefix in order of falling probability (equal ones in order of index) whose mass reaches `top_p`.
        sampling_temperature: takes the place of the settings', where it changes from one rollout to the next; at least
            `SMALLEST_TEMPERATURE`.
    """
    vocab = logits.shape[-1]
    if sampling_temperature is None and sampling.sampling_temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[:1], jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    temperature = _temperature(logits, sampling, sampling_temperature)

    def scaled(z: Array) -> Array:
        centred = z - top
        return centred if not isinstance(temperature, Array) and temperature == 1 else centred / temperature

    weight = jnp.exp(scaled(logits))
    cut = _cut(weight, sampling) if sampling.top_p < 1.0 or 0 < sampling.top_k < vocab else None
    blocks = _blocks(vocab)
    width = vocab // blocks
    weight_BNW = einops.rearrange(weight, "B (N W) -> B N W", N=blocks)
    if cut is None:
        mass_BN = jnp.sum(weight_BNW, axis=-1)
        ties_BN = None
    else:
        edge = cut.weight[:, None, None]
        equal_BN = jnp.sum(weight_BNW == edge, axis=-1, dtype=jnp.int32)
        before = jnp.cumsum(equal_BN, axis=-1) - equal_BN
        ties_BN = jnp.clip(cut.ties[:, None] - before, 0, equal_BN)
        above = jnp.sum(jnp.where(weight_BNW > edge, weight_BNW, 0.0), axis=-1)
        mass_BN = above + ties_BN.astype(jnp.float32) * edge[:, 0]
    running_BN = jnp.cumsum(mass_BN, axis=-1)
    total = running_BN[:, -1]
    goal = uniform * total
    block = _first_above(running_BN, mass_BN, goal)
    inside_BW = jnp.take_along_axis(weight_BNW, block[:, None, None], axis=1)[:, 0]
    if cut is not None and ties_BN is not None:
        equal_BW = inside_BW == cut.weight[:, None]
        rank = jnp.cumsum(equal_BW, axis=-1, dtype=jnp.int32)
        kept_BW = (inside_BW > cut.weight[:, None]) | (equal_BW & (rank <= _pick(ties_BN, block)[:, None]))
        inside_BW = jnp.where(kept_BW, inside_BW, 0.0)
    passed = _pick(running_BN - mass_BN, block)
    at = _first_above(passed[:, None] + jnp.cumsum(inside_BW, axis=-1), inside_BW, goal)
    token = block * width + at
    return token, scaled(_pick(logits, token)[:, None])[:, 0] - jnp.log(total)


def _temperature(logits: Float[Array, "B V"], sampling: Sampling, given: Array | None) -> float | Array:
    """Choose what divides the logits: a number, a scalar, or with EDT one of each row, [B, 1]."""
    base = sampling.sampling_temperature if given is None else given
    if sampling.edt_theta is None:
        return base
    nats = jnp.maximum(losses.entropy(logits)[:, None], jnp.finfo(jnp.float32).tiny)  # the sum of none is -0
    return jnp.maximum(base * EDT_BASE ** (sampling.edt_theta / nats), SMALLEST_TEMPERATURE)


def _blocks(vocab: int) -> int:
    """Choose the number of blocks: a power of two near the square root that divides the vocabulary; 128 for 151,936."""
    blocks = 1
    while 4 * blocks * blocks <= vocab and vocab % (2 * blocks) == 0:
        blocks *= 2
    return blocks


def _pick(values_BN: Array, at_B: Array) -> Array:
    return jnp.take_along_axis(values_BN, at_B[:, None], axis=-1)[:, 0]


def _first_above(running_BN: Array, mass_BN: Array, goal_B: Array) -> Array:
    """Find the first index whose running sum exceeds the goal; rounding can leave none, then the last with any mass."""
    at = jnp.sum(running_BN <= goal_B[:, None], axis=-1, dtype=jnp.int32)
    index_N = jnp.arange(mass_BN.shape[-1], dtype=jnp.int32)
    return jnp.minimum(at, jnp.max(jnp.where(mass_BN > 0, index_N[None, :], 0), axis=-1))


def _cut(weight: Float[Array, "B V"], sampling: Sampling) -> Cut:
    """Find where top-k and then top-p cut the weights (not negative; the largest of each row is 1)."""
    vocab = weight.shape[-1]
    cut = Cut(jnp.zeros(weight.shape[:1]), jnp.full(weight.shape[:1], vocab, jnp.int32))
    total = jnp.sum(weight, axis=-1)
    if 0 < sampling.top_k < vocab:
        goal = jnp.full(weight.shape[:1], float(sampling.top_k))
        edge = _boundary(weight, goal, lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.float32))
        above = jnp.sum(weight > edge[:, None], axis=-1, dtype=jnp.int32)
        cut = Cut(edge, sampling.top_k - above)
        mass = jnp.sum(jnp.where(weight > edge[:, None], weight, 0.0), axis=-1)
        total = mass + cut.ties.astype(jnp.float32) * edge
    if sampling.top_p < 1.0:
        goal = sampling.top_p * total
        edge = _boundary(weight, goal, lambda kept: jnp.sum(jnp.where(kept, weight, 0.0), axis=-1))
        # Top-k's own cut stands where the nucleus would reach below it, and where it has fewer ties to give.
        edge = jnp.maximum(edge, cut.weight)
        missing = goal - jnp.sum(jnp.where(weight > edge[:, None], weight, 0.0), axis=-1)
        equal = jnp.sum(weight == edge[:, None], axis=-1, dtype=jnp.int32)
        most = jnp.where(edge == cut.weight, jnp.minimum(cut.ties, equal), equal)
        wanted = jnp.ceil(missing / jnp.maximum(edge, jnp.finfo(jnp.float32).tiny))
        cut = Cut(edge, jnp.clip(jnp.minimum(wanted, float(vocab)).astype(jnp.int32), 1, jnp.maximum(most, 1)))
    return cut


def _boundary(weight: Float[Array, "B V"], goal: Float[Array, " B"], measure) -> Float[Array, " B"]:
    """Find the largest weight w of each row with measure(weights >= w) >= goal.

    Floats that are not negative order as their bit patterns do, so 30 halvings find the weight exactly; the search
    ends sooner where a single token is left between the bounds in every row, for a language model after about ten.
    """
    bits = jax.lax.bitcast_convert_type(weight, jnp.int32)
    one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)

    def open_(state):
        low, high, left = state
        return jnp.any((high - low > 1) & (left > 1))

    def halve(state):
        low, high, _ = state
        middle = low + (high - low) // 2
        enough = measure(bits >= middle[:, None]) >= goal
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle)
        left = jnp.sum((bits >= low[:, None]) & (bits < high[:, None]), axis=-1, dtype=jnp.int32)
        return low, high, left

    start = jnp.zeros(weight.shape[:1], jnp.int32)
    state = (start, jnp.broadcast_to(one + 1, start.shape), jnp.full(start.shape, weight.shape[-1], jnp.int32))
    _, high, _ = jax.lax.while_loop(open_, halve, state)
    return jnp.max(jnp.where(bits < high[:, None], weight, 0.0), axis=-1)

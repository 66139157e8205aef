"""A number that is turned between updates. `objective: {name: examples/held_entropy.py:held_entropy}`"""

from tsopsd_jax import losses
from tsopsd_jax.objectives import Control, Objective, policy_stats
from tsopsd_jax.types import LossOutput, Mean


def held_entropy(*, target_nats: float = 0.3, step: float = 0.002) -> Objective:
    """The surrogate - coefficient x H(p), token-mean; the coefficient follows the entropy towards `target_nats`."""

    def loss(stats, batch):
        surrogate = losses.clipped_surrogate(stats["logp"], batch.old_logp, batch.advantage)
        per_token = surrogate - batch.knobs["coefficient"] * stats["entropy"]  # a traced scalar: nothing compiles anew
        metrics = {"policy/entropy_nats": Mean.of(stats["entropy"], batch.mask)}
        return LossOutput(Mean.of(per_token, batch.mask), metrics)

    def turn(knobs, metrics):  # after each update, on the host, with the metrics of the loss
        change = step if metrics["policy/entropy_nats"] < target_nats else -step
        return {"coefficient": max(knobs["coefficient"] + change, 0.0)}

    return Objective(policy_stats(), loss, tokenwise=True, control=Control({"coefficient": 0.0}, turn))

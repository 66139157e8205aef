"""What a phase optimises: an `Objective` is a pair of pure functions that declares its needs itself.

To write your own, return an `Objective` from a function of keyword-only hyperparameters and name it in the YAML as
`path/to/file.py:function`; it runs sharded, tiled and micro-batched like the library's. `testing.check_objective` holds
it to what is said here.
"""

from typing import NamedTuple

from tsopsd_jax.head import Loss, Stats


class Objective(NamedTuple):
    """A loss as two pure functions, and what it needs.

    stats: (logits [..., V], tokens [...]) -> {name: [...]}, the only code that sees the vocabulary.
    loss: ({name: [B, L]}, Batch) -> LossOutput, sees whole sequences and no vocabulary.

    tokenwise: the loss of a token follows from the statistics and the batch at that token alone. Then it may be asked
        about any tokens in any arrangement, [1, n] at a time: the head forms gradients in one pass, and rows are packed.
    uses_advantage: the loss reads `batch.advantage`, so its phase needs a reward.
    policy_temperature: of the policy in its ratio, which must be the sampling temperature; None: right at any.

    A statistic called `logp` (log-probability of the token) lets the learner measure the sampler against itself.
    """

    stats: Stats
    loss: Loss
    tokenwise: bool = False
    uses_advantage: bool = True
    policy_temperature: float | None = 1.0

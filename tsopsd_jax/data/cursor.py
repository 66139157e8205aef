"""Order of the problems: shuffled, and resumed from one integer."""

import numpy as np
from jaxtyping import Int


def indices(n: int, *, seed: int, position: int, count: int) -> Int[np.ndarray, " count"]:
    """List the indices into `n` problems at positions `position .. position + count - 1` of an endless shuffled order.

    index(p) = permutation(seed, epoch = p // n)[p % n]: every epoch visits every problem once, in its own
    order. The position is all the state there is, so a checkpoint stores one integer.

    Raises:
        ValueError: if `n` < 1, or `seed`, `position` or `count` is negative.
    """
    if n < 1:
        raise ValueError(f"indices expects at least one problem, got n={n}: the data set is empty")
    if seed < 0 or position < 0 or count < 0:
        raise ValueError(
            f"indices expects seed, position, count >= 0, got seed={seed}, position={position}, count={count}"
        )
    pieces = [np.empty(0, dtype=np.int64)]
    end = position + count
    while position < end:
        epoch, start = divmod(position, n)
        stop = min(n, start + end - position)
        pieces.append(_permutation(n, seed, epoch)[start:stop])
        position += stop - start
    return np.concatenate(pieces)


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)

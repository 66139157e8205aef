"""The figure of docs/small_scale.md: entropy of the rollouts and accuracy on unseen problems, along the tokens that
were sampled since the collapse."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

from small.results import COLLAPSE, COLLAPSED, Key, Results, accuracy

mpl.use("Agg")
from matplotlib import pyplot as plt

GRID = 60
STYLES = ("-", "--", "-.", ":")


def entropy_course(results: Results, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Average an arm's rollout entropy over its seeds: (millions of tokens since the collapse, nats); None: no run."""
    curves = []
    for (seed, name), course in results.courses.items():
        collapse = results.courses.get((seed, COLLAPSE))
        if name != arm or collapse is None:
            continue
        since = np.asarray(course["tokens"]) - collapse["tokens"][-1]
        curves.append((since / 1e6, np.asarray(course["entropy_nats"])))
    if not curves:
        return None
    grid = np.linspace(0, min(since[-1] for since, _ in curves), GRID)
    return grid, np.mean([np.interp(grid, *curve) for curve in curves], axis=0)


def from_the_start(results: Results, arm: str) -> bool:
    """Return whether an arm is a run of its own: its first phase is not the collapse's."""
    first = {
        key: [(phase["phase"], phase["tokens"]) for phase in of["phases"][:1]] for key, of in results.courses.items()
    }
    return any(name == arm and phases != first.get((seed, COLLAPSE)) for (seed, name), phases in first.items())


def accuracy_course(results: Results, arm: str) -> tuple[list[float], list[float]]:
    """Average an arm's accuracy at the paper's sampling over the seeds of each of its points: (millions of tokens since
    the collapse, percent), beginning with the collapsed policy where the arm went on from it."""
    found = {} if from_the_start(results, arm) else {0.0: 100 * results.mean(COLLAPSE, COLLAPSED, accuracy())}
    for point in {key.point for key in results.policies if key.arm == arm}:
        seeds = results.seeds((arm, point), (COLLAPSE, COLLAPSED))
        if seeds:
            tokens = np.mean([results.policies[Key(seed, arm, point)]["tokens"] for seed in seeds])
            found[float(tokens) / 1e6] = 100 * float(results.scores(arm, point, accuracy(), seeds).mean())
    return [*sorted(found)], [found[at] for at in sorted(found)]


def drawable(results: Results) -> list[str]:
    """Return the arms that there is a curve of; none without a collapsed policy."""
    if not results.seeds((COLLAPSE, COLLAPSED)):
        return []
    return [arm for arm in results.arms() if entropy_course(results, arm) is not None]


def draw(results: Results, file: Path) -> None:
    """Draw the figure of the arms that are `drawable`, as a PNG."""
    arms = drawable(results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for at, arm in enumerate(arms):
        colour, style = f"C{at % 10}", STYLES[at // 10 % len(STYLES)]
        entropy = entropy_course(results, arm)
        assert entropy is not None
        left.plot(*entropy, style, color=colour, label=arm)
        right.plot(*accuracy_course(results, arm), style, color=colour, marker="o", markersize=3, label=arm)
    left.set(xlabel="tokens since the collapse, millions", ylabel="entropy of rollouts, nats")
    right.set(xlabel="tokens since the collapse, millions", ylabel="avg@8 on unseen problems, top-p 0.7, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)

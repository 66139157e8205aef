"""What an objective declares that it needs of its phase."""

from tsopsd_jax.config.schema import PhaseSettings
from tsopsd_jax.objectives import Objective
from tsopsd_jax.rollout import Sampling
from tsopsd_jax.types import SAMPLING_TEMPERATURE


def check_needs(phase: PhaseSettings, objective: Objective) -> None:
    """Check that a phase gives its objective what it needs.

    Raises:
        ValueError: naming the setting, what was expected and what it is.
    """
    name, t = phase.objective.name, objective.policy_temperature
    if objective.uses_advantage and phase.reward is None:
        raise ValueError(
            f"reward: objective {name!r} uses advantages and so needs rewards; add a reward section ({{}} for the "
            "defaults), or let an objective that uses none declare uses_advantage=False"
        )
    _check_turned_temperature(phase, objective)
    if t is not None and phase.sampling != Sampling(sampling_temperature=t):
        raise ValueError(
            f"sampling: objective {name!r} compares the policy at temperature {t:g} with the policy that sampled; "
            f"expected sampling_temperature {t:g}, top_p 1, top_k 0, got {phase.sampling}; an objective that is right "
            "at any declares policy_temperature=None"
        )
    if objective.reference and phase.reference == "none":
        raise ValueError(
            f"reference: objective {name!r} compares the policy with a frozen reference; expected reference: start, or "
            "a model directory, got none"
        )
    if phase.reference != "none" and not (objective.reference or phase.measure_start_kl):
        raise ValueError(
            f"reference: objective {name!r} compares the policy with no reference; expected reference: none, got "
            f"{phase.reference}; leave it out, or ask for measure_start_kl"
        )


def _check_turned_temperature(phase: PhaseSettings, objective: Objective) -> None:
    """A control that turns the sampling temperature begins at the phase's, and every row is drawn at the step's."""
    first = {} if objective.control is None else objective.control.init
    asked, name = phase.sampling.sampling_temperature, phase.objective.name
    if first.get(SAMPLING_TEMPERATURE, asked) != asked:
        raise ValueError(
            f"sampling: objective {name!r} turns the sampling temperature; expected sampling_temperature "
            f"{first[SAMPLING_TEMPERATURE]:g}, its first, got {asked:g}; change one of the two"
        )
    if SAMPLING_TEMPERATURE in first and phase.reward is not None and phase.reward.surplus == "keep":
        raise ValueError(
            f"reward.surplus: objective {name!r} turns the sampling temperature, and groups that are kept were drawn "
            "at the one before; expected drop, got keep"
        )

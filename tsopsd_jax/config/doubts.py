"""Settings that can be meant, and rarely are: sentences for a person to look at."""

from tsopsd_jax.config.schema import Config

LARGE_LEARNING_RATE = 0.01
"""From here on AdamW moves every weight by a hundredth a step: language models do not survive it."""


def doubts(config: Config) -> list[str]:
    """List the settings that can be meant, and rarely are, for a person to look at."""
    found = []
    collapsed = None
    for phase in config.phases:
        rate, stop, guard = phase.optimizer.learning_rate, phase.stop, phase.guard
        if rate >= LARGE_LEARNING_RATE and guard.runaway_entropy_nats is None:
            found.append(
                f"phase {phase.name!r}: optimizer.learning_rate {rate:g} is large for AdamW and nothing stops the run "
                "when its entropy runs away; lower it, or set guard.runaway_entropy_nats"
            )
        start, runaway, recovered = (
            guard.max_start_entropy_nats,
            guard.runaway_entropy_nats,
            stop.recovered_above_nats,
        )
        if recovered is not None and runaway is not None and runaway <= recovered:
            found.append(
                f"phase {phase.name!r}: guard.runaway_entropy_nats {runaway:g} stops the run before it can recover to "
                f"stop.recovered_above_nats {recovered:g}"
            )
        if collapsed is not None and start is not None and start < collapsed:
            found.append(
                f"phase {phase.name!r}: guard.max_start_entropy_nats {start:g} may refuse the policy that the phase "
                f"before leaves at up to stop.collapsed_below_nats {collapsed:g}"
            )
        collapsed = stop.collapsed_below_nats
    return found


def repetitions(config: Config, problems: int) -> list[str]:
    """List the phases that draw more prompts in a step than there are problems."""
    found = []
    for phase in config.phases:
        batches = max(1, phase.reward.max_generation_batches if phase.reward is not None else 1)
        if phase.prompts_per_step * batches > problems:
            most = f" in up to {batches} batches" if batches > 1 else ""
            found.append(
                f"phase {phase.name!r}: a step draws {phase.prompts_per_step * batches:,} prompts{most} from "
                f"{problems:,} problems: some come more than once; lower prompts_per_step"
            )
    return found

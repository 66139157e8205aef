"""The configuration: one frozen dataclass per concern, defaults only here, each with its unit and source.

Sources: [P] the TS-OPSD paper (arXiv 2606.00755), appendix A; [D] DAPO (arXiv 2503.14476); [V] verl's DAPO recipe,
which the paper builds on. This is the only place where a configuration is taken apart: `make_*` turn it into the
arguments that the layers below take.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from tsopsd_jax.data import CHATS, SOURCES, check_template
from tsopsd_jax.judge.groups import RewardRule
from tsopsd_jax.model.qwen3 import REMAT
from tsopsd_jax.rewards import check_setting
from tsopsd_jax.rollout import Sampling
from tsopsd_jax.rundir.trackers import Tracker
from tsopsd_jax.train.cycle import ONCE, Cycle
from tsopsd_jax.train.phase import START, Guard
from tsopsd_jax.train.samples import Samples
from tsopsd_jax.train.stopping import StopRule

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _known(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model: `path` is a Hugging Face directory, or `countdown-tiny`."""

    path: str
    random_init: bool = False
    """Start from random weights of the directory's config.json (trials and tests); needs no weight files."""
    compute_dtype: str = "float32"
    """float32 or bfloat16 [P: bfloat16]; master weights are float32 always."""
    remat: str = "none"
    """Recomputed in a layer's backward pass: none (elementwise functions alone), dots (all but products with weights),
    full (all but the layer's input)."""

    def __post_init__(self):
        _known("compute_dtype", self.compute_dtype, DTYPES)
        _known("remat", self.remat, REMAT)


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Devices per mesh axis; one may be -1: all that are left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    cpu_devices: int | None = None
    """Devices into which a process divides its CPU cores; null: as JAX has it."""

    def __post_init__(self):
        if self.cpu_devices is not None and self.cpu_devices < 1:
            raise ValueError(f"cpu_devices must be at least 1, got {self.cpu_devices}")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Problems: their source, what is put around them, and how responses are scored."""

    name: str
    verifier: str | dict[str, str]
    """A verifier or `path/to/file.py:function`, or several of them by name."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights of rewards by name in their sum; of others 1."""
    accuracy: str | None = None
    """Name of the reward that dynamic sampling and evaluations look at; null: the first."""
    split: str | None = None
    path: str | None = None
    """A published file or a folder with it; null: the prepared data set of that name."""
    problem_field: str = "problem"
    answer_field: str = "answer"
    """Names in the rows of a jsonl file."""
    template: str | None = None
    """Text around a problem: a name, a text with `{problem}`, or `path/to/file.py:function`; null: the source's own."""
    chat: str = "none"
    """none, or the model's chat turn around that: direct or thinking."""
    system_prompt: str | None = None
    """The system's message, in a chat, where a row has none of its own; null: none."""
    exclude: tuple[str, ...] = ()
    """Leave out problems that equal one of these evaluation sets."""
    drop_longer: bool = False
    """Leave out prompts over max_prompt_tokens."""
    first: int | None = None
    """Use the first N problems only, of those that are not left out."""
    sample: int | None = None
    """Use N problems drawn by the run's seed [P, figure 13: 2048]."""
    max_prompt_tokens: int = 2048
    """Limit of a prompt; longer ones are an error [V: 2048]."""

    def __post_init__(self):
        _known("name", self.name, SOURCES)
        check_setting(self.verifier, self.reward_weights, self.accuracy)
        for name, weight in self.reward_weights.items():
            if not isinstance(weight, float | int) or isinstance(weight, bool) or not math.isfinite(weight):
                raise ValueError(f"reward_weights.{name}: expected a finite number, got {weight!r}")
        if self.template is not None:
            check_template(self.template)
        _known("chat", self.chat, CHATS)
        if self.system_prompt is not None and (self.chat == "none" or not self.system_prompt.strip()):
            raise ValueError("system_prompt: expected a text, and chat direct or thinking; leave it out, or set both")
        if self.first is not None and self.sample is not None:
            raise ValueError(f"expected first or sample, got both ({self.first}, {self.sample})")
        if self.sample is not None and self.sample < 1:
            raise ValueError(f"sample must be at least 1, got {self.sample}")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Evaluation before the first phase and after each, and within phases; `data` None: none."""

    data: DataSettings | None = None
    samples: int = 8
    """Responses per problem [P: 8]."""
    sampling: Sampling = field(default_factory=lambda: Sampling(sampling_temperature=1.0, top_p=0.7))
    """[P: temperature 1.0, top-p 0.7, top-k off]"""
    max_response_tokens: int = 8192
    """[P: 8192]"""
    rows_at_once: int = 512
    """Slots: responses decoded side by side."""
    every_steps: int | None = None
    """Evaluate within phases too, at steps that it divides; each is saved first."""

    def __post_init__(self):
        for name in ("samples", "max_response_tokens", "rows_at_once", "every_steps"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")
        if self.every_steps is not None and self.data is None:
            raise ValueError("every_steps: expected evaluation.data too, got none; set it, or leave every_steps out")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Hyperparameters of AdamW, as `learn.update.make_optimizer` takes them."""

    learning_rate: float
    """[P: 2e-6 RL, 1e-6 OPSD]"""
    warmup_steps: int = 0
    """Updates over which the rate rises [P: 10 in RL; constant in OPSD]"""
    weight_decay: float = 0.0
    """[P: 0.1 in RL]"""
    clip_norm: float = 1.0
    """[P: 1.0]"""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum_dtype: str = "float32"
    """Dtype of the stored first moment; bfloat16 saves 2 bytes per parameter."""

    def __post_init__(self):
        _known("momentum_dtype", self.momentum_dtype, DTYPES)
        for name in ("learning_rate", "clip_norm", "epsilon"):
            if vars(self)[name] <= 0:
                raise ValueError(f"{name} must be positive, got {vars(self)[name]}")
        if self.warmup_steps < 0 or self.weight_decay < 0 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"expected warmup_steps and weight_decay >= 0, betas in [0, 1), got {self}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """An entry of OBJECTIVES or `path/to/file.py:function`, and its hyperparameters."""

    name: str
    hyperparameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RateControlSettings:
    """A learning rate that is found while the phase runs: the one at which the entropy changes as wanted."""

    entropy_gain_nats_per_step: float
    """Wanted gain of the mean token entropy a step; negative: a loss."""
    min_learning_rate: float
    max_learning_rate: float

    def __post_init__(self):
        if not 0 < self.min_learning_rate <= self.max_learning_rate or self.entropy_gain_nats_per_step == 0:
            raise ValueError(
                "expected 0 < min_learning_rate <= max_learning_rate, and a gain other than 0, got "
                f"{self.min_learning_rate}, {self.max_learning_rate}, {self.entropy_gain_nats_per_step}"
            )


@dataclass(frozen=True, kw_only=True)
class CycleSettings:
    """Phases that follow each other again and again: reheat whenever collapsed, as often as allowed."""

    phases: tuple[str, ...]
    """Names, in the order of the schedule, without a gap."""
    times: int
    """Rounds at most."""

    def __post_init__(self):
        if not self.phases or self.times < 1:
            raise ValueError(f"expected the names of phases and times >= 1, got {list(self.phases)}, {self.times}")


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """One stretch of the schedule."""

    name: str
    objective: ObjectiveSettings
    optimizer: OptimizerSettings
    stop: StopRule
    prompts_per_step: int
    """[P: 64 RL; 1024 sequences OPSD]"""
    responses_per_prompt: int
    """[P: 8 RL]"""
    max_response_tokens: int
    """[P: 8192 RL, 4096 OPSD]"""
    updates_per_rollout: int = 1
    """Updates of each pass over a step's rollout, each of a mini-batch of whole groups [P: 1; D: 16]"""
    passes_per_rollout: int = 1
    """Passes over a step's rollout, each in an order of its own."""
    outcome: str | None = None
    """Label of the policy after the phase, in evaluations."""
    sampling: Sampling = field(default_factory=Sampling)
    """[P: temperature 1.0, top-p 1.0]"""
    reward: RewardRule | None = None
    """Rule of the rewards; None: the objective uses no advantages, and its step is one jitted function."""
    optimizer_state: str = "reset"
    """reset or keep, at the phase's start"""
    rows_at_once: int | None = None
    """Slots: responses decoded side by side; one that ends makes room for the next. null: all of the step's."""
    micro_batches: int | None = None
    """Micro-batches of each update; changes memory, not the result. null: what the devices' memory asks for, none with
    more than 16,384 tokens a device (2,048 on a CPU)."""
    chunk_tokens: int | None = None
    """Tokens whose logits exist at once, on each device. null: what suits the device (`hardware.tiles`), 1,024 on a
    CPU."""
    pack: bool = True
    """Several responses in one row of an update of several micro-batches, where the objective is tokenwise."""
    learning_rate_control: RateControlSettings | None = None
    """Turn the learning rate towards a wanted gain of entropy, beginning with the optimizer's; None: it is the
    optimizer's."""
    measure_start_kl: bool = False
    """Measure the exact KL to the phase's start policy at every step; its reference is then `start`."""
    reference: str = "none"
    """The frozen policy that the objective compares with: none; start, a copy in the compute dtype of the policy that
    the phase begins with; or a Hugging Face directory of the same vocabulary."""
    reference_every_steps: int | None = None
    """The copy is taken anew after so many steps; null: never."""
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self):
        _known("optimizer_state", self.optimizer_state, ("reset", "keep"))
        for name in (
            "prompts_per_step",
            "responses_per_prompt",
            "max_response_tokens",
            "updates_per_rollout",
            "passes_per_rollout",
            "micro_batches",
            "chunk_tokens",
        ):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")
        if self.prompts_per_step % self.updates_per_rollout:
            raise ValueError(
                f"updates_per_rollout {self.updates_per_rollout} does not divide prompts_per_step "
                f"{self.prompts_per_step}: each update takes as many whole groups; choose a divisor"
            )
        prompts = self.prompts_per_step // self.updates_per_rollout
        rows, whose = prompts * self.responses_per_prompt, "step" if self.updates_per_rollout == 1 else "update"
        if rows % (self.micro_batches or 1):
            raise ValueError(
                f"micro_batches {self.micro_batches} does not divide the {whose}'s {rows} rows "
                f"({prompts} prompts x {self.responses_per_prompt} responses); choose a divisor"
            )
        if self.rows_at_once is not None and self.rows_at_once < 1:
            raise ValueError(f"rows_at_once must be at least 1, got {self.rows_at_once}")
        if self.reward is not None and self.responses_per_prompt == 1:
            raise ValueError(
                "responses_per_prompt: a response's advantage is its reward against those of its group; expected at "
                "least 2 where there is a reward, got 1"
            )
        control, rate = self.learning_rate_control, self.optimizer.learning_rate
        if control is not None and not control.min_learning_rate <= rate <= control.max_learning_rate:
            raise ValueError(
                f"learning_rate_control: the phase begins with optimizer.learning_rate; expected it within "
                f"{control.min_learning_rate:g} .. {control.max_learning_rate:g}, got {rate:g}"
            )
        self._check_reference()

    def _check_reference(self) -> None:
        every = self.reference_every_steps
        if every is not None and (every < 1 or self.reference != START):
            raise ValueError(
                "reference_every_steps: expected a number of at least 1 beside reference: start, or null, got "
                f"{every} beside reference: {self.reference}"
            )
        if self.measure_start_kl and (every is not None or self.reference not in ("none", START)):
            raise ValueError(
                "measure_start_kl: the phase's one reference must be its start policy; expected reference: start (or "
                f"none) and reference_every_steps: null, got {self.reference} and {every}; leave measure_start_kl out"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelSettings
    data: DataSettings
    phases: tuple[PhaseSettings, ...]
    cycle: CycleSettings | None = None
    """Phases that may come again; None: every phase once."""
    baseline_steps: int = 10
    """The mean entropy of the run's first so many steps is the unit of `stop.*_fraction`."""
    seed: int = 0
    """Seed of sampling, of the data order and of random weights."""
    mesh: MeshSettings = field(default_factory=MeshSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint_every_steps: int = 20
    keep_checkpoints: int = 2
    samples: Samples = field(default_factory=Samples)
    """Responses kept in samples.jsonl."""
    page_every_s: int = 300
    """Seconds between two writings of `report.html` while the run goes on; 0: only when it ends."""
    tracker: Tracker = field(default_factory=Tracker)
    cache_dir: str | None = None
    """Prepared data sets and compiled programs; null: $TSOPSD_CACHE_DIR, else ~/.cache/tsopsd_jax."""

    def __post_init__(self):
        if not self.phases:
            raise ValueError("phases: expected at least one, got none")
        asked = self.evaluation.data
        if asked is not None and asked.chat != self.data.chat:
            raise ValueError(
                f"evaluation.data: expected the chat of data, {self.data.chat}, in which the policy is trained, got "
                f"{asked.chat}"
            )
        if asked is not None and (asked.exclude or asked.drop_longer):
            raise ValueError("evaluation.data: exclude and drop_longer choose training problems; leave them out")
        names = [p.name for p in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases: expected different names, got {names}")
        if odd := [name for name in names if "#" in name]:
            raise ValueError(f"phases: expected names without '#', behind which the log puts the round, got {odd[0]!r}")
        for before, after in self._neighbours():
            for unit in ("nats", "fraction"):
                low, high = vars(before.stop)[f"collapsed_below_{unit}"], vars(after.stop)[f"recovered_above_{unit}"]
                if low is not None and high is not None and low > high:
                    raise ValueError(
                        f"phase {after.name!r}: stop.recovered_above_{unit} {high} must not be under "
                        f"stop.collapsed_below_{unit} {low} of phase {before.name!r}: a collapsed policy would count "
                        "as recovered"
                    )
        dtypes = [p.optimizer.momentum_dtype for p in self.phases]
        if len(set(dtypes)) != 1:
            raise ValueError(
                f"phases: expected one optimizer.momentum_dtype (the state is one), got {', '.join(dtypes)}"
            )
        if not 0 <= self.seed < 2**32:  # a random key holds 32 bits of it
            raise ValueError(f"seed must be >= 0 and < 2**32, got {self.seed}")
        limits = {"checkpoint_every_steps": 1, "keep_checkpoints": 1, "baseline_steps": 1, "page_every_s": 0}
        for name, least in limits.items():
            if vars(self)[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {vars(self)[name]}")

    def indices_of_cycle(self) -> Cycle:
        """The cycle by indices of phases.

        Raises:
            ValueError: its names are not a stretch of the schedule.
        """
        if self.cycle is None:
            return ONCE
        names, asked = [phase.name for phase in self.phases], list(self.cycle.phases)
        first = names.index(asked[0]) if asked[0] in names else len(names)
        if names[first : first + len(asked)] != asked:
            raise ValueError(f"cycle.phases: expected phases that follow each other among {names}, got {asked}")
        return Cycle(first=first, last=first + len(asked) - 1, times=self.cycle.times)

    def _neighbours(self) -> list[tuple[PhaseSettings, PhaseSettings]]:
        """Every phase with one that may follow it."""
        cycle, pairs = self.indices_of_cycle(), list(itertools.pairwise(self.phases))
        return [*pairs, (self.phases[cycle.last], self.phases[cycle.first])] if self.cycle is not None else pairs

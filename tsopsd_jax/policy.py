"""A policy in the hand: text in, samples out; entropies, divergences, one update. For notebooks and trials.

    policy = Policy.load("countdown-tiny")
    samples = policy.sample(["3 5 2 1 -> 24 :"], samples=4, max_tokens=19)[0]
    policy.stats(samples)[0].entropy                     # nats, one a token
    hotter, metrics = policy.update(samples, ts_opsd(), learning_rate=1e-4)

The first call of a kind compiles its program; later ones with the same shapes and settings find it. A run that is to
go on for long belongs into a configuration: `commands.train.run_config`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from tsopsd_jax import losses
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.data.encode import encode_to_fit
from tsopsd_jax.distributed.sharding import make_mesh, put, row_multiple, row_sharding
from tsopsd_jax.head import batch_stats
from tsopsd_jax.learn.update import ReferencePolicy, make_optimizer, make_update
from tsopsd_jax.logit_stats import LibraryStats, VocabStats
from tsopsd_jax.model import Qwen3, load_pretrained, save_pretrained
from tsopsd_jax.model.packaged import model_directory
from tsopsd_jax.objectives import Objective
from tsopsd_jax.rollout import Engine, Sampling
from tsopsd_jax.types import Batch, Prompts, PyTree, TrainState


class Sample(NamedTuple):
    """A response to a prompt. `tokens` hold the stop token too; `logp` (nats) are their log-probabilities under the
    distribution that was sampled; `entropy_nats` is the mean of the policy's exact entropy at temperature 1."""

    text: str
    prompt_tokens: Int[np.ndarray, " P"]
    tokens: Int[np.ndarray, " N"]
    logp: Float[np.ndarray, " N"]
    entropy_nats: float
    stopped: bool


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model, its parameters on a mesh, and its tokenizer. Immutable: an update makes a new one."""

    model: Qwen3
    params: PyTree
    tokenizer: Tokenizer
    folder: Path
    """The directory that it was loaded from."""
    _programs: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    """What was compiled, by its settings: shared with the policies that updates make of this one."""

    @classmethod
    def load(cls, path: str | Path, *, chat: str = "none", dtype: Any = jnp.float32) -> "Policy":
        """Load a Hugging Face directory, or the packaged `countdown-tiny`, onto all devices.

        Args:
            path: see `model.load_pretrained`.
            chat: `none`: prompts as they are; `direct` or `thinking`: in the model's chat turn.
            dtype: of parameters and computation; float32 to train.

        Raises:
            ValueError: a directory or file that is absent, damaged, or of another architecture.
        """
        folder = model_directory(path)
        mesh = make_mesh()
        model, params = load_pretrained(folder, dtype=dtype, mesh=mesh)
        tokenizer = Tokenizer.load(folder, chat=chat)
        tokenizer.check_fits(model.config.vocab_size)
        return cls(dataclasses.replace(model, mesh=mesh), params, tokenizer, folder)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face directory: weights, config, and the files of the tokenizer, which `load` reads again."""
        save_pretrained(folder, self.model, self.params, tokenizer_from=self.folder)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        samples: int = 1,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        seed: int = 0,
        slots: int = 64,
    ) -> list[list[Sample]]:
        """Sample responses to texts, a list for each prompt.

        Args:
            prompts: texts.
            samples: of each.
            max_tokens: a response is cut here.
            sampling: default: temperature 1, the whole distribution.
            seed: the same seed gives the same responses.
            slots: responses decoded side by side.

        Raises:
            ValueError: an empty prompt, or one that does not fit the model with `max_tokens`.
        """
        names = [f"number {i}" for i in range(len(prompts))]
        positions = self.model.config.max_position_embeddings
        asked = [(text, ()) for text in prompts]
        tokens, lengths = encode_to_fit(names, asked, self.tokenizer, max_tokens=max_tokens, positions=positions)
        which = np.repeat(np.arange(len(prompts)), samples)
        engine = self._engine(sampling or Sampling(), tokens.shape[1], max_tokens, slots)
        rows = Prompts(tokens[which], lengths[which], np.arange(len(which), dtype=np.uint32))
        found: list[Any] = [None] * len(which)
        for done in engine.stream(engine.view(self.params), rows, jax.random.key(seed), group=samples):
            prompt = rows.tokens[done.row, : rows.length[done.row]]
            text = self.tokenizer.decode(done.tokens)
            found[done.row] = Sample(
                text, np.asarray(prompt), done.tokens, done.logp, float(done.entropy_nats), done.stopped
            )
        return [found[i : i + samples] for i in range(0, len(found), samples)]

    def stats(self, samples: Sequence[Sample], *, teacher_temperature: float = 1.2) -> list[VocabStats]:
        """Compute, for each token of each sample, log-probability, exact entropy, and both KLs to softmax(z / T),
        in nats.

        Raises:
            ValueError: if the temperature is not positive.
        """
        stats = LibraryStats(VocabStats._fields, teacher_temperature)
        of = self._once(stats, lambda: jax.jit(lambda params, batch: self._stats(stats, params, batch)))
        found = of(self.params, self._batch(samples))
        rows: Any = self._places(found, samples)
        return [VocabStats(**{name: x[at] for name, x in row.items()}) for row, at in rows]

    def kl_to(self, other: "Policy", samples: Sequence[Sample]) -> list[Float[np.ndarray, " N"]]:
        """Compute KL(this policy || other) over the whole vocabulary at each token of each sample, in nats.

        Raises:
            ValueError: if the vocabularies differ.
        """
        sizes = self.model.config.vocab_size, other.model.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(f"kl_to: expected two policies of one vocabulary, got {sizes[0]} and {sizes[1]} entries")

        def stats(logits, _, other_logits):
            return {"kl": losses.reverse_kl(other_logits, logits)}

        def of(params, reference, batch):
            return self._stats(stats, params, batch, ReferencePolicy(other.model, reference))

        found = self._once(("kl", other.model), lambda: jax.jit(of))(self.params, other.params, self._batch(samples))
        return [row["kl"][at] for row, at in self._places(found, samples)]

    def update(
        self,
        samples: Sequence[Sample],
        objective: Objective,
        *,
        learning_rate: float,
        advantages: Sequence[float] | None = None,
    ) -> tuple["Policy", dict[str, float]]:
        """Take one step of AdamW, with a new optimizer, on these samples.

        Args:
            samples: of this policy, for an on-policy step.
            objective: such as `ts_opsd()`, which needs no advantages.
            learning_rate: of the step.
            advantages: one for each sample.

        Returns:
            The policy after the step, and the update's metrics.

        Raises:
            ValueError: advantages are missing where the objective uses them, or are not one for each sample.
        """
        if advantages is None and objective.uses_advantage:
            raise ValueError("update: this objective expects advantages, one for each sample, got none")
        if advantages is not None and len(advantages) != len(samples):
            raise ValueError(f"update: expected {len(samples)} advantages, one for each sample, got {len(advantages)}")
        optimizer = make_optimizer(learning_rate=learning_rate)
        state = TrainState(jnp.zeros((), jnp.int32), self.params, optimizer.init(self.params))
        knobs = {} if objective.control is None else dict(objective.control.init)
        batch = self._batch(samples, advantages)
        key = "update", objective.stats, objective.loss, learning_rate
        step = self._once(key, lambda: jax.jit(make_update(self.model, objective, optimizer)))
        after, out = step(state, batch, knobs=knobs)
        metrics = {name: float(value) for name, value in jax.device_get(out.metrics).items()}
        return dataclasses.replace(self, params=after.params), metrics

    # ---------------------------------------------------------------- inside

    @property
    def _mesh(self) -> Any:
        return self.model.mesh

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` made when it was first asked for under this key."""
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def _engine(self, sampling: Sampling, max_prompt_tokens: int, max_tokens: int, slots: int) -> Engine:
        return self._once(
            (sampling, max_prompt_tokens, max_tokens, slots),
            lambda: Engine(
                self.model,
                self._mesh,
                sampling=sampling,
                max_prompt_tokens=max_prompt_tokens,
                max_response_tokens=max_tokens,
                stop_ids=self.tokenizer.stop_ids,
                slots=slots,
                entropy=True,
            ),
        )

    def _batch(self, samples: Sequence[Sample], advantages: Sequence[float] | None = None) -> Batch:
        """The samples as rows, prompt first, with empty rows up to a number that the devices divide."""
        if not samples:
            raise ValueError("expected at least one sample, got none")
        if not isinstance(samples[0], Sample):
            raise ValueError(
                f"expected a list of Sample, got a list of {type(samples[0]).__name__}: `sample` returns a list for "
                "each prompt; pass one of them, or join them"
            )
        rows = -(-len(samples) // row_multiple(self._mesh)) * row_multiple(self._mesh)
        width = max(len(s.prompt_tokens) + len(s.tokens) for s in samples)
        tokens = np.zeros((rows, width), np.int32)
        mask, advantage, old_logp = (np.zeros((rows, width), kind) for kind in (bool, np.float32, np.float32))
        for row, s in enumerate(samples):
            prompt, end = len(s.prompt_tokens), len(s.prompt_tokens) + len(s.tokens)
            tokens[row, :prompt], tokens[row, prompt:end] = s.prompt_tokens, s.tokens
            mask[row, prompt:end], old_logp[row, prompt:end] = True, s.logp
            advantage[row, prompt:end] = 0.0 if advantages is None else advantages[row]
        batch = Batch.of(tokens=tokens, mask=mask, advantage=advantage, old_logp=old_logp)
        return put(jax.device_get(batch), row_sharding(self._mesh))

    def _stats(self, stats: Any, params: PyTree, batch: Batch, reference: ReferencePolicy | None = None) -> Any:
        hidden, unembed = self.model.hidden(params, batch.tokens), self.model.unembed(params)
        frozen = None if reference is None else reference.of(batch)
        return batch_stats(stats, hidden, unembed, batch, reference=frozen, mesh=self.model.mesh)

    @staticmethod
    def _places(found: Any, samples: Sequence[Sample]) -> list[tuple[dict[str, np.ndarray], Any]]:
        """What was found in each sample's row, and where in it the response stands."""
        host = jax.device_get(found)
        ends = [(len(s.prompt_tokens), len(s.prompt_tokens) + len(s.tokens)) for s in samples]
        return [({k: x[row] for k, x in host.items()}, slice(*at)) for row, at in enumerate(ends)]

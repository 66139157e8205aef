"""A run so small that its steps take milliseconds: a one-layer model, eleven problems, three phases of two or three
steps. What tests of the loop share; the fixtures `tokenizer` and `trainer_in` stand in conftest.py."""

import io
import os
import signal

import jax
import numpy as np

from tsopsd_jax.data import Problem
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.distributed.sharding import make_mesh, tree_shardings
from tsopsd_jax.judge.groups import RewardRule
from tsopsd_jax.learn.update import make_optimizer
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.objectives import dapo, ts_opsd
from tsopsd_jax.rewards import Rewards
from tsopsd_jax.rollout import Sampling
from tsopsd_jax.rundir.log import read_metrics
from tsopsd_jax.rundir.trackers import Tracker
from tsopsd_jax.train.cycle import ONCE
from tsopsd_jax.train.phase import Guard, Phase
from tsopsd_jax.train.phase_step import Shared
from tsopsd_jax.train.stopping import StopRule
from tsopsd_jax.train.task import EvaluationPlan, Task
from tsopsd_jax.train.trainer import Trainer

MODEL = Qwen3(
    Qwen3Config(
        vocab_size=112,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
)
PROBLEMS = [Problem(f"p{i}", f"{i} {i + 1} -> {i + 2} :", str(i)) for i in range(1, 12)]


def even(response: str, _gold: str) -> float:
    """A reward with a signal for random weights: right about half the time, so that most groups are informative."""
    return float(sum(map(ord, response)) % 2 == 0)


def rl_phase(name="rl", **changes) -> Phase:
    settings = {
        "name": name,
        "outcome": f"after {name}",
        "objective": dapo(),
        "optimizer": make_optimizer(learning_rate=1e-2),
        "reset_optimizer": False,
        "sampling": Sampling(),
        "max_response_tokens": 5,
        "prompts_per_step": 4,
        "responses_per_prompt": 2,  # half of the groups are uninformative: more are drawn, and some are left over
        "rows_at_once": 8,
        "micro_batches": 1,
        "tile_tokens": 4,
        "pack": True,
        # Keeps surplus groups: the checkpoint must carry them.
        "reward": RewardRule(
            overlong_buffer_tokens=2,
            max_generation_batches=4,
            surplus="keep",
            on_shortage="fill",
        ),
        "stop": StopRule(steps=3),
        "guard": Guard(),
    }
    return Phase(**(settings | changes))


def reheat_phase(**changes) -> Phase:
    settings = {"objective": ts_opsd(), "reward": None, "reset_optimizer": True, "stop": StopRule(steps=2)}
    return rl_phase("reheat", **(settings | changes))


SCHEDULE = (rl_phase(), reheat_phase(), rl_phase("again", stop=StopRule(steps=2), reset_optimizer=True))


def trainers(tokenizer):
    """What the fixture `trainer_in` returns: (run_dir, phases=..., verify=...) -> Trainer on `data` devices."""

    def make(
        run_dir,
        *,
        phases=SCHEDULE,
        verify=even,
        evaluate=False,
        evaluate_every=None,
        every=100,
        data=1,
        width=6,
        references=None,
        cycle=ONCE,
        baseline_steps=10,
    ):
        mesh = make_mesh(data=data, devices=jax.devices()[:data])
        layout = tree_shardings(MODEL.param_axes(), MODEL.param_shapes(), mesh)
        task = Task(problems=PROBLEMS, tokenizer=tokenizer, rewards=Rewards.of(verify), max_prompt_tokens=width, seed=0)
        plan = None
        if evaluate:
            plan = EvaluationPlan(
                benchmark="toy",
                problems=PROBLEMS[:3],
                rewards=Rewards.of(verify),
                max_prompt_tokens=width,
                samples=4,
                sampling=Sampling(top_p=0.7),
                max_response_tokens=5,
                rows_at_once=8,
                every_steps=evaluate_every,
            )
        return Trainer(
            Shared.of(MODEL, mesh, task, seed=0, references=references),
            phases,
            load_params=lambda: MODEL.init(jax.random.key(3), shardings=layout),
            evaluation=plan,
            run_dir=run_dir,
            checkpoint_every_steps=every,
            keep_checkpoints=2,
            tracker=Tracker(),
            table=LiveTable(stream=io.StringIO()),
            cycle=cycle,
            baseline_steps=baseline_steps,
        )

    return make


def facts(run_dir):
    """The metrics without what the clock says."""
    return [
        {k: v for k, v in line.items() if "time" not in k and "per_s" not in k and k != "rollout/programs"}
        for line in read_metrics(run_dir)
    ]


def finish(trainer):
    trainer.run()
    return jax.device_get(trainer.state)


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def interrupting(at_call: int):
    """A verifier that gets the process a SIGTERM in the middle of a step."""
    calls = iter(range(10**9))

    def verify(response: str, gold: str) -> float:
        if next(calls) == at_call:
            os.kill(os.getpid(), signal.SIGTERM)
        return even(response, gold)

    return verify

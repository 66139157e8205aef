"""A run's memory on a CPU beside the plan's: what the process holds at its peaks, part by part."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tsopsd_jax.model.packaged import model_directory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to reset a peak"),
]

SHAPE = {
    "vocab_size": 32_768,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 512,
}
CONFIG = """
model: {path: MODEL, random_init: true}
data: {name: countdown, verifier: countdown, max_prompt_tokens: 32}
cache_dir: CACHE
checkpoint_every_steps: 4
phases:
  - name: rl
    objective: {name: dapo}
    optimizer: {learning_rate: 1.0e-6}
    stop: {steps: 6}
    prompts_per_step: 2
    responses_per_prompt: 8
    max_response_tokens: 224
    micro_batches: 1
    chunk_tokens: 1024
    reward: {}
"""

# Runs CONFIG, and prints {part: [peak, at its end] of each time} in resident bytes; a part is what the heartbeat says.
RUN = """
import json, re, sys
from tsopsd_jax.commands.train import run_config
from tsopsd_jax.config import load_config
from tsopsd_jax.distributed import heartbeat

found, doing = {}, ["start"]

def resident(name):
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(name + r":\\s+(\\d+)", status)[1])

def begins(what):
    found.setdefault(doing[0], []).append([resident("VmHWM"), resident("VmRSS")])
    open("/proc/self/clear_refs", "w").write("5")
    doing[0] = what

def tick(what=None, tick=heartbeat.tick):
    tick(what)
    if what not in (None, doing[0]) and "compiling" not in what:
        begins(what)

heartbeat.tick = tick
run_config(load_config(sys.argv[1], []), sys.argv[2])
begins("end")
print(json.dumps(found))
"""

# Plans CONFIG for one CPU device, whose programs are those of the run.
PLAN = """
import json, sys
from pathlib import Path
import jax
from tsopsd_jax.commands.plan import no_compilation_cache
from tsopsd_jax.config import load_config
from tsopsd_jax.hardware.chips import GPUS
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.plan.compiled import CompiledPrograms
from tsopsd_jax.plan.planner import Means, make_plan
from tsopsd_jax.plan.topologies import Topology

config = load_config(sys.argv[1], [])
shape = read_config(Path(config.model.path) / "config.json")
here = Topology("cpu:1", GPUS["h100"], "cpu", tuple(jax.devices()[:1]), 1)
with no_compilation_cache():
    plan = make_plan(config, shape, here, means=Means(), programs=CompiledPrograms(lambda _: None))
print(json.dumps({"host": plan.host_bytes} | {part.name: part.bytes for part in plan.parts}))
"""


# glibc gives large blocks back when they are freed, as long as it may not raise its threshold for them: else resident
# memory between two parts holds what the part before has freed, more or less of it by the order of the threads.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024), "MALLOC_ARENA_MAX": "2"}


def printed(program: str, *args: Path) -> dict:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path), **GIVES_BACK}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True, env=env, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(bytes of the plan's parts by kind, resident bytes of the run's parts)."""
    folder = tmp_path_factory.mktemp("memory")
    model, config = folder / "model", folder / "run.yaml"
    shutil.copytree(model_directory("countdown-tiny"), model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | SHAPE))
    config.write_text(CONFIG.replace("MODEL", str(model)).replace("CACHE", str(folder / "cache")))
    return printed(PLAN, config), printed(RUN, config, folder / "run")


def part_of(parts: dict[str, list[list[int]]], step: int, words: str) -> list[int]:
    """[peak, at its end] of a step's part."""
    return parts[f"step {step}: {words}"][-1]


def test_peaks_are_those_of_the_plan(measured):
    """Of the third step, whose programs are compiled and beside which nothing is written: the plan's bytes and what the
    process holds beside the state where nothing but the state is alive. The update, which takes the most, within a
    tenth; sampling too, or less (pages that nobody fills are never touched)."""
    plan, parts = measured
    state = plan["update"]["parameters"] + plan["update"]["optimizer"]
    beside = part_of(parts, 3, "making room for the update")[1] - state
    update = part_of(parts, 3, "updating")[0] - beside
    assert update == pytest.approx(sum(plan["update"].values()), rel=0.1), (update, plan["update"])
    sampling, planned = part_of(parts, 3, "sampling")[0] - beside, sum(plan["decode"].values())
    assert 0.8 * planned < sampling <= 1.1 * planned, (sampling, plan["decode"])


def test_a_checkpoint_takes_no_second_copy(measured):
    """On a CPU it is written from the state's own memory: what the second save takes are the blocks of a digest and of
    what is compressed, some 60 MB, not the state again."""
    plan, parts = measured
    state = plan["update"]["parameters"] + plan["update"]["optimizer"]
    assert plan["host"] == pytest.approx(state, abs=16)
    before, saving = part_of(parts, 6, "updating")[1], parts["saving a checkpoint"][-1][0]
    assert saving - before < 0.7 * state, (saving, before)

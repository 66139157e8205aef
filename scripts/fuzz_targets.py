"""What scripts/fuzz.py reads: for each kind of file, good ones and the function of the package that reads them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from tsopsd_jax.config.places import DEMO_CONFIG

ASSETS = DEMO_CONFIG.parent / "countdown-tiny"
ROWS = [{"id": f"p{i}", "problem": f"What is {i} + {i}?", "answer": str(2 * i), "level": 0.5 * i} for i in range(40)]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Target(NamedTuple):
    """Something that is read."""

    make: Callable[[Path], str]
    """Puts good files into a folder; returns the name of the one that is changed, a pattern where there are several."""
    read: Callable[[Path], Any]
    """Reads the folder."""
    cases: int
    """In a long run."""


def copy_model(folder: Path) -> None:
    """Put the packaged model there."""
    for file in ASSETS.iterdir():
        shutil.copy(file, folder)


def small_weights(folder: Path) -> str:
    """Put a model of a few kB there."""
    import jax
    import jax.numpy as jnp

    from tsopsd_jax.model import Qwen3, Qwen3Config, save_pretrained

    config = Qwen3Config(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        rope_theta=1e4,
    )
    model = Qwen3(config)
    save_pretrained(folder, model, jax.tree.map(lambda s: jnp.ones(s.shape), model.param_shapes()))
    return "model.safetensors"


def index_of_weights(folder: Path) -> str:
    """Put a model there whose weights have an index."""
    small_weights(folder)
    os.rename(folder / "model.safetensors", folder / "a.safetensors")
    size = int.from_bytes((folder / "a.safetensors").read_bytes()[:8], "little")
    names = json.loads((folder / "a.safetensors").read_bytes()[8 : 8 + size])
    index = {"weight_map": {name: "a.safetensors" for name in names if name != "__metadata__"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model.safetensors.index.json"


def load_weights(folder: Path) -> Any:
    from tsopsd_jax.model import load_pretrained

    return load_pretrained(folder)


def read_model_config(folder: Path) -> Any:
    from tsopsd_jax.model.hf_config import read_config

    return read_config(folder / "config.json")


def load_tokenizer(folder: Path) -> Any:
    from tsopsd_jax.data import Tokenizer

    tokenizer = Tokenizer.load(folder)
    return tokenizer.decode(tokenizer.encode("1 2 3"))


def load_chat(folder: Path) -> Any:
    from tsopsd_jax.data import Tokenizer

    tokenizer = Tokenizer.load(folder, chat="direct")
    return tokenizer.encode("1 2", before=[("system", "3")])


def files_of(folder: Path, name: str) -> str:
    copy_model(folder)
    return name


def make_chat(folder: Path) -> str:
    """Put a tokenizer of bytes there, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {character: at for at, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return "chat_template.jinja"


def lines_of(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def make_parquet(folder: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"prompt": [{"content": f"What is {i}?", "role": "user"}], "reward_model": {"ground_truth": str(i)},
         "extra_info": {"index": f"p{i}"}} for i in range(20)]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "dapo-math-17k.parquet")
    return "dapo-math-17k.parquet"


def make_csv(folder: Path) -> str:
    names = (
        "Question",
        "Correct Answer",
        "Incorrect Answer 1",
        "Incorrect Answer 2",
        "Incorrect Answer 3",
        "Record ID",
    )
    rows = [",".join(names), *(f'"Which, {i}?",a{i},b,c,d,r{i}' for i in range(20))]
    (folder / "gpqa_diamond.csv").write_text("\n".join(rows) + "\n")
    return "gpqa_diamond.csv"


def problems(name: str, file: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from tsopsd_jax.data import load_problems

        return load_problems(name, path=folder / file)

    return read


def make_yaml(folder: Path) -> str:
    shutil.copy(DEMO_CONFIG, folder / "demo.yaml")
    return "demo.yaml"


def read_settings(folder: Path) -> Any:
    from tsopsd_jax.config import load_config

    return load_config(folder / "demo.yaml", [])


def run_files(folder: Path) -> None:
    """Put a short run's log there."""
    line = {"phase": "rl", "policy/entropy_nats": 0.3, "reward/mean": 0.5, "rollout/length_mean_tokens": 9.0}
    lines_of(folder, "metrics.jsonl", [{"step": i, "phase_step": i, "time_s": 1.0 * i} | line for i in range(1, 9)])
    example = {"prompt": "1 + 1", "response": "2", "answer": "2", "correct": True}
    record = {"stage": "base", "step": 0, "avg_at_k": 0.5, "pass_at_k": 0.7, "samples": 2, "examples": [example]}
    lines_of(folder, "evaluations.jsonl", [record, record | {"stage": "after rl", "step": 8}])
    kept = {"phase": "rl", "which": "best", "prompt": "1", "response": "2", "answer": "2", "reward": 1.0}
    lines_of(folder, "samples.jsonl", [kept | {"step": i} for i in range(1, 5)])
    status = {"state": "ended", "reason": None, "phase": "rl", "step": 8, "time": 1.7e9,
              "phases": [{"phase": "rl", "step": 8, "reason": "8 steps"}], "skipped_updates": 0, "held_updates": 0,
              "starts": [{"step": 0, "time": 1.7e9, "host": "h", "devices": "1 x cpu", "processes": 1,
                          "versions": {"jax": "0.10"}, "commit": None}]}  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status))
    shutil.copy(DEMO_CONFIG, folder / "config.yaml")


def run_file(name: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        run_files(folder)
        return name

    return make


def read_run(folder: Path) -> Any:
    """As a run that goes on does, and as the page does but for its figures."""
    from tsopsd_jax.display import page, panels, responses, run_status
    from tsopsd_jax.rundir.log import RunLog, read_evaluations, read_samples
    from tsopsd_jax.rundir.status import read_status
    from tsopsd_jax.rundir.trackers import Tracker

    panels.draw_panels = lambda *_, **__: ""
    page.write_report(folder)
    responses.kept(read_samples(folder))
    run_status.machines(read_status(folder))
    RunLog(folder, last_step=6, tracker=Tracker(tensorboard=False)).close()
    return read_evaluations(folder)


def make_inputs(folder: Path) -> str:
    """Put a claimed run directory there."""
    from tsopsd_jax.config import claim, load_config

    (folder / "run").mkdir()
    claim.claim(folder / "run", load_config(DEMO_CONFIG, []), {"training problems": "sha256 1"}, accept_changed=False)
    return "run/inputs.json"


def read_inputs(folder: Path) -> Any:
    from tsopsd_jax.config import claim, load_config

    return claim.claim(
        folder / "run", load_config(DEMO_CONFIG, []), {"training problems": "sha256 1"}, accept_changed=False
    )


def make_output(folder: Path) -> str:
    from tsopsd_jax.rundir import resumable_jsonl

    resumable_jsonl.claim_output(folder / "out.jsonl", {"model": "m", "samples": 4, "sampling": {"top_p": 0.7}})
    lines_of(folder, "out.jsonl", [{"problem": "p", "response": "r", "correct": True}] * 4)
    return "out.jsonl.settings.json"


def read_output(folder: Path) -> Any:
    from tsopsd_jax.rundir import resumable_jsonl

    resumable_jsonl.claim_output(folder / "out.jsonl", {"model": "m", "samples": 4, "sampling": {"top_p": 0.7}})
    return resumable_jsonl.lines(folder / "out.jsonl")


def train_state() -> Any:
    import jax.numpy as jnp

    from tsopsd_jax.types import TrainState

    return TrainState(jnp.int32(1), {"embed": jnp.arange(12.0).reshape(3, 4)}, {"mu": jnp.ones(5)})


def make_checkpoint(folder: Path) -> str:
    from tsopsd_jax.rundir.checkpoints import Checkpoints
    from tsopsd_jax.rundir.run_state import RunProgress, RunState

    checkpoints = Checkpoints(folder.resolve() / "c", keep=2)
    checkpoints.save(RunState(train_state(), RunProgress(position=7)))
    checkpoints.close()
    return "c/1/**/*"


def read_checkpoint(folder: Path) -> Any:
    from tsopsd_jax.rundir.checkpoints import Checkpoints, read_progress

    read_progress(folder.resolve() / "c")
    checkpoints = Checkpoints(folder.resolve() / "c", keep=2)
    try:
        return checkpoints.restore_newest(train_state())
    finally:
        checkpoints.close()


TARGETS = {
    "weights": Target(small_weights, load_weights, 1500),
    "index of weights": Target(index_of_weights, load_weights, 500),
    "config.json": Target(lambda f: files_of(f, "config.json"), read_model_config, 1200),
    "generation_config.json": Target(lambda f: files_of(f, "generation_config.json"), load_tokenizer, 400),
    "tokenizer.json": Target(lambda f: files_of(f, "tokenizer.json"), load_tokenizer, 900),
    "tokenizer_config.json": Target(lambda f: files_of(f, "tokenizer_config.json"), load_tokenizer, 500),
    "chat template": Target(make_chat, load_chat, 600),
    "parquet": Target(make_parquet, problems("dapo_math_17k", "dapo-math-17k.parquet"), 1200),
    "csv": Target(make_csv, problems("gpqa", "gpqa_diamond.csv"), 500),
    "jsonl": Target(lambda f: lines_of(f, "rows.jsonl", ROWS), problems("jsonl", "rows.jsonl"), 1200),
    "yaml": Target(make_yaml, read_settings, 1500),
    "metrics.jsonl": Target(run_file("metrics.jsonl"), read_run, 500),
    "evaluations.jsonl": Target(run_file("evaluations.jsonl"), read_run, 400),
    "samples.jsonl": Target(run_file("samples.jsonl"), read_run, 400),
    "status.json": Target(run_file("status.json"), read_run, 400),
    "config.yaml of a run": Target(run_file("config.yaml"), read_run, 300),
    "inputs.json": Target(make_inputs, read_inputs, 300),
    "settings of an output": Target(make_output, read_output, 300),
    "checkpoint": Target(make_checkpoint, read_checkpoint, 500),
}

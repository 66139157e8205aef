"""`tsopsd init`: write a small commented configuration to start from."""

import argparse
import json
from pathlib import Path
from typing import Any

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.model.packaged import model_directory
from tsopsd_jax.rundir import files
from tsopsd_jax.writing import writes_to

PROBLEM_FIELDS = ("problem", "question", "prompt", "instruction")
ANSWER_FIELDS = ("answer", "expected_answer", "solution", "target")
"""Names that data files give to a problem and to its answer, the likeliest first."""

TINY = {
    "claim": "Collapse the packaged model by RL, reheat it, train on: a few minutes on two CPU cores.",
    "model": "{path: countdown-tiny}  # 0.3 M parameters, packaged; or a Hugging Face directory",
    "data": "{name: countdown, verifier: countdown, max_prompt_tokens: 7}",
    "test": "{name: countdown, split: test, first: 256, verifier: countdown, max_prompt_tokens: 7}",
    "evaluation": "samples: 8, max_response_tokens: 19",
    "batch": "prompts_per_step: 64, responses_per_prompt: 8, max_response_tokens: 19",
    "reheat_batch": "prompts_per_step: 512, responses_per_prompt: 1, max_response_tokens: 19",
    "rl_rate": "5.0e-4",
    "reheat_rate": "2.0e-5",
    "shortage": ", on_shortage: fill",
    "collapsed": "collapsed_below_nats: 0.15, window_steps: 5, steps: 400",
    "recovered": "recovered_above_nats: 0.19, steps: 60",
    "hot": "0.19",
    "steps": "90",
}
"""The packaged task, as the demo has it."""

OWN = {
    "claim": "RL until the entropy has collapsed, policy reheating, RL again, with the paper's values.",
    "evaluation": "samples: 8, max_response_tokens: RESPONSE",
    "batch": "prompts_per_step: 64, responses_per_prompt: 8, max_response_tokens: RESPONSE",
    "reheat_batch": "prompts_per_step: 1024, responses_per_prompt: 1, max_response_tokens: RESPONSE",
    "rl_rate": "2.0e-6",
    "reheat_rate": "1.0e-6",
    "shortage": ", on_shortage: fill",
    "collapsed": "collapsed_below_nats: 0.08, window_steps: 5, steps: 500",
    "recovered": "recovered_above_nats: 0.12, steps: 30",
    "hot": "0.12",
    "steps": "200",
}
"""A model or data of one's own, with the paper's values."""

PROMPT_TOKENS, RESPONSE_TOKENS = 1024, 4096
"""Limits of lengths, where the model has the positions."""

LAYOUT = """\
# {claim}
#   tsopsd check {file}    says what is wrong or odd, before anything runs
#   tsopsd train {file}    runs it; the same command again resumes
model: {model}
data: {data}
evaluation:  # of the policy before the first phase and after each
  data: {test}
  {evaluation_lines}
phases:
  - &rl
    name: rl  # DAPO, until the mean token entropy is low
    objective: {{name: dapo}}
    {batch_lines}
    optimizer: {{learning_rate: {rl_rate}, warmup_steps: 10, weight_decay: 0.1}}
    reward: {{max_generation_batches: 10{shortage}}}  # dynamic sampling: draw until the batch is informative
    stop: {{{collapsed}}}
  - name: reheat  # TS-OPSD: distil softmax(z / 1.2) of the policy's own logits into it; needs no reward
    objective: {{name: ts_opsd, hyperparameters: {{teacher_temperature: 1.2}}}}
    {reheat_batch_lines}
    optimizer: {{learning_rate: {reheat_rate}}}
    stop: {{{recovered}}}
    guard: {{max_start_entropy_nats: {hot}}}  # a policy that is not collapsed would diverge
  - <<: *rl  # the first phase again
    name: rl-again
    stop: {{steps: {steps}}}
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("file", nargs="?", default="run.yaml", metavar="FILE.yaml", help="default: run.yaml")
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face directory; default: the packaged model")
    parser.add_argument("--data", metavar="FILE.jsonl", help="problems and answers; default: the packaged task")
    parser.add_argument("--reward", metavar="NAME|FILE.py:FUNCTION", help="how responses are scored; default: math")


def run(args: argparse.Namespace) -> int:
    """Write the file; one that is there stays as it is."""
    path = Path(args.file)
    text = configuration(path, model=args.model, data=args.data, reward=args.reward)
    if path.exists():
        raise ValueError(f"{path}: expected no such file, got one; remove it, or name another: tsopsd init FILE.yaml")
    with writes_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, [text.encode()])
    print(f"{path}: written. Next: tsopsd check {path}, then tsopsd train {path}")
    return exit_codes.DONE


def configuration(path: Path, *, model: str | None, data: str | None, reward: str | None) -> str:
    """Make the text of a configuration for the packaged model and task, or for one's own.

    Args:
        path: where it will stand: its comments name it.
        model: a Hugging Face directory; None: the packaged one, which knows the packaged task alone.
        data: a file of problems, a JSON object a line; None: the packaged task.
        reward: a verifier's name or `path/to/file.py:function`; None: `math`.

    Raises:
        ValueError: for a model without data or the reverse, a file without problems and answers, or a config.json of no
            known model.
    """
    if model is None and data is None:
        if reward is not None:
            raise ValueError(f"--reward {reward}: expected --model and --data too; the packaged task has its own")
        return _fill(path, TINY)
    if model is None or data is None:
        missing, given = ("--model DIR", "--data") if model is None else ("--data FILE.jsonl", "--model")
        raise ValueError(
            f"{given}: expected {missing} too: the packaged model and the packaged task know only each other"
        )
    problem, answer = _fields(Path(data))
    fields = f"problem_field: {problem}, answer_field: {answer}, " if (problem, answer) != ("problem", "answer") else ""
    source = f"{{name: jsonl, path: {_quoted(data)}, {fields}verifier: {_quoted(reward or 'math')}"
    prompt, response = _lengths(model)
    limit = f"max_prompt_tokens: {prompt}"
    own = {name: text.replace("RESPONSE", str(response)) for name, text in OWN.items()}
    return _fill(
        path,
        own
        | {
            "model": f"{{path: {_quoted(model)}, compute_dtype: bfloat16}}  # on a CPU float32 is faster",
            "data": f"{source}, {limit}, drop_longer: true}}  # chat: direct puts problems in the model's chat turn",
            "test": f"{source}, {limit}, first: 256}}  # better: problems that are not trained on",
        },
    )


def _lengths(model: str) -> tuple[int, int]:
    """Choose limits of prompt and response that fit a model; the usual ones for one that is not here yet."""
    from tsopsd_jax.model.hf_config import read_config  # transformers takes a second to import

    file = model_directory(model) / "config.json"
    if not file.is_file():
        return PROMPT_TOKENS, RESPONSE_TOKENS
    positions = read_config(file).max_position_embeddings
    response = min(RESPONSE_TOKENS, positions * 4 // 5)
    return min(PROMPT_TOKENS, positions - response), response


def _fill(path: Path, values: dict[str, str]) -> str:
    def lines(name: str) -> str:
        indent = "\n  " if name == "evaluation" else "\n    "
        return indent.join(values[name].split(", "))

    spread = {f"{name}_lines": lines(name) for name in ("evaluation", "batch", "reheat_batch")}
    return LAYOUT.format(file=path, **spread, **values)


def _quoted(text: str) -> str:
    """A scalar of YAML inside braces."""
    plain = all(c.isalnum() or c in "._-/~" for c in text)
    return text if plain and not text.startswith("-") else json.dumps(text)


def _fields(path: Path) -> tuple[str, str]:
    """Names of the problem and of the answer in the rows of a data file."""
    try:
        with path.expanduser().open(encoding="utf-8-sig") as file:
            row: Any = json.loads(next((line for line in file if line.strip()), "null"))
    except OSError as error:
        raise ValueError(f"--data {path}: expected a file to read, got: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--data {path}: expected a JSON object a line, got: {error}") from error
    keys = list(row) if isinstance(row, dict) else []
    found = [next((name for name in names if name in keys), None) for names in (PROBLEM_FIELDS, ANSWER_FIELDS)]
    problem, answer = found
    if problem is None or answer is None:
        raise ValueError(
            f"--data {path}: expected rows with a problem ({', '.join(PROBLEM_FIELDS)}) and an answer "
            f"({', '.join(ANSWER_FIELDS)}), got {', '.join(keys) or 'no object'} in the first; rename the columns, or "
            "set data.problem_field and data.answer_field yourself"
        )
    return problem, answer

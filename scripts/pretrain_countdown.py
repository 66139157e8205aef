"""Make the packaged model: a tiny Qwen3 pretrained on random valid derivations of the countdown-steps task.

    python scripts/pretrain_countdown.py --out tsopsd_jax/assets/countdown-tiny

Everything follows from --seed. About five minutes on two CPU cores. It trains with the library's own learner:
supervised learning is one more `Objective`.

    python scripts/pretrain_countdown.py --task runs/countdown-5 --numbers 5
    python scripts/pretrain_countdown.py --task runs/worked --worked

make another task in the place of the packaged one, of more numbers, or with working shown and further tries
(`small/worked.py`): a model of its own (`--task DIR`: DIR/model), problems beside it, DIR/train.jsonl and
DIR/test.jsonl, and DIR/task.json, for `scripts/reproduce_small.py --task DIR` or a configuration with data.name jsonl.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small import worked

from tsopsd_jax.data.countdown import EOS, NUMBERS, lengths, random_derivation, write_tokenizer
from tsopsd_jax.data.tokenizer import Tokenizer
from tsopsd_jax.learn.update import make_update
from tsopsd_jax.losses import token_logp
from tsopsd_jax.model import Qwen3, Qwen3Config, save_pretrained
from tsopsd_jax.objectives import Objective
from tsopsd_jax.types import Batch, LossOutput, Mean, TrainState

CONFIG = Qwen3Config(
    vocab_size=128,  # 109 used: padded, as the real Qwen3 vocabulary is
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=1e4,
    tie_word_embeddings=True,
    max_position_embeddings=128,
)


class Task(NamedTuple):
    """What is learnt: lengths in tokens, the verifier by its name in configurations, a document, and words that the
    packaged task does not know.

    `document(rng, held_out=)` draws (prompt, response without the end token, gold answer).
    """

    max_prompt_tokens: int
    max_response_tokens: int
    verifier: str
    document: Callable[..., tuple[str, str, str]]
    more_words: Sequence[str] = ()
    rows: Mapping[str, int] = {"train": 20_000, "test": 1_024}

    def write(self, folder: Path) -> None:
        """Write problems to train on and held-out ones, as JSON lines of problem and answer, and task.json."""
        folder.mkdir(parents=True, exist_ok=True)
        for split, seed in (("train", 17), ("test", 18)):
            rng, answers = np.random.default_rng(seed), {}
            while len(answers) < self.rows[split]:
                prompt, _, answer = self.document(rng, held_out=split == "test")
                answers[prompt] = answer
            lines = (json.dumps({"problem": prompt, "answer": answer}) + "\n" for prompt, answer in answers.items())
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        facts = {"max_prompt_tokens": self.max_prompt_tokens, "max_response_tokens": self.max_response_tokens}
        (folder / "task.json").write_text(json.dumps(facts | {"verifier": self.verifier}) + "\n", encoding="utf-8")


def countdown_of(numbers: int) -> Task:
    """The packaged task, with so many numbers."""
    return Task(*lengths(numbers), "countdown", functools.partial(random_derivation, numbers=numbers))


WORKED = Task(
    worked.MAX_PROMPT_TOKENS,
    worked.MAX_RESPONSE_TOKENS,
    f"{Path(worked.__file__).resolve()}:{worked.verify.__name__}",
    worked.random_document,
    (worked.REST, worked.AGAIN),
)


def cross_entropy() -> Objective:
    """Maximum likelihood of the response tokens."""

    def stats(logits, tokens):
        return {"logp": token_logp(logits, tokens)}

    def loss(stats, batch):
        nll = Mean.of(-stats["logp"], batch.mask)
        return LossOutput(loss=nll, metrics={"loss/cross_entropy_nats": nll})

    return Objective(stats, loss)


def make_batch(rng: np.random.Generator, tokenizer: Tokenizer, rows: int, task: Task) -> Batch:
    """Random derivations as a batch; loss on the response and its end token only."""
    length = task.max_prompt_tokens + task.max_response_tokens
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row in range(rows):
        prompt, response, _ = task.document(rng)
        head, tail = tokenizer.encode(prompt), [*tokenizer.encode(response), tokenizer.stop_ids[0]]
        tokens[row, : len(head) + len(tail)] = head + tail
        mask[row, len(head) : len(head) + len(tail)] = True
    zeros = np.zeros(tokens.shape, np.float32)
    return Batch.of(tokens=tokens, mask=mask, advantage=zeros, old_logp=zeros)


def main() -> None:
    """Pretrain the model, and write the task's problems where they are asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, help="the model's directory")
    place.add_argument("--task", type=Path, help="a directory for the model and its problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=256)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--numbers", type=int, default=NUMBERS, help="of a problem")
    kind.add_argument("--worked", action="store_true", help="working shown, further tries, three to five numbers")
    parser.add_argument("--layers", type=int, default=CONFIG.num_hidden_layers)
    parser.add_argument("--width", type=int, default=CONFIG.hidden_size, help="hidden size; the rest is in proportion")
    args = parser.parse_args()
    out, task = args.out or args.task / "model", WORKED if args.worked else countdown_of(args.numbers)
    if args.task is not None:
        task.write(args.task)

    shape = dataclasses.replace(
        CONFIG,
        num_hidden_layers=args.layers,
        hidden_size=args.width,
        intermediate_size=CONFIG.intermediate_size * args.width // CONFIG.hidden_size,
    )
    model, rng = Qwen3(shape), np.random.default_rng(args.seed)
    params = model.init(jax.random.key(args.seed))
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(100, args.steps // 4), args.steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    update = jax.jit(make_update(model, cross_entropy(), optimizer), donate_argnums=0)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder, longest=task.max_prompt_tokens + task.max_response_tokens, more=task.more_words)
        # The model directory declares the end token as Hugging Face models do.
        end = Tokenizer.load(folder).backend.token_to_id(EOS)
        (Path(folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": end}) + "\n")
        tokenizer, began = Tokenizer.load(folder), time.monotonic()
        for step in range(1, args.steps + 1):
            state, output = update(state, make_batch(rng, tokenizer, args.rows, task))
            if step % 100 == 0 or step == 1:
                loss = float(output.metrics["loss/total"])
                print(f"step {step:5d}  cross-entropy {loss:.4f} nats  {time.monotonic() - began:.0f} s", flush=True)
        if out.exists():
            shutil.rmtree(out)
        save_pretrained(out, model, state.params, tokenizer_from=folder)
    size = sum(f.stat().st_size for f in out.iterdir())
    print(f"wrote {out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

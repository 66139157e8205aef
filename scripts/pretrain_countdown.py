"""Make the packaged model: a tiny Qwen3 pretrained on random valid derivations of the countdown-steps task.

    python scripts/pretrain_countdown.py --out tsopsd_jax/assets/countdown-tiny

Everything follows from --seed. About five minutes on two CPU cores. It trains with the library's own learner:
supervised learning is one more `Objective`.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tsopsd_jax.data.countdown import EOS, MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS, random_derivation, write_tokenizer
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


def cross_entropy() -> Objective:
    """Maximum likelihood of the response tokens."""

    def stats(logits, tokens):
        return {"logp": token_logp(logits, tokens)}

    def loss(stats, batch):
        nll = Mean.of(-stats["logp"], batch.mask)
        return LossOutput(loss=nll, metrics={"loss/cross_entropy_nats": nll})

    return Objective(stats, loss)


def make_batch(rng: np.random.Generator, tokenizer: Tokenizer, rows: int) -> Batch:
    """Random derivations as a batch; loss on the response and its end token only."""
    length = MAX_PROMPT_TOKENS + MAX_RESPONSE_TOKENS
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row in range(rows):
        prompt, response, _ = random_derivation(rng)
        head, tail = tokenizer.encode(prompt), [*tokenizer.encode(response), tokenizer.stop_ids[0]]
        tokens[row, : len(head) + len(tail)] = head + tail
        mask[row, len(head) : len(head) + len(tail)] = True
    zeros = np.zeros(tokens.shape, np.float32)
    return Batch.of(tokens=tokens, mask=mask, advantage=zeros, old_logp=zeros)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=256)
    args = parser.parse_args()

    model, rng = Qwen3(CONFIG), np.random.default_rng(args.seed)
    params = model.init(jax.random.key(args.seed))
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, args.steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    update = jax.jit(make_update(model, cross_entropy(), optimizer), donate_argnums=0)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder)
        # The model directory declares the end token as Hugging Face models do.
        end = Tokenizer.load(folder).backend.token_to_id(EOS)
        (Path(folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": end}) + "\n")
        tokenizer, began = Tokenizer.load(folder), time.monotonic()
        for step in range(1, args.steps + 1):
            state, out = update(state, make_batch(rng, tokenizer, args.rows))
            if step % 100 == 0 or step == 1:
                loss = float(out.metrics["loss/total"])
                print(f"step {step:5d}  cross-entropy {loss:.4f} nats  {time.monotonic() - began:.0f} s", flush=True)
        if args.out.exists():
            shutil.rmtree(args.out)
        save_pretrained(args.out, model, state.params, tokenizer_from=folder)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"wrote {args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

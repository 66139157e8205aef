"""What analyses of two policies on given responses share: their options, and both policies on one mesh."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tsopsd_jax.analysis.batches import GivenBatch, batches_of
from tsopsd_jax.analysis.distributions import OnMesh
from tsopsd_jax.commands.generate import digest
from tsopsd_jax.commands.policies import PolicySource, add_policies, policy_of
from tsopsd_jax.commands.responses import Responses, read_responses
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.distributed.sharding import make_mesh, row_multiple
from tsopsd_jax.model.hf_config import read_config


def add_computing(parser: argparse.ArgumentParser, *, tokens_at_once: int) -> None:
    """Add which responses are looked at, and how policies are computed; `tokens_at_once` is a default."""
    parser.add_argument(
        "--responses", type=Path, required=True, metavar="FILE", help="JSON lines of tsopsd generate or eval"
    )
    parser.add_argument("--first", type=int, metavar="N", help="the first N responses only")
    parser.add_argument("--chat", help="the model's chat turn around prompts without ids: none, direct, thinking")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: the run's; of a model float32 on a CPU, else bfloat16",
    )
    parser.add_argument("--tensor", type=int, default=1, help="devices that share one copy of the weights; default 1")
    parser.add_argument(
        "--tokens-at-once",
        type=int,
        default=tokens_at_once,
        help=f"positions of a forward pass; default {tokens_at_once}",
    )
    parser.add_argument("--tile-tokens", type=int, default=1024, help="tokens whose logits exist at once; default 1024")


def add_pair(parser: argparse.ArgumentParser, *, tokens_at_once: int = 16384) -> None:
    """Add both policies, and what `add_computing` adds."""
    add_policies(parser)
    add_computing(parser, tokens_at_once=tokens_at_once)


def on_mesh(policy: PolicySource, mesh: jax.sharding.Mesh) -> OnMesh:
    """Load a policy onto the mesh."""
    model, params = policy.load(mesh)
    return OnMesh(dataclasses.replace(model, mesh=mesh), params)


def check_computing(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers that are out of range."""
    for name in ("first", "tensor", "tokens_at_once", "tile_tokens"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")


def responses_for(policy: PolicySource, args: argparse.Namespace) -> Responses:
    """Read the file of `--responses` with the policy's tokenizer."""
    tokenizer = Tokenizer.load(policy.folder, chat=policy.chat)
    vocab_size = read_config(policy.folder / "config.json").vocab_size
    return read_responses(args.responses, tokenizer, vocab_size=vocab_size, first=args.first)


class Pair(NamedTuple):
    """Two policies on one mesh, and the responses at which they are compared."""

    before: OnMesh
    after: OnMesh
    responses: Responses
    mesh: jax.sharding.Mesh
    tokens_at_once: int
    facts: dict[str, Any]
    settings: dict[str, Any]
    """All that the measures depend on, but for an analysis's own options."""

    def parts(self, table: LiveTable, doing: str = "comparing") -> Iterator[GivenBatch]:
        """The responses in batches; the table shows how many went by."""
        limit = min(each.model.config.max_position_embeddings for each in (self.before, self.after))
        answered, seen = self.responses.answered, 0
        multiple = row_multiple(self.mesh)
        for part in batches_of(answered, tokens_at_once=self.tokens_at_once, multiple=multiple, limit=limit):
            table.status(f"{doing}: {seen} of {len(answered)} responses")
            yield part
            seen += int((part.which >= 0).sum())


def open_pair(args: argparse.Namespace) -> Pair:
    """Load the policies and read the responses that the options of `add_pair` name.

    Raises:
        ValueError: what is not there, or policies of different vocabularies.
    """
    check_computing(args)
    before, after = (policy_of(text, dtype=args.dtype, chat=args.chat) for text in (args.before, args.after))
    responses = responses_for(after, args)
    mesh = make_mesh(tensor=args.tensor)
    policies = on_mesh(before, mesh), on_mesh(after, mesh)
    sizes = [each.model.vocab_size for each in policies]
    if sizes[0] != sizes[1]:
        raise ValueError(f"--after: expected the vocabulary of --before, {sizes[0]} entries, got {sizes[1]}")
    facts = {
        "before": before.name,
        "after": after.name,
        "responses": len(responses.answered),
        "encoded_again": responses.encoded_again,
    }
    settings = {
        "policies": [{**each.source, "dtype": each.dtype} for each in (before, after)],
        "responses_sha256": digest([f"{list(one.prompt)} {list(one.response)}" for one in responses.answered]),
        "tokens_at_once": args.tokens_at_once,
        "rows": row_multiple(mesh),
    }
    return Pair(*policies, responses, mesh, args.tokens_at_once, facts, settings)

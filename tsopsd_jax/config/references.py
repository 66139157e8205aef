"""The models that a run's phases are compared with: their directories, checked before anything is written."""

from collections.abc import Callable
from pathlib import Path

import jax

from tsopsd_jax.config.schema import Config
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.distributed.sharding import tree_shardings
from tsopsd_jax.learn.reference import ReferenceSource
from tsopsd_jax.model import Qwen3, load_pretrained
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.model.packaged import model_directory
from tsopsd_jax.train.phase import START
from tsopsd_jax.types import PyTree


def reference_folders(config: Config) -> dict[str, Path]:
    """Name -> directory of every other model that a phase is compared with."""
    named = (phase.reference for phase in config.phases)
    return {name: model_directory(name) for name in named if name not in ("none", START)}


def reference_model(folder: Path, model: Qwen3) -> Qwen3:
    """Make the functions of the model in `folder`, on the policy's mesh and in its compute dtype.

    Raises:
        ValueError: its vocabulary has another size than the policy's.
    """
    shape = read_config(folder / "config.json")
    if shape.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"reference: expected a model of the policy's {model.config.vocab_size:,} vocabulary entries, got "
            f"{shape.vocab_size:,} in {folder}; name one of the same family"
        )
    return Qwen3(shape, compute_dtype=model.compute_dtype, mesh=model.mesh)


def find_references(
    config: Config, model: Qwen3, mesh: jax.sharding.Mesh, tokenizer: Tokenizer
) -> dict[str, ReferenceSource]:
    """Check every other model that a phase is compared with; nothing is loaded yet.

    Raises:
        ValueError: no such directory; another vocabulary; too few positions; a size that does not divide over the mesh.
    """
    found = {}
    for name, folder in reference_folders(config).items():
        if not folder.is_dir():
            raise ValueError(f"reference: expected a Hugging Face model directory, got {folder}: no such directory")
        other, theirs = reference_model(folder, model), Tokenizer.load(folder)
        if theirs.backend.get_vocab(with_added_tokens=True) != tokenizer.backend.get_vocab(with_added_tokens=True):
            raise ValueError(f"reference: expected the policy's tokenizer in {folder}, got one of other tokens or ids")
        for phase in config.phases:
            width = config.data.max_prompt_tokens + phase.max_response_tokens
            if phase.reference == name and width > other.config.max_position_embeddings:
                raise ValueError(
                    f"phase {phase.name!r}: reference: prompt and response may take {width} tokens, more than the "
                    f"{other.config.max_position_embeddings} positions of {folder}; lower max_response_tokens"
                )
        tree_shardings(other.param_axes(), other.param_shapes(), mesh)  # names what does not divide
        found[name] = ReferenceSource(other, _loading(folder, other))
    return found


def _loading(folder: Path, model: Qwen3) -> Callable[[], PyTree]:
    return lambda: load_pretrained(folder, dtype=model.compute_dtype, mesh=model.mesh)[1]

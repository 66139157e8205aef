"""`tsopsd convert`: export a run's policy as a Hugging Face directory, and publish it."""

import argparse
from pathlib import Path

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.commands.hub import open_hub, push_to_hub
from tsopsd_jax.commands.model_card import EXPORTED, BaseModel, base_licence, model_card
from tsopsd_jax.config import DTYPES
from tsopsd_jax.config.places import model_folder
from tsopsd_jax.config.restore import resolved_config, restore_run
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.model import save_pretrained
from tsopsd_jax.model.hf import CARD
from tsopsd_jax.rundir import object_store
from tsopsd_jax.rundir.log import read_evaluations, read_metrics


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not hold anything else")
    parser.add_argument("--step", type=int, help="checkpoint to export; default: the latest")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the tensors; default bfloat16"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload it: NAME or OWNER/NAME (hf auth login)")
    parser.add_argument("--private", action="store_true", help="the repository is made private")


def run(args: argparse.Namespace) -> int:
    """Export, and print where; then upload what was exported, if that is asked for."""
    repo: str | None = args.push_to_hub
    if args.private and repo is None:
        raise ValueError("--private: expected with --push-to-hub REPO; leave it out")
    api = None if repo is None else open_hub(repo)
    with object_store.opened(args.run_dir) as folder:
        step = export(folder, args.out, step=args.step, dtype=args.dtype)
    print(f"{args.out}: the policy after step {step}, in {args.dtype}")
    if repo is not None:
        print(push_to_hub(api, args.out, repo, private=args.private))
    return exit_codes.DONE


def _check_out(out: Path, base: Path) -> None:
    """Raise if `out` is the model that the run began with, or holds a model that is no export."""
    if out.resolve() == base.resolve():
        raise ValueError(f"{out} is the model that the run began with; choose another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / CARD).is_file() or EXPORTED not in (out / CARD).read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{out} is not empty and is no export of `tsopsd convert`; choose another --out")


def export(run_dir: Path, out: Path, *, step: int | None, dtype: str) -> int:
    """Write the policy of a checkpoint (default: the latest) as a Hugging Face directory with a model card.

    Returns:
        The step of the checkpoint.

    Raises:
        ValueError: no run, no such checkpoint, or a directory that holds something else.
    """
    config = resolved_config(run_dir)
    folder = model_folder(config)
    _check_out(out, folder)
    model, state = restore_run(run_dir, step=step, mesh=make_mesh(), compute_dtype="float32")
    taken = int(state.step)
    card = model_card(
        config,
        base=BaseModel.of(folder),
        licence=base_licence(folder),
        step=taken,
        dtype=dtype,
        metrics=read_metrics(run_dir),
        evaluations=read_evaluations(run_dir),
    )
    stop_ids = Tokenizer.load(folder, chat=config.data.chat).stop_ids
    save_pretrained(out, model, state.params, dtype=DTYPES[dtype], tokenizer_from=folder, stop_ids=stop_ids, card=card)
    return taken

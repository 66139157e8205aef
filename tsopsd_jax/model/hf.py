"""Hugging Face model directories (config.json + safetensors) in and out of the model's parameter tree.

Tensors move one at a time: loading fills one device's part of one parameter on the host, reading only the
bytes that it needs; saving fetches one tensor, writes it, and forgets it.
"""

import contextlib
import functools
import gc
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open

from tsopsd_jax.distributed import processes
from tsopsd_jax.distributed.sharding import tree_shardings
from tsopsd_jax.huggingface import read_json
from tsopsd_jax.model.hf_config import config_json, read_config
from tsopsd_jax.model.hf_layout import EMBED, HEAD, STORED_DTYPES, Stored, cast, stored_tensors
from tsopsd_jax.model.qwen3 import Qwen3
from tsopsd_jax.types import PyTree
from tsopsd_jax.writing import writes_to

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"
CARRIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    GENERATION_CONFIG,
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DERIVED = "rotary_emb.inv_freq"  # of old checkpoints: the rotation's frequencies, which follow from config.json
_PRODUCER = "tsopsd_jax"  # marks the weight files that this module wrote, and therefore may replace


# -------------------------------------------------------------------------------------------------- reading


def _open(path: Path, stack: contextlib.ExitStack):
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such file, but {INDEX} names it; fetch the missing shard")
        return stack.enter_context(safe_open(path, framework="numpy"))
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt safetensors file ({error}); fetch it again") from None
    except OSError as error:  # a name that no file system takes, no rights
        raise ValueError(
            f"{path.parent}: cannot open {path.name[:80]} ({error.strerror}); fetch the directory again"
        ) from None


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Lazy slices of every tensor in the directory's weight files, by name."""
    if (folder / WEIGHTS).is_file():
        file = _open(folder / WEIGHTS, stack)
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither")
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(s, str) and Path(s).name == s for s in where.values()):
        raise ValueError(f"{folder / INDEX}: expected weight_map to be an object of tensor name -> file name")
    files = {shard: _open(folder / shard, stack) for shard in sorted(set(where.values()))}
    held = {shard: set(file.keys()) for shard, file in files.items()}
    for name, shard in where.items():
        if name not in held[shard]:
            raise ValueError(f"{folder / shard}: tensor {name} is missing, but {INDEX} places it there")
    for shard, names in held.items():
        for name in sorted(names):
            if name not in where and not name.endswith(_DERIVED):
                raise ValueError(f"{folder / shard}: surplus tensor {name}, which {INDEX} does not list")
            if name in where and where[name] != shard:
                raise ValueError(f"{folder / shard}: tensor {name} is in {where[name]} too, where {INDEX} places it")
    return {name: files[shard].get_slice(name) for name, shard in where.items()}


def check_tensors(model: Qwen3, stored: dict[str, Any], folder: Path) -> None:
    """Names, shapes and dtypes against the config, before any weight is read."""
    expected = {t.layout.name: t.layout.stored_shape(t.shape) for t in stored_tensors(model)}
    if model.config.tie_word_embeddings and HEAD.name in stored:
        expected[HEAD.name] = expected[EMBED.name]
    if missing := [name for name in expected if name not in stored]:
        raise ValueError(f"{folder}: missing tensor {missing[0]} ({len(missing)} in all); config.json implies it")
    if surplus := [name for name in stored if name not in expected and not name.endswith(_DERIVED)]:
        raise ValueError(f"{folder}: surplus tensor {surplus[0]} ({len(surplus)} in all), unknown to config.json")
    for name, shape in expected.items():
        if (got := tuple(stored[name].get_shape())) != shape:
            raise ValueError(f"{folder}: tensor {name}: expected shape {shape} from config.json, got {got}")
        if (kind := stored[name].get_dtype()) not in STORED_DTYPES:
            raise ValueError(f"{folder}: tensor {name}: expected a dtype among {list(STORED_DTYPES)}, got {kind}")
    if model.config.tie_word_embeddings and HEAD.name in stored:
        vocab, rows = model.config.vocab_size, max(1, 2**24 // model.config.hidden_size)
        for at in range(0, vocab, rows):
            part = slice(at, min(at + rows, vocab))
            if not processes.is_mine(at // rows):
                continue
            if not np.array_equal(stored[EMBED.name][part], stored[HEAD.name][part]):
                raise ValueError(
                    f"{folder}: {HEAD.name} differs from {EMBED.name}, but config.json ties them; "
                    "set tie_word_embeddings to false"
                )


def _read(tensors: list[Stored], stored: dict[str, Any], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """One part of one parameter; a stacked one is filled layer by layer."""

    def piece(tensor: Stored, index: tuple[slice, ...]) -> np.ndarray:
        value = tensor.layout.read(stored[tensor.layout.name], tensor.shape, index)
        return cast(value, dtype, tensor.layout.name)

    if tensors[0].layer is None:
        return np.ascontiguousarray(piece(tensors[0], index))
    out = np.empty([i.stop - i.start for i in index], dtype)
    for row, tensor in enumerate(tensors[index[0]]):
        out[row] = piece(tensor, index[1:])
    return out


def _to_devices(part: np.ndarray, devices: list) -> list[jax.Array]:
    arrays = jax.block_until_ready([jax.device_put(part, device) for device in devices])
    del part
    # JAX lets go of a transferred buffer in its garbage collection hook; without this the next part would lie
    # beside the last one.
    gc.collect(0)
    return arrays


def _place(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: Sharding | None
) -> jax.Array:
    """An array from this process's parts: each distinct part is read once and leaves before the next."""
    if sharding is None:
        return _to_devices(read(tuple(slice(0, n) for n in shape)), [None])[0]
    holders = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        # Bounds rather than slices, which Python 3.11 cannot hash.
        holders[tuple(i.indices(n)[:2] for i, n in zip(index, shape, strict=True))].append(device)
    parts = []
    for bounds, devices in holders.items():
        parts += _to_devices(read(tuple(slice(*b) for b in bounds)), devices)
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def load_pretrained(path: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> tuple[Qwen3, PyTree]:
    """Load the model and parameters of a Hugging Face directory; parameters and computation in `dtype`.

    Args:
        path: a local directory with config.json and model.safetensors (or an index and its shards).
        dtype: float32, bfloat16 or float16.
        mesh: where the parameters are placed, by `TRAIN_RULES`; each process reads only its own byte ranges.

    Raises:
        ValueError: a directory, config or weight file that is absent, damaged, of another architecture, or at
            odds with the config; the message names the file or the tensor.
    """
    folder, target = Path(path), np.dtype(dtype)
    if target not in STORED_DTYPES.values():
        raise ValueError(f"load_pretrained: expected dtype float32, bfloat16 or float16, got {target.name}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory; expected a local Hugging Face model directory")
    model = Qwen3(read_config(folder / "config.json"), compute_dtype=jnp.dtype(target))
    flat, treedef = jax.tree_util.tree_flatten_with_path(model.param_shapes())
    shardings = [None] * len(flat)
    if mesh is not None:
        shardings = jax.tree.leaves(tree_shardings(model.param_axes(), model.param_shapes(), mesh))
    with contextlib.ExitStack() as stack:
        stored = open_tensors(folder, stack)
        check_tensors(model, stored, folder)
        layers: dict[tuple[str, ...], list[Stored]] = defaultdict(list)
        for tensor in stored_tensors(model):
            layers[tensor.path].append(tensor)
        leaves = []
        for (path_of, leaf), sharding in zip(flat, shardings, strict=True):
            read = functools.partial(_read, layers[tuple(entry.key for entry in path_of)], stored, target)
            try:
                leaves.append(_place(read, leaf.shape, sharding))
            except ValueError as error:  # of one tensor's numbers
                raise ValueError(f"{folder}: {error}") from error
    return model, jax.tree.unflatten(treedef, leaves)


# -------------------------------------------------------------------------------------------------- writing


@functools.partial(jax.jit, static_argnames="sharding")
def _row(array, i, sharding):
    row = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
    return row if sharding is None else jax.lax.with_sharding_constraint(row, sharding)


@functools.partial(jax.jit, static_argnames="sharding")
def _gather(array, sharding):
    return jax.lax.with_sharding_constraint(array, sharding)


def fetch_tensor(tensor: Stored, params: PyTree) -> np.ndarray:
    """One tensor on the host, in our layout. Collective where the parameter spans processes."""
    array = functools.reduce(lambda tree, key: tree[key], tensor.path, params)
    spans = isinstance(array, jax.Array) and not array.is_fully_addressable
    everywhere = None
    if spans:
        assert isinstance(array.sharding, NamedSharding), array.sharding
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    if tensor.layer is not None:
        array = _row(array, np.int32(tensor.layer), everywhere)
    elif spans:
        array = _gather(array, everywhere)
    return np.asarray(array.addressable_data(0) if spans else array)


def _write_safetensors(path: Path, entries: list[tuple[str, tuple[int, ...]]], dtype: np.dtype, values) -> None:
    """The safetensors format, tensor by tensor: u64 header size, JSON header padded to 8 bytes, the data."""
    kind = {v: k for k, v in STORED_DTYPES.items()}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "producer": _PRODUCER}}
    end = 0
    for name, shape in entries:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in zip(entries, values, strict=True):
            file.write(value.view(np.uint8).data)


def _shards(model: Qwen3, itemsize: int, max_shard_bytes: int) -> dict[str, list[Stored]]:
    """Tensors grouped into files, by name, of at most `max_shard_bytes` (a larger tensor has a file of its own)."""
    groups: list[list[Stored]] = [[]]
    room = max_shard_bytes
    for tensor in stored_tensors(model):
        size = math.prod(tensor.shape) * itemsize
        if groups[-1] and size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _check_params(model: Qwen3, params: PyTree) -> np.dtype:
    """Raise unless `params` fits the model; its dtype, or float32 where leaves differ."""
    expected = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(model.param_shapes())[0]
    }
    got = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    if odd := sorted(expected.keys() ^ got.keys()):
        side = "missing from" if odd[0] in expected else "unknown in"
        raise ValueError(f"save_pretrained: {odd[0]} is {side} the parameters; expected those of model.init")
    for name, shape in expected.items():
        if got[name].shape != shape:
            raise ValueError(f"save_pretrained: params{name}: expected shape {shape}, got {got[name].shape}")
    dtypes = {np.dtype(leaf.dtype) for leaf in got.values()}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _check_replaceable(folder: Path) -> None:
    """Raise unless `folder` is absent, empty, or holds nothing but what this module wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a directory to save into, got a file")
    known = (*CARRIED_FILES, CARD, "config.json", INDEX, "model*.safetensors")
    for file in sorted(folder.iterdir()):
        ours = any(file.match(pattern) for pattern in known) and file.is_file()
        if file.name == CARD:  # ours beside our weights; alone it may be anybody's
            ours = any(folder.glob("model*.safetensors"))
        if ours and file.suffix == ".safetensors":
            with contextlib.ExitStack() as stack:
                ours = (_open(file, stack).metadata() or {}).get("producer") == _PRODUCER
        if not ours:
            raise ValueError(
                f"{folder}: not empty, and {file.name} was not written by save_pretrained; "
                "choose another directory or remove it"
            )


def _carried(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """The files to copy along from a model directory, and the special token ids of its config."""
    files = sorted({file for pattern in CARRIED_FILES for file in folder.glob(pattern) if file.is_file()})
    if not any(file.name != GENERATION_CONFIG for file in files):
        raise ValueError(f"{folder}: expected tokenizer files such as {CARRIED_FILES[0]}, found none")
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return files, {key: raw[key] for key in _TOKEN_IDS if key in raw}


def _name_stops(path: Path, stop_ids: list[int]) -> None:
    raw = read_json(path) if path.is_file() else {}
    named = raw.get("eos_token_id")
    if stop_ids != (named if isinstance(named, list) else [named]):
        _write_json(path, raw | {"eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_pretrained(
    path: str | Path,
    model: Qwen3,
    params: PyTree,
    *,
    dtype: Any = None,
    tokenizer_from: str | Path | None = None,
    stop_ids: Sequence[int] | None = None,
    card: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Save a Hugging Face directory that transformers loads as it is, whole from the moment it appears.

    Every process of a multi-process run must call it; process 0 writes.

    Args:
        path: a new or empty directory, or one that this function wrote, which is replaced as a whole.
        dtype: of the stored weights; None keeps that of `params`.
        tokenizer_from: a directory whose tokenizer files, generation_config.json and special ids come along.
        stop_ids: ids that end responses, for generation_config.json; None: it is copied as it is.
        card: text of README.md; None: there is none.
        max_shard_bytes: weights beyond this are split into several files with an index.

    Raises:
        ValueError: parameters that do not fit the model, a directory of someone else's, no tokenizer files.
        WriteError: it could not be written; what was there before is there still.
    """
    folder, native = Path(path).resolve(), _check_params(model, params)
    target = native if dtype is None else np.dtype(dtype)
    if target not in STORED_DTYPES.values():
        raise ValueError(f"save_pretrained: expected dtype float32, bfloat16 or float16, got {target.name}")
    if max_shard_bytes <= 0:
        raise ValueError(f"save_pretrained: expected max_shard_bytes above 0, got {max_shard_bytes}")
    _check_replaceable(folder)
    files, token_ids = ([], {}) if tokenizer_from is None else _carried(Path(tokenizer_from))
    shards = _shards(model, target.itemsize, max_shard_bytes)

    def value(tensor: Stored) -> np.ndarray:
        return cast(tensor.layout.to_stored(fetch_tensor(tensor, params)), target, tensor.layout.name)

    with jax.transfer_guard("allow"):
        if jax.process_index() != 0:
            for tensor in stored_tensors(model):
                fetch_tensor(tensor, params)
        else:
            with writes_to(folder), _replacing(folder) as fresh:
                for name, shard in shards.items():
                    entries = [(t.layout.name, t.layout.stored_shape(t.shape)) for t in shard]
                    _write_safetensors(fresh / name, entries, target, map(value, shard))
                if len(shards) > 1:
                    _write_json(fresh / INDEX, _index(shards, target.itemsize))
                for file in files:
                    shutil.copyfile(file, fresh / file.name)
                if stop_ids is not None:
                    _name_stops(fresh / GENERATION_CONFIG, list(stop_ids))
                if card is not None:
                    (fresh / CARD).write_text(card, encoding="utf-8")
                _write_json(fresh / "config.json", config_json(model.config, dtype_name=target.name) | token_ids)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_pretrained")


def _index(shards: dict[str, list[Stored]], itemsize: int) -> dict[str, Any]:
    size = sum(math.prod(t.shape) for shard in shards.values() for t in shard) * itemsize
    where = {t.layout.name: name for name, shard in shards.items() for t in shard}
    return {"metadata": {"total_size": size}, "weight_map": where}


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A fresh directory that takes the place of `folder` if the block ends well, and vanishes if not."""
    fresh = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)

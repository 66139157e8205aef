"""A step's memory and traffic by formula: for GPUs, which are not compiled for, and to choose what to compile.

Traffic is what this layout must move: weights gathered over `fsdp` in every pass of every micro-batch, their gradients
scattered; activations summed over `tensor`; gradients over `data`. Temporaries are the largest things alive at once, as
the compiler's own figures for TPUs show them.
"""

from tsopsd_jax.hardware.work import UpdateShape, cache_bytes_per_token, layer_weights, model_weights
from tsopsd_jax.plan.case import Case, Part
from tsopsd_jax.plan.collectives import Moved


def estimate(case: Case, micro_batches: int) -> list[Part]:
    """The parts of a step, its update cut into `micro_batches`."""
    works = case.works(micro_batches)
    held = {
        "view": _view(case),
        "prefill": _prefill(case),
        "decode": _decode(case),
        "update": update(case, micro_batches),
    }
    traffic = {
        "view": _view_moved(case),
        "prefill": _prefill_moved(case),
        "decode": _decode_moved(case),
        "update": _update_moved(case, micro_batches),
    }
    if case.one_program:
        most = max(sum(kinds.values()) for kinds in held.values())
        held = {"reheat_step": case.resident | {"temporaries": most - sum(case.resident.values())}}
        traffic = {"reheat_step": [moved for part in traffic.values() for moved in part]}
    updates, decodes = ("update", "reheat_step"), ("decode", "reheat_step")
    return [
        Part(
            name,
            case.names,
            held[name],
            works[name],
            tuple(traffic[name]),
            "formula",
            micro_batches=micro_batches if name in updates else None,
            updates=case.phase.updates_per_step if name in updates else None,
            steps=case.steps if name in decodes else None,
        )
        for name in held
    ]


def _ring(kind: str, axis: str, n: int, whole_bytes: float, count: float) -> list[Moved]:
    """`count` collectives, each of an array of `whole_bytes`, over an axis of n devices."""
    share = (2 if kind == "all-reduce" else 1) * (n - 1) / n
    return [Moved(kind, axis, count * whole_bytes * share, count)] if n > 1 else []


def _view(case: Case) -> dict[str, int]:
    layer = layer_weights(case.model.config) * 4 // case.split.tensor
    return case.resident | {"rollout view": case.view_bytes, "temporaries": 2 * layer}


def _view_moved(case: Case) -> list[Moved]:
    layers = case.model.config.num_hidden_layers
    return _ring("all-gather", "fsdp", case.split.fsdp, case.view_bytes / layers, layers)


def _activations(case: Case, positions: float) -> int:
    """Bytes of one layer's activations, in the compute dtype: residual stream, normed input, heads, feed-forward."""
    c, t = case.model.config, case.split.tensor
    wide = 4 * c.hidden_size + (2 * c.num_attention_heads * c.head_dim + 3 * c.intermediate_size) / t
    return int(positions * wide * case.itemsize)


def _prefill(case: Case) -> dict[str, int]:
    c, split = case.model.config, case.split
    _, rows, width = case.prefill
    positions = rows * width / split.rows
    # Its own cache, heads over `tensor`, each prompt on the devices that continue it.
    store = cache_bytes_per_token(c, case.itemsize) * positions / split.tensor
    temporaries = int(store) + _activations(case, positions)
    return case.resident | {"rollout view": case.view_bytes, "cache": case.cache_bytes, "temporaries": temporaries}


def _prefill_moved(case: Case) -> list[Moved]:
    c, split = case.model.config, case.split
    calls, rows, width = case.prefill
    hidden = rows * width / split.rows * c.hidden_size * case.itemsize
    return _ring("all-reduce", "tensor", split.tensor, hidden, 2 * c.num_hidden_layers * calls)


def _decode(case: Case) -> dict[str, int]:
    c, split = case.model.config, case.split
    logits = case.slots / split.rows * c.vocab_size / split.tensor * 4
    temporaries = int(3 * logits) + _activations(case, case.slots / split.rows)
    return case.resident | {"rollout view": case.view_bytes, "cache": case.cache_bytes, "temporaries": temporaries}


def _decode_moved(case: Case) -> list[Moved]:
    c, split = case.model.config, case.split
    hidden = case.slots / split.rows * c.hidden_size * case.itemsize
    return _ring("all-reduce", "tensor", split.tensor, hidden, (2 * c.num_hidden_layers + 1) * case.steps)


def update(case: Case, micro_batches: int) -> dict[str, int]:
    """Memory of the update by kind."""
    c, split, phase = case.model.config, case.split, case.phase
    d, t = c.hidden_size, split.tensor
    gradients = case.resident["parameters"]
    positions = phase.update_rows / micro_batches / split.rows * case.width
    inside = _activations(case, positions)
    kept = {"full": 1, "dots": 4, "none": 8}[case.model.remat] * d
    saved = c.num_hidden_layers * positions * kept * case.itemsize
    unembed = d * c.vocab_size / t
    tile = min(case.tile_tokens, positions) * c.vocab_size / t * 4
    layer = layer_weights(c) / t * case.itemsize
    # The sum over micro-batches stands beside the last one's gradients; a layer's activations and their gradients; two
    # layers' gathered weights; the unembedding gathered, and its gradient in float32; a tile's logits and their
    # gradient.
    temporaries = (micro_batches > 1) * gradients + saved + 2 * inside + 2 * layer
    temporaries += unembed * (case.itemsize + 4) + 2 * tile
    if phase.reference is not None:  # its logits of a tile, and its unembedding gathered
        other = (case.reference_model or case.model).config
        temporaries += tile + other.hidden_size * other.vocab_size / t * case.itemsize
    return case.resident | {"gradients": gradients, "temporaries": int(temporaries)}


def _update_moved(case: Case, micro_batches: int) -> list[Moved]:
    c, split, u = case.model.config, case.split, case.update_shape(micro_batches)
    again, layers = u.remat == "full", c.num_hidden_layers
    n = case.phase.updates_per_step * u.micro_batches
    layer = layer_weights(c) / split.tensor * case.itemsize
    unembed = c.hidden_size * c.vocab_size / split.tensor
    hidden = u.rows / split.rows * u.width * c.hidden_size * case.itemsize
    shard = 4 * model_weights(c) / (split.fsdp * split.tensor)
    return [
        *_reference_moved(case, u),
        *_ring("all-gather", "fsdp", split.fsdp, layer, n * layers * (2 + again)),
        *_ring("all-gather", "fsdp", split.fsdp, unembed * case.itemsize, n),
        *_ring("reduce-scatter", "fsdp", split.fsdp, layer, n * layers),
        *_ring("reduce-scatter", "fsdp", split.fsdp, unembed * 4, n),
        *_ring("all-reduce", "tensor", split.tensor, hidden, n * layers * (4 + again)),
        *_ring("all-reduce", "data", split.data, shard, n),
    ]


def _reference_moved(case: Case, u: UpdateShape) -> list[Moved]:
    """Bytes of the reference's forward pass: its weights gathered, its activations summed."""
    if case.phase.reference is None:
        return []
    c, split, n = (case.reference_model or case.model).config, case.split, u.micro_batches
    layer, unembed = layer_weights(c) / split.tensor, c.hidden_size * c.vocab_size / split.tensor
    hidden = u.rows / split.rows * u.width * c.hidden_size * case.itemsize
    return [
        *_ring("all-gather", "fsdp", split.fsdp, layer * case.itemsize, n * c.num_hidden_layers),
        *_ring("all-gather", "fsdp", split.fsdp, unembed * case.itemsize, n),
        *_ring("all-reduce", "tensor", split.tensor, hidden, n * c.num_hidden_layers * 2),
    ]

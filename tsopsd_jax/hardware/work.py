"""What a step must compute and read, counted by hand from shapes (the compiler counts a loop's body once).

Floating-point operations: a product of [a, b] and [b, c] is 2 a b c; norms, softmaxes and rotations are left out (under
1 % at these sizes). Bytes of memory: what each device must read and write at least, whatever the compiler fuses.
"""

from typing import NamedTuple

from tsopsd_jax.model.qwen3 import Qwen3Config


class Split(NamedTuple):
    """Devices per mesh axis."""

    data: int
    fsdp: int
    tensor: int

    @property
    def rows(self) -> int:
        return self.data * self.fsdp

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor


class Lengths(NamedTuple):
    """Tokens of a mean row."""

    prompt: int
    response: int


class Work(NamedTuple):
    """Work of one part in one step: operations of all devices together, bytes read and written by each."""

    flops: float
    hbm_bytes: float


class UpdateShape(NamedTuple):
    """An update as it is computed: sequences of a mean length in rows, cut into micro-batches of the same number of
    rows."""

    sequences: int
    length: int
    """Positions computed for each sequence, padding included."""
    response: int
    width: int
    micro_batches: int
    """That hold a token; with packed rows, fewer than the batch has."""
    rows: int
    """Rows of a micro-batch."""
    tile_tokens: int
    remat: str
    tokenwise: bool

    def tiles(self, split: Split) -> int:
        """Tiles of the head for each micro-batch on each device."""
        tokens = self.sequences * self.response / (self.micro_batches * split.rows)
        return max(1, -(-int(tokens) // self.tile_tokens))


def layer_weights(c: Qwen3Config) -> int:
    """Weights of a layer's matrix products."""
    heads = c.num_attention_heads + c.num_key_value_heads
    return 2 * c.hidden_size * heads * c.head_dim + 3 * c.hidden_size * c.intermediate_size


def model_weights(c: Qwen3Config) -> int:
    """All parameters but the norms."""
    tables = 1 if c.tie_word_embeddings else 2
    return c.num_hidden_layers * layer_weights(c) + tables * c.vocab_size * c.hidden_size


def attention_flops(c: Qwen3Config, length: float) -> float:
    """Scores and values of a causal sequence: 2 products x 2 N H operations for each of length (length + 1) / 2
    pairs."""
    return c.num_hidden_layers * 2 * c.num_attention_heads * c.head_dim * length * (length + 1)


def cache_bytes_per_token(c: Qwen3Config, itemsize: int) -> int:
    """Keys and values of all layers."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * itemsize


def update_work(c: Qwen3Config, split: Split, u: UpdateShape) -> Work:
    """Forward once, backward twice the forward, and forward again where `remat` is full; the backward pass of attention
    forms the scores again (2.5 forwards), and with any remat its forward is repeated. The head: logits and a gradient
    for each operand, logits twice if the loss sees whole sequences."""
    again = u.remat == "full"
    positions = u.sequences * u.length
    products = 2 * positions * c.num_hidden_layers * layer_weights(c) * (3 + again)
    attention = u.sequences * attention_flops(c, u.length) * (3.5 + (u.remat != "none"))
    head = 2 * u.sequences * u.response * c.hidden_size * c.vocab_size * (3 if u.tokenwise else 4)
    return Work(products + attention + head, _update_bytes(c, split, u, positions / split.rows))


def _update_bytes(c: Qwen3Config, split: Split, u: UpdateShape, positions: float) -> float:
    d, t, layers = c.hidden_size, split.tensor, c.num_hidden_layers
    passes = 2 + (u.remat == "full")
    weights = layers * layer_weights(c) / t
    shard = model_weights(c) / (split.fsdp * t)
    # Of each micro-batch: gathered bfloat16 weights written and read in each pass; float32 gradients written, then
    # added to the sum (two reads, a write).
    per_piece = passes * 2 * 2 * weights + 4 * 4 * shard
    # AdamW: reads parameters, both moments and gradients, writes three of them.
    optimizer = 7 * 4 * shard
    # Of each position in each layer: inputs and results of the products, bfloat16, forward, again, and twice backward.
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim / t
    wide = 4 * d + 2 * heads + 3 * c.intermediate_size / t
    activations = positions * layers * 2 * wide * (passes + 1)
    # Of the head: float32 logits and their gradient each written and read; for each tile the unembedding read by two
    # products and its float32 gradient read and written.
    tokens, v = u.sequences * u.response / split.rows, c.vocab_size / t
    head = tokens * v * 4 * 4 + u.micro_batches * u.tiles(split) * d * v * (2 * 2 + 2 * 4)
    return u.micro_batches * per_piece + optimizer + activations + head


def reference_work(c: Qwen3Config, split: Split, u: UpdateShape) -> Work:
    """A frozen reference of an update: its layers forward once, and its logits beside the policy's."""
    d, t, layers = c.hidden_size, split.tensor, c.num_hidden_layers
    positions, tokens = u.sequences * u.length, u.sequences * u.response
    products = 2 * positions * layers * layer_weights(c)
    flops = products + u.sequences * attention_flops(c, u.length) + 2 * tokens * d * c.vocab_size
    # As in `_update_bytes`: gathered weights written and read for each micro-batch, one pass of activations, logits
    # written and read, the unembedding read for each tile.
    wide = (
        4 * d + 2 * (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim / t + 3 * c.intermediate_size / t
    )
    weights, v = layers * layer_weights(c) / t, c.vocab_size / t
    per_piece = 2 * 2 * weights + u.tiles(split) * d * v * 2
    moved = (positions * layers * 2 * wide + tokens * v * 4 * 2) / split.rows
    return Work(flops, u.micro_batches * per_piece + moved)


def view_work(c: Qwen3Config, split: Split, itemsize: int) -> Work:
    """Masters read, the view written."""
    weights = model_weights(c) / split.tensor
    return Work(0.0, 4 * weights / split.fsdp + itemsize * weights)


def prefill_work(c: Qwen3Config, split: Split, *, calls: int, rows: int, width: int, itemsize: int) -> Work:
    """Prompts through the layers, no logits; each call reads the layers' weights and writes a cache."""
    prompts = calls * rows
    products = 2 * prompts * width * c.num_hidden_layers * layer_weights(c)
    weights = c.num_hidden_layers * layer_weights(c) / split.tensor * itemsize
    cache = prompts * width * cache_bytes_per_token(c, itemsize) / split.devices
    return Work(products + prompts * attention_flops(c, width), calls * weights + cache)


def decode_work(
    c: Qwen3Config, split: Split, *, rows: int, slots: int, steps: float, lengths: Lengths, itemsize: int
) -> Work:
    """`rows` responses through `slots`: each step reads the layers and the unembedding, and the live cache, on average
    the prompt and half of the response."""
    context = lengths.prompt + lengths.response / 2
    weights = c.num_hidden_layers * layer_weights(c) + c.hidden_size * c.vocab_size
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * context
    tokens = rows * lengths.response
    live = slots * context * cache_bytes_per_token(c, itemsize) / split.devices
    return Work(tokens * (2 * weights + attention), steps * (weights * itemsize / split.tensor + live))

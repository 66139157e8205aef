"""How many tokens go through the head at once on a device: by what the tiles cost, and what their logits take."""

import jax

from tsopsd_jax.hardware.chips import Chip, chip_of

UNKNOWN_DEVICE = 1024
"""Tokens of a tile on a device whose peaks are not known; on a CPU, whose products are fastest at about this many."""
GRADIENT_SHARE = 0.08
"""Reading and writing the unembedding's gradient once a tile may take this share of the time of the tile's products."""
LOGITS_SHARE = 1 / 8
"""A tile's logits and their gradient, both float32, may take this share of the device's memory."""


def head_tile_tokens(chip: Chip | None, *, vocab_size: int) -> int:
    """Choose the least power of two of tokens whose gradient traffic is small beside the products, halved until their
    logits fit.

    A tile of T tokens takes three products, 6 T D V operations at F a second, and reads and writes the float32 gradient
    [D, V], 8 D V bytes at R a second: the share is 4/3 F / (R T), whatever D and V.

    Args:
        chip: None: a device whose peaks are not known.
        vocab_size: entries on a device, where the vocabulary is divided.
    """
    if chip is None:
        return UNKNOWN_DEVICE
    tile = 1
    while 4 / 3 * chip.flops / (chip.hbm_rate * tile) > GRADIENT_SHARE:
        tile *= 2
    while tile > 1 and 2 * 4 * tile * vocab_size > LOGITS_SHARE * chip.hbm_bytes:
        tile //= 2
    return tile


def head_tile_on(mesh: jax.sharding.Mesh, *, vocab_size: int) -> int:
    """Choose the tile for the devices of a mesh."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return head_tile_tokens(chip, vocab_size=-(-vocab_size // mesh.shape["tensor"]))

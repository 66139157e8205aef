"""`python -m tsopsd_jax`."""

import sys

from tsopsd_jax.cli import program

sys.exit(program())

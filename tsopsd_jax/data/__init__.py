"""Problems to learn from: sources, prompt templates, tokenizers, and a deterministic resumable order."""

from tsopsd_jax.data.cursor import indices
from tsopsd_jax.data.prompts import TEMPLATES, render
from tsopsd_jax.data.sources import SOURCES, Problem, load_problems
from tsopsd_jax.data.tokenizer import Tokenizer

__all__ = ["SOURCES", "TEMPLATES", "Problem", "Tokenizer", "indices", "load_problems", "render"]

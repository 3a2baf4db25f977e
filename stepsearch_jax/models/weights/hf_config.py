"""`config.json` of Hugging Face folders: read into a shape, written from one.

A field that changes the model's arithmetic is read, or the folder is refused
by the field's name; fields that change nothing are left alone.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from stepsearch_jax import types
from stepsearch_jax.models import decoder, families, rope

_SHAPE = ("vocab_size", "hidden_size", "intermediate_size",
          "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class _Fields:
  """The fields of one file; every error names the file and the field."""

  file: str
  raw: dict[str, Any]

  def wrong(self, field, expected) -> types.UserError:
    """Returns the error of a field that cannot be used."""
    given = repr(self.raw[field]) if field in self.raw else "nothing"
    return types.UserError(
      f"{self.file}: {field} must be {expected}, got {given}"
    )

  def number(self, field, default=None, kind=int):
    """Returns a positive number; null counts as missing."""
    value = self.raw.get(field)
    value = default if value is None else value
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or value <= 0 or (kind is int and value != int(value)):
      name = "a positive integer" if kind is int else "a positive number"
      raise self.wrong(field, name)
    return kind(value)


def read(file: epath.Path) -> decoder.DecoderConfig:
  """Returns the shape that a `config.json` of transformers 4 or 5 describes.

  Raises:
    UserError: it is no JSON object, a field is missing, or one of them asks
      for what the decoder does not compute.
  """
  try:
    raw = json.loads(file.read_text())
  except ValueError as error:
    raise types.UserError(f"{file}: not a JSON file ({error})") from error
  if not isinstance(raw, dict):
    raise types.UserError(f"{file}: expected a JSON object")
  fields = _Fields(str(file), raw)
  family = families.find(raw.get("model_type"), f"{file}: model_type")
  shape = {name: fields.number(name) for name in _SHAPE}
  _refuse_other_arithmetic(fields, shape)
  heads = shape["num_attention_heads"]
  biased = family.attention_bias and bool(raw.get("attention_bias"))
  settings = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  theta = settings.get("rope_theta") or raw.get("rope_theta") or 10000.0
  return decoder.DecoderConfig(
    family=raw["model_type"],
    vocab_size=shape["vocab_size"],
    hidden_size=shape["hidden_size"],
    intermediate_size=shape["intermediate_size"],
    num_layers=shape["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=fields.number("num_key_value_heads", heads),
    head_dim=fields.number("head_dim", shape["hidden_size"] // heads),
    rope_theta=float(theta),
    rope_scaling=_rope_scaling(fields, settings),
    rms_norm_eps=fields.number("rms_norm_eps", kind=float),
    tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
    qkv_bias=family.qkv_bias or biased,
    o_bias=biased,
    mlp_bias=family.mlp_bias and bool(raw.get("mlp_bias")),
    max_positions=shape["max_position_embeddings"],
  )


def _refuse_other_arithmetic(fields: _Fields, shape) -> None:
  """Refuses fields that ask for what the decoder does not compute."""
  raw = fields.raw
  if raw.get("hidden_act", "silu") not in ("silu", "swish"):
    raise fields.wrong("hidden_act", "silu")
  if raw.get("quantization_config"):
    raise fields.wrong("quantization_config", "absent: weights are read whole")
  if (raw.get("pretraining_tp") or 1) != 1:
    raise fields.wrong("pretraining_tp", "1")
  if (raw.get("partial_rotary_factor") or 1) != 1:
    raise fields.wrong("partial_rotary_factor", "1")
  window = raw.get("sliding_window")
  if not raw.get("use_sliding_window") or not window:
    return  # Without the flag transformers ignores the window.
  kinds = raw.get("layer_types")
  if kinds is None:
    first = raw.get("max_window_layers", 28)
    kinds = ["sliding_attention"] * (shape["num_hidden_layers"] - first)
  if "sliding_attention" in kinds and window < (
    shape["max_position_embeddings"]
  ):
    raise fields.wrong(
      "use_sliding_window", f"false: a window of {window} is not supported"
    )


def _rope_scaling(fields: _Fields, given) -> rope.RopeScaling | None:
  if (given.get("partial_rotary_factor") or 1) != 1:
    raise types.UserError(
      f"{fields.file}: partial_rotary_factor must be 1, got "
      f"{given['partial_rotary_factor']!r}"
    )
  kind = given.get("rope_type") or given.get("type") or "default"
  if kind == "default":
    return None
  raw, inner = fields.raw, _Fields(f"{fields.file}: rope {kind}", given)
  longest = raw["max_position_embeddings"]
  original = int(
    given.get("original_max_position_embeddings")
    or raw.get("original_max_position_embeddings") or longest
  )
  if kind == "longrope":
    return _factors(inner, original)
  if kind not in ("linear", "llama3", "yarn"):
    raise types.UserError(
      f"{fields.file}: rope type {kind!r} is not supported, expected "
      "default, linear, llama3, yarn or longrope"
    )
  ratio = longest / original if kind == "yarn" else None
  factor = inner.number("factor", ratio, float)
  if kind == "linear":
    return rope.RopeScaling("linear", factor, original)
  if kind == "llama3":
    return rope.RopeScaling(
      "llama3", factor, original, inner.number("low_freq_factor", kind=float),
      inner.number("high_freq_factor", kind=float),
    )
  scale = given.get("attention_factor") or 0.0
  if not scale and given.get("mscale") and given.get("mscale_all_dim"):
    scale = rope.yarn_scale(factor, given["mscale"]) / rope.yarn_scale(
      factor, given["mscale_all_dim"]
    )
  return rope.RopeScaling(
    "yarn", factor, original, float(given.get("beta_slow") or 1.0),
    float(given.get("beta_fast") or 32.0), float(scale),
    bool(given.get("truncate", True)),
  )


def _factors(given: _Fields, original: int) -> rope.RopeScaling:
  """Frequencies that are the same at every length: all that is supported."""
  short = given.raw.get("short_factor")
  if short != given.raw.get("long_factor"):
    raise types.UserError(
      f"{given.file}: short_factor and long_factor must be equal"
    )
  if given.raw.get("attention_factor") != 1:
    raise given.wrong("attention_factor", "1")
  return rope.RopeScaling(
    "factors", 1.0, original, factors=tuple(float(x) for x in short)
  )


def _written_rope(config: decoder.DecoderConfig) -> dict[str, Any]:
  """`rope_parameters` of a config.json."""
  out: dict[str, Any] = {"rope_type": "default"}
  if scaling := config.rope_scaling:
    out = {
      "rope_type": scaling.kind,
      "factor": scaling.factor,
      "original_max_position_embeddings": scaling.original,
    }
    if scaling.kind == "llama3":
      out |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    elif scaling.kind == "yarn":
      out |= {"beta_slow": scaling.low, "beta_fast": scaling.high,
              "truncate": scaling.truncate}
      if scaling.attention_factor:
        out["attention_factor"] = scaling.attention_factor
    elif scaling.kind == "factors":
      factors = list(scaling.factors)
      out |= {"rope_type": "longrope", "attention_factor": 1.0,
              "short_factor": factors, "long_factor": factors}
  return out | {"rope_theta": config.rope_theta}


def write(
  config: decoder.DecoderConfig, dtype: str, tokenizer: Any
) -> dict:
  """Returns the `config.json` of a policy, the inverse of `read`.

  Args:
    config: shape of the policy.
    dtype: stored type of the tensors.
    tokenizer: its tokenizer, for the ids that end and pad.
  """
  family = families.FAMILIES[config.family]
  rotary = _written_rope(config)
  out = {
    "architectures": [family.architecture],
    "model_type": config.family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.rms_norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "rope_parameters": rotary,
    # Readers before transformers 5 look here.
    "rope_theta": config.rope_theta,
    "dtype": dtype,
    "torch_dtype": dtype,
    "eos_token_id": list(tokenizer.eos_ids),
    "pad_token_id": tokenizer.pad_id,
  }
  if family.attention_bias:
    out["attention_bias"] = config.o_bias
  if family.mlp_bias:
    out["mlp_bias"] = config.mlp_bias
  if config.rope_scaling:
    out["rope_scaling"] = {
      k: v for k, v in rotary.items() if k != "rope_theta"
    }
  return out

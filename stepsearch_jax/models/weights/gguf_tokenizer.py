"""The byte-level BPE tokenizer inside a GGUF file."""

from __future__ import annotations

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post_processors

from stepsearch_jax import types
from stepsearch_jax.models.weights import gguf as gguf_weights

# Token kinds of GGUF. Unused entries only fill up the embedding.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
# Names of pre-tokenizers that split alike.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_GPT2 = ("gpt-2", "gpt2", "default", "")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2",)
# How Qwen2 splits text (its tokenizer.json); Llama 3 joins up to three digits.
_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = _PATTERN.replace("DIGITS", r"\p{N}")
_LLAMA3_PATTERN = _PATTERN.replace("DIGITS", r"\p{N}{1,3}")


def load(path: str) -> transformers.PreTrainedTokenizerFast:
  """Returns the tokenizer of a GGUF file, rebuilt from its metadata.

  Raises:
    UserError: it is of another kind than byte-level BPE.
  """
  fields = gguf_weights.fields(path)
  kind = fields.get("tokenizer.ggml.model")
  if kind != "gpt2":
    raise types.UserError(
      f"{path}: tokenizer.ggml.model must be gpt2 (byte-level BPE), got "
      f"{kind!r}"
    )
  for name in ("tokens", "token_type", "merges"):
    if f"tokenizer.ggml.{name}" not in fields:
      raise types.UserError(f"{path}: tokenizer.ggml.{name} is missing")
  pre = fields.get("tokenizer.ggml.pre", "")
  tokens = fields["tokenizer.ggml.tokens"]
  merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"]]
  backend = tokenizers.Tokenizer(models.BPE(
    {t: i for i, t in enumerate(tokens)}, merges, ignore_merges=pre in _LLAMA3
  ))
  if pre in _QWEN2:
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = _pre_tokenizer(path, pre)
  backend.decoder = decoders.ByteLevel()
  kinds = fields["tokenizer.ggml.token_type"]
  backend.add_tokens([
    tokenizers.AddedToken(
      token, special=kind != _USER_DEFINED, normalized=False
    )
    for token, kind in zip(tokens, kinds, strict=True)
    if kind in (_CONTROL, _USER_DEFINED, _UNUSED)
  ])

  def named(role):
    index = fields.get(f"tokenizer.ggml.{role}_token_id")
    return None if index is None else tokens[index]

  bos = named("bos")
  if bos and fields.get("tokenizer.ggml.add_bos_token", pre in _LLAMA3):
    index = fields["tokenizer.ggml.bos_token_id"]
    backend.post_processor = post_processors.TemplateProcessing(
      single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1",
      special_tokens=[(bos, index)],
    )
  out = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token=bos,
    eos_token=named("eos"),
    pad_token=named("padding"),
    unk_token=named("unknown"),
  )
  out.chat_template = fields.get("tokenizer.chat_template")
  return out


def end_ids(path: str) -> list[int]:
  """Returns the ids that a GGUF file says end a text or a turn."""
  fields = gguf_weights.fields(path)
  found = (
    fields.get(f"tokenizer.ggml.{role}_token_id")
    for role in ("eos", "eot", "eom")
  )
  return [int(index) for index in found if index is not None]


def _pre_tokenizer(path: str, name: str):
  """Pre-tokenizers by their GGUF name."""
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
  if name in _SINGLE_DIGITS:
    return pre_tokenizers.Sequence(
      [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
  if name in _GPT2:
    return byte_level
  if name in _QWEN2 + _LLAMA3:
    pattern = QWEN2_PATTERN if name in _QWEN2 else _LLAMA3_PATTERN
    return pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
  raise types.UserError(
    f"{path}: tokenizer.ggml.pre = {name!r} is not supported; set "
    "model.tokenizer to the original tokenizer folder"
  )

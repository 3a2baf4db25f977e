"""Tokenizers: text to ids and back, chat prompts, bytes of each token.

A thin layer over Hugging Face tokenizers. It adds the byte view of the
vocabulary that the stop automaton needs, GGUF files, and a padding id that is
never an end-of-text id: where the two coincide, masks computed from ids drop
real tokens (the released code's quirks B10 and E4).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import tokenizers
import transformers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from stepsearch_jax import types
from stepsearch_jax.models.weights import gguf as gguf_weights
from stepsearch_jax.models.weights import hf as hf_weights

_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
_END_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>",
              "</s>")


@functools.cache
def _byte_of_character() -> dict[str, int]:
  """Inverse of GPT-2's printable alphabet for raw bytes."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  table = {chr(byte): byte for byte in printable}
  spare = 256
  for byte in range(256):
    if byte not in printable:
      table[chr(spare)] = byte
      spare += 1
  return table


class Tokenizer:
  """Encodes and decodes for one model."""

  def __init__(self, hf: transformers.PreTrainedTokenizerFast):
    """Wraps a fast Hugging Face tokenizer."""
    self.hf = hf
    self._backend = hf.backend_tokenizer
    # Text from outside must not be able to spell a special token.
    self._plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
    self._plain.encode_special_tokens = True
    self.vocab_size = len(hf)
    special = set(hf.all_special_ids)
    special |= {i for i, t in hf.added_tokens_decoder.items() if t.special}
    self._special = special
    vocabulary = hf.get_vocab()
    ends = {hf.eos_token_id} | {
      vocabulary[name] for name in _END_NAMES
      if name in vocabulary and vocabulary[name] in special
    }
    self.eos_ids = tuple(sorted(i for i in ends if i is not None))
    pad = hf.pad_token_id
    if pad is None or pad in self.eos_ids:
      # A special token that never ends or opens a text.
      spare = sorted(special - set(self.eos_ids) - {hf.bos_token_id})
      pad = spare[-1] if spare else self.vocab_size - 1
    self.pad_id = int(pad)

  def encode(self, text: str, special: bool = False) -> list[int]:
    """Token ids of `text`; no special tokens are added.

    Args:
      text: what to encode.
      special: recognise special tokens spelled out in the text. Off for
        everything from outside, which must not be able to write them.
    """
    backend = self._backend if special else self._plain
    return backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Text of `ids`; special tokens are left out by default."""
    return self._backend.decode(list(ids), skip_special_tokens=skip_special)

  def chat_prompt(self, message: str) -> str:
    """The user's message in the model's chat template, ready for an answer.

    Without a template the message is returned as it is.
    """
    if not self.hf.chat_template:
      return message
    return self.hf.apply_chat_template(
      [{"role": "user", "content": message}],
      tokenize=False,
      add_generation_prompt=True,
    )

  def encode_prompt(self, message: str) -> list[int]:
    """Token ids of `chat_prompt(message)`."""
    return self.encode(self.chat_prompt(message), special=True)

  def token_bytes(self) -> list[bytes | None]:
    """Bytes that each token id stands for; None for special tokens.

    Raises:
      UserError: the vocabulary is not byte-level BPE.
    """
    table = _byte_of_character()
    out: list[bytes | None] = []
    for i in range(self.vocab_size):
      piece = self._backend.id_to_token(i)
      if i in self._special or piece is None:
        out.append(None)
        continue
      if any(character not in table for character in piece):
        # An added, not special token is stored as plain text.
        out.append(piece.encode())
        continue
      out.append(bytes(table[character] for character in piece))
    if not any(len(b) > 1 for b in out if b):
      raise types.UserError(
        "the tokenizer is not byte-level BPE: no merged token "
        "maps to bytes, stop tags cannot be tracked"
      )
    return out

  def save(self, folder: epath.PathLike) -> None:
    """Writes a folder that `load` and transformers read."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self.hf.save_pretrained(str(folder))


def load(reference: str) -> Tokenizer:
  """Opens the tokenizer of a model.

  Args:
    reference: HF folder or id, tokenizer.json, *.gguf or package:<name>.

  Raises:
    UserError: nothing readable there.
  """
  path = hf_weights.resolve(reference)
  if path.endswith(".gguf"):
    return Tokenizer(_from_gguf(path))
  if path.endswith(".json"):
    return Tokenizer(
      transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    )
  try:
    return Tokenizer(transformers.AutoTokenizer.from_pretrained(path))
  except (OSError, ValueError, KeyError) as error:
    if (epath.Path(path) / "tokenizer.json").exists():
      return Tokenizer(transformers.PreTrainedTokenizerFast.from_pretrained(
        path
      ))
    raise types.UserError(f"no tokenizer in {reference!r}: {error}") from error


def _from_gguf(path: str) -> transformers.PreTrainedTokenizerFast:
  """Rebuilds a byte-level BPE tokenizer from GGUF metadata."""
  fields = gguf_weights.fields(path)
  kind = fields.get("tokenizer.ggml.model")
  pre = fields.get("tokenizer.ggml.pre", "")
  if kind != "gpt2":
    raise types.UserError(f"{path}: tokenizer model {kind!r}, expected 'gpt2'")
  tokens = fields["tokenizer.ggml.tokens"]
  kinds = fields["tokenizer.ggml.token_type"]
  merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"]]
  backend = tokenizers.Tokenizer(
    models.BPE({t: i for i, t in enumerate(tokens)}, merges)
  )
  backend.pre_tokenizer = _pre_tokenizer(path, pre)
  backend.decoder = decoders.ByteLevel()
  control = [t for t, k in zip(tokens, kinds, strict=True) if k == 3]
  backend.add_special_tokens(
    [tokenizers.AddedToken(t, special=True, normalized=False) for t in control]
  )

  def named(role):
    index = fields.get(f"tokenizer.ggml.{role}_token_id")
    return None if index is None else tokens[index]

  out = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token=named("bos"),
    eos_token=named("eos"),
    pad_token=named("padding"),
    unk_token=named("unknown"),
  )
  out.chat_template = fields.get("tokenizer.chat_template")
  return out


def _pre_tokenizer(path: str, name: str):
  """Pre-tokenizers by their GGUF name."""
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
  if name in ("smollm", "starcoder", "refact", "command-r"):
    return pre_tokenizers.Sequence(
      [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
  if name in ("gpt-2", "gpt2", "default", ""):
    return byte_level
  if name in ("qwen2", "llama-bpe", "llama3"):
    digits = r"\p{N}" if name == "qwen2" else r"\p{N}{1,3}"
    pattern = (
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
      + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
  raise types.UserError(
    f"{path}: unknown pre-tokenizer {name!r}; pass "
    "model.tokenizer with the original tokenizer folder"
  )


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Learns a small byte-level BPE with single digits and chat specials.

  Args:
    texts: training texts; the result is a function of them alone.
    vocab_size: tokens including 256 bytes and the specials.
  """
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
  ])
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(_SPECIALS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  return Tokenizer(
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend,
      bos_token="<|im_start|>",
      eos_token="<|im_end|>",
      pad_token="<|pad|>",
    )
  )

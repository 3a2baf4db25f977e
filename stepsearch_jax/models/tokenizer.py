"""Tokenizers: text to ids and back, chat prompts, bytes of each token.

A thin layer over Hugging Face tokenizers. It adds the byte view of the
vocabulary that the stop automaton needs, GGUF files, and a padding id that is
never an end-of-text id: where the two coincide, masks computed from ids drop
real tokens (the released code's quirks B10 and E4).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
import transformers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from stepsearch_jax import types
from stepsearch_jax.models.weights import gguf_tokenizer
from stepsearch_jax.models.weights import hf as hf_weights

_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
# GPT-2's pieces of a text, and before all others a tag of a protocol.
_PIECES = (
  r" ?</?\p{L}+>|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+"
  r"| ?(?:<|[^\s\p{L}\p{N}<]+)|\s+(?!\S)|\s+"
)
_END_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>",
              "</s>")
# In front of a chat template, hides transformers' function, which asks the
# clock; only data, no function, may be handed to a template.
_DATE_MACRO = (
  "{%- macro strftime_now(form) %}{{ run_date[form] }}{% endmacro %}\n"
)
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


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

  def __init__(
    self, hf: transformers.PreTrainedTokenizerFast,
    end_ids: Sequence[int] = (), chat: Mapping[str, Any] | None = None,
    date: str = "",
  ):
    """Wraps a fast Hugging Face tokenizer.

    Args:
      hf: the tokenizer.
      end_ids: ids that end a text, besides those that its names tell.
      chat: variables for the chat template; None values are left out.
      date: what the chat template takes for today, as 2026-11-26; empty asks
        the clock once, here.

    Raises:
      UserError: a variable that the chat template does not mention, a date
        that is none, or an end id outside the vocabulary.
    """
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
    ends = {hf.eos_token_id, *end_ids} | {
      vocabulary[name] for name in _END_NAMES
      if name in vocabulary and vocabulary[name] in special
    }
    self.eos_ids = tuple(sorted(i for i in ends if i is not None))
    if not all(0 <= i < self.vocab_size for i in self.eos_ids):
      raise types.UserError(
        f"eos_token_id must be below the vocabulary's {self.vocab_size}, got "
        f"{list(self.eos_ids)}"
      )
    pad = hf.pad_token_id
    if pad is None or pad in self.eos_ids:
      # A special token that never ends or opens a text.
      spare = sorted(special - set(self.eos_ids) - {hf.bos_token_id})
      pad = spare[-1] if spare else self.vocab_size - 1
    self.pad_id = int(pad)
    self._opening = self._find_opening()
    self._chat = {k: v for k, v in (chat or {}).items() if v is not None}
    for name in self._chat:
      if name not in (hf.chat_template or ""):
        raise types.UserError(
          f"model.chat.{name}: the chat template does not mention {name!r}"
        )
    try:
      today = datetime.date.today()
      self._date = datetime.date.fromisoformat(date) if date else today
    except ValueError as error:
      raise types.UserError(
        f"date must be written as 2026-11-26, got {date!r}"
      ) from error

  @property
  def date(self) -> str:
    """What the chat template takes for today, for the run to keep."""
    return self._date.isoformat()

  @property
  def splits_like_qwen2(self) -> bool:
    """Whether text is normalized and split as transformers does for Qwen2."""
    state = json.loads(self._backend.to_str())
    if (state["normalizer"] or {}).get("type") != "NFC":
      return False
    parts = (state["pre_tokenizer"] or {}).get("pretokenizers", ())
    patterns = [part.get("pattern", {}).get("Regex") for part in parts]
    return patterns == [gguf_tokenizer.QWEN2_PATTERN, None]

  def _find_opening(self) -> list[int]:
    """Ids that the tokenizer itself puts in front of a text (BOS)."""
    whole = self._backend.encode("a", add_special_tokens=True).ids
    bare = self._backend.encode("a", add_special_tokens=False).ids
    for start in range(len(whole) - len(bare) + 1):
      if whole[start : start + len(bare)] == bare:
        return whole[:start]
    return []

  def encode(self, text: str, special: bool = False) -> list[int]:
    """Token ids of `text`; no special tokens are added.

    Args:
      text: what to encode.
      special: recognize special tokens spelled out in the text. Off for
        everything from outside, which must not be able to write them.
    """
    backend = self._backend if special else self._plain
    return backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Text of `ids`; special tokens are left out by default."""
    return self._backend.decode(list(ids), skip_special_tokens=skip_special)

  def chat_prompt(self, message: str) -> str:
    """Returns the user's message in the chat template, ready for an answer.

    Without a template the message is returned as it is.
    """
    template = self.hf.chat_template
    if not template:
      return message
    # Templates ask for today by this name; a run has one date to its end.
    formats = re.findall(r"""strftime_now\(\s*['"](.*?)['"]""", template)
    found: Any = self.hf.apply_chat_template(
      [{"role": "user", "content": message}],
      chat_template=(_DATE_MACRO if formats else "") + template,
      tokenize=False,
      add_generation_prompt=True,
      run_date={form: self._date.strftime(form) for form in formats},
      **self._chat,
    )
    return found

  def encode_prompt(self, message: str) -> list[int]:
    """Returns the token ids of `chat_prompt(message)`.

    Without a template they begin as the tokenizer begins a text: with its BOS
    where it adds one. Templates write their BOS themselves.
    """
    ids = self.encode(self.chat_prompt(message), special=True)
    return ids if self.hf.chat_template else [*self._opening, *ids]

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
    """Writes a folder that `load` and transformers 4 and 5 read alike.

    `save_pretrained` of transformers 5 names a class and a field that 4.x does
    not know; these names mean the same in both.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {role: getattr(self.hf, role) for role in _ROLES}
    named = {role: str(token) for role, token in named.items() if token}
    added = self.hf.added_tokens_decoder.values()
    settings: dict[str, Any] = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      **named,
      "additional_special_tokens": [
        token.content for token in added
        if token.special and token.content not in named.values()
      ],
      "clean_up_tokenization_spaces": False,
    }
    if self.hf.model_max_length < 1e12:  # Above: transformers' "no limit".
      settings["model_max_length"] = self.hf.model_max_length
    if self.hf.chat_template:
      settings["chat_template"] = self.hf.chat_template
    state = json.dumps(json.loads(self._backend.to_str()), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(state)
    (folder / "tokenizer_config.json").write_text(
      json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    )


def load(
  reference: str, chat: Mapping[str, Any] | None = None, date: str = ""
) -> Tokenizer:
  """Opens the tokenizer of a model.

  Args:
    reference: HF folder or id, tokenizer.json, *.gguf or package:<name>.
    chat: see `Tokenizer`.
    date: likewise.

  Raises:
    UserError: nothing readable there.
  """
  path = hf_weights.resolve(reference)
  if path.endswith(".gguf"):
    hf, ends = gguf_tokenizer.load(path), gguf_tokenizer.end_ids(path)
  elif path.endswith(".json"):
    hf, ends = transformers.PreTrainedTokenizerFast(tokenizer_file=path), ()
  else:
    hf, ends = _from_folder(reference, path), _end_ids(epath.Path(path))
  return Tokenizer(hf, ends, chat, date)


def _from_folder(reference: str, path: str):
  try:
    return transformers.AutoTokenizer.from_pretrained(path)
  except (OSError, ValueError, KeyError) as error:
    if (epath.Path(path) / "tokenizer.json").exists():
      return transformers.PreTrainedTokenizerFast.from_pretrained(path)
    raise types.UserError(f"no tokenizer in {reference!r}: {error}") from error


def _end_ids(folder: epath.Path) -> list[int]:
  """Ids that end a text: of generation_config.json, else of config.json."""
  for name in ("generation_config.json", "config.json"):
    if not (folder / name).exists():
      continue
    try:
      found = json.loads((folder / name).read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
      raise types.UserError(f"{folder / name}: not a JSON object") from error
    found = found if isinstance(found, list) else [found]
    ids = [i for i in found if isinstance(i, int)]
    if ids:
      return ids
  return []


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Learns a small byte-level BPE with single digits and chat specials.

  A tag is a token where it is frequent, as it is in trajectories.

  Args:
    texts: training texts; the result is a function of them alone.
    vocab_size: tokens including 256 bytes and the specials.
  """
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
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

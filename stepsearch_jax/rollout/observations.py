"""Observation text to tokens: encoded once, cut per document.

Head and tail are never cut, so that an observation always closes its tag;
documents share what is left fairly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stepsearch_jax.env import search_env


@dataclasses.dataclass(frozen=True)
class Encoded:
  """An observation as tokens; `cut` of its documents were shortened."""

  tokens: list[int]
  cut: int


def fair_shares(sizes: Sequence[int], room: int) -> list[int]:
  """Splits `room` so that no large item starves a small one (max-min fair).

  Args:
    sizes: what each item wants.
    room: what there is.

  Returns:
    Shares <= sizes whose sum is min(sum(sizes), room).
  """
  shares = [0] * len(sizes)
  room = max(room, 0)
  by_size = sorted(range(len(sizes)), key=lambda i: sizes[i])
  for rank, i in enumerate(by_size):
    shares[i] = min(sizes[i], room // (len(sizes) - rank))
    room -= shares[i]
  return shares


def encode(
  observation: search_env.Observation, tokenizer, limit: int
) -> Encoded:
  """Returns an observation as tokens within `limit`.

  Head and tail stay whole: the result is longer than `limit` only when they
  alone are.

  Args:
    observation: texts.
    tokenizer: has `encode`.
    limit: tokens at most.
  """
  encode_text = tokenizer.encode
  head, tail = encode_text(observation.head), encode_text(observation.tail)
  documents = [encode_text(text) for text in observation.documents]
  ends = [encode_text("\n") if text.endswith("\n") else []
          for text in observation.documents]
  sizes = [len(tokens) for tokens in documents]
  shares = fair_shares(sizes, limit - len(head) - len(tail))
  body = []
  for tokens, end, share in zip(documents, ends, shares, strict=True):
    if share < len(tokens):
      # The next document's label starts a line of its own all the same.
      tokens = tokens[: max(share - len(end), 0)] + end
    body += tokens[:share]
  cut = sum(share < size for share, size in zip(shares, sizes, strict=True))
  return Encoded(head + body + tail, cut)

"""Observation text to tokens: encoded once, cut per document.

Head and tail are never cut, so that an observation always closes its tag;
documents share what is left fairly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stepsearch_jax import types
from stepsearch_jax.env import search_env


@dataclasses.dataclass(frozen=True)
class Encoded:
  """An observation as tokens.

  Attributes:
    tokens: head, documents and tail.
    parts: per document, what is left of its text; None where nothing was cut.
  """

  tokens: list[int]
  parts: tuple[str | None, ...]

  @property
  def cut(self) -> int:
    """Returns how many documents were cut."""
    return sum(part is not None for part in self.parts)

  def shown(
    self, documents: Sequence[types.Passage]
  ) -> tuple[str, ...] | None:
    """Returns `types.Turn.shown` of these documents."""
    if not self.cut:
      return None
    return tuple(
      passage.text if part is None else part
      for passage, part in zip(documents, self.parts, strict=True)
    )


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
  observation: search_env.Observation, tokenizer: types.TextCodec, limit: int
) -> Encoded:
  """Returns an observation as tokens within `limit`.

  Head and tail stay whole: the result is longer than `limit` only when they
  alone are.

  Args:
    observation: texts.
    tokenizer: has `encode` and `decode`.
    limit: tokens at most.
  """
  head = tokenizer.encode(observation.head)
  tail = tokenizer.encode(observation.tail)
  whole = [tokenizer.encode(doc.text) for doc in observation.documents]
  shares = fair_shares(
    list(map(len, whole)), limit - len(head) - len(tail)
  )
  body, parts = [], []
  for doc, tokens, share in zip(
    observation.documents, whole, shares, strict=True
  ):
    part = None
    if share < len(tokens):
      # The next document's label starts a line of its own all the same.
      end = tokenizer.encode(doc.end) if doc.end else []
      kept = tokens[: max(share - len(end), 0)]
      # Half a character at the cut decodes to a replacement mark.
      text = tokenizer.decode(kept).removesuffix("\ufffd")
      part = text[len(doc.label) :]
      tokens = (kept + end)[:share]
    body += tokens
    parts.append(part)
  return Encoded(head + body + tail, tuple(parts))

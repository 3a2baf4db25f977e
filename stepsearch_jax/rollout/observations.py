"""Observation text to tokens: encoded once, cut per document.

Head and tail are never cut, so that an observation always closes its tag;
documents share what is left fairly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stepsearch_jax.env import search_env


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


def observation_tokens(
  observation: search_env.Observation,
  encode: Callable[[str], list[int]],
  limit: int,
) -> tuple[list[int], int]:
  """Tokens of an observation within `limit`, and how many documents were cut.

  Head and tail stay whole: the result is longer than `limit` only when they
  alone are.
  """
  head, tail = encode(observation.head), encode(observation.tail)
  documents = [encode(text) for text in observation.documents]
  ends = [encode("\n") if text.endswith("\n") else []
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
  return head + body + tail, cut

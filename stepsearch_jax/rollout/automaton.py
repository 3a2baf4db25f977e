"""A stop-tag automaton over token ids, as one table for the device.

Aho-Corasick (Aho & Corasick, 1975) over the BYTES of every vocabulary entry:
however a tokenizer merges `</search>` with its neighbors, the table knows
after which token the tag is complete. Built once on the host; the decode loop
only gathers from it. This module knows bytes, not what the tags mean.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types


@dataclasses.dataclass(frozen=True)
class StopAutomaton:
  """Transition table of the stop tags.

  Attributes:
    table: [states, V] int32, the state after reading token v in state s.
    first_stop: states >= this one are absorbing; `first_stop + i` means that
      tag i was the first to be completed, the last state means end of text.
  """

  table: np.ndarray
  first_stop: int


def _byte_transitions(tags: Sequence[bytes]) -> tuple[np.ndarray, int]:
  """Returns ([states, 256] transitions over bytes, first absorbing state)."""
  children: list[dict[int, int]] = [{}]
  ends: dict[int, int] = {}
  for index, tag in enumerate(tags):
    node = 0
    for byte in tag:
      if byte not in children[node]:
        children[node][byte] = len(children)
        children.append({})
      node = children[node][byte]
    ends.setdefault(node, index)
  total = len(children)
  next_node = np.zeros((total, 256), np.int32)
  failure = [0] * total
  completes = [ends.get(node) for node in range(total)]
  queue = collections.deque([0])
  while queue:
    node = queue.popleft()
    if node:
      next_node[node] = next_node[failure[node]]
      if completes[node] is None:
        completes[node] = completes[failure[node]]
    for byte, child in children[node].items():
      failure[child] = int(next_node[failure[node], byte]) if node else 0
      next_node[node, byte] = child
      queue.append(child)
  # Completed nodes become absorbing, so what follows a tag inside the same
  # token cannot undo it. Renumber: running states first, then one per tag.
  running = [node for node in range(total) if completes[node] is None]
  number = {node: i for i, node in enumerate(running)}
  first_stop = len(running)
  rename = np.array(
    [
      number[node] if node in number else first_stop + completes[node]
      for node in range(total)
    ],
    np.int32,
  )
  stops = np.arange(first_stop, first_stop + len(tags) + 1, dtype=np.int32)
  absorbing = np.repeat(stops[:, None], 256, axis=1)
  return np.concatenate([rename[next_node[running]], absorbing]), first_stop


def build_automaton(
  token_bytes: Sequence[bytes | None],
  tags: Sequence[str],
  eos_ids: Sequence[int],
) -> StopAutomaton:
  """Compiles stop tags for one vocabulary.

  Args:
    token_bytes: bytes of every token id; None for special tokens, which
      interrupt a tag that has begun.
    tags: texts that end a turn, for instance `("</search>", "</answer>")`.
    eos_ids: tokens that end the turn by themselves.

  Returns:
    The automaton; state 0 is the start of every turn.

  Raises:
    UserError: no tag, an empty tag, or an end-of-text id outside the
      vocabulary.
  """
  if not tags or not all(tags):
    raise types.UserError(f"stop tags must be non-empty strings, got {tags!r}")
  vocab = len(token_bytes)
  if any(not 0 <= i < vocab for i in eos_ids):
    raise types.UserError(
      f"end-of-text ids {tuple(eos_ids)} must lie in the vocabulary of {vocab}"
    )
  step, first_stop = _byte_transitions([tag.encode() for tag in tags])
  states = step.shape[0]
  lengths = np.array([len(b) if b else 0 for b in token_bytes])
  packed = np.zeros((vocab, max(int(lengths.max()), 1)), np.uint8)
  for token, text in enumerate(token_bytes):
    if text:
      packed[token, : len(text)] = np.frombuffer(text, np.uint8)
  table = np.repeat(np.arange(states, dtype=np.int32)[:, None], vocab, axis=1)
  for column in range(packed.shape[1]):
    live = np.nonzero(lengths > column)[0]
    table[:, live] = step[table[:, live], packed[live, column]]
  special = np.array([b is None for b in token_bytes])
  table[:first_stop, special] = 0
  table[:first_stop, list(eos_ids)] = states - 1
  return StopAutomaton(table, first_stop)


def pad_vocabulary(table: np.ndarray, vocab: int) -> np.ndarray:
  """Models may have more rows than the tokenizer has tokens."""
  if table.shape[1] > vocab:
    raise types.UserError(
      f"the tokenizer has {table.shape[1]} tokens, the model only {vocab}: "
      "model.tokenizer and model.reference do not belong together"
    )
  extra = np.zeros((table.shape[0], vocab - table.shape[1]), table.dtype)
  return np.concatenate([table, extra], axis=1)

"""The released rollout loop, token for token, around any `generate`.

Turn-synchronous, with decoding and re-encoding between turns, padding moved by
sorting, and both truncations: what the released code trains on, and the shape
of loop that `rollout/engine.py` replaces. For comparisons only; nothing that
trains uses it. Source: search_r1/llm_agent/generation.py and tensor_helper.py
of the release (quirks E1-E9).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.env import search_env

Generate = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
                    Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class LoopLimits:
  """Lengths in tokens, under the released names.

  Attributes:
    max_obs_length: observations keep their head.
    max_prompt_length: contexts keep their tail, responses their head (E6).
    max_start_length: the final prompt keeps its tail.
  """

  max_obs_length: int = 800
  max_prompt_length: int = 4096
  max_start_length: int = 2048


@dataclasses.dataclass
class LoopResult:
  """Final arrays of a batch, all int64 [B, ...], and statistics [B]."""

  prompts: np.ndarray
  responses: np.ndarray
  responses_with_info_mask: np.ndarray
  input_ids: np.ndarray
  attention_mask: np.ndarray
  info_mask: np.ndarray
  position_ids: np.ndarray
  turns_stats: np.ndarray
  active_mask: np.ndarray
  valid_action_stats: np.ndarray
  valid_search_stats: np.ndarray


def cut_response(text: str) -> str:
  """Keeps a response up to its first closing search, else answer, tag (E1)."""
  for tag in ("</search>", "</answer>"):
    if tag in text:
      return text.split(tag)[0] + tag
  return text


def _positions(mask: np.ndarray) -> np.ndarray:
  return (np.cumsum(mask, axis=1) - 1).clip(0) * mask


def _pads_first(ids: np.ndarray, pad: int, left: bool) -> np.ndarray:
  """Stable order that moves padding to the left (or right) of each row."""
  key = (ids != pad) if left else (ids == pad)
  return np.argsort(key, axis=1, kind="stable")


def _padded(rows: Sequence[Sequence[int]], pad: int) -> np.ndarray:
  width = max(map(len, rows), default=0)
  out = np.full((len(rows), width), pad, np.int64)
  for row, ids in zip(out, rows, strict=True):
    row[: len(ids)] = ids
  return out


@dataclasses.dataclass
class ReleasedLoop:
  """One batch through the released protocol.

  Attributes:
    env: texts and rules; build it with `sanitize=False`.
    retriever: answers a whole turn's searches in one call.
    tokenizer: with `encode`, and `decode` that skips special tokens.
    pad_id: padding, also where the prompt uses it as a token (E4).
    limits: truncations.
  """

  env: search_env.SearchEnv
  retriever: types.Retriever
  tokenizer: Any
  pad_id: int
  limits: LoopLimits = LoopLimits()

  def run(self, prompt_ids: np.ndarray, generate: Generate) -> LoopResult:
    """Plays a batch.

    Args:
      prompt_ids: [B, P] left-padded prompts.
      generate: (row numbers, ids, attention mask, positions) of the active
        rows to their sampled ids, end of text included.

    Returns:
      The arrays that the released code hands to reward and learner.
    """
    batch = len(prompt_ids)
    context = np.asarray(prompt_ids, np.int64)
    positions = _positions((context != self.pad_id).astype(np.int64))
    left = context[:, -self.limits.max_start_length :]
    right = masked = context[:, :0]
    active = np.ones(batch, bool)
    turns = np.ones(batch, np.int64)
    valid, searched = np.zeros((2, batch), np.int64)
    for turn in range(self.env.max_turns + 1):
      if not active.any():
        break
      forced = self.env.is_last(turn)
      longest = (context != self.pad_id).sum(axis=1).max()
      context, positions = context[:, -longest:], positions[:, -longest:]
      texts, ids = self._respond(context, positions, active, generate)
      steps = [self.env.step(text, turn) if on else None
               for text, on in zip(texts, active, strict=True)]
      answered = [s is None or s.action is types.Action.ANSWER for s in steps]
      actions = [s and s.action for s in steps]
      valid += [action not in (None, types.Action.INVALID)
                for action in actions]
      searched += [action is types.Action.SEARCH for action in actions]
      if forced:
        active &= ~np.array(answered)
        right, masked = self._append(right, masked, ids, None)
        break
      observed = self._observe(steps, turn)
      active &= ~np.array(answered)
      turns[~np.array(answered)] += 1
      context, positions = self._extend(context, ids, observed)
      right, masked = self._append(right, masked, ids, observed)
    mask = (left != self.pad_id).astype(np.int64)
    attention = np.concatenate([mask, right != self.pad_id], axis=1)
    return LoopResult(
      prompts=left,
      responses=right,
      responses_with_info_mask=masked,
      input_ids=np.concatenate([left, right], axis=1),
      attention_mask=attention,
      info_mask=np.concatenate([mask, masked != self.pad_id], axis=1),
      position_ids=_positions(attention),
      turns_stats=turns,
      active_mask=active,
      valid_action_stats=valid,
      valid_search_stats=searched,
    )

  def _respond(self, context, positions, active, generate):
    """(cut texts, re-encoded ids [B, R]); inactive rows are empty."""
    rows = np.nonzero(active)[0]
    mask = (context[rows] != self.pad_id).astype(np.int64)
    sampled = generate(rows, context[rows], mask, positions[rows])
    texts = [""] * len(context)
    for row, ids in zip(rows, sampled, strict=True):
      texts[row] = cut_response(self.tokenizer.decode(ids))
    encoded = [self.tokenizer.encode(text) if text else [] for text in texts]
    return texts, _padded(encoded, self.pad_id)

  def _observe(self, steps, turn) -> np.ndarray:
    """Observation ids [B, O], cut at the released length (E5)."""
    queries = [s.query for s in steps if s is not None and s.query is not None]
    found = iter(self.retriever.search(queries, self.env.topk)
                 if queries else ())
    rows = []
    for step in steps:
      if step is None or step.action is types.Action.ANSWER:
        text = ""
      elif step.query is None:
        text = step.warning
      else:
        text = self.env.observation(next(found), turn).text
      rows.append(self.tokenizer.encode(text) if text else [])
    return _padded(rows, self.pad_id)[:, : self.limits.max_obs_length]

  def _extend(self, context, ids, observed):
    """The next turn's context; positions count what truncation dropped."""
    whole = np.concatenate([context, ids, observed], axis=1)
    whole = np.take_along_axis(
      whole, _pads_first(whole, self.pad_id, left=True), axis=1
    )
    mask = (whole != self.pad_id).astype(np.int64)
    keep = min(mask.sum(axis=1).max(), self.limits.max_prompt_length)
    return whole[:, -keep:], _positions(mask)[:, -keep:]

  def _append(self, right, masked, ids, observed):
    """Responses with and without observations, padding moved right."""
    parts, hidden = [right, ids], [masked, ids]
    if observed is not None:
      parts.append(observed)
      hidden.append(np.full_like(observed, self.pad_id))
    whole = np.concatenate(parts, axis=1)
    order = _pads_first(whole, self.pad_id, left=False)
    whole = np.take_along_axis(whole, order, axis=1)
    masked = np.take_along_axis(np.concatenate(hidden, axis=1), order, axis=1)
    longest = (whole != self.pad_id).sum(axis=1).max(initial=0)
    keep = min(longest, self.limits.max_prompt_length)
    return whole[:, :keep], masked[:, :keep]

"""Weights of the tokens of a mini-batch in the policy's loss (numpy)."""

from __future__ import annotations

import dataclasses

import numpy as np
from absl import logging

from stepsearch_jax.ppo import specs
from stepsearch_jax.ppo.records import Experience


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights of tokens, [B, T] float32; rows of other mini-batches are 0.

  Attributes:
    policy: in the policy's loss, relative to a mean over tokens.
    llds: in the LLDS penalty.
  """

  policy: np.ndarray
  llds: np.ndarray


def of_mini_batch(
  experience: Experience, rows: np.ndarray, spec: specs.LearnerSpec
) -> Weights:
  """Computes the weights of one optimizer step over `rows`."""
  batch, loss = experience.batch, spec.loss
  mask = batch.policy_mask[rows]
  policy, penalty = np.zeros((2, *batch.tokens.shape), np.float32)
  policy[rows] = aggregation(mask, loss.aggregation, spec.batch.row_length)
  if loss.llds_coef:
    penalty[rows] = llds(
      experience.advantages[rows], mask,
      np.arange(mask.shape[1]) >= batch.answer_start[rows, None],
      loss.llds_answer_weight,
    )
  return Weights(policy, penalty)


def warn_of_llds(spec: specs.LearnerSpec, trajectories: int) -> None:
  """Warns where LLDS cannot do anything."""
  coef = spec.loss.llds_coef
  if coef and spec.batch.optimizer_steps(trajectories) == 1:
    logging.warning(
      "ppo.llds_coef = %g does nothing: a batch of %d trajectories is one "
      "optimizer step, before which no token has become less likely; lower "
      "ppo.mini_batch or raise ppo.epochs", coef, trajectories,
    )


def aggregation(mask: np.ndarray, kind: str, length: int) -> np.ndarray:
  """Weights with which a mean over tokens becomes another aggregation.

    token     1
    sequence  tokens / (rows with tokens * own tokens): mean of row means
    constant  tokens / (rows * length): sum over a fixed size (Dr.GRPO)

  Args:
    mask: [B, T] policy mask of the mini-batch.
    kind: a `specs.Aggregation`.
    length: the fixed tokens per row.

  Returns:
    [B, T] float32; 1 everywhere for "token", else 0 where masked.
  """
  if kind == specs.Aggregation.TOKEN:
    return np.ones(mask.shape, np.float32)
  on = mask > 0
  own = on.sum(axis=1, keepdims=True)
  if kind == specs.Aggregation.SEQUENCE:
    per_row = on.sum() / (max((own > 0).sum(), 1) * np.maximum(own, 1))
  else:
    per_row = np.full(own.shape, on.sum() / (len(mask) * length))
  return np.where(on, per_row, 0.0).astype(np.float32)


def row_advantages(advantages: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Mean advantage of each row's policy tokens, [B]; 0 for a row without."""
  on = mask > 0
  total = np.where(on, advantages, 0.0).sum(axis=1)
  return total / np.maximum(on.sum(axis=1), 1)


def llds(
  advantages: np.ndarray, mask: np.ndarray, answer: np.ndarray,
  answer_weight: float,
) -> np.ndarray:
  """Weights of tokens in LLDS: a mean over good rows of means over tokens.

  Args:
    advantages: [B, T].
    mask: [B, T] policy mask.
    answer: [B, T] bool, tokens of the answer.
    answer_weight: their weight beside the others' 1.

  Returns:
    [B, T] float32, 0 in rows of negative advantage or without tokens.
  """
  on = mask > 0
  own = on.sum(axis=1)
  good = (row_advantages(advantages, mask) >= 0) & (own > 0)
  per_row = good / (max(good.sum(), 1) * np.maximum(own, 1))
  weights = np.where(answer, answer_weight, 1.0) * per_row[:, None]
  return np.where(on, weights, 0.0).astype(np.float32)

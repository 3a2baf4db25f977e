"""The update suite: policy updates, a whole PPO step and their memory."""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.bench import duel, peers, workload
from stepsearch_jax.models import decoder
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import (
  batching,
  estimators,
  learner,
  packer,
  records,
  specs,
)

_PEAK_ROWS = 2  # Of 1,024 tokens; for 4 torch alone takes 23 GB.
_SHARE = 0.13  # Of a search rollout's tokens that the policy wrote.


def full_rows(rows: int, length: int, vocab: int) -> types.RolloutBatch:
  """Rows without padding; every eighth token or so is the policy's."""
  replays = [workload.Replay(length, ()) for _ in range(rows)]
  batch = batch_of(replays, vocab)
  rng = np.random.default_rng(1)
  mask = rng.random(batch.tokens.shape) < _SHARE
  mask[:, 0] = False
  batch.policy_mask = mask.astype(np.float32)
  return batch


def batch_of(
  replays: Sequence[workload.Replay], vocab: int
) -> types.RolloutBatch:
  """Random tokens in the lengths of a workload, behind its prompts.

  Trajectories of one question are a group.
  """
  rng = np.random.default_rng(0)
  width = max(r.total for r in replays)
  tokens = np.zeros((len(replays), width), np.int32)
  mask = np.zeros(tokens.shape, np.float32)
  prompts = workload.prompts(replays, vocab)
  for row, (replay, prompt) in enumerate(zip(replays, prompts, strict=True)):
    tokens[row, : replay.total] = rng.integers(1, vocab, replay.total)
    tokens[row, : replay.prompt] = prompt
    at = replay.prompt
    for generated, observed in replay.turns:
      mask[row, at : at + generated] = 1.0
      at += generated + observed
  lengths = np.array([r.total for r in replays], np.int32)
  rewards = np.zeros(tokens.shape, np.float32)
  rewards[np.arange(len(replays)), lengths - 1] = rng.random(len(replays))
  count = len(replays)
  return types.RolloutBatch(
    tokens=tokens, lengths=lengths, policy_mask=mask,
    token_rewards=rewards * mask, rollout_logp=np.zeros_like(mask),
    group=workload.questions(replays),
    turn=np.where(mask > 0, 0, -1).astype(np.int32),
    anchor=np.zeros((count, 8), np.int32),
    searches=np.zeros(count, np.int32),
    answer_start=np.full(count, width, np.int32),
  )


def row_length(batch: types.RolloutBatch) -> int:
  """Tokens of a packed row: 2,048, or what the longest trajectory needs."""
  longest = batch.tokens.shape[1]
  return max(longest + -longest % 128, 2048)


def learner_spec(
  estimator: str, mini_batch: int, micro_rows: int, row_length: int,
  learning_rate: float = 1e-6,
) -> specs.LearnerSpec:
  """Settings of the released train.sh, without KL in the reward."""
  def adamw(role):
    return specs.OptimizerSpec(
      role=role, learning_rate=learning_rate, warmup=0, first_rate_zero=False,
      weight_decay=0.01, grad_clip=1.0, adapter=None,
    )

  return specs.LearnerSpec(
    estimator=specs.EstimatorSpec(
      name=estimator, gamma=1.0, lam=1.0, scope="policy", turn_gamma=0.95,
      turn_weight=1.0, strata_blend=0.5,
    ),
    loss=specs.LossSpec(
      clip_ratio=0.2, clip_ratio_high=0.0, dual_clip=0.0, ratio="token",
      aggregation="token", llds_coef=0.0, llds_answer_weight=0.2,
      old_logp="recompute", importance_cap=2.0, value_clip=0.5,
      entropy_coef=0.001, micro_weighting="token",
    ),
    kl=specs.KlSpec(
      in_reward=True, coef=0.0, estimator="kl",
      loss_estimator="low_var_kl", controller="fixed", target=0.1,
      horizon=10000.0,
    ),
    policy=adamw("policy"),
    value=adamw("value"),
    batch=specs.BatchSpec(
      epochs=1, mini_batch=mini_batch, micro_rows=micro_rows,
      row_length=row_length,
    ),
    temperature=1.0,
    critic_warmup=0,
  )


class _WholePacker(packer.Packer):
  """Shares nothing, whatever trajectories have in common."""

  def packing(
    self, batch: types.RolloutBatch, rows: Iterable[int], share: bool = True
  ) -> batching.Packing:
    """See `packer.Packer`."""
    del share
    return super().packing(batch, rows, share=False)


class WholeLearner(learner.Learner):
  """A learner that computes every trajectory from its first token on."""

  def __init__(self, *parts: Any):
    """See `learner.Learner`."""
    super().__init__(*parts)
    self._packer = _WholePacker(self.spec, self._mesh)


class Ours:
  """The learner on a batch."""

  def __init__(
    self, config: decoder.DecoderConfig, params: types.Tree,
    batch: types.RolloutBatch, estimator: str, micro_rows: int, row_length: int,
    kind: type[learner.Learner] = learner.Learner,
  ):
    """Places the models; `micro_rows` packed rows are one pass."""
    self._batch = batch
    spec = learner_spec(
      estimator, len(batch.tokens), micro_rows, row_length
    )
    self._learner = kind(config, config, spec, sharding.make_mesh())
    masters = jax.tree.map(lambda x: x.astype(config.param_dtype), params)
    self._state = self._learner.start(masters, params, jax.random.key(1))

  def scores(self) -> records.Experience:
    """The batch under policy, reference and value model."""
    experience, _ = self._learner.prepare(self._state, self._batch)
    return experience

  def update(self, experience: records.Experience) -> dict[str, float]:
    """Updates on an experience."""
    self._state, metrics = self._learner.update(self._state, experience)
    return metrics

  def step(self) -> np.ndarray:
    """A whole step; returns the policy's log-probabilities before it."""
    experience = self.scores()
    self.update(experience)
    return experience.logp

  def experience(
    self, old: np.ndarray, advantages: np.ndarray
  ) -> records.Experience:
    """Made-up scores around the batch."""
    zeros = np.zeros_like(old)
    masks = records.Masks.of(self._batch, "policy")
    return records.Experience(
      batch=self._batch, masks=masks, logp=old, reference_logp=old,
      values=zeros, advantages=advantages, returns=zeros,
      value_weights=masks.value, kl=0.0,
    )


def _made_up(batch) -> tuple[np.ndarray, np.ndarray]:
  """Old log-probabilities near those of a random policy, and advantages."""
  rng = np.random.default_rng(2)
  shape = batch.tokens.shape
  old = -10.8 + 0.1 * rng.standard_normal(shape)
  return old.astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def _policy_duel(config, params, rows, length, checkpointing) -> duel.Duel:
  from stepsearch_jax.bench import torch_ppo

  batch = full_rows(rows, length, config.vocab_size)
  old, advantages = _made_up(batch)
  ours = Ours(config, params, batch, "grpo", rows, length)
  theirs = torch_ppo.TorchPpo(config, params, rows, checkpointing)
  experience = ours.experience(old, advantages)

  def same(mine, norm):
    np.testing.assert_allclose(mine["actor/grad_norm"], norm, rtol=1e-2)

  return duel.Duel(
    f"policy update, {rows} x {length}",
    f"{rows * length} tokens, {int(batch.policy_mask.sum())} of the policy",
    "torch, full logits" + ", checkpointing" * checkpointing,
    lambda: ours.update(experience),
    lambda: theirs.update_policy(batch, old, advantages), same,
    goal="1.3, aim 1.6",
  )


def _same_scores(mask: np.ndarray, mine: np.ndarray, theirs: np.ndarray):
  """Compares log-probabilities of the policy's tokens before any update."""
  apart = np.abs(mine - theirs)[mask > 0]
  if not apart.mean() <= 0.02:
    raise types.UserError(f"log-probabilities are {apart.mean():.3f} apart")


def _our_step(
  config, params, batch, estimator="gae", kind=learner.Learner
) -> Ours:
  """The learner in rows that torch can afford as well."""
  # Two padded rows a pass: with four, torch beside us takes more than 24 GB.
  # A packed row of ours has about four fifths of their real tokens.
  return Ours(config, params, batch, estimator, 1, row_length(batch), kind)


def _step_duel(config, params, replays, estimator, goal) -> duel.Duel:
  """A whole step of ours beside torch's."""
  from stepsearch_jax.bench import torch_ppo

  batch = batch_of(replays, config.vocab_size)
  ours = _our_step(config, params, batch, estimator)
  has_value = estimators.find(estimator).needs_values
  theirs = torch_ppo.TorchPpo(config, params, 2, True, has_value)
  _, advantages = _made_up(batch)
  name = {"gae": "PPO", "grpo": "GRPO"}[estimator]
  return duel.Duel(
    f"{name} step, {len(replays)} trajectories", workload.describe(replays),
    "torch, padded, full logits, checkpointing", ours.step,
    lambda: theirs.step(batch, advantages),
    functools.partial(_same_scores, batch.policy_mask), goal=goal,
    warm_up=False,  # Minutes, of them seconds compiling.
  )


def _sharing_duel(config, params, replays) -> duel.Duel:
  """A whole step of ours beside one that shares no prefix."""
  batch = batch_of(replays, config.vocab_size)
  ours = _our_step(config, params, batch)
  whole = _our_step(config, params, batch, kind=WholeLearner)
  return duel.Duel(
    f"PPO step, {len(replays)} trajectories", workload.describe(replays),
    "ours without shared prefixes", ours.step, whole.step,
    functools.partial(_same_scores, batch.policy_mask), goal="1.2",
    warm_up=False,  # Minutes, of them seconds compiling, on both sides.
  )


def _peak(side: str) -> duel.Measured:
  """Gradient norm and peak GB of one update in a process of its own."""
  out = subprocess.run(
    [sys.executable, "-m", __name__, side, str(_PEAK_ROWS)], check=True,
    capture_output=True, text=True,
  )
  found = json.loads(out.stdout.splitlines()[-1])
  return duel.Measured(found["norm"], found["gb"])


def _update_once(side: str, rows: int) -> None:
  """One policy update at Qwen's vocabulary."""
  config = peers.smollm2(vocab_size=151_936)
  params = peers.policy(config)
  batch = full_rows(rows, 1024, config.vocab_size)
  old, advantages = _made_up(batch)
  if side == "ours":
    ours = Ours(config, params, batch, "grpo", rows, 1024)
    updated = ours.update(ours.experience(old, advantages))
    norm = float(updated["actor/grad_norm"])
  else:
    from stepsearch_jax.bench import torch_ppo

    theirs = torch_ppo.TorchPpo(config, params, rows, True)
    norm = theirs.update_policy(batch, old, advantages)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(json.dumps({"gb": peak / 2**20, "norm": norm}))


def duels(path: str | None) -> Iterator[duel.Duel]:
  """Updates of SmolLM2-135M, float32.

  Args:
    path: recorded workloads (JSON); None makes similar ones up.
  """
  del path
  # First, while this process holds nothing itself.
  yield duel.Duel(
    f"peak memory of an update, {_PEAK_ROWS} x 1024",
    "vocabulary of 151,936",
    "torch, full logits, checkpointing",
    lambda: _peak("ours"), lambda: _peak("theirs"),
    lambda mine, norm: np.testing.assert_allclose(mine, norm, rtol=1e-2),
    goal="4, aim 5", unit="GB", warm_up=False,
  )
  config = peers.smollm2()
  params = peers.policy(config)
  for rows, length in ((4, 1024), (8, 512)):
    for checkpointing in (True, False):
      yield _policy_duel(config, params, rows, length, checkpointing)


def steps(
  path: str | None, config: decoder.DecoderConfig | None = None
) -> Iterator[duel.Duel]:
  """Policy, value and reference work of whole steps; ours is packed.

  Args:
    path: recorded workloads (JSON); None makes similar ones up.
    config: shape; None is SmolLM2-135M's, float32.
  """
  config = config or peers.smollm2()
  params = peers.policy(config)
  recorded = workload.load(path, 32)
  template = workload.behind(recorded, workload.STEPSEARCH)
  grouped = workload.behind(recorded, workload.STEPSEARCH, rollouts=4)
  yield _sharing_duel(config, params, template)  # Needs no torch.
  for replays in (workload.load(path, 8), recorded, template):
    yield _step_duel(config, params, replays, "gae", "2.5, aim 3")
  yield _step_duel(config, params, grouped, "grpo", "2.6, aim 3.2")


if __name__ == "__main__":
  _update_once(sys.argv[1], int(sys.argv[2]))

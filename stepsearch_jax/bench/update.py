"""The update suite: policy updates, a whole PPO step and their memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.bench import duel, peers, workload
from stepsearch_jax.models import decoder
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import learner, records, specs

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
  """Random tokens in the lengths of a workload, common where it says so."""
  rng = np.random.default_rng(0)
  width = max(r.total for r in replays)
  tokens = np.zeros((len(replays), width), np.int32)
  mask = np.zeros(tokens.shape, np.float32)
  template = rng.integers(1, vocab, max(r.common for r in replays))
  prompts: dict[int, np.ndarray] = {}
  for row, replay in enumerate(replays):
    tokens[row, : replay.total] = rng.integers(1, vocab, replay.total)
    own = row if replay.question is None else replay.question
    prompt = tokens[row, : replay.prompt]
    prompt[:] = prompts.setdefault(own, prompt.copy())
    prompt[: replay.common] = template[: replay.common]
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
    group=np.arange(count, dtype=np.int32),
    turn=np.where(mask > 0, 0, -1).astype(np.int32),
    anchor=np.zeros((count, 8), np.int32),
    searches=np.zeros(count, np.int32),
    answer_start=np.full(count, width, np.int32),
  )


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


class Ours:
  """The learner on a batch."""

  def __init__(
    self, config: decoder.DecoderConfig, params: types.Tree,
    batch: types.RolloutBatch, estimator: str, micro_rows: int, row_length: int,
  ):
    """Places the models; `micro_rows` packed rows are one pass."""
    self._batch = batch
    spec = learner_spec(
      estimator, len(batch.tokens), micro_rows, row_length
    )
    self._learner = learner.Learner(
      config, config, spec, sharding.make_mesh()
    )
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


def _step_duel(config, params, replays) -> duel.Duel:
  from stepsearch_jax.bench import torch_ppo

  batch = batch_of(replays, config.vocab_size)
  # Two padded rows a pass: with four, torch beside us takes more than 24 GB.
  # A packed row of ours has about four fifths of their real tokens.
  ours = Ours(config, params, batch, "gae", 1, 2048)
  theirs = torch_ppo.TorchPpo(config, params, 2, True)
  _, advantages = _made_up(batch)

  def padded():
    old = theirs.scores(batch)
    theirs.update_policy(batch, old, advantages)
    theirs.update_value(batch, advantages)
    return old

  def packed():
    experience = ours.scores()
    ours.update(experience)
    return experience.logp

  def same(mine, theirs):
    """Log-probabilities of the policy's tokens before any update."""
    apart = np.abs(mine - theirs)[batch.policy_mask > 0]
    if apart.mean() > 0.02:
      raise types.UserError(f"log-probabilities are {apart.mean():.3f} apart")

  return duel.Duel(
    f"PPO step, {len(replays)} trajectories", workload.describe(replays),
    "torch, padded, full logits, checkpointing", packed, padded, same,
    goal="1.8, aim 2.5", warm_up=False,  # Minutes, of them seconds compiling.
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
    goal="3.3", unit="GB", warm_up=False,
  )
  config = peers.smollm2()
  params = peers.policy(config)
  for rows, length in ((4, 1024), (8, 512)):
    for checkpointing in (True, False):
      yield _policy_duel(config, params, rows, length, checkpointing)


def steps(path: str | None) -> Iterator[duel.Duel]:
  """Policy, value and reference work of whole PPO steps; ours is packed."""
  config = peers.smollm2()
  params = peers.policy(config)
  for count in (8, 32):
    yield _step_duel(config, params, workload.load(path, count))


if __name__ == "__main__":
  _update_once(sys.argv[1], int(sys.argv[2]))

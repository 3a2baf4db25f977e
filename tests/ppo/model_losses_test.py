"""Losses of a micro-batch against loops over its tokens, setting by setting."""

import jax.numpy as jnp
import numpy as np
import pytest
from ppo import parts

from stepsearch_jax.ppo import forward, model_losses, records

ROWS, WIDTH = 2, 9
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 8 + [0]])
TURNS = np.array([[-1, 0, 0, 1, -1, 0, 0, -1, -1],
                  [-1, 0, 0, -1, -1, 1, 1, 1, -1]])
MASK = (TURNS >= 0).astype(np.float32)
SHARE = model_losses.Share(*map(np.float32, (25.0, 7.0, 3.0)))


def numbers(seed, scale=1.0):
  drawn = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)) * scale
  return np.where(MASK > 0, drawn, np.nan).astype(np.float32)


MICRO = records.MicroBatch(
  tokens=np.zeros((ROWS, WIDTH), np.int32), segment_ids=SEGMENTS,
  positions=np.zeros((ROWS, WIDTH), np.int32), turn=TURNS, policy_mask=MASK,
  weights=1 + numbers(1) ** 2, llds_weights=np.abs(numbers(2)),
  value_weights=np.where(MASK > 0, 0.5 + numbers(3) ** 2, 0).astype("f4"),
  logp=numbers(4), reference_logp=numbers(5), values=numbers(6),
  advantages=numbers(7, 2.0), returns=numbers(8),
)
NOW, ENTROPY, VALUES = numbers(4) + numbers(9, 0.7), numbers(10), numbers(11)
TOKENS = list(zip(*np.nonzero(MASK), strict=True))


@pytest.fixture(autouse=True)
def forward_pass(monkeypatch):
  output = forward.PolicyOutput(jnp.asarray(NOW), jnp.asarray(ENTROPY))
  monkeypatch.setattr(
    model_losses.forward, "policy", lambda *unused: output
  )
  monkeypatch.setattr(
    model_losses.forward, "values", lambda *unused: jnp.asarray(VALUES)
  )


def surrogate(place, low, high, dual=0.0, cap=np.inf):
  gap = float(NOW[place]) - float(MICRO.logp[place])
  ratio, a = min(np.exp(gap), cap), float(MICRO.advantages[place])
  loss = max(-a * ratio, -a * min(max(ratio, low), high))
  return min(loss, -a * dual) if dual and a < 0 else loss


def expected(spec, scale, **clipping):
  total, fell = 0.0, {}
  for place in TOKENS:
    row, _ = place
    key = row, SEGMENTS[place], TURNS[place]
    drop = float(MICRO.logp[place]) - float(NOW[place])
    fell[key] = fell.get(key, 0.0) + drop
  for place in TOKENS:
    gap = float(NOW[place]) - float(MICRO.reference_logp[place])
    k3 = min(np.exp(-gap) + gap - 1.0, 10.0)
    weight = float(MICRO.weights[place])
    total += scale * weight * (
      surrogate(place, **clipping)
      - spec.loss.entropy_coef * float(ENTROPY[place])
      + (0.0 if spec.kl.in_reward else spec.kl.coef) * k3
    )
    row, _ = place
    drop = float(MICRO.logp[place]) - float(NOW[place])
    if fell[row, SEGMENTS[place], TURNS[place]] > 0:
      total += (spec.loss.llds_coef * float(MICRO.llds_weights[place])
                * max(drop, 0.0))
  return total


PLAIN = dict(low=0.8, high=1.2)


@pytest.mark.parametrize("changes, clipping", [
  ({}, PLAIN),
  ({"loss__clip_ratio": 0.1}, dict(low=0.9, high=1.1)),
  ({"loss__clip_ratio_high": 0.5}, dict(low=0.8, high=1.5)),
  ({"loss__dual_clip": 1.5}, PLAIN | dict(dual=1.5)),
  ({"loss__entropy_coef": 0.7}, PLAIN),
  ({"kl__in_reward": False, "kl__coef": 0.6}, PLAIN),
  ({"loss__llds_coef": 0.8}, PLAIN),
  ({"loss__old_logp": "rollout", "loss__importance_cap": 1.3},
   PLAIN | dict(cap=1.3)),
])
def test_the_policys_loss_is_the_formula(changes, clipping):
  spec = parts.learner_spec(**changes)
  found = model_losses.policy(None, MICRO, SHARE, config=None, spec=spec)
  np.testing.assert_allclose(
    found.loss, expected(spec, 1 / 25, **clipping), rtol=1e-5
  )
  assert set(found.metrics) == set(model_losses.METRICS["policy"])


def test_a_mean_per_micro_batch_weighs_by_its_own_tokens():
  spec = parts.learner_spec(loss__micro_weighting="micro_mean")
  found = model_losses.policy(None, MICRO, SHARE, config=None, spec=spec)
  scale = 1 / (MASK.sum() * 3)
  np.testing.assert_allclose(
    found.loss, expected(spec, scale, **PLAIN), rtol=1e-5
  )


def test_metrics_of_the_policy_are_means_over_the_mini_batch():
  spec = parts.learner_spec()
  got = model_losses.policy(None, MICRO, SHARE, config=None, spec=spec).metrics
  gaps = np.array([NOW[p] - MICRO.logp[p] for p in TOKENS], np.float64)
  weights = np.array([MICRO.weights[p] for p in TOKENS], np.float64)
  clipped = [
    -MICRO.advantages[p] * np.clip(np.exp(g), 0.8, 1.2)
    > -MICRO.advantages[p] * np.exp(g)
    for p, g in zip(TOKENS, gaps, strict=True)
  ]
  fell = {}
  for place, gap in zip(TOKENS, gaps, strict=True):
    key = place[0], SEGMENTS[place], TURNS[place]
    fell[key] = fell.get(key, 0.0) - gap
  assert 0 < sum(drop > 0 for drop in fell.values()) < len(fell)
  want = {
    # Of the 7 turns of the mini-batch.
    "actor/less_likely_turns": sum(drop > 0 for drop in fell.values()) / 7,
    "actor/pg_clipfrac": np.sum(clipped) / 25,
    "actor/ppo_kl": -gaps.sum() / 25,
    "actor/logp_change": np.abs(gaps).sum() / 25,
    "actor/logp_k3": (np.exp(gaps) - 1 - gaps).sum() / 25,
    "actor/logp_outside": (np.abs(np.exp(gaps) - 1) > 0.1).sum() / 25,
    "actor/token_entropy": np.sum([ENTROPY[p] for p in TOKENS]) / 25,
    "actor/entropy_loss":
      (weights * [ENTROPY[p] for p in TOKENS]).sum() / 25,
    "actor/pg_loss":
      (weights * [surrogate(p, 0.8, 1.2) for p in TOKENS]).sum() / 25,
  }
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("clip", [0.5, 0.1])
def test_the_value_loss_is_the_larger_of_two_squares(clip):
  spec = parts.learner_spec(loss__value_clip=clip)
  found = model_losses.value(None, MICRO, SHARE, config=None, spec=spec)
  total = 0.0
  for place in TOKENS:
    new, old = float(VALUES[place]), float(MICRO.values[place])
    goal = float(MICRO.returns[place])
    near = min(max(new, old - clip), old + clip)
    total += float(MICRO.value_weights[place]) * 0.5 * max(
      (new - goal) ** 2, (near - goal) ** 2)
  np.testing.assert_allclose(found.loss, total / 25, rtol=1e-5)

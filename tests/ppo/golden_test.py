"""PPO core against recorded outputs of the released (verl) functions."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ppo import parts
from ppo.estimators import estimators_test

from stepsearch_jax.ppo import (
  estimators,
  kl,
  logprobs,
  losses,
  masked,
  optimizer,
  records,
)


@pytest.fixture(scope="module")
def cases(shared):
  """Cases by function: [(params, inputs, outputs)]."""
  folder = shared / "golden/ppo_core"
  arrays = np.load(folder / "ppo_core_cases.npz")
  manifest = json.loads((folder / "ppo_core_cases.json").read_text())
  out = {}
  for case in manifest["cases"]:
    named = [
      {name: arrays[key] for name, key in case[side].items()}
      for side in ("inputs", "outputs")
    ]
    out.setdefault(case["fn"], []).append((case["params"], *named))
  return out


def f32(x):
  return np.asarray(x, np.float32)


@functools.cache
def compiled(loss):
  """Loss with gradient by its first argument, compiled once per shape."""
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def close(ours, theirs, where=None):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  if where is not None:
    ours, theirs = ours[where], theirs[where]
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def estimate(name, rewards, values, masks, group=None, **settings):
  batch = parts.rollout_batch(np.asarray(masks.policy))
  inputs = estimators.Inputs(
    rewards=f32(rewards), values=f32(values),
    logp=np.zeros(rewards.shape, np.float32), masks=masks,
    group=batch.group if group is None else np.asarray(group, np.int32),
    turn=batch.turn, anchor=batch.anchor, searches=batch.searches,
  )
  return estimators_test.run(name, inputs, **settings)


def test_released_gae_and_whitening(cases):
  for params, given, want in cases["compute_gae_advantage_return"]:
    mask = f32(given["eos_mask"])
    on = np.asarray(mask) > 0
    if on.sum() < 2:
      continue  # The released code raises; ours only removes the mean.
    # Its recursion runs over every position, whatever the mask says.
    everywhere = np.ones_like(mask)
    found = estimate(
      "gae", given["token_level_rewards"], given["values"],
      records.Masks(mask, mask, everywhere), gamma=params["gamma"],
      lam=params["lam"],
    )
    close(found.returns, want["returns"], on)
    close(found.advantages, want["advantages"], on)


def test_grpo(cases):
  for _, given, want in cases["compute_grpo_outcome_advantage"]:
    mask = f32(given["eos_mask"])
    _, group = np.unique(given["index"], return_inverse=True)
    # The released outcome sums every token reward, masked or not.
    rewards = f32(given["token_level_rewards"]).sum(-1, keepdims=True)
    first = (np.cumsum(mask, axis=-1) == 1) & (mask > 0)
    spread = np.where(first, rewards, 0.0)
    ours = estimate(
      "grpo", spread, np.zeros(mask.shape), records.Masks(mask, mask, mask),
      group,
    ).advantages
    rows = np.asarray(mask).sum(-1) > 0
    if rows.all():
      close(ours, want["advantages"], np.asarray(mask) > 0)


def policy_loss(new, old, advantages, mask, clip):
  log_ratio = jnp.where(mask > 0, new - old, 0.0)
  token = losses.policy_loss(log_ratio, advantages, 1 - clip, 1 + clip)
  value, hit, kl = (
    losses.masked_sum(x, mask) / mask.sum()
    for x in (token.loss, token.clipped, -log_ratio)
  )
  return value, (hit, kl)


def test_policy_loss_with_gradient(cases):
  for params, given, want in cases["compute_policy_loss"]:
    old, new, advantages, mask = (
      f32(given[name])
      for name in ("old_log_prob", "log_prob", "advantages", "eos_mask")
    )
    (value, (hit, kl)), grad = compiled(policy_loss)(
      new, old, advantages, mask, params["cliprange"]
    )
    close(value, want["pg_loss"])
    close(hit, want["pg_clipfrac"])
    close(kl, want["ppo_kl"])
    close(grad, want["grad_log_prob"])


def value_loss(new, old, returns, mask, clip):
  token = losses.value_loss(new, old, returns, clip)
  return tuple(
    losses.masked_sum(x, mask) / mask.sum()
    for x in (token.loss, token.clipped)
  )


def test_value_loss_with_gradient(cases):
  for params, given, want in cases["compute_value_loss"]:
    new, returns, old, mask = (
      f32(given[name]) for name in ("vpreds", "returns", "values", "eos_mask")
    )
    (value, hit), grad = compiled(value_loss)(
      new, old, returns, mask, params["cliprange_value"]
    )
    close(value, want["vf_loss"])
    close(hit, want["vf_clipfrac"])
    close(grad, want["grad_vpreds"])


def through_logits(logits, targets, mask):
  """Our log-probabilities of given logits: hidden = logits, weight = 1."""
  vocab = logits.shape[-1]
  logp, entropy = logprobs.token_logprobs(
    logits.reshape(-1, vocab), jnp.eye(vocab, dtype=jnp.float32),
    targets.reshape(-1), mask.reshape(-1),
  )
  return logp.reshape(mask.shape), entropy.reshape(mask.shape)


def entropy_loss(logits, mask):
  targets = jnp.zeros(mask.shape, jnp.int32)
  entropy = through_logits(logits, targets, jnp.ones_like(mask))[1]
  return masked.mean(entropy, mask), entropy


def test_entropy_with_gradient(cases):
  for _, given, want in cases["compute_entropy_loss"]:
    logits, mask = f32(given["logits"]), f32(given["eos_mask"])
    (value, entropy), grad = compiled(entropy_loss)(logits, mask)
    close(value, want["entropy_loss"])
    close(entropy, want["entropy_per_token"])
    close(grad, want["grad_logits"])


def weighted_logprobs(logits, labels, weight):
  logp = through_logits(logits, labels, jnp.ones(labels.shape))[0]
  return (logp * weight).sum(), logp


def test_logprobs_with_gradient(cases):
  for _, given, want in cases["logprobs_from_logits"]:
    logits, weight = f32(given["logits"]), f32(given["weight"])
    labels = np.asarray(given["labels"], np.int32)
    (_, logp), grad = compiled(weighted_logprobs)(logits, labels, weight)
    close(logp, want["log_probs"])
    close(grad, want["grad_logits_of_weighted_sum"])


@functools.partial(jax.jit, static_argnums=2)
def kl_with_gradient(logp, reference, kind):
  grad = jax.grad(lambda x: kl.penalty(x, reference, kind).sum())(logp)
  return kl.penalty(logp, reference, kind), grad


def test_kl_estimators_with_gradient(cases):
  for params, given, want in cases["kl_penalty"]:
    logp, reference = f32(given["logprob"]), f32(given["ref_logprob"])
    found, grad = kl_with_gradient(logp, reference, params["kl_penalty"])
    close(found, want["kl"])
    close(grad, want["grad_logprob_of_sum"])


def test_adaptive_kl_controller(cases):
  for params, given, want in cases["AdaptiveKLController"]:
    spec = parts.learner_spec(
      kl__controller="adaptive", kl__target=params["target_kl"],
      kl__horizon=params["horizon"],
    ).kl
    values = [params["init_kl_coef"]]
    steps = np.broadcast_to(given["n_steps"], given["current_kl"].shape)
    for gap, count in zip(given["current_kl"], steps, strict=True):
      values.append(
        kl.next_coefficient(spec, values[-1], float(gap), int(count))
      )
    close(values, want["values"])


def test_whitening_and_masked_mean(cases):
  name = "masked_mean/masked_sum/masked_var/masked_whiten"
  for _, given, want in cases[name]:
    x, mask = f32(given["values"]), f32(given["mask"])
    close(jax.jit(masked.mean)(x, mask), want["mean"])
    close(jax.jit(masked.whiten)(x, mask), want["whiten"], np.asarray(mask) > 0)


def test_released_learning_rate_schedule(cases):
  for params, given, want in cases["lr schedule factor"]:
    if params.keys() != {"num_warmup_steps"}:
      continue  # Cosine schedules are not part of the released train.sh.
    ours = [
      optimizer.warmup_factor(int(s), params["num_warmup_steps"], True)
      for s in given["step"]
    ]
    close(ours, want["factor"])


def test_adamw_with_clipping(cases):
  for params, given, want in cases["AdamW + clip_grad_norm_ + constant warmup"]:
    rate = optimizer.warmup_schedule(
      params["lr"], params["num_warmup_steps"], first_zero=True
    )
    tx = optimizer.adamw(rate, params["weight_decay"], params["max_norm"])
    weights = {"w": f32(given["w0"]), "b": f32(given["b0"])}
    with jax.numpy_dtype_promotion("standard"):
      state, update = jax.jit(tx.init)(weights), jax.jit(tx.update)
      for k in range(len(given["grad_w"])):
        grads = {"w": f32(given["grad_w"][k]), "b": f32(given["grad_b"][k])}
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        close(weights["w"], want["w"][k])
        close(weights["b"], want["b"][k])

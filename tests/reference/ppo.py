"""Naive numpy loops, written from the equations and not from the code."""

import numpy as np


def gae(rewards, values, mask, gamma, lam):
  advantages = np.zeros_like(rewards)
  for b in range(rewards.shape[0]):
    where = np.nonzero(mask[b])[0]
    running = 0.0
    for i in reversed(range(len(where))):
      t = where[i]
      following = values[b, where[i + 1]] if i + 1 < len(where) else 0.0
      delta = rewards[b, t] + gamma * following - values[b, t]
      running = delta + gamma * lam * running
      advantages[b, t] = running
  return advantages, (advantages + values) * mask


def logprobs(hidden, weight, targets, temperature):
  logits = hidden @ weight.T / temperature
  logits = logits - logits.max(-1, keepdims=True)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  logp = np.log(p)
  return logp[np.arange(len(targets)), targets], -(p * logp).sum(-1)

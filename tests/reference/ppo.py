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


def z(x, others):
  """(x - mean) / (unbiased std + 1e-6) by hand; 0 where all are equal."""
  if max(others) - min(others) < 1e-6:
    return 0.0
  mean = sum(others) / len(others)
  square = sum((y - mean) ** 2 for y in others)
  return (x - mean) / ((square / (len(others) - 1)) ** 0.5 + 1e-6)


def totals(rewards, mask):
  return [float(sum(r[m > 0])) for r, m in zip(rewards, mask, strict=True)]


def on_tokens(scores, mask):
  return np.asarray(scores)[:, None] * (mask > 0)


def row_estimator(name, rewards, mask, group, searches=None, blend=0.5):
  """Estimators with one number per row: loops over rows and their groups."""
  scores = totals(rewards, mask)
  out = []
  for i, score in enumerate(scores):
    mates = [j for j in range(len(scores)) if group[j] == group[i]]
    all_of_them = [scores[j] for j in mates]
    others = [scores[j] for j in mates if j != i]
    mean = sum(all_of_them) / len(all_of_them)
    equal = max(all_of_them) - min(all_of_them) < 1e-6
    if name == "grpo":
      out.append(
        z(score, all_of_them) if others else score / (1 + 1e-6)
      )
    elif name == "rloo":
      out.append(0.0 if not others else score - sum(others) / len(others))
    elif name == "grpo_no_std":
      out.append(score - mean)
    elif name == "maxrl":
      out.append(0.0 if equal or mean <= 1e-6 else (score - mean) / mean)
    elif name == "stratified":
      stratum = [scores[j] for j in mates if searches[j] == searches[i]]
      out.append(
        blend * z(score, stratum) + (1 - blend) * z(score, all_of_them)
      )
  return on_tokens(out, mask)


def turn_rewards(rewards, turn, count):
  out = np.zeros((len(rewards), count))
  for b, t in zip(*np.nonzero(turn >= 0), strict=True):
    out[b, turn[b, t]] += rewards[b, t]
  return out


def discounted(rewards, gamma):
  out, later = [], 0.0
  for reward in reversed(rewards):
    later = reward + gamma * later
    out.append(later)
  return out[::-1]


def on_turns(per_turn, turn):
  out = np.zeros(turn.shape)
  for b, t in zip(*np.nonzero(turn >= 0), strict=True):
    out[b, t] = per_turn[b][turn[b, t]]
  return out


def turn_rloo(rewards, turn, group, count):
  r = turn_rewards(rewards, turn, count)
  out = np.zeros_like(r)
  for i in range(len(r)):
    mates = [j for j in range(len(r)) if group[j] == group[i] and j != i]
    for n in range(count):
      for m in range(n, count):
        base = sum(r[j, m] for j in mates) / len(mates) if mates else r[i, m]
        out[i, n] += r[i, m] - base
  return on_turns(out, turn)


def gigpo(rewards, mask, turn, group, anchor, gamma, weight):
  r = turn_rewards(rewards, turn, anchor.shape[1])
  returns = [discounted(row, gamma) for row in r]
  scores, out = totals(rewards, mask), np.zeros(r.shape)
  for i in range(len(r)):
    mates = [scores[j] for j in range(len(r)) if group[j] == group[i]]
    for n in range(r.shape[1]):
      if anchor[i, n] < 0:
        continue
      same = [returns[j][m] for j in range(len(r)) for m in range(r.shape[1])
              if anchor[j, m] == anchor[i, n]]
      out[i, n] = z(scores[i], mates) + weight * z(returns[i][n], same)
  return on_turns(out, turn)


def igpo(rewards, turn, group, anchor):
  r = turn_rewards(rewards, turn, anchor.shape[1])
  out = np.zeros(r.shape)
  for i in range(len(r)):
    everyone = [r[j, m] for j in range(len(r)) for m in range(r.shape[1])
                if group[j] == group[i] and anchor[j, m] >= 0]
    scores = [z(r[i, n], everyone) if anchor[i, n] >= 0 else 0.0
              for n in range(r.shape[1])]
    out[i] = discounted(scores, 1.0)
  return on_turns(out, turn)


def ig_search(rewards, mask, turn, group):
  last = [np.nonzero(row)[0].max(initial=-1) for row in mask]
  outcome = [rewards[i, t] if t >= 0 else 0.0 for i, t in enumerate(last)]
  out = np.zeros(rewards.shape)
  for i, t in zip(*np.nonzero(mask), strict=True):
    mates = [outcome[j] for j in range(len(outcome)) if group[j] == group[i]]
    out[i, t] = z(outcome[i], mates)
    if rewards[i, t] and t != last[i]:
      out[i, t] += sum(
        rewards[i, k] for k in np.nonzero(turn[i] == turn[i, t])[0]
        if k != last[i]
      )
  return out


def firsts(turn):
  """[(row, turn, its tokens)] in order."""
  return [
    (b, n, np.nonzero(turn[b] == n)[0])
    for b in range(len(turn)) for n in range(turn[b].max() + 1)
    if (turn[b] == n).any()
  ]


def turn_gae(rewards, values, turn, gamma, lam):
  """Raw advantages [B, T] at the first token of each turn."""
  out = np.zeros(rewards.shape)
  for b in range(len(turn)):
    inside = [where for row, _, where in firsts(turn) if row == b]
    later_value = later_advantage = 0.0
    for where in reversed(inside):
      value = values[b, where[0]]
      delta = rewards[b, where].sum() + gamma * later_value - value
      later_advantage = delta + gamma * lam * later_advantage
      later_value = value
      out[b, where[0]] = later_advantage
  return out


def bilevel_gae(rewards, values, turn, gamma, turn_gamma, lam):
  """Raw token advantages: GAE in each turn, which ends in its return."""
  outer = turn_gae(rewards, values, turn, turn_gamma, lam)
  out = np.zeros(rewards.shape)
  for b, _, where in firsts(turn):
    later_value = later_advantage = 0.0
    end = outer[b, where[0]] + values[b, where[0]]
    for i in reversed(where):
      reward = end if i == where[-1] else 0.0
      delta = reward + gamma * later_value - values[b, i]
      later_advantage = delta + gamma * lam * later_advantage
      later_value = values[b, i]
      out[b, i] = later_advantage
  return out


def white(x, where):
  picked = x[where]
  return np.where(
    where, (x - picked.mean()) / np.sqrt(picked.var(ddof=1) + 1e-8), 0.0
  )


def policy_loss(gap, advantage, low, high, dual):
  """PPO's clipped loss of one token."""
  ratio = np.exp(float(gap))
  clipped = min(max(ratio, 1 - low), 1 + high)
  loss = -min(ratio * advantage, clipped * advantage)
  if dual and advantage < 0:
    loss = min(loss, dual * -advantage)
  return loss


def packed_turns(segments, turn):
  """Token places of every turn in packed rows: [(row, places)]."""
  found = {}
  for r, t in zip(*np.nonzero(turn >= 0), strict=True):
    found.setdefault((r, segments[r, t], turn[r, t]), []).append(t)
  return [(key[0], places) for key, places in found.items()]


def log_ratio(logp, old, segments, turn, kind):
  out = np.zeros(turn.shape)
  groups = packed_turns(
    segments, turn if kind == "turn" else np.where(turn >= 0, 0, -1)
  )
  if kind == "token":
    return np.where(turn >= 0, logp - old, 0)
  for r, places in groups:
    out[r, places] = np.mean([logp[r, t] - old[r, t] for t in places])
  return np.minimum(out, 10)


def likelihood_drop(logp, old, segments, turn):
  """(penalty per token, turns that fell)."""
  out, fell = np.zeros(turn.shape), 0
  for r, places in packed_turns(segments, turn):
    drops = [old[r, t] - logp[r, t] for t in places]
    if sum(drops) > 0:
      fell += 1
      out[r, places] = [max(0, d) for d in drops]
  return out, fell

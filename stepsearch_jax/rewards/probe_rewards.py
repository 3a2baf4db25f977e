"""Turn rewards from the answer probe; none needs search keys.

L_t,c is the log-probability of gold answer c behind the observation of turn t
(behind the prompt for t = 0), n_c its tokens, v_t = max over c of L_t,c / n_c:

  tips       alpha (Phi_t - Phi_{t-1}),  Phi_t = tau log sum_c exp(L_t,c / tau)
             by the reference (TIPS, arXiv 2603.22293)
  igpo       exp(v_t) - exp(v_{t-1}), or v_t - v_{t-1}
             by the policy (IGPO, arXiv 2510.14967)
  ig_search  alpha (v_t - mean of v_t with documents of other questions)
             by the policy (IG-Search, arXiv 2604.15148)

Both sides of a difference are about the same answers: those that had room in
all places that are compared. Where none had, a turn earns 0; so does one that
nothing was replied to. A search that failed, or a turn without an action, is a
turn like any other to tips and igpo, or gains would not add up: a reply without
documents moves the probe by about nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import re

import numpy as np

from stepsearch_jax import types

_QUERY = re.compile(r"<search>\s*(.*?)\s*</search>", re.DOTALL)


class Kind(enum.StrEnum):
  """What a turn earns by the probe."""

  NONE = "none"
  TIPS = "tips"
  IGPO = "igpo"
  IG_SEARCH = "ig_search"


class Gain(enum.StrEnum):
  """What two probes of igpo are compared in."""

  PROBABILITY = "probability"
  LOG = "log"


@dataclasses.dataclass(frozen=True)
class ProbeRewardSpec:
  """Which probe rewards are paid, and how much; see the module docstring.

  Attributes:
    reward: a `Kind`.
    tips_alpha, tips_tau: scale, and temperature of the maximum over answers.
    igpo_gain: a `Gain`.
    ig_search_alpha: scale.
  """

  reward: str
  tips_alpha: float
  tips_tau: float
  igpo_gain: str
  ig_search_alpha: float

  def __post_init__(self):
    """Raises UserError, naming the field of the config."""
    for name, allowed in (("reward", Kind), ("igpo_gain", Gain)):
      value = getattr(self, name)
      types.expect(value in list(allowed), f"probe.{name}",
                   f"one of {', '.join(allowed)}", value)
    for name in ("tips_alpha", "tips_tau", "ig_search_alpha"):
      value = getattr(self, name)
      types.expect(0 < value < np.inf, f"probe.{name}", "more than 0", value)

  @classmethod
  def off(cls) -> ProbeRewardSpec:
    """Pays nothing."""
    return cls(Kind.NONE, 1.0, 1.0, Gain.PROBABILITY, 1.0)


def value(probe: types.AnswerProbe, logp: np.ndarray) -> float:
  """Returns v, the best mean log-probability per token; NaN without answer."""
  mean = logp / probe.sizes
  return float(np.nanmax(mean)) if np.isfinite(mean).any() else np.nan


def potential(logp: np.ndarray, tau: float) -> float:
  """Returns Phi = tau log sum_c exp(L_c / tau); NaNs are left out."""
  scaled = logp[np.isfinite(logp)].astype(np.float64) / tau
  return float(tau * np.logaddexp.reduce(scaled)) if len(scaled) else np.nan


def per_turn(
  spec: ProbeRewardSpec, trajectory: types.Trajectory
) -> list[float]:
  """Returns what each turn of a trajectory earns.

  Raises:
    ValueError: the trajectory was not probed.
  """
  count = len(trajectory.turns)
  if spec.reward == Kind.NONE:
    return [0.0] * count
  probe = trajectory.probe
  if probe is None:
    raise ValueError(f"question {trajectory.question.id!r} was not probed")
  if spec.reward == Kind.IG_SEARCH:
    found = [_over_others(probe, turn + 1) for turn in range(count)]
    return [spec.ig_search_alpha * gain for gain in found]
  rewards, before = [], probe.logp[0]
  for after in probe.logp[1:]:
    same = np.where(np.isfinite(after), before, np.nan)
    gain = _gain(spec, probe, after) - _gain(spec, probe, same)
    rewards.append(gain if np.isfinite(gain) else 0.0)
    before = after
  return rewards


def _gain(
  spec: ProbeRewardSpec, probe: types.AnswerProbe, logp: np.ndarray
) -> float:
  """What differences of tips and igpo are taken of, at one place."""
  if spec.reward == Kind.TIPS:
    return spec.tips_alpha * potential(logp, spec.tips_tau)
  found = value(probe, logp)
  return found if spec.igpo_gain == Gain.LOG else float(np.exp(found))


def _over_others(probe: types.AnswerProbe, row: int) -> float:
  """v_t minus its mean over documents of other questions; 0 without any."""
  tried = probe.others[row]
  tried = tried[np.isfinite(tried).any(axis=1)]
  places = np.vstack([probe.logp[row], tried])
  common = np.isfinite(places).all(axis=0)
  if not len(tried) or not common.any():
    return 0.0
  own, *others = (
    value(probe, np.where(common, logp, np.nan)) for logp in places
  )
  return own - float(np.mean(others))


def query_tokens(
  trajectory: types.Trajectory, turn: int, tokenizer: types.TextCodec
) -> np.ndarray:
  """Returns the places of the tokens that spell the query of a search.

  A token counts that has a part of the query in it, spaces around it left out;
  an empty query has the token that closed it.
  """
  done = trajectory.turns[turn]
  own = np.nonzero(
    trajectory.policy_mask & (trajectory.turn_index == turn)
  )[0]
  match = _QUERY.search(done.text)
  if match is None:
    return np.array([done.action_position])
  ids = trajectory.tokens[own].tolist()

  def tokens_until(character):
    """Tokens whose text ends at or before a character of the turn."""
    low, high = 0, len(ids)
    while low < high:
      middle = (low + high + 1) // 2
      if len(tokenizer.decode(ids[:middle])) <= character:
        low = middle
      else:
        high = middle - 1
    return low

  first, last = match.span(1)
  inside = own[tokens_until(first) : tokens_until(last - 1) + 1]
  return inside if last > first else np.array([done.action_position])


def on_tokens(
  spec: ProbeRewardSpec, trajectory: types.Trajectory,
  tokenizer: types.TextCodec | None,
) -> np.ndarray:
  """Returns [T] float32, what is paid at each token; a turn's add up to its.

  At the token that closed the turn; ig_search evenly over the query's.
  """
  paid = np.zeros(len(trajectory.tokens), np.float32)
  for number, (turn, reward) in enumerate(
    zip(trajectory.turns, per_turn(spec, trajectory), strict=True)
  ):
    places = np.array([turn.action_position])
    if spec.reward == Kind.IG_SEARCH and reward and tokenizer:
      places = query_tokens(trajectory, number, tokenizer)
    paid[places] += reward / len(places)
  return paid


def metrics(probes: list[types.AnswerProbe]) -> dict[str, float]:
  """Means over trajectories of v behind the prompt, at the end and per turn."""
  starts, finals, gains = [], [], []
  for probe in probes:
    values = np.array([value(probe, logp) for logp in probe.logp])
    values = values[np.isfinite(values)]
    if len(values):
      starts.append(values[0])
      finals.append(values[-1])
      gains += np.diff(values).tolist()
  columns = {"start": starts, "end": finals, "gain_per_turn": gains}
  return {
    f"probe/{name}": float(np.mean(found))
    for name, found in columns.items() if found
  }

"""What is wrong with a run, in sentences: limits of metrics and what they mean.

Owns the tables; `monitor.Sentinel` counts the steps. Each limit is a field of
`config.sentinel`.
"""

from __future__ import annotations

import dataclasses

from stepsearch_jax.types import expect


@dataclasses.dataclass(frozen=True)
class Limits:
  """What counts as a collapse, and what as a sign; see `configs/common.py`.

  Attributes:
    invalid_share: most questions with an invalid action.
    unanswered_share: most questions without a closed answer.
    entropy: least policy entropy, in nats.
    kl: largest KL to the reference, in nats per token.
    grad_norm: largest gradient norm of the policy before clipping.
    reward_drop: largest fall of the mean score below its best so far.
    searches: least searches per question.
    clipped_share: most rollouts that hit a length limit.
    kl_growth: largest growth of the KL over `patience` steps.
    explained_variance: least of the value model, once it has settled.
    settling: steps that the value model has for that.
    differing_share: least groups whose rollouts differ in reward.
    patience: steps in a row that break a limit before it is an alarm.
  """

  invalid_share: float
  unanswered_share: float
  entropy: float
  kl: float
  grad_norm: float
  reward_drop: float
  searches: float
  clipped_share: float
  kl_growth: float
  explained_variance: float
  settling: int
  differing_share: float
  patience: int

  def __post_init__(self):
    expect(self.patience >= 1, "sentinel.patience", "1 or more steps",
           self.patience)
    expect(self.settling >= 0, "sentinel.settling", "0 or more steps",
           self.settling)


@dataclasses.dataclass(frozen=True)
class Check:
  """A limit of one metric.

  Attributes:
    metric: verl's name, or one that `monitor.Sentinel` derives.
    side: "above" or "below", where the value breaks the limit.
    limit: the limit.
    sentence: with {value}, {limit} and {since}.
    never: likewise, where the metric never kept the limit; "" = no alarm.
    collapse: whether the run has collapsed then; else it is an early sign.
  """

  metric: str
  side: str
  limit: float
  sentence: str
  never: str
  collapse: bool

  def alarm(self, value: float, since: int, kept: bool) -> str:
    """Returns what to say of a broken limit, "" for nothing.

    Args:
      value: of the metric now.
      since: the step from which on the limit is broken.
      kept: whether the metric kept its limit before.
    """
    sentence = self.sentence if kept else self.never
    if not sentence:
      return ""
    said = sentence.format(value=value, limit=self.limit, since=since)
    return f"{said} ({self.metric})"

  def is_broken(self, value: float) -> bool:
    """Whether `value` is on the wrong side of the limit."""
    return value > self.limit if self.side == "above" else value < self.limit


def check(
  metric: str, side: str, limit: float, sentence: str,
  never: str | None = None, collapse: bool = False,
) -> Check:
  """Returns a check; without `never` both sentences are the same."""
  return Check(metric, side, limit, sentence,
                sentence if never is None else never, collapse)


def collapses(limits: Limits) -> list[Check]:
  """Returns what is a collapse, besides a reward that falls."""
  return [
    check(
      "env/invalid_share", "above", limits.invalid_share,
      "{value:.0%} of the questions have an invalid action, more than "
      "{limit:.0%} since step {since}", collapse=True,
    ),
    check(
      "env/unanswered_share", "above", limits.unanswered_share,
      "answers stopped being closed since step {since}: {value:.0%} of the "
      "questions end without one",
      "answers are not closed since step {since}: {value:.0%} of the questions "
      "end without one", collapse=True,
    ),
    check(
      "actor/entropy", "below", limits.entropy,
      "the policy hardly varies what it writes since step {since}: entropy "
      "{value:.2g} nats per token, below {limit:.2g}", collapse=True,
    ),
    check(
      "critic/kl", "above", limits.kl,
      "the policy is far from the start since step {since}: KL {value:.3g} "
      "nats per token, above {limit:.3g}", collapse=True,
    ),
    check(
      "actor/grad_norm", "above", limits.grad_norm,
      "gradients explode since step {since}: norm {value:.3g} before clipping, "
      "above {limit:.3g}", collapse=True,
    ),
  ]


def signs(limits: Limits) -> list[Check]:
  """Returns what comes before a collapse, or makes training useless."""
  return [
    check(
      "env/searches_per_question", "below", limits.searches,
      "the policy stopped searching since step {since}: {value:.2g} searches "
      "per question", never="",
    ),
    check(
      "response_length/clip_ratio", "above", limits.clipped_share,
      "responses hit the length limit in {value:.0%} of rollouts since step "
      "{since}",
    ),
    check(
      "growth of critic/kl", "above", limits.kl_growth,
      "KL to the start grows fast since step {since}: by {value:.2g} nats per "
      f"token within {limits.patience} steps",
    ),
    check(
      "settled critic/vf_explained_var", "below", limits.explained_variance,
      "explained variance of the value model is below {limit:.2g} after "
      f"{limits.settling} steps: {{value:.2g}}, since step {{since}}",
    ),
    check(
      "batch/differing_share", "below", limits.differing_share,
      "groups no longer differ since step {since}: {value:.0%} have rollouts "
      "of unlike reward, there is nothing to learn from",
      "groups do not differ: {value:.0%} have rollouts of unlike reward, there "
      "is nothing to learn from",
    ),
  ]

"""Step-wise rewards of StepSearch (arXiv 2505.15107, section 3).

For turn t with documents doc_1..doc_k and gold paragraphs d*_1..d*_n:

  c_i = max_j cos_tfidf(d*_i, doc_j)
  G_t = 1/n sum_i max(c_i - m_i, 0),   m_i <- max(m_i, c_i)
  P_t = 1/k #{documents of turn t that an earlier turn has shown}
  step reward = G_t - P_t
  r_key = 1/M sum_i max over queries q and variants k in K_i of F1(q, k)
  outcome = F1(answer) + gamma_key * r_key

Host code: strings in, floats out. Where tokens are is `token_rewards`' matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.rewards import text_match, tfidf


class RewardError(types.UserError):
  """A trajectory cannot be scored.

  Attributes:
    kind: name of the exception that the released code raises here.
  """

  def __init__(self, kind: str, message: str):
    """Keeps the released code's exception name beside the message."""
    super().__init__(message)
    self.kind = kind


@dataclasses.dataclass(frozen=True)
class RewardSpec:
  """Every choice in which paper, intention and released code differ.

  Attributes:
    step_scale: factor of step rewards (intended 0.6, released 1.6).
    malformed: outcome when the answer is not the very end (0; released -1,
      which also discards step rewards).
    key_match: "best" over all queries, or "last": the latest query wins its
      group and one query fills one group.
    f1_decimals: rounding of F1 inside the reward, None for none.
    empty_gold: what earns an answer whose gold has no words after
      normalization ("The The"): "text", the same text, or "never".
    step_position: "sampled" token that closes the search, or "reencoded":
      found by encoding the decoded prefix again, which drifts.
    outcome_on_step: "add" or "overwrite" where both fall on one token.
    document_text: "retrieved" documents, or "parsed" back from the prompt.
    scored_text: "provenance": only what the policy sampled; "regex": the
      whole string, warnings and examples included.
    eos: "trained" or "dropped" from the policy mask.
    gamma_key: weight of the search-key reward.
    information_gain, redundancy_penalty, search_steps_reward,
      search_key_reward: the released ablation switches.
    outcome_only: answer F1 alone (the paper's PPO and GRPO baselines).
  """

  step_scale: float = 0.6
  malformed: float = 0.0
  key_match: str = "best"
  f1_decimals: int | None = None
  empty_gold: str = "text"
  step_position: str = "sampled"
  outcome_on_step: str = "add"
  document_text: str = "retrieved"
  scored_text: str = "provenance"
  eos: str = "trained"
  gamma_key: float = 0.618
  information_gain: bool = True
  redundancy_penalty: bool = True
  search_steps_reward: bool = True
  search_key_reward: bool = True
  outcome_only: bool = False

  def __post_init__(self):
    for field, allowed in (
      ("key_match", ("best", "last")),
      ("empty_gold", ("text", "never")),
      ("step_position", ("sampled", "reencoded")),
      ("outcome_on_step", ("add", "overwrite")),
      ("document_text", ("retrieved", "parsed")),
      ("scored_text", ("provenance", "regex")),
      ("eos", ("trained", "dropped")),
    ):
      if getattr(self, field) not in allowed:
        raise types.UserError(
          f"reward.{field} must be one of {allowed}, got "
          f"{getattr(self, field)!r}"
        )

  @classmethod
  def paper(cls) -> RewardSpec:
    """The method as the paper describes it; the default for training."""
    return cls()

  @classmethod
  def released(cls) -> RewardSpec:
    """The released code, quirk for quirk."""
    return cls(
      step_scale=1.6,
      malformed=-1.0,
      key_match="last",
      f1_decimals=4,
      empty_gold="never",
      step_position="reencoded",
      outcome_on_step="overwrite",
      document_text="parsed",
      scored_text="regex",
      eos="dropped",
    )


PRESETS = {"paper": RewardSpec.paper, "released": RewardSpec.released}


@dataclasses.dataclass(frozen=True)
class Evidence:
  """What of a trajectory is scored, after the choice of text source.

  Attributes:
    queries: all search queries in order.
    documents: per answered search, the texts it returned.
    answer: content of the last answer block, None without one.
    well_formed: the answer block ends the trajectory.
  """

  queries: Sequence[str]
  documents: Sequence[Sequence[str]]
  answer: str | None
  well_formed: bool


@dataclasses.dataclass(frozen=True)
class Gold:
  """What a trajectory is scored against."""

  answers: Sequence[str]
  search_keys: Sequence[Sequence[str]] | None
  support: Sequence[str]


@dataclasses.dataclass(frozen=True)
class RewardParts:
  """Scores of one trajectory; lists have one entry per answered search.

  `step_scores` are unscaled; `token_rewards` applies `step_scale`. With the
  released early return (malformed ending) gains and penalties are None.
  """

  score: float
  answer_correct: float
  search_key_score: float
  step_scores: list[float]
  information_gains: list[float] | None
  redundancy_penalty: list[float] | None


def information_gains(
  documents: Sequence[Sequence[str]],
  support: Sequence[str],
  strict: bool = False,
) -> list[float]:
  """G_t of every turn; see the module docstring.

  Args:
    documents: per turn, the retrieved texts.
    support: gold paragraphs, n >= 1.
    strict: see `tfidf.similarities`.
  """
  flat = [text for turn in documents for text in turn]
  cosine = tfidf.similarities(support, flat, strict)
  memory = np.zeros(len(support))
  gains, start = [], 0
  for turn in documents:
    stop = start + len(turn)
    current = cosine[:, start:stop].max(axis=1, initial=0.0)
    gains.append(float(np.maximum(current - memory, 0.0).sum() / len(support)))
    memory = np.maximum(memory, current)
    start = stop
  return gains


def redundancy(
  documents: Sequence[Sequence[str]], within_turn: bool = False
) -> list[float]:
  """P_t of every turn; `within_turn` also counts repeats inside a turn."""
  seen: set[str] = set()
  penalties = []
  for turn in documents:
    repeated, fresh = 0, set()
    for text in turn:
      if text in seen or (within_turn and text in fresh):
        repeated += 1
      fresh.add(text)
    seen |= fresh
    penalties.append(repeated / len(turn) if turn else 0.0)
  return penalties


def key_score(
  queries: Sequence[str],
  keys: Sequence[Sequence[str]],
  match: str = "best",
  decimals: int | None = None,
) -> float:
  """r_key of equation 5, or the released variant with match="last"."""
  if not queries or not keys:
    return 0.0
  table = np.array(
    [[text_match.f1(query, group, decimals) for group in keys]
     for query in queries]
  )
  if match == "best":
    return float(table.max(axis=0).mean())
  held = [0.0] * len(keys)
  for row in table:
    # Ties go to the first group; a query without overlap fills none.
    group = int(row.argmax())
    if row[group] > 0:
      held[group] = float(row[group])
  return sum(held) / len(keys)


def score(spec: RewardSpec, evidence: Evidence, gold: Gold) -> RewardParts:
  """Scores one trajectory.

  Raises:
    RewardError: the parsed documents have no vocabulary (released preset).
  """
  f1 = text_match.f1 if spec.empty_gold == "never" else text_match.answer_f1
  correct = f1(evidence.answer, gold.answers, spec.f1_decimals)
  if spec.outcome_only:
    outcome = correct if evidence.well_formed else spec.malformed
    return RewardParts(outcome, correct, 0.0, [], [], [])
  if not evidence.well_formed and spec.malformed < 0:
    # The released code returns before it looks at the searches.
    return RewardParts(spec.malformed, correct, 0.0, [], None, None)
  parsed = spec.document_text == "parsed"
  gains, penalties = [], []
  if gold.support:
    try:
      gains = information_gains(evidence.documents, gold.support, parsed)
    except tfidf.EmptyVocabularyError as error:
      raise RewardError("ValueError", str(error)) from error
    penalties = redundancy(evidence.documents, within_turn=parsed)
  use_gain = spec.information_gain and spec.search_steps_reward
  use_penalty = spec.redundancy_penalty and spec.search_steps_reward
  steps = [
    (gain if use_gain else 0.0) - (penalty if use_penalty else 0.0)
    for gain, penalty in zip(gains, penalties, strict=True)
  ]
  keys = 0.0
  if gold.search_keys is not None:
    keys = key_score(
      evidence.queries, gold.search_keys, spec.key_match, spec.f1_decimals
    )
  outcome = spec.malformed
  if evidence.well_formed:
    outcome = correct
    if spec.search_key_reward:
      outcome += keys * spec.gamma_key
  return RewardParts(outcome, correct, keys, steps, gains, penalties)

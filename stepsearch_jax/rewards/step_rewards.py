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
from stepsearch_jax.rewards import probe_rewards, text_match, tfidf


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
    outcome_only: only answer F1 is paid (the paper's PPO and GRPO baselines);
      the other parts are computed all the same.
    search_bonus: paid for every search that got a result, whatever it found;
      0 = off. The control that tells what the CONTENT of step rewards does.
    function: a user's own "module:function", which pays instead of all of
      this; empty for none. The parts are computed all the same.
    probe: what turns earn by the answer probe, beside the rest.
  """

  step_scale: float
  malformed: float
  key_match: str
  f1_decimals: int | None
  empty_gold: str
  step_position: str
  outcome_on_step: str
  document_text: str
  scored_text: str
  eos: str
  gamma_key: float
  information_gain: bool
  redundancy_penalty: bool
  search_steps_reward: bool
  search_key_reward: bool
  outcome_only: bool
  search_bonus: float
  function: str
  probe: probe_rewards.ProbeRewardSpec

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
      value = getattr(self, field)
      types.expect(value in allowed, f"reward.{field}", f"one of {allowed}",
                   value)

  @classmethod
  def paper(cls) -> RewardSpec:
    """The method as the paper describes it; the default for training."""
    return cls(
      step_scale=0.6,
      malformed=0.0,
      key_match="best",
      f1_decimals=None,
      empty_gold="text",
      step_position="sampled",
      outcome_on_step="add",
      document_text="retrieved",
      scored_text="provenance",
      eos="trained",
      gamma_key=0.618,
      information_gain=True,
      redundancy_penalty=True,
      search_steps_reward=True,
      search_key_reward=True,
      outcome_only=False,
      search_bonus=0.0,
      function="",
      probe=probe_rewards.ProbeRewardSpec.off(),
    )

  @classmethod
  def released(cls) -> RewardSpec:
    """The released code, quirk for quirk."""
    return dataclasses.replace(
      cls.paper(),
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

  def untrained(self, eos_ids: Sequence[int]) -> Sequence[int]:
    """Returns the sampled tokens that the policy mask leaves out."""
    return eos_ids if self.eos == "dropped" else ()


PRESETS = {"paper": RewardSpec.paper, "released": RewardSpec.released}


@dataclasses.dataclass(frozen=True)
class Evidence:
  """What of a trajectory is scored, after the choice of text source.

  Attributes:
    queries: all queries that were searched, in order.
    documents: per retrieved search, the texts of its documents.
    answer: content of the last answer block, None without one.
    well_formed: the answer block ends the trajectory.
    shown: as `documents`, what of each text the policy was shown; None where
      it was shown all of it.
  """

  queries: Sequence[str]
  documents: Sequence[Sequence[str]]
  answer: str | None
  well_formed: bool
  shown: Sequence[Sequence[str]] | None = None


@dataclasses.dataclass(frozen=True)
class Gold:
  """What a trajectory is scored against."""

  answers: Sequence[str]
  search_keys: Sequence[Sequence[str]] | None
  support: Sequence[str]


@dataclasses.dataclass(frozen=True)
class RewardParts:
  """What one trajectory earned, part by part.

  Attributes:
    score: the outcome that is paid.
    answer_correct: F1 of the answer.
    search_key_score: r_key, paid or not.
    step_scores: per retrieved search, what is paid before `step_scale`.
    information_gains: per retrieved search, G_t, paid or not; None where the
      released code returns early (malformed ending).
    redundancy_penalty: the same of P_t.
    key_gains: per query, what it added to `search_key_score`.
  """

  score: float
  answer_correct: float
  search_key_score: float
  step_scores: list[float]
  information_gains: list[float] | None
  redundancy_penalty: list[float] | None
  key_gains: list[float]


def information_gains(
  documents: Sequence[Sequence[str]],
  support: Sequence[str],
  strict: bool = False,
) -> list[float]:
  """Returns G_t of every turn; see the module docstring.

  Args:
    documents: per turn, the texts that the policy was shown.
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
  documents: Sequence[Sequence[str]],
  within_turn: bool = False,
  shown: Sequence[Sequence[str]] | None = None,
) -> list[float]:
  """Returns P_t of every turn.

  Args:
    documents: per turn, the retrieved texts.
    within_turn: whether repeats inside a turn count as well.
    shown: see `Evidence`; a document of which nothing was shown has not been
      seen by a later turn.
  """
  seen: set[str] = set()
  penalties = []
  for texts, parts in zip(documents, shown or documents, strict=True):
    repeated, fresh = 0, set()
    for text, part in zip(texts, parts, strict=True):
      if text in seen or (within_turn and text in fresh):
        repeated += 1
      if part or text == part:
        fresh.add(text)
    seen |= fresh
    penalties.append(repeated / len(texts) if texts else 0.0)
  return penalties


def key_scores(
  queries: Sequence[str],
  keys: Sequence[Sequence[str]],
  match: str = "best",
  decimals: int | None = None,
) -> list[float]:
  """Returns r_key after each query: equation 5 of the queries up to it.

  Args:
    queries: in order.
    keys: per sub-question, its accepted search phrases.
    match: "best", or the released variant "last".
    decimals: see `text_match.f1`.
  """
  if not queries or not keys:
    return [0.0] * len(queries)
  table = np.array(
    [[text_match.f1(query, group, decimals) for group in keys]
     for query in queries]
  )
  if match == "best":
    return np.maximum.accumulate(table, axis=0).mean(axis=1).tolist()
  held, scores = [0.0] * len(keys), []
  for row in table:
    # Ties go to the first group; a query without overlap fills none.
    group = int(row.argmax())
    if row[group] > 0:
      held[group] = float(row[group])
    scores.append(sum(held) / len(keys))
  return scores


def score(spec: RewardSpec, evidence: Evidence, gold: Gold) -> RewardParts:
  """Returns the rewards of one trajectory.

  Raises:
    RewardError: the parsed documents have no vocabulary (released preset).
  """
  f1 = text_match.f1 if spec.empty_gold == "never" else text_match.answer_f1
  correct = f1(evidence.answer, gold.answers, spec.f1_decimals)
  pays_steps = not spec.outcome_only
  if pays_steps and not evidence.well_formed and spec.malformed < 0:
    # The released code returns before it looks at the searches.
    return RewardParts(spec.malformed, correct, 0.0, [], None, None, [])
  gains, penalties = _gains_and_penalties(spec, evidence, gold)
  use_steps = pays_steps and spec.search_steps_reward
  use_gain = use_steps and spec.information_gain
  use_penalty = use_steps and spec.redundancy_penalty
  steps = [
    (gain if use_gain else 0.0) - (penalty if use_penalty else 0.0)
    for gain, penalty in zip(gains, penalties, strict=True)
  ]
  keys = key_scores(
    evidence.queries, gold.search_keys or (), spec.key_match, spec.f1_decimals
  )
  key_score = keys[-1] if keys else 0.0
  outcome = spec.malformed
  if evidence.well_formed:
    outcome = correct
    if pays_steps and spec.search_key_reward:
      outcome += key_score * spec.gamma_key
  return RewardParts(
    outcome, correct, key_score, steps, gains, penalties,
    np.diff(keys, prepend=0.0).tolist(),
  )


def _gains_and_penalties(
  spec: RewardSpec, evidence: Evidence, gold: Gold
) -> tuple[list[float], list[float]]:
  """Returns G_t and P_t of every retrieved search, paid or not."""
  if not gold.support:
    return [], []
  parsed = spec.document_text == "parsed"
  shown = None if parsed else evidence.shown
  try:
    gains = information_gains(
      shown or evidence.documents, gold.support,
      strict=parsed and not spec.outcome_only,
    )
  except tfidf.EmptyVocabularyError as error:
    raise RewardError("ValueError", str(error)) from error
  return gains, redundancy(evidence.documents, parsed, shown)

"""Rejection sampling: a policy's own right answers become demonstrations.

A round asks every training question several times, keeps the rollouts whose
answer is right, token for token as they were sampled, and imitates them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from absl import logging
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.parallel import distributed
from stepsearch_jax.rewards import text_match
from stepsearch_jax.run import identity
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.sft import traces


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a round samples.

  Attributes:
    attempts: rollouts per training question.
    temperature: of the decoding, above 0.
    number: of the round, from 1; no two sample alike.
  """

  attempts: int
  temperature: float
  number: int

  def __post_init__(self):
    types.expect(self.attempts > 0, "--rejection", "1 or more attempts",
                 self.attempts)
    types.expect(self.temperature > 0, "--temperature", "more than 0, because "
                 "greedy attempts are all the same", self.temperature)


def claim(
  folder: epath.Path, experiment: Experiment, sampling: Sampling,
  allowed: Sequence[str] = (),
) -> None:
  """Writes down how the rounds of a folder are made, or compares it.

  Args:
    folder: of the rounds.
    experiment: that the rounds sample with, for its settings and questions.
    sampling: of any of the rounds.
    allowed: fields that may differ; the new value then stands in the note.

  Raises:
    ChangedSettingsError: earlier rounds were made in another way.
  """
  path = folder / "sampling.json"
  about: dict[str, Any] = {
    "rejection": sampling.attempts, "temperature": sampling.temperature,
    "config": experiment.settings.config,
    "questions": identity.questions_hash(experiment.train_questions),
  }
  if path.exists():
    old = json.loads(path.read_text())
    changed = [
      (field, was, now) for field, was, now in (
        *identity.differences(
          *({k: v for k, v in note.items() if k != "config"}
            for note in (old, about))
        ),
        *identity.differences(old["config"], about["config"]),
      ) if field not in allowed
    ]
    if changed:
      differ = "; ".join(f"{field}: they have {was!r}, this start {now!r}"
                         for field, was, now in changed)
      names = ",".join(field for field, _, _ in changed)
      raise identity.ChangedSettingsError(
        f"{folder} holds rounds with other settings: {differ}; "
        f"--allow_changes={names} goes on behind them with these; to start "
        "over, remove that folder"
      )
  files.write_text(path, json.dumps(about, indent=2) + "\n")


def right(rollouts: list[types.Trajectory]) -> list[types.Trajectory]:
  """Returns the rollouts whose answer is right, equal ones once.

  Right is an exact match in a rollout of valid turns only.
  """
  kept: dict[tuple[str, bytes], types.Trajectory] = {}
  for rollout in rollouts:
    question = rollout.question
    valid = all(t.action != types.Action.INVALID for t in rollout.turns)
    if valid and text_match.exact_match(rollout.answer, question.answers):
      kept.setdefault((question.id, rollout.tokens.tobytes()), rollout)
  return list(kept.values())


def sample(
  experiment: Experiment, policy: types.Tree, sampling: Sampling,
  path: epath.Path,
) -> None:
  """Plays the training questions and writes the right rollouts to `path`.

  Raises:
    UserError: there is no right one.
  """
  asked = [
    question for question in experiment.train_questions
    for _ in range(sampling.attempts)
  ]
  first = sampling.number * len(asked)
  played = experiment.engine.run(
    policy, asked, range(first, first + len(asked)), sampling.temperature
  )
  kept = right(played.trajectories)
  types.expect(
    bool(kept), "--rejection", "at least one right answer to imitate",
    f"none among {len(asked)} rollouts",
  )
  logging.info("round %d: %d of %d rollouts are right and different, of %d of "
               "%d questions", sampling.number, len(kept), len(asked),
               len({rollout.question.id for rollout in kept}),
               len(experiment.train_questions))
  if distributed.is_primary():
    files.write_text(path, files.to_jsonl(
      traces.to_row(rollout, experiment.tokenizer) for rollout in kept
    ))
  distributed.wait("right rollouts written")

"""Plays one question at a time and tells what happens as it happens.

Owns what `ask` needs of a run: an engine with one slot per device and a text
side that reports each turn. It knows nothing of terminals.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import ml_collections
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.env import search_env
from stepsearch_jax.rollout import recorder, text_side
from stepsearch_jax.run import saved
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Happening:
  """One thing to tell.

  Attributes:
    kind: "turn" (what the policy wrote) or "documents" (what it was shown).
    text: the policy's text; "" for documents.
    documents: passages, best first; None where the search failed.
  """

  kind: str
  text: str = ""
  documents: Sequence[types.Passage] | None = ()


@dataclasses.dataclass(frozen=True)
class Reply:
  """A played question.

  Attributes:
    trajectory: the rollout.
    seconds: it took.
    tokens: that the policy wrote.
  """

  trajectory: types.Trajectory
  seconds: float
  tokens: int

  def as_row(self) -> dict:
    """Returns a JSON-able form."""
    turns = [
      {
        "action": str(turn.action), "content": turn.content,
        "text": turn.text, "failed": turn.failed,
        "documents": [
          {"id": p.id, "title": p.title, "text": p.text, "score": p.score}
          for p in turn.documents
        ],
      }
      for turn in self.trajectory.turns
    ]
    return {
      "question": self.trajectory.question.text,
      "answer": self.trajectory.answer,
      "stop_reason": str(self.trajectory.stop_reason),
      "seconds": round(self.seconds, 3), "tokens": self.tokens,
      "turns": turns,
    }


class _TellingTexts(text_side.TextSide):
  """A text side that reports turns and documents."""

  tell: Callable[[Happening], None] = staticmethod(lambda happening: None)

  def judge(self, record: recorder.Recorder) -> search_env.Step:
    """Reports a turn, then judges it."""
    self.tell(Happening("turn", self.decode(
      record.tokens[record.turn_start :]
    )))
    return super().judge(record)

  def observation(
    self, documents: Sequence[types.Passage] | None, turn: int
  ) -> search_env.Observation:
    """Reports documents, then writes the reply."""
    self.tell(Happening("documents", documents=documents))
    return super().observation(documents, turn)


class Agent:
  """A run's policy that answers questions."""

  def __init__(
    self, config: ml_collections.ConfigDict, workdir: epath.Path,
    step: int | None = None,
  ):
    """Loads the policy of a run, or `model.reference` where there is none.

    Args:
      config: settings of the run; one slot per device is enough here.
      workdir: of the run.
      step: checkpoint, None for the newest.
    """
    config = copy.deepcopy(config)
    saved.search_own_index(config, workdir)
    mesh = Settings.from_config(config).mesh
    shards = mesh.shards("slots", jax.device_count())
    config.rollout.slots = shards
    config.rollout.extend_rows = (shards,)
    settings = Settings.from_config(config)
    self._experiment = Experiment(settings, workdir)
    parts = self._experiment
    self._texts = _TellingTexts(parts.env, parts.tokenizer)
    self._engine = parts.make_engine(self._texts)
    if (workdir / "checkpoints").exists():
      number, self._policy = parts.trained_policy(step)
      self.name = f"{workdir}, step {number}"
    else:
      types.expect(
        bool(settings.model.reference), "--workdir",
        "a run with checkpoints, or a config with model.reference",
        str(workdir),
      )
      self._policy = parts.initial_policy()
      self.name = settings.model.reference
    self._asked = 0

  def ask(
    self, text: str, temperature: float = 0.0,
    tell: Callable[[Happening], None] = lambda happening: None,
  ) -> Reply:
    """Plays one question.

    Args:
      text: the question.
      temperature: 0 for greedy.
      tell: called with everything that happens, while it happens.

    Raises:
      UserError: the question does not fit the context.
    """
    question = types.Question(f"asked {self._asked}", text, ("?",))
    self._engine.prompt_tokens(question)
    self._texts.tell = tell
    began = time.perf_counter()
    rollout = self._engine.run(
      self._policy, [question], [self._asked], temperature
    )
    self._asked += 1
    (trajectory,) = rollout.trajectories
    return Reply(trajectory, time.perf_counter() - began,
                 int(trajectory.policy_mask.sum()))

  def close(self) -> None:
    """Ends the search threads."""
    self._engine.close()

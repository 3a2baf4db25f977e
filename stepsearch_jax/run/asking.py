"""Plays one question at a time and tells what happens as it happens.

Owns what `ask` needs of a run: an engine with one slot per device and a text
side that reports each turn. It knows nothing of terminals.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import ml_collections
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.env import actions, search_env
from stepsearch_jax.retrieval.index import index as index_lib
from stepsearch_jax.retrieval.index import passages
from stepsearch_jax.rollout import recorder, text_side
from stepsearch_jax.run import saved
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Happening:
  """One thing to tell.

  Attributes:
    kind: "text" (what the policy has just written), "turn" (the turn that it
      ended, whose text has been told in pieces) or "documents" (what it was
      shown).
    text: the policy's text; "" for documents.
    documents: passages, best first; None where the search failed.
  """

  kind: str
  text: str = ""
  documents: Sequence[types.Passage] | None = ()

  def as_row(self) -> dict:
    """Returns a JSON-able form."""
    if self.kind == "turn":
      turn = actions.parse(self.text)
      return {"kind": self.kind, "thought": actions.thought(self.text),
              "action": str(turn.action), "content": turn.content}
    if self.kind == "text":
      return {"kind": self.kind, "text": self.text}
    return {"kind": self.kind, "failed": self.documents is None,
            "titles": [passage.title for passage in self.documents or ()]}


@dataclasses.dataclass(frozen=True)
class Reply:
  """A played question.

  Attributes:
    trajectory: the rollout.
    seconds: it took.
    tokens: that the policy wrote.
    turn_seconds: that each turn took, its search included.
    cut: it wrote all tokens that it was given and did not answer.
  """

  trajectory: types.Trajectory
  seconds: float
  tokens: int
  turn_seconds: Sequence[float] = ()
  cut: bool = False

  def as_row(self) -> dict:
    """Returns a JSON-able form."""
    turns = [
      {
        "action": str(turn.action), "content": turn.content,
        "text": turn.text, "thought": actions.thought(turn.text),
        "failed": turn.failed, "seconds": round(seconds, 3),
        "documents": [
          {"id": p.id, "title": p.title, "text": p.text, "score": p.score}
          for p in turn.documents
        ],
      }
      for turn, seconds in zip(
        self.trajectory.turns, self.turn_seconds, strict=True
      )
    ]
    return {
      "question": self.trajectory.question.text,
      "answer": self.trajectory.answer,
      "stop_reason": str(self.trajectory.stop_reason),
      "seconds": round(self.seconds, 3), "tokens": self.tokens,
      "read_tokens": len(self.trajectory.tokens) - self.tokens,
      "cut": self.cut, "turns": turns,
    }


def _ignore(happening: Happening) -> None:
  """Tells nobody."""


class _TellingTexts(text_side.TextSide):
  """A text side that reports texts and documents, and counts tokens."""

  def begin(
    self, tell: Callable[[Happening], None], max_tokens: int | None
  ) -> None:
    """Starts over for the next question."""
    self._tell = tell
    self._left = max_tokens
    self._told = 0  # Characters of the current turn that are told.
    self._began = time.perf_counter()
    # When each turn so far was over, its search included.
    self._ends: list[float] = []

  @property
  def spent(self) -> bool:
    """Whether the policy has written all tokens that it was given."""
    return self._left == 0

  @property
  def turn_seconds(self) -> list[float]:
    """Seconds of each turn."""
    begins = [self._began, *self._ends]
    return [end - begin
            for begin, end in zip(begins, self._ends, strict=False)]

  def turn_budget(self, record: recorder.Recorder, limit: int) -> int:
    """Returns how many tokens, at most `limit`, the next turn may have."""
    budget = super().turn_budget(record, limit)
    return budget if self._left is None else min(budget, self._left)

  def written(self, record: recorder.Recorder) -> None:
    """Reports what a turn has grown by."""
    text = self.decode(record.tokens[record.turn_start :])
    # Bytes of a character that is not complete are held back.
    self._tell_rest(text.rstrip("\ufffd"))

  def _tell_rest(self, text: str) -> None:
    """Reports what is not told yet of a turn's text so far."""
    rest, self._told = text[self._told :], max(self._told, len(text))
    if rest:
      self._tell(Happening("text", rest))

  def judge(self, record: recorder.Recorder) -> search_env.Step:
    """Reports a turn, then judges it; the last one if no token is left."""
    tokens = record.tokens[record.turn_start :]
    text = self.decode(tokens)
    self._tell_rest(text)
    self._told = 0
    self._ends.append(time.perf_counter())
    self._tell(Happening("turn", text))
    step = super().judge(record)
    if self._left is not None:
      self._left -= len(tokens)
    return dataclasses.replace(step, done=step.done or self.spent)

  def observation(
    self, documents: Sequence[types.Passage] | None, turn: int
  ) -> search_env.Observation:
    """Reports documents, then writes the reply."""
    self._ends[-1] = time.perf_counter()
    self._tell(Happening("documents", documents=documents))
    return super().observation(documents, turn)


class Agent:
  """A policy that answers questions: a run's, or `model.reference`."""

  def __init__(
    self, config: ml_collections.ConfigDict, workdir: epath.Path | None,
    step: int | None = None,
  ):
    """Loads the policy of a run, or `model.reference` where there is none.

    Args:
      config: settings; one slot per device is enough here.
      workdir: of the run; None where the config names model and index.
      step: checkpoint, None for the newest.
    """
    config = copy.deepcopy(config)
    # Parts want a folder to look into, even if there is nothing to find.
    self._scratch = tempfile.TemporaryDirectory()
    workdir = workdir or epath.Path(self._scratch.name)
    saved.search_own_index(config, workdir)
    mesh = Settings.from_config(config).mesh
    shards = mesh.shards("slots", jax.device_count())
    config.rollout.slots = shards
    config.rollout.extend_rows = (shards,)
    settings = Settings.from_config(config)
    self.reward = settings.reward  # What the run pays in training.
    self._experiment = Experiment(settings, workdir)
    parts = self._experiment
    self._texts = _TellingTexts(parts.env, parts.tokenizer)
    self._engine = parts.make_engine(self._texts)
    if _has_policy(workdir):
      number, self._policy = parts.trained_policy(step)
      self.name = f"{workdir}, step {number}"
    else:
      self._policy = parts.initial_policy()
      self.name = settings.model.reference
    self._asked = 0

  def ask(
    self, text: str, temperature: float = 0.0,
    tell: Callable[[Happening], None] = _ignore,
    max_tokens: int | None = None,
  ) -> Reply:
    """Plays one question.

    Args:
      text: the question.
      temperature: 0 for greedy.
      tell: called with everything that happens, while it happens; what it
        raises ends the rollout and reaches the caller.
      max_tokens: that the policy may write in all turns together, at least 1;
        None for what the turns allow.

    Raises:
      UserError: the question does not fit the context.
    """
    question = types.Question(f"asked {self._asked}", text, ("?",))
    self._engine.prompt_tokens(question)
    self._texts.begin(tell, max_tokens)
    began = time.perf_counter()
    rollout = self._engine.run(
      self._policy, [question], [self._asked], temperature
    )
    self._asked += 1
    (trajectory,) = rollout.trajectories
    return Reply(
      trajectory, time.perf_counter() - began,
      int(trajectory.policy_mask.sum()), self._texts.turn_seconds,
      self._texts.spent and trajectory.answer is None,
    )

  def close(self) -> None:
    """Ends the search threads."""
    self._engine.close()
    self._scratch.cleanup()


def _has_policy(workdir: epath.PathLike | None) -> bool:
  """Whether a run has a policy of its own."""
  return bool(workdir) and (epath.Path(workdir) / "checkpoints").exists()


@dataclasses.dataclass(frozen=True)
class Wanted:
  """Which agent a command's flags name.

  Attributes:
    workdir: folder of a run; None for none.
    step: checkpoint of it, None for the newest.
    model: plays instead of a run's policy (HF folder or id, *.gguf,
      package:<name>); None for none.
    index: folder that is searched instead of what the config says.
  """

  workdir: str | None = None
  step: int | None = None
  model: str | None = None
  index: str | None = None

  def fill(self, config: ml_collections.ConfigDict) -> None:
    """Puts model and index into a config, and checks that both are known.

    Raises:
      UserError: naming the flag that is missing, wrong or too much.
    """
    trained = _has_policy(self.workdir)
    types.expect(
      not (self.model and trained), "--model",
      f"no run beside it, but --workdir={self.workdir} has checkpoints",
      self.model,
    )
    if self.model:
      config.model.reference = self.model
    types.expect(
      trained or bool(config.model.reference), "--workdir",
      "a run with checkpoints (or --model)", self.workdir,
    )
    if self.index:
      self._search_index(config)
    found = config.retrieval
    types.expect(
      bool(self.workdir or found.index or found.remote or found.replay
           or found.engine == "online"),
      "--index", "the folder of an index to search (see stepsearch index)",
      self.index,
    )

  def _search_index(self, config: ml_collections.ConfigDict) -> None:
    """Makes a ready index what is searched, whatever built it."""
    retrieval = config.retrieval
    retrieval.encoder, encoding = index_lib.encoder_of(
      index_lib.read_manifest(self.index, "--index: ")
    )
    retrieval.encoding.update(dataclasses.asdict(encoding))
    retrieval.index, retrieval.engine = self.index, "index"
    # Its own passages stand for the files that they came from.
    config.data.train = ""
    config.data.corpus = str(epath.Path(self.index) / passages.TEXTS)


def open_agent(
  config: ml_collections.ConfigDict | None, wanted: Wanted
) -> Agent:
  """Returns the agent that a command's flags name.

  Args:
    config: None where neither a flag nor the run nor the model has one.
    wanted: what the flags say.

  Raises:
    UserError: there is no policy to load, or nothing to search.
  """
  if config is None:
    given = f"--workdir={wanted.workdir}, which holds no config.json"
    raise types.UserError(
      "expected --workdir of a run, or --model and --index; got "
      + (given if wanted.workdir else "neither")
    )
  config = copy.deepcopy(config)
  wanted.fill(config)
  workdir = epath.Path(wanted.workdir) if wanted.workdir else None
  return Agent(config, workdir, wanted.step)

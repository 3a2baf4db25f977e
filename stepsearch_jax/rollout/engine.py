"""Host scheduler of the rollout: questions in, trajectories out.

The life of a slot, one place in the device cache:

             +--------- next question -----------------------------+
             v                                                     |
    free -> WRITING --prompt in cache--> SPEAKING --turn ended--> judge
             ^                                                     |
             |                                 answer, last turn --+--> done
             +------ warning ----------------------- no action ----+
             |                                                     |
             +-- observation -- SEARCHING <-------------- search --+

Searches run on host threads while other slots decode. The schedule depends on
the data alone, never on the time of day: a search is read a fixed number of
decode steps after it was asked, however fast or slow it was. So a run repeats
bit for bit whatever the retriever's speed.

Prompts begin alike, and rollouts of one question have the same prompt: a slot
takes over what some slot holds of its prompt and writes only the rest.

This is the one place that sees both the device programs and the text world.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging

from stepsearch_jax import types
from stepsearch_jax.env import search_env
from stepsearch_jax.rollout import (
  probing,
  programs,
  reading,
  recorder,
  records,
  text_side,
)
from stepsearch_jax.rollout.searches import SearchQueue
from stepsearch_jax.rollout.slot_cache import Phase, Slot, SlotCache

# A rollout that waits longer than this share, and this long, gets a warning.
_WAIT_SHARE, _WAIT_SECONDS = 0.2, 5.0


class Engine:
  """Plays questions through a policy and a search environment."""

  def __init__(
    self,
    compiled: programs.RolloutPrograms,
    texts: text_side.TextSide,
    retriever: types.Retriever,
    spec: records.EngineSpec,
    seed: int,
  ):
    """Keeps the parts; `seed` and an episode number fix a trajectory.

    Args:
      compiled: device programs.
      texts: protocol and tokenizer.
      retriever: answers queries, on host threads.
      spec: limits.
      seed: of the sampling.
    """
    self.programs = compiled
    self._texts = texts
    self._retriever = retriever
    self._spec = spec
    self._key = jax.random.key(seed)
    self._pool = concurrent.futures.ThreadPoolExecutor(
      spec.search_threads, thread_name_prefix="search"
    )

  def close(self) -> None:
    """Waits for searches that have begun, then closes the retriever."""
    self._pool.shutdown(wait=True, cancel_futures=True)
    types.close_retriever(self._retriever)

  def compile_ahead(self) -> None:
    """Compiles all that a rollout can need; else each is when first needed."""
    spec = self._spec
    self.programs.compile_ahead(
      spec.extend_rows, spec.extend_tokens, spec.max_prompt,
      spec.probe.tokens if spec.probe else (),
    )

  def prompt_tokens(self, question: types.Question) -> list[int]:
    """Returns the tokens of a question's prompt.

    Raises:
      UserError: the prompt is longer than `max_prompt` or leaves no room.
    """
    tokens = self._texts.prompt(question)
    room = self.programs.spec.context - self._spec.answer_room
    limit = min(self._spec.max_prompt, room)
    if len(tokens) > limit:
      raise types.UserError(
        f"question {question.id!r} needs {len(tokens)} prompt tokens, the "
        f"limit is {limit}: raise rollout.max_prompt / rollout.context or "
        "drop the question"
      )
    return tokens

  def run(
    self, params: types.Tree, questions: Sequence[types.Question],
    episodes: Sequence[int], temperature: float = 1.0, probe: bool = False,
    finished: Callable[[], object] = lambda: None,
  ) -> records.Rollout:
    """Rolls out every question once.

    Args:
      params: policy parameters in training layout.
      questions: what to ask.
      episodes: rollout numbers, one per question; they seed the sampling.
      temperature: 0 for greedy.
      probe: ask how likely the gold answers are; changes no token.
      finished: called for every trajectory that has ended.
    """
    if len(questions) != len(episodes):
      raise ValueError(
        f"{len(questions)} questions but {len(episodes)} episode numbers"
      )
    began = time.perf_counter()
    stats = records.RolloutStats()
    cache = SlotCache(
      self.programs, params, self._key, temperature, self._spec, stats
    )
    searches = SearchQueue(
      self._retriever, self._pool, self._texts.topk,
      self._spec.retrieval_delay, stats,
    )
    prompts = [
      _Prompt(order, question, episode, self.prompt_tokens(question))
      for order, (question, episode) in enumerate(
        zip(questions, episodes, strict=True)
      )
    ]
    spec = self._spec
    if not probe:
      spec = dataclasses.replace(spec, probe=None)
    schedule = _Schedule(self._texts, cache, searches, spec,
                         self.programs.spec)
    done = schedule.play(prompts, stats, finished)
    stats.seconds = time.perf_counter() - began
    _warn_of_waiting(stats)
    return records.Rollout(done, stats)

  def probe(self, params: types.Tree, rollout: records.Rollout) -> None:
    """Reads finished trajectories with a model and sets their `probe`.

    For a model that has not played them, such as the reference. Costs a pass
    over all contexts, and what `ProbeSpec.others` asks for.

    Args:
      params: of the model, in training layout.
      rollout: of this engine; its `probe_seconds` grow.
    """
    spec = self._spec
    if spec.probe is None:
      raise ValueError("an engine without a ProbeSpec probes nothing")
    began = time.perf_counter()
    cache = SlotCache(
      self.programs, params, self._key, 1.0, spec, records.RolloutStats()
    )
    reading.Reader(
      cache, self._texts, spec, spec.probe, self.programs.spec
    ).read(rollout.trajectories)
    rollout.stats.probe_seconds += time.perf_counter() - began


def _warn_of_waiting(stats: records.RolloutStats) -> None:
  if (stats.retrieval_wait_share > _WAIT_SHARE
      and stats.retrieval_wait_seconds > _WAIT_SECONDS):
    logging.warning(
      "the rollout waited for searches in %.0f %% of its %.1f seconds: raise "
      "rollout.search_threads or rollout.retrieval_delay, or mend the "
      "retriever", 100 * stats.retrieval_wait_share, stats.seconds,
    )


@dataclasses.dataclass(frozen=True)
class _Prompt:
  """A question that waits for a slot; `order` is its place in the result."""

  order: int
  question: types.Question
  episode: int
  tokens: list[int]


class _Schedule:
  """The loop of one rollout: which slot does what, and when."""

  def __init__(
    self,
    texts: text_side.TextSide,
    cache: SlotCache,
    searches: SearchQueue,
    spec: records.EngineSpec,
    shape: programs.ProgramSpec,
  ):
    self._texts = texts
    self._cache = cache
    self._searches = searches
    self._spec = spec
    self._context = shape.context
    self._slots: list[Slot | None] = [None] * shape.slots
    self._waiting: collections.deque[_Prompt] = collections.deque()
    self._done: dict[int, types.Trajectory] = {}
    # Whose contexts still lie in their slots and are to be probed.
    self._unprobed: list[tuple[int, types.Trajectory]] = []

  def play(
    self, prompts: Sequence[_Prompt], stats: records.RolloutStats,
    finished: Callable[[], object],
  ) -> list[types.Trajectory]:
    """Plays every prompt to its end; returns them in order."""
    self._waiting.extend(prompts)
    told = 0
    while self._waiting or any(self._slots):
      for _ in range(told, told := len(self._done)):
        finished()
      # 0. Trajectories are probed before others take their slots.
      if self._waiting:
        self._probe()
      # 1. Free slots take the next questions; their prompts are to be written.
      self._refill()
      # 2. Searches that are due become observations, to be written as well.
      self._read_searches()
      # 3. All that is to be written is; those slots speak next.
      self._cache.write(self._in(Phase.WRITING))
      speaking = self._in(Phase.SPEAKING)
      if not speaking:
        continue
      # 4. The policy speaks until some turn ends or a search is due ...
      ended = self._cache.decode(speaking, self._searches.steps_until_due())
      for slot in speaking:
        self._texts.written(slot.record)
      # 5. ... and the environment judges each turn that ended.
      self._end_turns(ended, stats)
    self._probe()
    for _ in range(told, len(self._done)):
      finished()
    return [self._done[prompt.order] for prompt in prompts]

  def _in(self, phase: Phase) -> list[Slot]:
    return [slot for slot in self._slots if slot and slot.phase is phase]

  def _refill(self) -> None:
    for place, slot in enumerate(self._slots):
      if slot is None and self._waiting:
        prompt = self._waiting.popleft()
        record = recorder.Recorder(
          prompt.order, prompt.question, prompt.episode
        )
        record.append(prompt.tokens, types.Provenance.PROMPT)
        self._slots[place] = slot = Slot(
          place, record, np.asarray(prompt.tokens, np.int32)
        )
        self._let_speak(slot)

  def _let_speak(self, slot: Slot) -> None:
    """Marks a slot for writing; the policy's next turn begins behind it."""
    record = slot.record
    record.turn_start = len(record.tokens)
    slot.phase = Phase.WRITING
    slot.budget = min(
      self._texts.turn_budget(record, self._spec.max_turn),
      self._context - len(record.tokens),
    )

  def _read_searches(self) -> None:
    """Reads searches that are due, or that nothing else can be done before."""
    while self._searches:
      idle = not (self._in(Phase.WRITING) or self._in(Phase.SPEAKING))
      if self._searches.steps_until_due() > 0 and not idle:
        return
      for result in self._searches.read():
        slot, turn = result.asker
        documents = self._texts.documents(slot.record, result.documents)
        observation = self._texts.observation(
          documents, len(slot.record.turns)
        )
        if documents is None:
          turn = dataclasses.replace(turn, failed=True)
        else:
          turn = dataclasses.replace(
            turn, documents=tuple(documents), retrieved=True
          )
        self._observe(slot, turn, observation)

  def _observe(
    self, slot: Slot, turn: types.Turn, observation: search_env.Observation
  ) -> None:
    """Appends an observation to a slot, or ends it for lack of room."""
    record, spec = slot.record, self._spec
    room = self._context - len(record.tokens) - spec.answer_room
    encoded = self._texts.encode(observation, min(spec.max_observation, room))
    if len(encoded.tokens) > room:
      record.turns.append(dataclasses.replace(turn, retrieved=False))
      self._finish(slot, types.StopReason.CONTEXT)
      return
    record.truncated_documents += encoded.cut
    record.append(encoded.tokens, types.Provenance.OBSERVATION)
    record.turns.append(
      dataclasses.replace(
        turn, observation=self._texts.decode(encoded.tokens),
        shown=encoded.shown(turn.documents),
      )
    )
    self._let_speak(slot)

  def _end_turns(
    self, ended: Sequence[Slot], stats: records.RolloutStats
  ) -> None:
    """Judges turns that have ended; starts their searches in one request."""
    asked = []
    for slot in ended:
      step = self._texts.judge(slot.record)
      turn = types.Turn(
        text=step.text,
        action=step.action,
        content=step.content,
        documents=(),
        observation="",
        action_position=len(slot.record.tokens) - 1,
      )
      if step.done:
        self._conclude(slot, turn, step)
        stats.vacant_slot_steps += slot.idled if self._waiting else 0
      elif step.query is not None:
        slot.phase = Phase.SEARCHING
        asked.append((slot, turn))
      else:
        self._observe(
          slot, turn, search_env.Observation(step.warning, (), "")
        )
    if asked:
      self._searches.ask([turn.content for _, turn in asked], asked)

  def _conclude(
    self, slot: Slot, turn: types.Turn, step: search_env.Step
  ) -> None:
    """Ends a trajectory with its last turn, an answer or none."""
    record, reason = slot.record, types.StopReason.MAX_TURNS
    if step.action is types.Action.ANSWER:
      record.answer, reason = step.content, types.StopReason.ANSWER
      if step.begins >= 0:
        first = record.turn_start + self._texts.reaches(
          record.tokens[record.turn_start :], step.begins
        )
        turn = dataclasses.replace(turn, answer_position=first)
    record.turns.append(turn)
    self._finish(slot, reason)

  def _finish(self, slot: Slot, reason: types.StopReason) -> None:
    done = self._done[slot.record.order] = slot.record.finish(reason)
    self._slots[slot.place] = None
    if self._spec.probe:
      self._unprobed.append((slot.place, done))

  def _probe(self) -> None:
    """Asks how likely the gold answers of ended trajectories were."""
    spec = self._spec.probe
    if spec is None or not self._unprobed:
      return
    probing.probe(
      [
        probing.Placed(place, done, self._texts.answers(done.question))
        for place, done in self._unprobed
      ], self._cache.probe, spec, self._context,
    )
    self._unprobed.clear()

"""Host scheduler of the rollout: questions in, trajectories out.

The one place that sees both the device programs and the text world. A slot
goes through: prompt in -> policy turn -> (search -> observation in -> policy
turn)* -> done, and is refilled with the next question at once. Searches run on
host threads while other slots decode.

The schedule depends on the data alone, never on the clock: a search asked
after block n joins before block n + delay, however fast or slow it was. So a
run repeats bit for bit whatever the retriever's speed.
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
from stepsearch_jax.rollout import observations, recorder, sampler

_SEARCH_THREADS = 2


@dataclasses.dataclass(frozen=True)
class EngineSpec:
  """Limits of a rollout, in tokens.

  Attributes:
    max_prompt: a longer prompt is an error; questions are never cut.
    max_turn: tokens that the policy may write in one turn.
    max_observation: an observation's documents are cut to fit this.
    answer_room: tokens kept free behind an observation; a trajectory whose
      context cannot offer them ends there.
    retrieval_delay: decode blocks between asking and reading a search.
    extend_rows: bucket sizes for rows ingested together.
    extend_tokens: bucket sizes for the tokens of one ingested chunk.
  """

  max_prompt: int = 2048
  max_turn: int = 800
  max_observation: int = 800
  answer_room: int = 32
  retrieval_delay: int = 2
  extend_rows: tuple[int, ...] = (4, 16)
  extend_tokens: tuple[int, ...] = (64, 256, 512)

  def __post_init__(self):
    if self.retrieval_delay < 1:
      raise ValueError("retrieval_delay must be at least 1 block, got "
                       f"{self.retrieval_delay}")
    for name in ("extend_rows", "extend_tokens"):
      sizes = getattr(self, name)
      if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(f"{name} must be increasing positive sizes: {sizes}")
    if self.extend_tokens[-1] < 2:
      raise ValueError("extend_tokens must allow chunks of at least 2 tokens")


@dataclasses.dataclass
class RolloutStats:
  """What one call of `Engine.run` did, for metrics and benchmarks."""

  policy_tokens: int = 0
  ingested_tokens: int = 0
  extend_padding: int = 0
  decode_steps: int = 0
  slot_steps: int = 0
  idle_slot_steps: int = 0
  searches: int = 0
  failed_searches: int = 0
  seconds: float = 0.0
  retrieval_wait_seconds: float = 0.0
  extend_seconds: float = 0.0
  decode_seconds: float = 0.0


@dataclasses.dataclass
class _Job:
  """Tokens that wait to be written into a slot."""

  slot: int
  tokens: list[int]
  start: int


class Engine:
  """Plays questions through a policy and a search environment."""

  def __init__(
    self,
    programs: sampler.Sampler,
    env: search_env.SearchEnv,
    retriever: search_env.Retriever,
    tokenizer,
    spec: EngineSpec,
    seed: int,
    merge: Callable = lambda found, k: found,
  ):
    """Keeps the parts; `seed` and an episode number fix a trajectory.

    Args:
      programs: compiled device programs.
      env: the search environment.
      retriever: answers queries, on host threads.
      tokenizer: of the policy.
      spec: limits.
      seed: of the sampling.
      merge: (a search's results or None for failed, k) to the same; runs in
        schedule order on the main thread, where processes may exchange them.
    """
    self._merge = merge
    self._programs = programs
    self._env = env
    self._retriever = retriever
    self._tokenizer = tokenizer
    self._spec = spec
    self._key = jax.random.key(seed)
    self._pool = concurrent.futures.ThreadPoolExecutor(
      _SEARCH_THREADS, thread_name_prefix="search"
    )

  def close(self) -> None:
    """Ends the search threads."""
    self._pool.shutdown(wait=False, cancel_futures=True)

  def prompt_tokens(self, question: types.Question) -> list[int]:
    """Tokens of a question's prompt.

    Raises:
      ValueError: the prompt is longer than `max_prompt` or leaves no room.
    """
    tokens = self._tokenizer.encode_prompt(self._env.prompt(question))
    room = self._programs.spec.context - self._spec.answer_room
    limit = min(self._spec.max_prompt, room)
    if len(tokens) > limit:
      raise ValueError(
        f"question {question.id!r} needs {len(tokens)} prompt tokens, the "
        f"limit is {limit}: raise rollout.max_prompt / rollout.context or "
        "drop the question"
      )
    return tokens

  def run(
    self,
    params,
    questions: Sequence[types.Question],
    episodes: Sequence[int],
    temperature: float = 1.0,
    on_done: Callable[[types.Trajectory], None] | None = None,
  ) -> tuple[list[types.Trajectory], RolloutStats]:
    """Rolls out every question once.

    Args:
      params: policy parameters in training layout.
      questions: what to ask.
      episodes: rollout numbers, one per question; they seed the sampling.
      temperature: 0 for greedy.
      on_done: called with each finished trajectory, in finishing order.

    Returns:
      (trajectories in the order of `questions`, statistics).
    """
    if len(questions) != len(episodes):
      raise ValueError(
        f"{len(questions)} questions but {len(episodes)} episode numbers"
      )
    run = _Run(self, params, questions, episodes, temperature, on_done)
    return run.play()


class _Run:
  """One call of `Engine.run`: the slots, the queues and the clock."""

  def __init__(self, engine, params, questions, episodes, temperature, on_done):
    self._e = engine
    self._params = engine._programs.decode_params(params)
    self._state = engine._programs.init_state()
    self._temperature = temperature
    self._on_done = on_done
    self._waiting = collections.deque(enumerate(zip(questions, episodes,
                                                    strict=True)))
    slots = engine._programs.spec.slots
    self._slots: list[recorder.Recorder | None] = [None] * slots
    self._active = np.zeros(len(self._slots), bool)
    self._jobs: list[_Job] = []
    # (due block, future, [(slot, text of the turn)]).
    self._searches: collections.deque = collections.deque()
    self._done: list[types.Trajectory | None] = [None] * len(questions)
    self._tick = 0
    self.stats = RolloutStats()

  def play(self):
    """Runs the schedule to its end."""
    began = time.perf_counter()
    while self._waiting or any(slot is not None for slot in self._slots):
      self._refill()
      self._join_searches()
      self._ingest()
      if self._active.any():
        self._end_turns(self._decode())
      self._tick += 1
    self.stats.seconds = time.perf_counter() - began
    return self._done, self.stats

  def _refill(self):
    for p, slot in enumerate(self._slots):
      if slot is None and self._waiting:
        order, (question, episode) = self._waiting.popleft()
        tokens = self._e.prompt_tokens(question)
        slot = recorder.Recorder(order, question, episode, len(tokens))
        slot.append(tokens, types.Provenance.PROMPT)
        self._slots[p] = slot
        self._jobs.append(_Job(p, tokens, 0))

  def _join_searches(self):
    """Feeds the observations of searches that are due, waiting if late."""
    while self._searches and self._searches[0][0] <= self._tick:
      _, future, askers = self._searches.popleft()
      began = time.perf_counter()
      try:
        results = future.result()
      except search_env.SearchError as error:
        logging.warning("%d searches failed: %s", len(askers), error)
        results = None
      results = self._e._merge(results, self._e._env.topk)
      if results is None:
        results = [None] * len(askers)
        self.stats.failed_searches += len(askers)
      self.stats.retrieval_wait_seconds += time.perf_counter() - began
      for (p, turn), documents in zip(askers, results, strict=True):
        index = len(self._slots[p].turns)
        if documents is None:
          turn = dataclasses.replace(turn, failed=True)
          self._observe(p, turn, self._e._env.failure(index))
          continue
        turn = dataclasses.replace(
          turn, documents=tuple(documents), answered=True
        )
        self._observe(p, turn, self._e._env.observation(documents, index))

  def _observe(self, p: int, turn: types.Turn, seen) -> None:
    """Appends an observation to slot `p`, or ends it for lack of room."""
    slot, spec = self._slots[p], self._e._spec
    room = self._e._programs.spec.context - len(slot.tokens) - spec.answer_room
    tokens, cut = observations.observation_tokens(
      seen, self._e._tokenizer.encode, min(spec.max_observation, room)
    )
    if len(tokens) > room:
      slot.turns.append(dataclasses.replace(turn, answered=False))
      self._finish(p, "context")
      return
    slot.truncated_documents += cut
    start = len(slot.tokens) - 1
    newest = slot.tokens[-1]
    slot.append(tokens, types.Provenance.OBSERVATION)
    slot.turns.append(
      dataclasses.replace(turn, observation=self._e._tokenizer.decode(tokens))
    )
    slot.turn_start = len(slot.tokens)
    self._jobs.append(_Job(p, [newest, *tokens], start))

  def _ingest(self):
    """Writes all waiting tokens into the cache, longest rows together."""
    began = time.perf_counter()
    spec = self._e._spec
    jobs = sorted(self._jobs, key=lambda job: (-len(job.tokens), job.slot))
    self._jobs = []
    while jobs:
      group, jobs = jobs[: spec.extend_rows[-1]], jobs[spec.extend_rows[-1] :]
      chunk, upto = self._chunk(group)
      self._state = self._e._programs.extend(
        self._params, self._state, chunk, upto
      )
      size = chunk.tokens.shape[1]
      # A chunk's last token is still pending, so the next chunk repeats it.
      rest = [
        _Job(job.slot, job.tokens[size - 1 :], job.start + size - 1)
        for job in group
        if len(job.tokens) > size
      ]
      for job in group:
        self._active[job.slot] |= len(job.tokens) <= size
      jobs = rest + jobs
    self.stats.extend_seconds += time.perf_counter() - began

  def _chunk(self, group: Sequence[_Job]):
    """Pads a group of jobs to bucket sizes; returns (Chunk, kv bound)."""
    spec, context = self._e._spec, self._e._programs.spec.context
    longest = max(len(job.tokens) for job in group)
    size = next((s for s in spec.extend_tokens if s >= longest),
                spec.extend_tokens[-1])
    rows = next(r for r in spec.extend_rows if r >= len(group))
    ints = {
      name: np.zeros(rows, np.int32)
      for name in ("slot", "start", "length", "budget", "episode")
    }
    tokens = np.zeros((rows, size), np.int32)
    begins = np.zeros(rows, bool)
    for row, job in enumerate(group):
      slot = self._slots[job.slot]
      count = min(len(job.tokens), size)
      tokens[row, :count] = job.tokens[:count]
      begins[row] = count == len(job.tokens)
      ints["slot"][row] = job.slot
      ints["start"][row] = job.start
      ints["length"][row] = count
      ints["budget"][row] = min(spec.max_turn, context - len(slot.tokens))
      ints["episode"][row] = slot.episode
      self.stats.ingested_tokens += count
    self.stats.extend_padding += rows * size - int(ints["length"].sum())
    chunk = sampler.Chunk(
      tokens=tokens,
      begins_turn=begins,
      temperature=np.full(rows, self._temperature, np.float32),
      **ints,
    )
    return chunk, int((ints["start"] + ints["length"]).max())

  def _decode(self) -> list[int]:
    """Runs one block; returns the slots whose turn ended."""
    began = time.perf_counter()
    programs = self._e._programs
    furthest = max(
      len(self._slots[p].tokens) for p in np.nonzero(self._active)[0]
    )
    self._state, output = programs.decode_block(
      self._params, self._state, self._e._key, furthest + programs.spec.block
    )
    output = jax.device_get(output)
    stopped = []
    for p in np.nonzero(self._active)[0]:
      slot = self._slots[p]
      count = int((output.tokens[p] >= 0).sum())
      slot.append(
        output.tokens[p, :count].tolist(),
        types.Provenance.POLICY,
        output.logprobs[p, :count].tolist(),
      )
      self.stats.policy_tokens += count
      if not output.active[p]:
        stopped.append(int(p))
    steps = int(output.steps)
    self._active[stopped] = False
    self.stats.decode_steps += steps
    self.stats.slot_steps += steps * len(self._slots)
    self.stats.idle_slot_steps += int((output.tokens[:, :steps] < 0).sum())
    self.stats.decode_seconds += time.perf_counter() - began
    return stopped

  def _end_turns(self, stopped) -> None:
    """Hands finished turns to the environment; submits their searches."""
    asked = []
    for p in stopped:
      slot = self._slots[p]
      text = self._e._tokenizer.decode(slot.tokens[slot.turn_start :])
      index = len(slot.turns)
      step = self._e._env.step(text, index)
      turn = types.Turn(
        text=text,
        action=step.action,
        content=step.content,
        documents=(),
        observation="",
        action_position=len(slot.tokens) - 1,
      )
      if step.done:
        if step.action == "answer":
          slot.answer = step.content
        slot.turns.append(turn)
        self._finish(p, "answer" if step.action == "answer" else "max_turns")
      elif step.query is not None:
        asked.append((p, turn, step.query))
      else:
        self._observe(
          p, turn, search_env.Observation(step.warning, [], "")
        )
    if asked:
      queries = [query for _, _, query in asked]
      future = self._e._pool.submit(
        self._e._retriever.search, queries, self._e._env.topk
      )
      due = self._tick + self._e._spec.retrieval_delay
      self._searches.append((due, future, [(p, t) for p, t, _ in asked]))
      self.stats.searches += len(asked)

  def _finish(self, p: int, reason: str) -> None:
    slot = self._slots[p]
    trajectory = slot.finish(reason)
    self._done[slot.order] = trajectory
    self._slots[p] = None
    self._active[p] = False
    if self._on_done is not None:
      self._on_done(trajectory)

"""Host scheduler of the rollout: questions in, trajectories out.

The one place that sees both the device programs and the text world. A slot
goes through: prompt in -> policy turn -> (search -> observation in -> policy
turn)* -> done, and is refilled with the next question at once. Searches run on
host threads while other slots decode.

The schedule depends on the data alone, never on the clock: a search joins a
fixed number of decode steps after it was asked, however fast or slow it was.
So a run repeats bit for bit whatever the retriever's speed.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.env import search_env
from stepsearch_jax.parallel import distributed
from stepsearch_jax.rollout import device as slots
from stepsearch_jax.rollout import observations, recorder, records
from stepsearch_jax.rollout import programs as sampler

_SEARCH_THREADS = 2


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
    retriever: types.Retriever,
    tokenizer,
    spec: records.EngineSpec,
    seed: int,
  ):
    """Keeps the parts; `seed` and an episode number fix a trajectory.

    Args:
      programs: compiled device programs.
      env: the search environment.
      retriever: answers queries, on host threads.
      tokenizer: of the policy.
      spec: limits.
      seed: of the sampling.
    """
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

  def compile_ahead(self) -> None:
    """Compiles all that a rollout can need; else each is when first needed."""
    self._programs.compile_ahead(
      self._spec.extend_rows, self._spec.extend_tokens
    )

  def prompt_tokens(self, question: types.Question) -> list[int]:
    """Tokens of a question's prompt.

    Raises:
      UserError: the prompt is longer than `max_prompt` or leaves no room.
    """
    tokens = self._tokenizer.encode_prompt(self._env.prompt(question))
    room = self._programs.spec.context - self._spec.answer_room
    limit = min(self._spec.max_prompt, room)
    if len(tokens) > limit:
      raise types.UserError(
        f"question {question.id!r} needs {len(tokens)} prompt tokens, the "
        f"limit is {limit}: raise rollout.max_prompt / rollout.context or "
        "drop the question"
      )
    return tokens

  def turn_limit(self, slot: recorder.Recorder) -> int:
    """Tokens that the policy may write in the turn that begins."""
    del slot
    return self._spec.max_turn

  def judge(self, slot: recorder.Recorder) -> tuple[str, search_env.Step]:
    """(text, verdict) of the turn that a slot's policy has just ended."""
    text = self._tokenizer.decode(slot.tokens[slot.turn_start :])
    return text, self._env.step(text, len(slot.turns))

  def run(
    self,
    params,
    questions: Sequence[types.Question],
    episodes: Sequence[int],
    temperature: float = 1.0,
    on_done: Callable[[types.Trajectory], None] | None = None,
  ) -> tuple[list[types.Trajectory], records.RolloutStats]:
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
      raise types.UserError(
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
    # (decode step when due, future, [(slot, its turn)]).
    self._searches: collections.deque = collections.deque()
    self._done: list[types.Trajectory | None] = [None] * len(questions)
    # Stopped slots that end a block: a few per cent may idle, and a large
    # batch does not return to the host for every one of them.
    self._leave = max(slots // 16, 1)
    self.stats = records.RolloutStats()

  def play(self):
    """Runs the schedule to its end."""
    began = time.perf_counter()
    while self._waiting or any(slot is not None for slot in self._slots):
      self._refill()
      self._join_searches()
      self._ingest()
      if self._active.any():
        self._end_turns(self._decode())
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
    while self._searches and (self._due() <= 0 or self._starved()):
      _, future, askers = self._searches.popleft()
      began = time.perf_counter()
      # In schedule order on the main thread, so that processes can exchange.
      results = distributed.search_together(
        future.result, len(askers), self._e._env.topk
      )
      self.stats.failed_searches += results.count(None)
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

  def _due(self) -> int:
    """Decode steps until the oldest search joins."""
    return self._searches[0][0] - self.stats.decode_steps

  def _starved(self) -> bool:
    """Whether nothing can be done before a search joins."""
    return not (self._jobs or self._active.any())

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
    if not self._jobs:
      return
    began = time.perf_counter()
    spec = self._e._spec
    jobs = sorted(self._jobs, key=lambda job: (-len(job.tokens), job.slot))
    self._jobs = []
    while jobs:
      # No padding rows: the largest bucket that the jobs fill.
      rows = max((r for r in spec.extend_rows if r <= len(jobs)),
                 default=len(jobs))
      group, jobs = jobs[:rows], jobs[rows:]
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
    jax.block_until_ready(self._state.position)  # For honest timings.
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
      ints["budget"][row] = min(
        self._e.turn_limit(slot), context - len(slot.tokens)
      )
      ints["episode"][row] = slot.episode
      self.stats.ingested_tokens += count
    self.stats.extend_padding += rows * size - int(ints["length"].sum())
    chunk = slots.Chunk(
      tokens=tokens,
      begins_turn=begins,
      temperature=np.full(rows, self._temperature, np.float32),
      **ints,
    )
    return chunk, int((ints["start"] + ints["length"]).max())

  def _decode(self) -> dict[int, int]:
    """Runs a block; {slot whose turn ended: steps that it then idled}."""
    began = time.perf_counter()
    programs = self._e._programs
    on = np.nonzero(self._active)[0]
    furthest = max(len(self._slots[p].tokens) for p in on)
    limit = programs.spec.block
    if self._searches:
      limit = min(limit, self._due())
    self._state, output = programs.decode_block(
      self._params, self._state, self._e._key, furthest + limit, limit,
      self._leave,
    )
    output = jax.device_get(output)
    steps, stopped = int(output.steps), {}
    for p in on:
      slot = self._slots[p]
      count = int((output.tokens[p] >= 0).sum())
      slot.append(
        output.tokens[p, :count].tolist(),
        types.Provenance.POLICY,
        output.logprobs[p, :count].tolist(),
      )
      self.stats.policy_tokens += count
      if not output.active[p]:
        stopped[int(p)] = steps - count
    self._active[list(stopped)] = False
    self.stats.decode_steps += steps
    self.stats.slot_steps += steps * len(self._slots)
    self.stats.idle_slot_steps += int((output.tokens[:, :steps] < 0).sum())
    self.stats.decode_seconds += time.perf_counter() - began
    return stopped

  def _end_turns(self, stopped: dict[int, int]) -> None:
    """Hands finished turns to the environment; submits their searches."""
    asked = []
    for p, idled in stopped.items():
      slot = self._slots[p]
      text, step = self._e.judge(slot)
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
        self.stats.vacant_slot_steps += idled if self._waiting else 0
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
      due = self.stats.decode_steps + self._e._spec.retrieval_delay
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

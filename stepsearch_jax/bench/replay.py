"""Whole multi-turn rollouts of given lengths: the engine beside other loops.

Every turn ends after its recorded number of tokens and every observation has
its recorded length, so that the loops are timed and not what a random policy
writes. Tokens are sampled at temperature 1.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, cast

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.bench import peers, workload
from stepsearch_jax.bench import programs as bench_programs
from stepsearch_jax.bench.workload import Replay
from stepsearch_jax.env import search_env
from stepsearch_jax.models import decoder
from stepsearch_jax.rollout import (
  engine,
  observations,
  programs,
  recorder,
  records,
  text_side,
)

_ROOM = 32


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Of the programs that a replay compiles.

  Attributes:
    rows, tokens: see `records.EngineSpec`.
    kv_lengths: bounds on the positions that a program attends to, below the
      context; None = the programs' own.
  """

  rows: tuple[int, ...] = (1, 4, 8)
  tokens: tuple[int, ...] = (64, 160, 256, 448, 512, 576)
  kv_lengths: tuple[int, ...] | None = None


class _ReplayedTexts:
  """Stands in for `TextSide`: every text is a number of random tokens."""

  topk = 1

  def __init__(self, replays: list[Replay], vocab: int):
    self._replays = replays
    self._prompts = workload.prompts(replays, vocab)
    self._rng = np.random.default_rng(0)
    self._vocab = vocab

  def _tokens(self, count: int) -> list[int]:
    return self._rng.integers(1, self._vocab, count).tolist()

  def _turn(self, record: recorder.Recorder) -> tuple[int, int]:
    """Returns the recorded (generated, observed) tokens of a turn."""
    return self._replays[record.order].turns[len(record.turns)]

  def prompt(self, question: types.Question) -> list[int]:
    """Returns the prompt of a trajectory, whose number is the id."""
    return self._prompts[int(question.id)].tolist()

  def turn_budget(self, record: recorder.Recorder, limit: int) -> int:
    """Returns the recorded length of the turn, which ends it there."""
    del limit
    return self._turn(record)[0]

  def written(self, record: recorder.Recorder) -> None:
    """Hears that a turn has grown."""
    del record

  def judge(self, record: recorder.Recorder) -> search_env.Step:
    """Returns a search for the recorded observation, or the end."""
    _, observed = self._turn(record)
    if observed:
      query = str(observed)
      return search_env.Step("", types.Action.SEARCH, query, query=query)
    return search_env.Step("", types.Action.ANSWER, "", done=True)

  def documents(self, record: recorder.Recorder, found):
    """Returns what a search found."""
    del record
    return found

  def observation(self, documents, turn: int) -> search_env.Observation:
    """Returns the one retrieved length."""
    del turn
    return search_env.Observation(documents[0].text, (), "")

  def encode(
    self, observation: search_env.Observation, limit: int
  ) -> observations.Encoded:
    """Returns as many tokens as the observation says."""
    del limit
    return observations.Encoded(self._tokens(int(observation.head)), ())

  def decode(self, tokens) -> str:
    """Returns nothing; nobody reads it."""
    del tokens
    return ""


class _DelayedLengths:
  """A retriever that returns each query, after a delay."""

  def __init__(self, seconds: float):
    self._seconds = seconds

  def search(self, queries, k: int) -> list[list[types.Passage]]:
    """See `types.Retriever`."""
    del k
    time.sleep(self._seconds)
    return [[types.Passage(q, "", q)] for q in queries]


class _CountingPrograms(programs.RolloutPrograms):
  """Remembers (kv_length, steps) of every decode block in `blocks`."""

  blocks: list[tuple[int, Any]]

  def decode_block(self, params, state, key, kv_length, limit, leave):
    """See `RolloutPrograms.decode_block`."""
    state, output = super().decode_block(
      params, state, key, kv_length, limit, leave
    )
    self.blocks.append((self.bucket(kv_length), output.steps))
    return state, output


class Ours:
  """The engine on a workload.

  Attributes:
    params: policy in training layout.
    programs: those of the rollout; their `blocks` and
    stats: are those of the last play.
  """

  def __init__(
    self, config: decoder.DecoderConfig, params: types.Tree,
    replays: list[Replay], slots: int, delay: float = 0.0,
    retrieval_delay: int = 2, shapes: Shapes = Shapes(),
  ):
    """Prepares everything that a training run keeps between steps."""
    self.params, self._count = params, len(replays)
    context = max(r.total for r in replays) + _ROOM
    context += -context % 128
    self.programs = cast(_CountingPrograms, bench_programs.endless(
      config, slots, context, _CountingPrograms
    ))
    if shapes.kv_lengths is not None:
      below = (length for length in shapes.kv_lengths if length < context)
      self.programs.kv_buckets = (*below, context)
    limits = records.EngineSpec(
      max_prompt=context, max_turn=context, max_observation=context,
      answer_room=1, retrieval_delay=retrieval_delay, search_threads=2,
      extend_rows=shapes.rows, extend_tokens=shapes.tokens,
      probe=None,
    )
    texts = cast(
      text_side.TextSide, _ReplayedTexts(replays, config.vocab_size)
    )
    self._engine = engine.Engine(
      self.programs, texts, cast(types.Retriever, _DelayedLengths(delay)),
      limits, seed=0,
    )
    self.stats = records.RolloutStats()

  def compile_ahead(self) -> None:
    """Compiles all programs, side by side."""
    self._engine.compile_ahead()

  def play(self) -> list[tuple[int, int]]:
    """Returns (tokens, sampled tokens) of every trajectory."""
    questions = [types.Question(str(i), "", ("",)) for i in range(self._count)]
    self.programs.blocks = []
    played = self._engine.run(self.params, questions, range(self._count))
    self.stats = played.stats
    return [
      (len(t.tokens), int(t.policy_mask.sum())) for t in played.trajectories
    ]


class TurnByTurn:
  """The released loop around transformers' generate.

  All rows wait for the longest of each turn, the text is cut, the observation
  appended and the whole context prefilled again.
  """

  def __init__(
    self, config: decoder.DecoderConfig, params: types.Tree,
    replays: list[Replay], fixed: int | None = None,
  ):
    """Prepares the model.

    Args:
      config, params: of our policy.
      replays: the workload.
      fixed: tokens that every turn decodes whatever its length, as the
        released code does; None stops a row at its recorded length.
    """
    self._model = peers.torch_policy(params, config)
    self._replays, self._vocab = replays, config.vocab_size
    self._prompts = workload.prompts(replays, self._vocab)
    self._fixed = fixed

  def play(self) -> list[tuple[int, int]]:
    """Returns (tokens, sampled tokens) of every trajectory."""
    rng = np.random.default_rng(0)
    contexts = [prompt.tolist() for prompt in self._prompts]
    sampled = [0] * len(contexts)
    for turn in range(max(len(r.turns) for r in self._replays)):
      active = [i for i, r in enumerate(self._replays) if turn < len(r.turns)]
      lengths = [self._replays[i].turns[turn] for i in active]
      out = self._generate([contexts[i] for i in active],
                           [count for count, _ in lengths])
      for i, row, (count, observed) in zip(active, out, lengths, strict=True):
        contexts[i] += row[:count].tolist()
        contexts[i] += list(rng.integers(1, self._vocab, observed))
        sampled[i] += count
    return [(len(c), n) for c, n in zip(contexts, sampled, strict=True)]

  def _generate(self, contexts, counts):
    import torch
    import transformers

    width = max(map(len, contexts))
    ids = torch.zeros((len(contexts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
      ids[row, width - len(context) :] = torch.tensor(context)
      mask[row, width - len(context) :] = 1
    ends = width + torch.tensor(counts)

    class Stops(transformers.StoppingCriteria):
      def __call__(self, input_ids, scores, **unused):
        return input_ids.shape[1] >= ends

    stops = None
    if self._fixed is None:
      stops = transformers.StoppingCriteriaList([Stops()])
    longest = self._fixed or max(counts)
    with torch.inference_mode():
      out = self._model.generate(
        ids, attention_mask=mask, max_new_tokens=longest, do_sample=True,
        top_k=0, stopping_criteria=stops, pad_token_id=0,
      )
    return out[:, width:].numpy()

"""The answer probe against whole forward passes, and what it leaves alone."""

import collections
import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.env.actions import ParsedTurn
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.rollout import device, probing, reading, records

SPEC = records.ProbeSpec(aliases=3, tokens=(6, 24), others=0, seed=0)


@pytest.fixture(autouse=True)
def many_searches(monkeypatch):
  """Whatever the random policy writes is a search or, rarely, nothing."""
  def parse(text):
    kind = types.Action.INVALID if len(text) % 5 == 0 else types.Action.SEARCH
    return ParsedTurn(kind, text)

  monkeypatch.setattr("stepsearch_jax.env.actions.parse", parse)


def questions(count):
  """With answers of 1, about 4 and about 9 tokens, one too long, one twice."""
  answers = ("Ada Brandt director", "Ada", "Ada", "Silent Harbor film by Ada "
             "Brandt and others", "many " * 40)
  return [
    dataclasses.replace(question, answers=answers[i % 2 :])
    for i, question in enumerate(fakes.make_questions(count))
  ]


class Retriever(fakes.FakeRetriever):
  """Fails for some queries."""

  def search(self, queries, k):
    found = super().search(queries, k)
    return [None if len(q) % 7 == 0 else docs
            for q, docs in zip(queries, found, strict=True)]


def make_engine(parts, compiled, probe=SPEC, max_turns=3, **limits):
  return fakes.make_engine(
    *parts[:2], Retriever(), compiled=compiled, env=dict(max_turns=max_turns),
    spec=fakes.engine_spec(probe=probe, **limits),
  )


def play(parts, compiled, probe=True, count=9, **settings):
  engine = make_engine(parts, compiled, **settings)
  played = engine.run(
    parts[2], questions(count), range(count), 1.0, probe=probe
  )
  engine.close()
  return played


def whole_pass(parts, context, alias):
  """Log-probability of an answer in its tag, by one pass over everything."""
  tokenizer, model, policy = parts
  row = np.zeros(256, np.int32)  # One length, so that it is compiled once.
  tokens = [*context, *tokenizer.encode("<answer>"), *alias]
  row[: len(tokens)] = tokens
  logp = np.asarray(all_logprobs(model, policy, row))
  places = np.arange(len(tokens) - len(alias), len(tokens))
  return logp[places - 1, row[places]].sum()


@functools.partial(jax.jit, static_argnums=0)
def all_logprobs(model, policy, row):
  positions = jnp.arange(len(row), dtype=jnp.int32)[None]
  hidden, _ = decoder.Decoder(model).apply(
    {"params": policy["trunk"]}, row[None], positions
  )
  return jax.nn.log_softmax(heads.logits(policy, hidden)[0])


def contexts(trajectory):
  """Tokens behind the prompt and behind each reply; None without a reply."""
  turns = len(trajectory.turns)
  out = [trajectory.tokens[trajectory.turn_index < 0]]
  for turn in range(turns):
    seen = (trajectory.turn_index == turn) & ~trajectory.policy_mask
    last = np.nonzero(seen)[0].max(initial=-1)
    out.append(trajectory.tokens[: last + 1] if last >= 0 else None)
  return out


def aliases_of(tokenizer, question, limit=24):
  opening = len(tokenizer.encode("<answer>"))
  found = [tokenizer.encode(" " + a) for a in dict.fromkeys(question.answers)]
  return [a for a in sorted(found, key=lambda a: (len(a), a))
          if opening + len(a) <= limit][:3]


def check(parts, trajectories):
  seen = collections.Counter()
  for trajectory in trajectories:
    probe = trajectory.probe
    aliases = aliases_of(parts[0], trajectory.question)
    assert probe.sizes.tolist() == [len(alias) for alias in aliases]
    places = contexts(trajectory)
    assert probe.logp.shape == (len(trajectory.turns) + 1, len(aliases))
    for tokens, row in zip(places, probe.logp, strict=True):
      for alias, value in zip(aliases, row, strict=True):
        if tokens is None:
          seen["ended"] += 1
          assert np.isnan(value)
        elif len(tokens) + 1 + len(alias) > 256:
          seen["no room"] += 1
          assert np.isnan(value)
        else:
          seen[len(alias)] += 1
          want = whole_pass(parts, tokens, alias)
          np.testing.assert_allclose(value, want, atol=2e-4, rtol=1e-5)
  return seen


def test_values_equal_a_whole_pass_over_context_and_answer(parts, compiled):
  played = play(parts, compiled)
  assert len(parts[0].encode("<answer>")) == 1
  seen = check(parts, played.trajectories)
  turns = [turn for t in played.trajectories for turn in t.turns]
  assert any(turn.failed for turn in turns)
  assert any(turn.action == "invalid" for turn in turns)
  assert len([size for size in seen if isinstance(size, int)]) == 3
  assert seen["ended"] and played.stats.probe_seconds > 0


def test_a_probe_changes_no_token_and_no_probability(parts, compiled):
  """To the bit: more questions than slots, so that rows are used again."""
  ours, theirs = (play(parts, compiled, probe).trajectories
                  for probe in (True, False))
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert a.probe is not None and b.probe is None


def test_a_probe_leaves_the_cache_as_it_is(parts, compiled):
  tokenizer, _, policy = parts
  params = compiled.decode_params(policy)
  rng = np.random.default_rng(0)
  state = compiled.init_state()
  state = state.replace(cache=jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
    state.cache,
  ))
  before = jax.tree.map(np.array, state)
  row = np.array([2, 2], np.int32)
  chunk = device.ProbeChunk(
    slot=row, tokens=np.full((2, 6), 7, np.int32), start=row + 30,
    length=row + 4, targets=np.full((2, 6), 9, np.int32),
  )
  compiled.probe(params, state, chunk)
  jax.tree.map(np.testing.assert_array_equal, before,
               jax.tree.map(np.array, state))


def test_an_answer_without_room_is_left_out(parts, compiled):
  """Contexts of up to 254 of 256 tokens."""
  played = play(parts, compiled, max_turns=9, answer_room=2)
  seen = check(parts, played.trajectories)
  assert seen["no room"] and sum(seen.values()) > seen["no room"]


def test_probes_compiled_ahead_are_all_that_a_rollout_needs(
  parts, compilations
):
  model = fakes.make_model(parts[0].vocab_size, num_layers=1)
  compiled = fakes.make_programs(parts[0], model, context=512)
  policy = fakes.make_policy(model)
  engine = make_engine(
    (parts[0], model), compiled, extend_rows=(2,), extend_tokens=(64,)
  )
  engine.compile_ahead()
  engine.run(policy, questions(1), [0], probe=True)
  engine.probe(policy, engine.run(policy, questions(1), [0]))
  compilations.clear()
  played = engine.run(policy, questions(9), range(1, 10), probe=True)
  engine.probe(policy, played)
  assert not compilations
  # kv_length 256 and 512 (384 is left out), 2 sizes.
  assert len(compiled._probes) == 4
  engine.close()


def test_reading_gives_what_the_warm_cache_gives(parts, compiled):
  played = play(parts, compiled)
  warm = [t.probe for t in played.trajectories]
  for trajectory in played.trajectories:
    trajectory.probe = None
  engine = make_engine(parts, compiled)
  engine.probe(parts[2], played)
  engine.close()
  for trajectory, want in zip(played.trajectories, warm, strict=True):
    assert trajectory.probe.others.shape[1] == 0
    np.testing.assert_allclose(
      trajectory.probe.logp, want.logp, atol=2e-4, rtol=1e-5
    )


def test_documents_of_other_questions_are_tried_in_place_of_each_search(
  parts, compiled
):
  spec = dataclasses.replace(SPEC, others=2, aliases=1)
  engine = make_engine(parts, compiled, probe=spec)
  played = engine.run(parts[2], questions(9), range(9))
  engine.probe(parts[2], played)
  found = reading._Documents.of(played.trajectories)
  checked = 0
  for trajectory in played.trajectories:
    tried = collections.defaultdict(list)
    for instead in found.instead(trajectory, spec):
      tried[instead.turn].append(instead.documents)
    others = trajectory.probe.others
    assert np.isnan(others[0]).all()
    for number, turn in enumerate(trajectory.turns):
      assert len(tried[number]) == (2 if turn.retrieved else 0)
      for value, documents in zip(others[number + 1], tried[number],
                                  strict=False):
        start = trajectory.tokens[: turn.action_position + 1].tolist()
        reply = engine._texts.encode(
          engine._texts.observation(documents, number),
          min(48, 256 - len(start) - 8),
        ).tokens
        alias = aliases_of(parts[0], trajectory.question)[0]
        want = whole_pass(parts, start + reply, alias)
        np.testing.assert_allclose(value[0], want, atol=2e-4, rtol=1e-5)
        checked += 1
      if not turn.retrieved:
        assert np.isnan(others[number + 1]).all()
  assert checked > 10
  again = reading._Documents.of(played.trajectories)
  first = played.trajectories[0]
  assert again.instead(first, spec) == found.instead(first, spec)
  engine.close()


def test_other_questions_are_chosen_by_seed_episode_and_turn():
  passages = [types.Passage(str(i), "", "") for i in range(40)]

  def rollout(question, episode, *documents):
    turns = [types.Turn("", types.Action.SEARCH, "", (passages[d],), "", 0,
                        retrieved=True) for d in documents]
    return types.Trajectory(
      types.Question(question, question, ("a",)), episode, *[None] * 4, turns,
      None, types.StopReason.CONTEXT,
    )

  batch = [rollout("a", 0, 0, 1), rollout("a", 1, 2)] + [
    rollout(str(i), i, i) for i in range(3, 40)
  ]
  found = reading._Documents.of(batch)

  def picks(trajectory, **changes):
    spec = dataclasses.replace(SPEC, others=3, **changes)
    return [(i.turn, i.n, i.documents[0].id)
            for i in found.instead(trajectory, spec)]

  ours = picks(batch[0])
  assert [(turn, n) for turn, n, _ in ours] == [
    (1, 0), (1, 1), (1, 2), (0, 0), (0, 1), (0, 2)
  ]
  # None of the same question, its other rollout's included; no set twice.
  ids = [name for *_, name in ours]
  assert not {"0", "1", "2"} & set(ids) and len(set(ids[:3])) == 3
  assert ids[:3] != ids[3:] and ours == picks(batch[0])
  assert picks(batch[0], seed=1) != ours != picks(batch[1])
  few = reading._Documents.of(batch[:3])
  assert len(few.instead(batch[0], dataclasses.replace(SPEC, others=3))) == 2


def test_rows_of_one_size_that_reach_equally_far_go_together():
  def row(start, length):
    return probing.Row(start % 5, start, list(range(length)), [1])

  rows = [row(10, 3), row(90, 9), row(50, 4), row(20, 9), row(30, 2)]
  found = list(probing.pieces(rows, (1, 2), (4, 16)))
  assert [piece.rows for piece in found] == [[2, 4], [0], [1, 3]]
  assert [p.chunk.tokens.shape for p in found] == [(2, 4), (1, 4), (2, 16)]
  assert found[0].chunk.targets.tolist() == [[-1, -1, -1, 1], [-1, 1, -1, -1]]

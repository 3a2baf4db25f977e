"""Compiled programs: when blocks end, which shapes exist, what is compiled."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.rollout import device, programs


def test_a_block_ends_at_its_limit_and_when_enough_slots_stopped(parts):
  """Budgets 1, 2, 5 and 9 in four slots, blocks of up to 8 steps."""
  tokenizer, model, policy = parts
  compiled = fakes.make_programs(tokenizer, model, block=8, tags=("never",))
  params = compiled.decode_params(policy)
  rows = np.arange(4, dtype=np.int32)
  chunk = device.Chunk(
    slot=rows, tokens=np.full((4, 16), 7, np.int32), start=0 * rows,
    length=0 * rows + 3, begins_turn=rows >= 0, episode=rows,
    budget=np.array([1, 2, 5, 9], np.int32),
    temperature=np.zeros(4, np.float32),
  )
  for limit, leave, steps in ((8, 1, 1), (8, 2, 2), (8, 3, 5), (8, 4, 8),
                              (3, 4, 3), (3, 1, 1)):
    state = compiled.extend(params, compiled.init_state(), chunk, 16)
    _, output = compiled.decode_block(
      params, state, jax.random.key(0), 16, limit, leave
    )
    assert int(output.steps) == steps, (limit, leave)
    sampled = (np.asarray(output.tokens) >= 0).sum(1)
    np.testing.assert_array_equal(sampled, np.minimum(steps, [1, 2, 5, 9]))


def test_top_k_and_top_p_reach_the_policy(parts):
  """With one token kept, sampling at any temperature is greedy."""
  tokenizer, _, _ = parts
  model = fakes.make_model(tokenizer.vocab_size, num_layers=1)
  policy = fakes.make_policy(model)

  def sampled(temperature, **kept):
    compiled = fakes.make_programs(
      tokenizer, model, block=12, tags=("never",), **kept
    )
    state = compiled.init_state().replace(
      active=np.ones(4, bool), budget=np.full(4, 99, np.int32),
      episode=np.arange(4, dtype=np.int32),
      temperature=np.full(4, temperature, np.float32),
    )
    _, output = compiled.decode_block(
      compiled.decode_params(policy), state, jax.random.key(0), 12, 12, 5
    )
    return np.asarray(output.tokens).tolist()

  greedy = sampled(0.0)
  assert sampled(1.5) != greedy
  assert sampled(1.5, top_k=1) == greedy
  assert sampled(1.5, top_p=1e-6) == greedy


@pytest.mark.parametrize(("letters", "kind"), [(200, "ui8"), (300, "ui16")])
def test_every_state_of_the_automaton_fits_its_table(parts, letters, kind):
  """A slot that is in the last state, which stops, samples one token."""
  tokenizer, model, policy = parts
  compiled = fakes.make_programs(tokenizer, model, tags=("x" * letters,))
  program = compiled.lowered(4, 16, policy)["decode_block"].as_text()
  assert f"tensor<{letters + 2}x{model.vocab_size}x{kind}>" in program
  state = compiled.init_state().replace(
    active=np.ones(4, bool), budget=np.full(4, 99, np.int32),
    automaton=np.full(4, letters + 1, np.int32),
  )
  state, output = compiled.decode_block(
    compiled.decode_params(policy), state, jax.random.key(0), 16, 4, 5
  )
  assert (np.asarray(output.tokens) >= 0).sum(1).tolist() == [1] * 4
  np.testing.assert_array_equal(state.automaton, letters + 1)


def test_prefixes_are_copied_in_place_and_nothing_else_changes(parts):
  """Slot 5 takes over 3 tokens of slot 2, slot 6 of slot 0."""
  tokenizer, model, _ = parts
  compiled = fakes.make_programs(tokenizer, model, slots=64, context=512)
  rng = np.random.default_rng(0)
  state = compiled.init_state()
  cache = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
    state.cache,
  )
  before = jax.tree.map(np.array, cache)
  ints = lambda *values: np.array(values, np.int32)  # noqa: E731
  chunk = device.Chunk(
    slot=ints(5, 6, 0), tokens=ints(40, 41, 0)[:, None], start=ints(3, 3, 0),
    length=ints(1, 1, 0), begins_turn=np.array([True, False, False]),
    budget=ints(7, 8, 9), episode=ints(70, 80, 90),
    temperature=np.array([0.5, 1.0, 2.0], np.float32),
  )
  after = compiled.copy_prefix(
    state.replace(cache=cache), ints(2, 0, 0), chunk, 3
  )
  for old, new in zip(before.k, after.cache.k, strict=True):
    new = np.asarray(new)
    np.testing.assert_array_equal(new[5, ..., :3], old[2, ..., :3])
    np.testing.assert_array_equal(new[6, ..., :3], old[0, ..., :3])
    np.testing.assert_array_equal(np.delete(new, [5, 6], 0),
                                  np.delete(old, [5, 6], 0))
  for old, new in zip(before.v, after.cache.v, strict=True):
    new = np.asarray(new)
    np.testing.assert_array_equal(new[5, :, :3], old[2, :, :3])
    np.testing.assert_array_equal(np.delete(new, [5, 6], 0),
                                  np.delete(old, [5, 6], 0))
  assert np.asarray(after.pending)[[5, 6, 0]].tolist() == [40, 41, 0]
  assert np.asarray(after.position)[[5, 6, 0]].tolist() == [3, 3, 0]
  assert np.asarray(after.active).nonzero()[0].tolist() == [5]
  assert after.budget[5] == 7 and after.episode[6] == 80
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(before))
  memory = compiled._program(256, 3).memory_analysis()
  assert memory.alias_size_in_bytes >= whole
  assert memory.temp_size_in_bytes < whole / 8


def test_a_second_rollout_compiles_nothing(parts, compilations):
  tokenizer, model, policy = parts
  engine = fakes.make_engine(tokenizer, model, fakes.FakeRetriever())
  engine.run(policy, fakes.make_questions(6), range(6))
  compilations.clear()
  engine.run(policy, fakes.make_questions(9), range(6, 15), temperature=0.0)
  assert not compilations
  engine.close()


def test_programs_compiled_ahead_are_all_that_rollouts_need(
  parts, compilations
):
  tokenizer, _, _ = parts
  model = fakes.make_model(tokenizer.vocab_size, num_layers=1)
  policy = fakes.make_tag_lover(tokenizer, fakes.make_policy(model))
  engine = fakes.make_engine(
    tokenizer, model, fakes.FakeRetriever(text="{query} " + "far " * 30),
    context=512, spec=fakes.engine_spec(
      max_observation=200, extend_rows=(1, 4), extend_tokens=(32, 128)
    ),
  )
  engine.compile_ahead()
  engine.run(policy, fakes.make_questions(1), [0])  # Casts, places and so on.
  compilations.clear()
  done = engine.run(policy, fakes.make_questions(9), range(1, 10)).trajectories
  longest = max(len(t.tokens) for t in done)
  compiled = engine.programs._compiled
  lengths = sorted({kv_length for kv_length, *_ in compiled})
  assert longest > lengths[0] and not compilations
  # (256, 384, 512) x 2 sizes x 2 counts of rows, 3 decode blocks, and copies
  # of 2 counts of rows for prompts of at most 64 tokens.
  assert lengths == [256, 384, 512] and len(compiled) == 17
  engine.close()


@pytest.mark.parametrize("field, value", [
  ("slots", 0), ("context", 0), ("block", 0), ("top_k", -1), ("top_p", 0.0),
  ("top_p", 1.1),
])
def test_a_wrong_shape_or_filter_names_its_field(field, value):
  fields = dict(slots=1, context=1, block=1, top_k=0, top_p=1.0)
  programs.ProgramSpec(**fields)
  with pytest.raises(types.UserError, match=f"rollout.{field}: .*{value}"):
    programs.ProgramSpec(**(fields | {field: value}))

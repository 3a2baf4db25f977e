"""Writing into slots: what is put into chunks, and in which order."""

import fakes
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.rollout import programs, recorder, records, slot_cache


class Recording:
  """Programs that only remember their chunks."""

  spec = programs.ProgramSpec(8, 256, 4, 0, 1.0)

  def __init__(self):
    self.chunks, self.copies = [], []

  def decode_params(self, params):
    return params

  def init_state(self):
    return fakes.State(np.zeros(8))

  def extend(self, params, state, chunk, kv_length):
    self.chunks.append((chunk, kv_length))
    return state

  def copy_prefix(self, state, source, chunk, kv_length):
    self.copies += [
      (int(source[row]), int(chunk.slot[row]), int(chunk.start[row]),
       bool(chunk.begins_turn[row]))
      for row in range(len(source)) if chunk.length[row]
    ]
    assert chunk.start.max() <= kv_length
    return state


def make_slot(place, tokens):
  record = recorder.Recorder(place, fakes.make_questions(1)[0], place)
  record.append(tokens, types.Provenance.PROMPT)
  return slot_cache.Slot(place, record, np.array(record.tokens), budget=7)


def write(lengths, **spec):
  """Chunks of slots; the first one's tokens are 100, 101, ..."""
  stats, device = records.RolloutStats(), Recording()
  cache = slot_cache.SlotCache(
    device, {}, None, 1.0, fakes.engine_spec(**spec), stats
  )
  slots = []
  for place, length in enumerate(lengths):
    # Every prompt is another, so that none is shared.
    slots.append(make_slot(place, range(100 * place + 100,
                                        100 * place + 100 + length)))
  cache.write(slots)
  return slots, device.chunks, stats


def test_chunks_of_waiting_rows_have_no_padding_rows():
  """Five prompts in buckets of 1, 2 and 4 rows are a 4 and a 1."""
  _, chunks, _ = write([9] * 5, extend_rows=(1, 2, 4), extend_tokens=(64,))
  assert [chunk.tokens.shape for chunk, _ in chunks] == [(4, 64), (1, 64)]


def test_a_long_row_continues_with_the_token_that_was_fed_and_not_stored():
  (slot,), chunks, stats = write(
    [20], extend_rows=(1,), extend_tokens=(4, 8)
  )
  pieces = [chunk.tokens[0, : chunk.length[0]].tolist() for chunk, _ in chunks]
  assert pieces == [list(range(100, 108)), list(range(107, 115)),
                    list(range(114, 120))]
  assert [int(chunk.start[0]) for chunk, _ in chunks] == [0, 7, 14]
  assert [bool(c.begins_turn[0]) for c, _ in chunks] == [False, False, True]
  assert [kv_length for _, kv_length in chunks] == [8, 15, 20]
  assert slot.cached == 19 and slot.phase is slot_cache.Phase.SPEAKING
  assert stats.ingested_tokens == 22 and stats.extend_padding == 2


def test_the_longest_rows_go_together():
  _, chunks, _ = write([3, 50, 4, 60], extend_rows=(2,),
                       extend_tokens=(8, 64))
  assert [chunk.slot.tolist() for chunk, _ in chunks] == [[3, 1], [2, 0]]
  assert [chunk.tokens.shape[1] for chunk, _ in chunks] == [64, 8]
  assert chunks[0][0].budget.tolist() == [7, 7]


TEMPLATE = list(range(40))


def make_cache():
  stats, device = records.RolloutStats(), Recording()
  cache = slot_cache.SlotCache(
    device, {}, None, 1.0,
    fakes.engine_spec(extend_rows=(1, 4), extend_tokens=(16, 64)), stats,
  )
  return cache, device, stats


def prompt(question):
  """40 tokens that all share, 5 of the question."""
  return TEMPLATE + [1000 * question + i for i in range(5)]


def fed(device):
  """(slot, first position, tokens) of everything written by the model."""
  return [
    (int(chunk.slot[row]), int(chunk.start[row]), int(chunk.length[row]))
    for chunk, _ in device.chunks for row in range(len(chunk.slot))
    if chunk.length[row]
  ]


def test_a_template_is_written_once_and_copied():
  cache, device, stats = make_cache()
  slots = [make_slot(place, prompt(place)) for place in range(3)]
  cache.write(slots)
  assert fed(device) == [(0, 0, 45), (1, 40, 5), (2, 40, 5)]
  assert device.copies == [(0, 1, 40, False), (0, 2, 40, False)]
  assert stats.shared_tokens == 80 and stats.ingested_tokens == 55
  assert all(slot.phase is slot_cache.Phase.SPEAKING for slot in slots)
  assert [slot.cached for slot in slots] == [44] * 3


def test_rollouts_of_a_question_copy_its_prompt_and_write_nothing():
  cache, device, stats = make_cache()
  cache.write([make_slot(place, prompt(place // 3)) for place in range(6)])
  # Two prompts are written, of the second only what the first lacks.
  assert fed(device) == [(0, 0, 45), (3, 40, 5)]
  assert sorted(device.copies) == [
    (0, 1, 44, True), (0, 2, 44, True), (0, 3, 40, False),
    (3, 4, 44, True), (3, 5, 44, True),
  ]
  assert stats.shared_tokens == 4 * 44 + 40


def test_a_refilled_slot_keeps_the_template_and_looks_for_its_question():
  cache, device, _ = make_cache()
  cache.write([make_slot(place, prompt(place)) for place in range(2)])
  device.chunks.clear()
  device.copies.clear()
  cache.write([make_slot(0, prompt(7))])
  assert fed(device) == [(0, 40, 5)] and not device.copies
  cache.write([make_slot(1, prompt(7))])
  assert device.copies == [(0, 1, 44, True)]
  # The same question in the same slot again: nothing moves, it just speaks.
  cache.write([make_slot(1, prompt(7))])
  assert device.copies[1:] == [(1, 1, 44, True)]
  assert fed(device) == [(0, 40, 5)]


def test_a_row_about_to_be_written_anew_is_no_source():
  """Slots 0 and 1 are refilled together; only slot 2 still holds question 2."""
  cache, device, _ = make_cache()
  cache.write([make_slot(place, prompt(place)) for place in range(3)])
  device.copies.clear()
  cache.write([make_slot(0, prompt(1)), make_slot(1, prompt(2))])
  assert device.copies == [(2, 1, 44, True)]


def test_short_common_beginnings_are_not_shared():
  cache, device, stats = make_cache()
  cache.write([make_slot(p, TEMPLATE[:31] + [100 + p]) for p in range(2)])
  assert not device.copies and stats.shared_tokens == 0
  assert fed(device) == [(0, 0, 32), (1, 0, 32)]

"""Writing into slots: what is put into chunks, and in which order."""

import fakes
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.rollout import programs, recorder, records, slot_cache


class Recording:
  """Programs that only remember their chunks."""

  spec = programs.ProgramSpec(8, 256, 4, 0, 1.0)

  def __init__(self):
    self.chunks = []

  def decode_params(self, params):
    return params

  def init_state(self):
    return fakes.State(np.zeros(8))

  def extend(self, params, state, chunk, kv_length):
    self.chunks.append((chunk, kv_length))
    return state


def write(lengths, **spec):
  """Chunks of slots whose records have so many tokens 100, 101, ..."""
  stats, device = records.RolloutStats(), Recording()
  cache = slot_cache.SlotCache(
    device, {}, None, 1.0, fakes.engine_spec(**spec), stats
  )
  slots = []
  for place, length in enumerate(lengths):
    record = recorder.Recorder(place, fakes.make_questions(1)[0], place)
    record.append(range(100, 100 + length), types.Provenance.PROMPT)
    slots.append(slot_cache.Slot(place, record, budget=7))
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

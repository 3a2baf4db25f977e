"""No program runs for the first time beside another thread's device work."""

import threading

from stepsearch_jax.parallel import first_run


def in_a_thread(call):
  """(the thread, what it returned so far)."""
  found = []
  thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
  thread.start()
  return thread, found


def test_a_first_run_waits_for_others_and_a_later_one_does_not():
  run = first_run.FirstAlone()
  program = lambda x: x + 1  # noqa: E731
  with first_run.alone():
    thread, found = in_a_thread(lambda: run(program, 1))
    thread.join(0.2)
    assert not found
  thread.join(5)
  assert found == [2]
  with first_run.alone():
    again, later = in_a_thread(lambda: run(program, 2))
    again.join(5)
    assert later == [3]
    other, found = in_a_thread(lambda: run(lambda x: -x, 1))
    other.join(0.2)
    assert not found  # Another program has not run yet.
  other.join(5)
  assert found == [-1]


def test_nobody_works_beside_a_first_run():
  running, go = threading.Event(), threading.Event()

  def program():
    running.set()
    assert go.wait(5)
    return 7

  thread, found = in_a_thread(lambda: first_run.FirstAlone()(program))
  assert running.wait(5)

  def work():
    with first_run.alone():
      return "embedded"

  searching, embedded = in_a_thread(work)
  searching.join(0.2)
  assert not embedded
  go.set()
  searching.join(5)
  thread.join(5)
  assert found == [7] and embedded == ["embedded"]


def test_a_program_that_failed_is_still_a_first_run():
  run, calls = first_run.FirstAlone(), []

  def program():
    calls.append(first_run.alone().locked())
    if len(calls) == 1:
      raise RuntimeError("no memory")
    return 1

  try:
    run(program)
  except RuntimeError:
    pass
  assert not first_run.alone().locked()
  assert run(program) == 1
  with first_run.alone():
    thread, found = in_a_thread(lambda: run(program))
    thread.join(5)
    assert found == [1]
  assert calls[:2] == [True, True]

"""No program runs for the first time beside another thread's device work."""

import threading

import pytest

from stepsearch_jax.parallel import first_run


def in_a_thread(call):
  """(the thread, what it returned so far)."""
  found = []
  thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
  thread.start()
  return thread, found


def ends(thread):
  thread.join(5)
  return not thread.is_alive()


def work():
  with first_run.working():
    return "embedded"


def test_a_first_run_waits_for_others_and_a_later_one_does_not():
  run = first_run.FirstAlone()
  program = lambda x: x + 1  # noqa: E731
  with first_run.working():
    thread, found = in_a_thread(lambda: run(program, 1))
    thread.join(0.2)
    assert not found
  assert ends(thread) and found == [2]
  with first_run.working():
    again, later = in_a_thread(lambda: run(program, 2))
    assert ends(again) and later == [3]
    other, found = in_a_thread(lambda: run(lambda x: -x, 1))
    other.join(0.2)
    assert not found  # Another program has not run yet.
  assert ends(other) and found == [-1]


def test_nobody_works_beside_a_first_run():
  running, go = threading.Event(), threading.Event()

  def program():
    running.set()
    assert go.wait(5)
    return 7

  thread, found = in_a_thread(lambda: first_run.FirstAlone()(program))
  assert running.wait(5)
  searching, embedded = in_a_thread(work)
  searching.join(0.2)
  assert not embedded
  go.set()
  assert ends(searching) and ends(thread)
  assert found == [7] and embedded == ["embedded"]


def test_others_work_beside_each_other():
  with first_run.working():
    thread, embedded = in_a_thread(work)
    assert ends(thread) and embedded == ["embedded"]
    run, found = in_a_thread(lambda: first_run.FirstAlone()(lambda: 1))
    run.join(0.2)
    assert not found  # One of them is still at it.
  assert ends(run) and found == [1]


def test_what_failed_leaves_nobody_waiting_and_is_still_a_first_run():
  run, calls = first_run.FirstAlone(), []

  def program():
    calls.append(1)
    if len(calls) == 1:
      raise RuntimeError("no memory")
    return 1

  with pytest.raises(RuntimeError, match="no memory"):
    run(program)
  with pytest.raises(RuntimeError, match="embed"), first_run.working():
    raise RuntimeError("embed")
  with first_run.working():
    thread, found = in_a_thread(lambda: run(program))
    thread.join(0.2)
    assert not found
  assert ends(thread) and found == [1]

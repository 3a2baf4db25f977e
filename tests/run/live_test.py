"""What a step shows, on a terminal and in a log."""

import io
import re
import sys

import pytest
from absl import logging

from stepsearch_jax.run import live
from stepsearch_jax.run.state import RunState

ROW = {
  "critic/score/mean": 0.612, "env/searches_per_question": 3.41,
  "response_length/mean": 84.2, "critic/kl": 0.0021,
  "perf/tokens_per_second": 27_500.0,
}


class Terminal(io.StringIO):
  def isatty(self):
    return True


def state():
  found = RunState(0, learner=None)
  for step, em in ((0, 0.5), (6, 0.6), (12, 0.55)):
    found.step = step
    found.note_evaluation({"em": em})
  return found


@pytest.fixture
def clock(monkeypatch):
  """A clock that a test sets."""
  now = [0.0]
  monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
  return now


def test_a_log_gets_one_line_per_step_and_no_rich(clock, capsys, monkeypatch):
  for name in ("console", "live", "table", "text", "progress_bar"):
    monkeypatch.setitem(sys.modules, f"rich.{name}", None)  # Cannot be had.
  view = live.View("step", 60)
  for step in (11, 12):
    clock[0] = 5.2 * step
    view.update(step, live.training(ROW, state()), ["something is wrong"])
  view.close()
  assert capsys.readouterr().err.splitlines() == [
    "step 11/60 reward .61 EM .55 searches 3.4 length 84 kl .0021 tok/s 27500",
    "step 12/60 reward .61 EM .55 searches 3.4 length 84 kl .0021 tok/s 27500 "
    "left 4m10s",
  ]


def test_a_terminal_gets_a_table_with_the_alarms(monkeypatch):
  screen = Terminal()
  monkeypatch.setattr(sys, "stderr", screen)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  handler = logging.get_absl_handler().python_handler
  before = handler.stream
  view = live.View("step", 60)
  view.update(12, live.training(ROW, state()), ["answers are not closed [b]"])
  assert sys.stderr is not screen and handler.stream is sys.stderr
  drawn = screen.getvalue()
  assert drawn.rfind("\x1b[?25h") > drawn.rfind("\x1b[?25l")  # A cursor.
  view.close()
  assert sys.stderr is screen and handler.stream is screen
  handler.setStream(before)
  shown = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", screen.getvalue())
  for text in (
    "12/60", "reward", ".61", "searches", "3.4", "84", ".0021", "27500",
    "+0.050 since the start, -0.050 since the best (step 6)",
    "! answers are not closed [b]",
  ):
    assert text in shown


def test_a_process_that_shows_nothing_shows_nothing(capsys):
  live.View("step", 2, active=False).update(1, [])
  assert capsys.readouterr().err == ""


def test_lines_can_be_rare_but_the_last_step_has_one(capsys):
  view = live.View("warm start", 45, every=20)
  for step in range(1, 46):
    view.update(step, [live.Measure("loss", live.short(0.3))])
  lines = capsys.readouterr().err.splitlines()
  assert [re.sub(" left.*", "", line) for line in lines] == [
    f"warm start {step}/45 loss .30" for step in (20, 40, 45)
  ]


def test_slow_steps_have_a_line_each_half_minute(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
  view = live.View("warm start", 100, every=20)
  for step in range(1, 22):
    now[0] = 13.0 * step
    view.update(step, [])
  lines = capsys.readouterr().err.splitlines()
  assert [line.split("/")[0].split()[-1] for line in lines] == [
    str(step) for step in (3, 6, 9, 12, 15, 18, 20)
  ]


def test_the_pace_is_of_the_latest_steps_and_starts_anew_after_a_rollback():
  pace = live.Pace()
  assert pace.left(10) is None
  pace.note(1, 100.0)  # Which compiled.
  assert pace.left(10) is None
  for step in (2, 3, 4):
    pace.note(step, 100.0 + 2 * (step - 1))
  assert pace.left(10) == 12.0
  pace.note(2, 120.0)
  assert pace.left(10) is None
  pace.note(3, 123.0)
  assert pace.left(10) == 21.0


@pytest.mark.parametrize("value, text", [
  (27500.4, "27500"), (84.2, "84"), (3.41, "3.4"), (0.612, ".61"),
  (0.0021, ".0021"), (0.0, "0"), (-0.25, "-.25"), (10.04, "10"), (0.1, ".10"),
])
def test_numbers_are_short(value, text):
  assert live.short(value) == text


@pytest.mark.parametrize("seconds, text", [
  (35.4, "35s"), (250, "4m10s"), (60, "1m00s"), (59.7, "1m00s"),
  (7500, "2h05m"),
])
def test_times_have_two_units(seconds, text):
  assert live.duration(seconds) == text

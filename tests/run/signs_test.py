"""Made-up sequences of metrics to the sentences that a user reads."""

import pytest

from stepsearch_jax.run import monitor, signs

LIMITS = signs.Limits(
  invalid_share=0.9, unanswered_share=0.9, entropy=0.01, kl=1.0, grad_norm=10.0,
  reward_drop=0.3, searches=0.1, clipped_share=0.3, kl_growth=0.2,
  explained_variance=0.0, settling=4, differing_share=0.1, patience=2,
)
# Half of a row of a healthy run; what a case needs comes on top.
HEALTHY = {
  "env/invalid_share": 0.1, "env/unanswered_share": 0.1, "actor/entropy": 0.5,
  "critic/kl": 0.01, "actor/grad_norm": 1.0, "critic/score/mean": 0.6,
  "env/searches_per_question": 3.0, "response_length/clip_ratio": 0.0,
}
VALUE = {"critic/vf_loss": 0.1}


def said(rows):
  """(step, sentence) of everything that is new at a step."""
  guard = monitor.Sentinel(LIMITS)
  return [
    (step, alarm.message)
    for step, row in enumerate(rows, 1)
    for alarm in guard.observe(step, HEALTHY | row) if alarm.new
  ]


def series(name, *values, **others):
  return [{name: value} | others for value in values]


@pytest.mark.parametrize("rows, sentences", [
  ([{}] * 9, []),
  (series("env/unanswered_share", 0.1, 0.97, 0.97, 1.0, 1.0),
   [(3, "answers stopped being closed since step 2: 97% of the questions end "
        "without one (env/unanswered_share)")]),
  (series("env/unanswered_share", 1.0, 1.0, 1.0),
   [(2, "answers are not closed since step 1: 100% of the questions end "
        "without one (env/unanswered_share)")]),
  (series("env/searches_per_question", 3.0, 2.0, 0.05, 0.0, 0.0),
   [(4, "the policy stopped searching since step 3: 0 searches per question "
        "(env/searches_per_question)")]),
  (series("env/searches_per_question", 0.0, 0.0, 0.0), []),  # It never did.
  (series("response_length/clip_ratio", 0.1, 0.4, 0.4, 0.1, 0.5, 0.5),
   [(3, "responses hit the length limit in 40% of rollouts since step 2 "
        "(response_length/clip_ratio)"),
    (6, "responses hit the length limit in 50% of rollouts since step 5 "
        "(response_length/clip_ratio)")]),  # Once per onset.
  (series("critic/kl", 0.0, 0.1, 0.25, 0.4, 0.5, 0.55),
   [(4, "KL to the start grows fast since step 3: by 0.3 nats per token within "
        "2 steps (growth of critic/kl)")]),
  (series("critic/kl", 0.0, 0.08, 0.16, 0.24, 0.32), []),
  (series("critic/vf_explained_var", -3.0, -2.0, -1.0, -0.5, -0.4, -0.3, -0.2,
          **VALUE),
   [(6, "explained variance of the value model is below 0 after 4 steps: -0.3, "
        "since step 5 (settled critic/vf_explained_var)")]),
  (series("critic/vf_explained_var", *[-0.5] * 7), []),  # No value model.
  (series("batch/differing_share", 0.5, 0.02, 0.02),
   [(3, "groups no longer differ since step 2: 2% have rollouts of unlike "
        "reward, there is nothing to learn from (batch/differing_share)")]),
  (series("critic/score/mean", 0.6, 0.9, 0.5, 0.5),
   [(4, "the mean reward is 0.5 since step 3, after 0.9 at its best "
        "(critic/score/mean)")]),
])
def test_what_is_said_of_a_run(rows, sentences):
  assert said(rows) == sentences


def test_an_early_sign_is_no_collapse():
  guard = monitor.Sentinel(LIMITS)
  for step in (1, 2):
    (*_, alarm) = [None, *guard.observe(
      step, HEALTHY | {"response_length/clip_ratio": 0.9}
    )]
  assert not alarm.collapse and guard.trouble_since == 0
  spec = monitor.MonitorSpec("halt", 0.5, 1, LIMITS)
  assert monitor.must_roll_back(spec, [alarm], 0) is False


def test_an_alarm_that_stands_is_logged_once(caplog):
  guard, spec = monitor.Sentinel(LIMITS), monitor.MonitorSpec(
    "warn", 0.5, 1, LIMITS
  )
  for step in range(1, 6):
    row = HEALTHY | {"actor/entropy": 0.001}
    monitor.must_roll_back(spec, guard.observe(step, row), 0)
  assert caplog.text.count("hardly varies") == 1
  assert len(guard.alarms) == 1  # For the table, it still stands.


def test_a_resumed_sentinel_says_what_the_uninterrupted_one_says():
  rows = [
    HEALTHY | {"critic/kl": 0.1 * step * step,
               "env/searches_per_question": 3.0 * (step < 3)}
    for step in range(1, 7)
  ]
  whole = monitor.Sentinel(LIMITS)
  expected = [whole.observe(i, row) for i, row in enumerate(rows, 1)]
  assert any(expected)
  for cut in range(1, 6):
    first = monitor.Sentinel(LIMITS)
    for i, row in enumerate(rows[:cut], 1):
      first.observe(i, row)
    again = monitor.Sentinel(LIMITS, first.state)
    got = [again.observe(i, row) for i, row in enumerate(rows[cut:], cut + 1)]
    assert got == expected[cut:]

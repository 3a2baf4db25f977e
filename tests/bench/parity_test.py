"""What counts as an error between two devices, from numbers worked by hand."""

import numpy as np
import pytest

from stepsearch_jax.bench import parity


def test_the_largest_relative_error_of_all_arrays_counts():
  wanted = {"a": np.array([3.0, 4.0]), "b": np.array([2.0])}
  found = {"a": np.array([3.0, 4.5]), "b": np.array([2.1])}
  # 0.5 of a norm of 5, and 0.1 of 2.
  assert parity.error(found, wanted) == pytest.approx(0.1)
  assert parity.error(wanted, wanted) == 0.0


@pytest.mark.parametrize("found, message", [
  (np.array([1.0, np.nan]), "1 of 2 numbers"),
  (np.array([1.0]), r"\(1,\) here, \(2,\) there"),
])
def test_numbers_that_cannot_be_compared_never_pass(found, message):
  with pytest.raises(ValueError, match=message):
    parity.error({"a": found}, {"a": np.array([1.0, 2.0])})


def test_a_rollout_counts_up_to_a_rows_first_other_token():
  tokens = np.array([[1, 2, 3, 4, 5]])
  logprobs = np.array([[-1.0, -1.0, -1.0, -1.0, -9.0]])
  other = {"tokens": np.array([[1, 2, 3, 4, 6]]), "logprobs": logprobs + 0.1}
  # Four log-probabilities 0.1 off: 0.2 of a norm of 2; the fifth is left out.
  assert parity.error(other, {"tokens": tokens, "logprobs": logprobs}) == (
    pytest.approx(0.1)
  )
  early = {"tokens": np.array([[1, 2, 9, 4, 5]]), "logprobs": logprobs}
  with pytest.raises(ValueError, match=r"first \[2\] tokens"):
    parity.error(early, {"tokens": tokens, "logprobs": logprobs})

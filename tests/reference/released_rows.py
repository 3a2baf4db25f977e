"""One row of the released reward tensor, as verl's main_ppo.py writes it."""

import numpy as np


def reward_row(
  scores, positions, length: int, valid: int, step_scale: float
):
  """One row of the released reward tensor.

  Args:
    scores: of the trajectory.
    positions: from `step_positions`.
    length: padded response length.
    valid: tokens of the response; 0 puts the score last (B5).
    step_scale: the released constant; the row gets (1 + scale) times it (B1).

  Returns:
    [length] float32.

  Raises:
    IndexError: a drifted position lies outside the row (B4).
  """
  row = np.zeros(length, np.float32)
  for position, step in zip(positions, scores.step_scores, strict=False):
    if position >= length:
      raise IndexError(
        f"index {position} is out of bounds for dimension 0 with size {length}"
      )
    row[position] = step
  row += np.float32(step_scale) * row
  row[valid - 1] = scores.score
  return row

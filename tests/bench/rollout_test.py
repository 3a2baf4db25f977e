"""Both sides of a replay are given the same prompts."""

import numpy as np
import pytest
from bench import sizes

from stepsearch_jax import types
from stepsearch_jax.bench import peers, replay, rollout, workload

TEMPLATE = workload.Template(prompt=48, common=36)
TURNS = ((3, 20), (2, 0))


def replays(rollouts):
  return workload.behind(
    [workload.Replay(9, TURNS[i % 2 :]) for i in range(8)], TEMPLATE, rollouts
  )


class Silent(replay.TurnByTurn):
  """Keeps the contexts that it is to go on with."""

  def __init__(self, *given):
    super().__init__(*given)
    self.contexts = []

  def _generate(self, contexts, counts):
    self.contexts.append([list(context) for context in contexts])
    return np.zeros((len(contexts), max(counts)), np.int64)


@pytest.fixture
def silent(monkeypatch):
  """Parameters of ours; the peer's model is not built."""
  monkeypatch.setattr(peers, "torch_policy", lambda params, config: None)
  return peers.policy(sizes.MODEL)


@pytest.mark.parametrize("rollouts", [1, 4])
def test_the_peer_goes_on_from_the_prompts_that_ours_is_given(silent, rollouts):
  ours = replay.Ours(sizes.MODEL, silent, replays(rollouts), 4)
  theirs = Silent(sizes.MODEL, silent, replays(rollouts))
  counts = theirs.play()
  first, later = theirs.contexts
  assert first == [
    ours._engine.prompt_tokens(types.Question(str(i), "", ("",)))
    for i in range(8)
  ]
  assert [row[:48] for row in later] == first[::2]
  assert len({tuple(row) for row in first}) == 8 // rollouts
  assert counts == [(48 + 25, 5), (48 + 2, 2)] * 4


def test_rollouts_of_a_question_take_its_whole_prompt_over(silent):
  shared = {}
  for rollouts in (1, 4):
    ours = replay.Ours(sizes.MODEL, silent, replays(rollouts), 4)
    played = ours.play()
    rollout._same(played, Silent(sizes.MODEL, silent, replays(rollouts)).play())
    shared[rollouts] = ours.stats.shared_tokens
  # A prompt's last token is fed and never copied. Of 8 trajectories one
  # writes the template, or two write a prompt, of which one took it over.
  assert shared == {1: 7 * 36, 4: 6 * 47 + 36}


def test_the_suite_replays_all_workloads_with_what_was_asked(silent, tmp_path):
  path = sizes.workloads(tmp_path)
  rows = [
    (d.what, d.goal, d.work.partition("prompts")[2])
    for d in rollout._replays(sizes.MODEL, silent, path)
  ]
  template = " of 271, 244 of them common"
  assert rows == [
    ("replay, 8 trajectories", "2.5, aim 3", ""),
    ("replay, 32 trajectories", "2.5, aim 3", ""),
    ("replay, 32 trajectories", "2.5, aim 3", template),
    ("replay, 32 trajectories", "2.8, aim 3.5",
     f"{template}, 8 questions x 4"),
    ("replay, 8 trajectories", "5", ""),
  ]


def test_transformers_plays_the_workloads_of_ours():
  pytest.importorskip("torch")
  params = peers.policy(sizes.MODEL)
  for rollouts in (1, 4):
    rollout._same(
      replay.Ours(sizes.MODEL, params, replays(rollouts), 4).play(),
      replay.TurnByTurn(sizes.MODEL, params, replays(rollouts)).play(),
    )

"""One's own question is played like any other, and told while it happens."""

import fakes
import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax import types
from stepsearch_jax.run import asking
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.tools import ask


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
  """An agent with a policy that likes tags, over the embedded world."""
  config = quickstart.get_config("runlocal")
  workdir = epath.Path(tmp_path_factory.mktemp("run"))
  config.rollout.max_turns = 2
  patch = pytest.MonkeyPatch()
  patch.setattr(Experiment, "trained_policy", lambda self, step: (
    7, fakes.make_tag_lover(self.tokenizer, fakes.make_policy(self.model))
  ))
  (workdir / "checkpoints").mkdir()
  made = asking.Agent(config, workdir)
  yield made
  made.close()
  patch.undo()


def test_a_question_is_played_and_told(agent):
  happened = []
  reply = agent.ask("Who founded Larn?", 1.0, happened.append)
  turns = reply.trajectory.turns
  told = [h.text for h in happened if h.kind == "turn"]
  assert told == [turn.text for turn in turns]
  searched = [turn for turn in turns if turn.action == types.Action.SEARCH
              and turn.retrieved]
  found = [h.documents for h in happened if h.kind == "documents"]
  assert [tuple(d) for d in found] == [turn.documents for turn in searched]
  row = reply.as_row()
  assert row["question"] == "Who founded Larn?"
  assert row["tokens"] == reply.trajectory.policy_mask.sum() > 0
  assert agent.name.endswith("step 7")


def test_greedy_replies_repeat(agent):
  first, second = (agent.ask("Who?").as_row() for _ in range(2))
  assert first["turns"] == second["turns"]


def test_a_question_that_does_not_fit_is_one_line(agent):
  with pytest.raises(types.UserError, match="needs .* prompt tokens"):
    agent.ask("word " * 300)


def test_why_compares_with_a_gold_answer(agent):
  passage = types.Passage("1", "Larn", "Larn was founded by Ada Brandt.")
  turn = types.Turn("<search> Larn </search>", types.Action.SEARCH, "Larn",
                    (passage,), "", 3, retrieved=True)
  reply = agent.ask("Who?")
  reply.trajectory.turns[:] = [turn, turn]
  reply.trajectory.answer = "Ada Brand"
  text = ask.why(reply, "Ada Brandt")
  assert "exact match 0, F1 0.500" in text
  assert "search 2, 'Larn': redundancy penalty 1.00" in text
  assert "documents that hold the gold answer: [1, 2]" in text

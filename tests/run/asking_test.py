"""One's own question is played like any other, and told while it happens."""

import dataclasses

import fakes
import pytest
import tiny_agent
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.models.weights import export
from stepsearch_jax.run import asking, exported
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings
from stepsearch_jax.tools import ask


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
  with tiny_agent.tag_lover(tmp_path_factory.mktemp("run")) as made:
    yield made


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
  assert row["tokens"] + row["read_tokens"] == len(reply.trajectory.tokens)
  assert len(row["turns"]) == len(turns)
  assert all(turn["seconds"] > 0 for turn in row["turns"])
  assert sum(reply.turn_seconds) <= reply.seconds
  rows = [h.as_row() for h in happened]
  assert [(r["thought"], r["action"], r["content"]) for r in rows
          if r["kind"] == "turn"] == [
    (t["thought"], t["action"], t["content"]) for t in row["turns"]
  ]


def test_a_turn_is_told_while_it_is_written(agent):
  happened = []
  agent.ask("Who founded Larn?", 1.0, happened.append)
  pieces, wholes = [[]], []
  for happening in happened:
    if happening.kind == "text":
      pieces[-1].append(happening.text)
    elif happening.kind == "turn":
      wholes.append(happening.text)
      pieces.append([])
  assert ["".join(turn) for turn in pieces[:-1]] == wholes
  # Turns of up to 24 tokens in blocks of 8.
  assert max(map(len, pieces)) > 1 and pieces[-1] == []
  assert all(piece for turn in pieces for piece in turn)


def test_half_a_character_is_held_back_until_it_is_whole(tmp_path):
  turns = ("<answer> na\u00efve \U0001f600\u20ac </answer>",)
  happened = []
  with tiny_agent.scripted(tmp_path, turns) as agent:
    agent._engine.programs.spec = dataclasses.replace(
      agent._engine.programs.spec, block=1
    )
    reply = agent.ask("Who?", tell=happened.append)
  pieces = [h.text for h in happened if h.kind == "text"]
  assert "".join(pieces) == turns[0] and "\ufffd" not in "".join(pieces)
  assert 5 < len(pieces) < reply.tokens  # Its emoji is several tokens.


def test_what_stays_broken_is_told_when_the_turn_ends(tmp_path):
  happened = []
  with tiny_agent.scripted(tmp_path, ("a \U0001f600",)) as agent:
    agent.ask("Who?", tell=happened.append, max_tokens=3)
  assert [h.kind for h in happened] == ["text", "text", "turn"]
  assert happened[0].text + happened[1].text == happened[2].text
  assert happened[0].text.strip() == "a" and "\ufffd" in happened[1].text


def test_the_screen_shows_each_turn_once_and_while_it_grows(capsys):
  screen, seen = ask.Screen(), []
  for piece in ("\n I", " look.\n", "\n<search> x </search>", " \n"):
    screen.tell(asking.Happening("text", piece))
    seen.append(capsys.readouterr().out)
  assert seen == ["  I", " look.", "\n  \n  <search> x </search>", ""]
  screen.tell(asking.Happening("turn", "told"))
  screen.tell(asking.Happening("documents", documents=None))
  screen.tell(asking.Happening("text", "  Next"))
  assert capsys.readouterr().out == "\n      the search failed\n  Next"


def test_a_reply_writes_no_more_tokens_than_it_was_given(agent):
  whole = agent.ask("Who founded Larn?")
  assert whole.tokens > 3 and not whole.cut
  for most in (1, 3, whole.tokens - 1):
    reply = agent.ask("Who founded Larn?", max_tokens=most)
    assert (reply.tokens, reply.cut) == (most, True)
    mask, asked = reply.trajectory.policy_mask, whole.trajectory
    assert (reply.trajectory.tokens[mask] ==
            asked.tokens[asked.policy_mask][:most]).all()
  assert agent.ask("Who founded Larn?", max_tokens=whole.tokens + 1).tokens == (
    whole.tokens)


def test_a_listener_that_raises_ends_the_rollout_and_no_other(agent):
  def refuse(happening):
    raise KeyError("enough")

  with pytest.raises(KeyError, match="enough"):
    agent.ask("Who founded Larn?", tell=refuse)
  assert agent.ask("Who founded Larn?").tokens > 0


def test_greedy_replies_repeat(agent):
  first, second = (agent.ask("Who?").as_row() for _ in range(2))
  for row in (first, second):
    for turn in row["turns"]:
      del turn["seconds"]
  assert first["turns"] == second["turns"]


def test_a_question_that_does_not_fit_is_one_line(agent):
  with pytest.raises(types.UserError, match="needs .* prompt tokens"):
    agent.ask("word " * 300)


@pytest.fixture
def replied(agent):
  """A reply with two equal searches and a half right answer."""
  passage = types.Passage("1", "Larn", "Larn was founded by Ada Brandt.")
  turn = types.Turn("<search> Larn </search>", types.Action.SEARCH, "Larn",
                    (passage,), "", 3, retrieved=True)
  answer = types.Turn("<answer> Ada Brand </answer>", types.Action.ANSWER,
                      "Ada Brand", (), "", 5)
  reply = agent.ask("Who?")
  reply.trajectory.turns[:] = [turn, turn, answer]
  reply.trajectory.answer = "Ada Brand"
  return reply


def test_why_compares_with_a_gold_answer(replied, agent):
  text = ask.why(replied, "Ada Brandt", agent.reward)
  assert "exact match 0, F1 0.500\noutcome 0.500\n" in text
  assert "search 1, 'Larn': redundancy penalty 0.00" in text
  assert "search 2, 'Larn': redundancy penalty 1.00" in text
  assert "documents that hold the gold answer: [1, 2]" in text


def test_why_says_what_an_answer_alone_does_not_tell(replied, agent):
  def said(**changes):
    spec = dataclasses.replace(agent.reward, **changes)
    return ask.why(replied, "Ada Brandt", spec).splitlines()[5:]

  gain, keys = said()
  assert "needs supporting paragraphs" in gain
  assert gain.endswith("paid 0.6 x (gain - penalty)")
  assert keys.startswith("search keys, up to 0.618 of the outcome")
  assert said(search_key_reward=False) == [gain]
  assert said(search_steps_reward=False) == said(information_gain=False) == [
    keys]
  (line,) = said(outcome_only=True)
  assert line.startswith("searches earn nothing in this run")
  (line,) = said(function="mine:reward")
  assert "mine:reward instead" in line


def test_why_of_a_reply_without_an_answer_is_the_outcome_of_none(
  replied, agent
):
  del replied.trajectory.turns[2:]
  replied.trajectory.answer = None
  text = ask.why(replied, "Ada Brandt",
                 dataclasses.replace(agent.reward, malformed=-1.0))
  assert "outcome -1.000: it does not end with an answer" in text


def small_index():
  """The tiny config with an encoder that is not the default."""
  found = tiny_agent.config()
  found.retrieval.encoder = "hashed_tfidf:512"
  return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Folders of a run, and of its exported policy; the run has an index."""
  run = epath.Path(tmp_path_factory.mktemp("run"))
  parts = Experiment(Settings.from_config(small_index()), run)
  policy = fakes.make_tag_lover(
    parts.tokenizer, fakes.make_policy(parts.model)
  )
  export.save_policy(
    run / "hf", policy, parts.model, parts.tokenizer, "float32",
    texts={exported.FILE: exported.text(parts.settings.config)},
  )
  assert parts.retriever.search(["Larn"], 1)
  return run, str(run / "hf")


def test_an_exported_policy_with_an_index_replies_as_its_run(folders, agent):
  run, model = folders
  config = exported.get_config(model)
  config.rollout.max_turns = 3  # An override counts.
  wanted = asking.Wanted(model=model, index=str(run / "index"))
  alone = asking.open_agent(config, wanted)
  assert alone.name == model and config.retrieval.index == ""
  config = small_index()
  config.rollout.max_turns = 3
  config.model.reference = model
  as_run = asking.Agent(config, run)
  for text in ("Who founded Larn?", "Who is Ada?"):
    ours, theirs = (one.ask(text, 1.0).trajectory for one in (alone, as_run))
    assert ours.tokens.tolist() == theirs.tokens.tolist()
  alone.close()
  as_run.close()


def test_the_index_that_is_named_is_searched(folders):
  run, model = folders
  index = str(run / "index")
  config = exported.get_config(model)
  with tiny_agent.scripted_device():
    alone = asking.open_agent(config, asking.Wanted(model=model, index=index))
    reply = alone.ask("Who?")
  alone.close()
  experiment = Experiment(Settings.from_config(small_index()), run)
  (found,) = experiment.retriever.search(["founder of Larn"], 1)
  assert list(reply.trajectory.turns[0].documents) == found != []


@pytest.mark.parametrize("flags, said", [
  (dict(model="hf"), "--index: expected the folder of an index .*got None"),
  (dict(model="hf", index="."), "--index: .* is no index: manifest.json is"),
  (dict(model="hf", index="index", workdir="trained"),
   "--model: expected no run beside it, but .*trained has checkpoints"),
  (dict(index="index"), "--workdir: expected a run with checkpoints"),
])
def test_flags_that_name_no_agent_are_one_line(folders, flags, said):
  run, model = folders
  (run / "trained/checkpoints").mkdir(parents=True, exist_ok=True)
  config = exported.get_config(flags.get("model") and model or "")
  flags = {name: str(run / value) for name, value in flags.items()}
  with pytest.raises(types.UserError, match=said):
    asking.open_agent(config, asking.Wanted(**flags))


def test_flags_win_over_the_config(folders):
  run, model = folders
  config = tiny_agent.config()
  config.retrieval.engine, config.data.corpus = "bm25", "other.jsonl"
  index = str(run / "index")
  asking.Wanted(model=model, index=index).fill(config)
  assert config.model.reference == model
  assert (config.retrieval.engine, config.retrieval.index) == ("index", index)
  assert config.data.corpus == f"{index}/passages.jsonl"


def test_without_settings_the_flags_that_would_do_are_named():
  with pytest.raises(types.UserError, match="--model and --index; got neither"):
    asking.open_agent(None, asking.Wanted())
  with pytest.raises(types.UserError, match="got --workdir=w, which holds no"):
    asking.open_agent(None, asking.Wanted("w"))

"""Playing a run again needs its work directory, not its training file."""

import json

import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax import evaluate, files, types
from stepsearch_jax.data import questions
from stepsearch_jax.run import asking, saved
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings

PASSAGES = [
  types.Passage.of("Ada Rook", "Ada Rook was born in Lintel."),
  types.Passage.of("Lintel", "Lintel lies on the river Mossing."),
]


@pytest.fixture
def config(tmp_path):
  """Settings of a run that has indexed the passages of its question files."""
  for name, passage in zip(("train", "eval"), PASSAGES, strict=True):
    row = questions.to_row(types.Question(
      name, "Where?", ("Lintel",), support=(passage,)
    ))
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
  config = quickstart.get_config("runlocal")
  config.data.train = str(tmp_path / "train.jsonl")
  config.data.eval = str(tmp_path / "eval.jsonl")
  return config


def opened(config, workdir):
  return Experiment(Settings.from_config(config), epath.Path(workdir))


def test_the_index_of_a_run_stands_for_its_training_file(config, tmp_path):
  before = opened(config, tmp_path).retriever
  (tmp_path / "train.jsonl").unlink()
  with pytest.raises(files.DataError, match="train.jsonl: no such file"):
    _ = opened(config, tmp_path).retriever
  saved.search_own_index(config, epath.Path(tmp_path))
  again = opened(config, tmp_path)
  asked = ["river Mossing", "born in Lintel"]
  assert again.retriever.search(asked, 2) == before.search(asked, 2)
  assert again.retriever.describe() == before.describe()
  assert [q.id for q in again.eval_questions] == ["eval"]
  assert again.absent_gold == set()


@pytest.mark.parametrize("field, value", [
  ("data.train", "world"), ("data.corpus", "c.jsonl"),
  ("retrieval.index", "ready"),
])
def test_what_the_config_searches_stays(config, tmp_path, field, value):
  (tmp_path / "index").mkdir()
  (tmp_path / "index/passages.jsonl").touch()
  config.update_from_flattened_dict({field: value})
  before = config.to_dict()
  saved.search_own_index(config, epath.Path(tmp_path))
  assert config.to_dict() == before


def test_a_run_without_an_index_keeps_its_files(config, tmp_path):
  saved.search_own_index(config, epath.Path(tmp_path))
  assert not config.data.corpus


class BuiltError(Exception):
  """Raised in place of building, with the settings."""


@pytest.mark.parametrize("command", ["evaluate", "ask"])
def test_commands_that_play_search_it(config, tmp_path, monkeypatch, command):
  def build(settings, workdir):
    raise BuiltError(settings.data.corpus)

  (tmp_path / "index").mkdir()
  (tmp_path / "index/passages.jsonl").touch()
  (tmp_path / "checkpoints").mkdir()
  module = {"evaluate": evaluate, "ask": asking}[command]
  monkeypatch.setattr(module, "Experiment", build)
  with pytest.raises(BuiltError, match=r"index/passages\.jsonl"):
    if command == "ask":
      asking.Agent(config, epath.Path(tmp_path))
    else:
      flags = evaluate.flags.FLAGS
      if not flags.is_parsed():
        flags(["test"])
      monkeypatch.setattr(flags, "workdir", str(tmp_path))
      monkeypatch.setattr(flags["config"], "_value", config)
      evaluate._evaluate_model()

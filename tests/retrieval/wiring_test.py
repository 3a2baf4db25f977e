"""Config to retriever: ready indexes, large corpora, what cards say."""

import json

import fakes
import pytest
from etils import epath

from configs import quickstart
from stepsearch_jax import types
from stepsearch_jax.data import questions
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import corpus, encoder, index
from stepsearch_jax.run import reporting, starting
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings

PASSAGES = [
  types.Passage("1", "Ada Rook", "Ada Rook was born in Lintel."),
  types.Passage("2", "Lintel", "Lintel lies on the river Mossing."),
  types.Passage("3", "Bo", "Bo sells umbrellas near the harbour."),
]


@pytest.fixture
def config(tmp_path):
  """A run with files of its own and a ready index."""
  asked = [
    types.Question(str(i), "Where was Ada Rook born?", ("Lintel",),
                   support=(PASSAGES[0],))
    for i in range(10)
  ]
  (tmp_path / "train.jsonl").write_text(
    "".join(json.dumps(questions.to_row(q)) + "\n" for q in asked)
  )
  corpus.write_corpus(epath.Path(tmp_path) / "wiki.jsonl", PASSAGES)
  index_build.build_index(
    tmp_path / "index", corpus.stream_corpus(str(tmp_path / "wiki.jsonl")),
    encoder.HashedTfidfEncoder(),
  )
  config = quickstart.get_config("runlocal")
  config.data.train = str(tmp_path / "train.jsonl")
  config.data.corpus = str(tmp_path / "wiki.jsonl")
  config.retrieval.index = str(tmp_path / "index")
  return config


def opened(config, workdir):
  experiment = Experiment(Settings.from_config(config), epath.Path(workdir))
  return experiment, experiment.retriever


def test_a_ready_index_keeps_the_corpus_out_of_memory(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(corpus, "load_corpus", lambda *unused: pytest.fail())
  experiment, retriever = opened(config, tmp_path)
  assert len(experiment.corpus) == 3 and experiment.corpus[1] == PASSAGES[1]
  assert experiment.corpus[1:] == PASSAGES[1:]
  ((found,),) = retriever.search(["river Mossing"], 1)
  assert (found.id, found.text) == ("2", PASSAGES[1].text)


def test_an_index_of_another_corpus_is_refused(config, tmp_path):
  corpus.write_corpus(epath.Path(tmp_path) / "wiki.jsonl", PASSAGES[:2])
  with pytest.raises(index.IndexMismatchError, match="this run's corpus is"):
    opened(config, tmp_path)
  config.data.corpus = ""  # Then it is that of the question files.
  with pytest.raises(index.IndexMismatchError, match="this run's corpus is"):
    opened(config, tmp_path)
  config.retrieval.index = str(tmp_path / "absent")
  with pytest.raises(ValueError, match="absent' does not exist: build it"):
    opened(config, tmp_path)


def test_cards_name_the_corpus_and_its_hash(config, tmp_path):
  _, retriever = opened(config, tmp_path)
  card = reporting.card_settings(
    Settings.from_config(config), retriever, "m"
  )
  assert card["corpus"] == str(tmp_path / "wiki.jsonl")
  assert card["corpus_hash"] == corpus.corpus_hash(PASSAGES)
  assert card["passages"] == 3 and card["index"].startswith("hashed_tfidf:")


@pytest.mark.parametrize("changes, name", [
  ({}, "paragraphs of the question files"),
  ({"data.train": "world"}, "the embedded world"),
  ({"retrieval.remote": "http://x:1"}, "whatever http://x:1 searches"),
  ({"retrieval.engine": "online"}, "the web"),
])
def test_cards_claim_no_corpus_that_was_not_searched(
  changes, name, monkeypatch
):
  monkeypatch.setenv("SERPER_API_KEY", "k")
  class Described:
    def describe(self):
      return {}

  config = quickstart.get_config("runlocal")
  config.data.train = "train.jsonl"
  config.update_from_flattened_dict(changes)
  card = reporting.card_settings(
    Settings.from_config(config), Described(), "m"
  )
  assert card["corpus"] == name


def test_a_dead_server_is_given_up_as_the_config_says(config, tmp_path):
  config.retrieval.index = config.data.corpus = ""
  config.retrieval.remote = "http://127.0.0.1:9"
  config.retrieval.patience.update(retries=0, open_after=1, open_seconds=99.0)
  _, retriever = opened(config, tmp_path)
  with pytest.raises(types.SearchError, match="ConnectError"):
    retriever.search(["a"], 1)
  with pytest.raises(types.SearchError, match="1 times in a row; .*9. s"):
    retriever.search(["a"], 1)
  config.retrieval.patience.retries = -1
  with pytest.raises(ValueError, match="patience.retries must be at"):
    opened(config, tmp_path)


class Flaky(fakes.FakeRetriever):
  """Fails for some queries."""

  def search(self, queries, k):
    return [
      None if "bad" in query else super(Flaky, self).search([query], k)[0]
      for query in queries
    ]


def test_a_warm_start_leaves_out_scripts_whose_searches_failed(
  config, tmp_path
):
  asked = [
    types.Question(
      name, "q", ("a",), search_keys=((f"{name} key",),),
      support=(PASSAGES[0],), decomposition=(types.SubQuestion("q", "a"),),
    )
    for name in ("good", "bad")
  ]
  config.warm_start.trajectories = 20
  experiment = Experiment(Settings.from_config(config), tmp_path)
  parts = experiment.__dict__  # Where cached parts live.
  parts |= {"retriever": Flaky(), "train_questions": asked,
            "tokenizer": fakes.make_tokenizer()}
  scripts = starting.demonstrations(experiment)
  assert {t.question.id for t in scripts} == {"good"}
  assert 1 < len(scripts) < 20
  parts["train_questions"] = asked[1:]
  with pytest.raises(types.UserError, match="20 more had no search"):
    starting.demonstrations(experiment)

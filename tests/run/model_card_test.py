"""The model card of an exported policy says what the run says."""

import ast
import json
import re
import types as types_lib

import huggingface_hub
import jax
import numpy as np
import pytest
import tiny_agent
import yaml
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.run import model_card, reporting
from stepsearch_jax.run.settings import Settings
from stepsearch_jax.tools import export

# What the hub's specification of model cards knows of what a card here uses.
KEYS = {"library_name", "pipeline_tag", "license", "tags", "base_model",
        "model-index"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """An experiment whose step 7 was evaluated, with its card."""
  folder = epath.Path(tmp_path_factory.mktemp("run"))
  with tiny_agent.scripted_experiment(folder) as experiment:
    asked = list(experiment.eval_questions[:3])
    asked[0] = types.Question(**{**vars(asked[0]), "answers": ("Ada",)})
    asked[1] = types.Question(**{
      **vars(asked[1]), "answers": ("Ada Brandt",), "source": "musique",
    })
    card = reporting.evaluate(
      experiment, {}, f"{folder} step 7", folder / "evaluations/a",
      questions=asked,
    )
    yield experiment, card


def with_reference(experiment, reference):
  """The same experiment as if it had begun with a reference."""
  config = tiny_agent.config()
  config.model.reference = reference
  settings = Settings.from_config(config)
  changed = type(experiment)(settings, experiment.workdir)
  changed.__dict__["tokenizer"] = experiment.tokenizer
  return changed


def parts(text):
  _, head, body = text.split("---\n", 2)
  return yaml.safe_load(head), body


def test_the_front_matter_holds_the_runs_results_as_the_hub_reads_them(run):
  experiment, card = run
  text = model_card.render(experiment, 7, "my_agent", "apache-2.0")
  head, _ = parts(text)
  assert set(head) <= KEYS and "base_model" not in head
  assert (head["license"], head["library_name"], head["pipeline_tag"]) == (
    "apache-2.0", "transformers", "text-generation")
  data = huggingface_hub.ModelCard(text).data  # Refuses a bad model-index.
  assert data.model_name == "my_agent"
  found = {(r.dataset_name, r.metric_type): r.metric_value
           for r in data.eval_results}
  assert found == {
    (source, kind): row[metric] for source, row in card["sources"].items()
    for metric, kind in (("em", "exact_match"), ("f1", "f1"))
  }
  assert found["musique", "exact_match"] == 1.0
  assert 0 < found["world", "f1"] < 1


def test_the_body_holds_the_runs_settings_and_intervals(run):
  experiment, card = run
  settings = experiment.settings
  _, body = parts(model_card.render(experiment, 7, "my_agent"))
  cells = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", body, re.MULTILINE))
  assert cells["base model"] == "none, trained anew"
  assert cells["method"].startswith("method steppo, StepSearch")
  assert cells["steps"] == "7" and cells["seed"] == str(settings.seed)
  assert cells["training questions"] == "the embedded world"
  assert cells["tokens per turn, at most"] == str(settings.rollout.max_turn)
  assert cells["encoder"] == card["settings"]["encoder"]
  assert cells["jax"] == jax.__version__
  assert cells["machine"] == f"{jax.device_count()} x cpu"
  assert re.fullmatch(r"20\d\d-\d\d-\d\d", cells["date"])
  for source, row in card["sources"].items():
    em, f1 = (f"{row[m]:.4f} ({row[m + '_interval'][0]:.4f}-"
              f"{row[m + '_interval'][1]:.4f})" for m in ("em", "f1"))
    assert f"| {source} | {row['n']} | {em} | {f1} |" in body
  assert str(experiment.workdir) not in body
  assert "fill in `license`" in body


def test_the_use_holds_the_runs_prompt_and_code_that_parses(run):
  experiment, _ = run
  _, body = parts(model_card.render(experiment, 7, "my_agent"))
  prompt, reply = re.findall(r"^````\n(.*?)\n````$", body, re.DOTALL | re.M)
  assert prompt == "Question: {question}"
  assert reply == "<information>{text} </information>"
  (code,) = re.findall(r"````python\n(.*?)\n````", body, re.DOTALL)
  texts = [node.value for node in ast.walk(ast.parse(code))
           if isinstance(node, ast.Constant)]
  asked = types.Question("", "{question}", ("?",))
  assert experiment.tokenizer.chat_prompt(experiment.env.prompt(asked)) in texts
  assert experiment.settings.rollout.max_turn in texts
  assert {"</search>", "</answer>"} <= set(texts)


def test_only_evaluations_of_the_exported_step_count_the_newest_first(run):
  experiment, card = run
  _, body = parts(model_card.render(experiment, 17, "my_agent"))
  assert "Step 17 was not evaluated." in body
  assert model_card.newest_evaluation(experiment.workdir, 7) == card
  folder = experiment.workdir / "evaluations/b"
  folder.mkdir()
  newer = card | {"metrics": card["metrics"] | {"searches": 9.0}}
  other = newer | {"settings": card["settings"] | {"model": "x step 17"}}
  try:
    for written, expected in ((newer, newer), (other, card)):
      (folder / "card.json").write_text(json.dumps(written))
      assert model_card.newest_evaluation(experiment.workdir, 7) == expected
  finally:
    folder.rmtree()


def test_a_base_model_is_named_as_the_hub_knows_it(run, tmp_path):
  experiment, _ = run
  hub = with_reference(experiment, "Qwen/Qwen2.5-3B")
  head, body = parts(model_card.render(hub, 7, "x"))
  assert (head["base_model"], head["license"]) == ("Qwen/Qwen2.5-3B", "unknown")
  assert "| base model | Qwen/Qwen2.5-3B |" in body
  folder = tmp_path / "secret/base"
  folder.mkdir(parents=True)
  (folder / "README.md").write_text(
    "---\ntags: [a]\nlicense: mit\n---\nlicense: none\n")
  head, body = parts(model_card.render(
    with_reference(experiment, str(folder)), 7, "x"))
  assert "base_model" not in head and head["license"] == "mit"
  assert "| base model | base |" in body and "secret" not in body
  assert "## License" not in body


def test_the_command_writes_the_card_into_the_folder(
  run, tmp_path, monkeypatch, capsys
):
  experiment, _ = run
  shapes = jax.eval_shape(experiment.initial_policy)
  policy = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  monkeypatch.setattr(type(experiment), "trained_policy",
                      lambda self, step: (7, policy))
  for name, value in dict(
    CONFIG=tiny_agent.config(), WORKDIR=str(experiment.workdir), STEP=None,
    OUTPUT=f"{tmp_path}/my_agent", DTYPE="float32", LICENSE="mit",
  ).items():
    monkeypatch.setattr(export, f"_{name}", types_lib.SimpleNamespace(
      value=value))
  export.main()
  assert capsys.readouterr().out == (
    f"policy of step 7: {tmp_path}/my_agent\n")
  text = (tmp_path / "my_agent/README.md").read_text()
  assert text == model_card.render(experiment, 7, "my_agent", "mit")
  assert (tmp_path / "my_agent/model.safetensors").exists()
  carried = json.loads((tmp_path / "my_agent/stepsearch.json").read_text())
  assert carried["rollout"]["max_turn"] == 24  # Of tiny_agent.config.
  assert "`stepsearch ask --model=my_agent --index=FOLDER`" in text

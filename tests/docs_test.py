"""What the documents say is true of the files beside them."""

import dataclasses
import importlib.util
import pathlib
import re

import cli_test
import pytest
from reference import worked_example

from configs import common
from stepsearch_jax import __main__ as verbs
from stepsearch_jax import cli
from stepsearch_jax.run import identity, signs
from stepsearch_jax.run.settings import Settings

ROOT = pathlib.Path(__file__).parents[1]
NOTES = ROOT / "stepsearch_jax/README.md"
DOCUMENTS = sorted([
  ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md",
  *(path for place in ("configs", "launch", "stepsearch_jax")
    for path in (ROOT / place).rglob("*.md")),
])
OF_A_RUN = {
  "tensorboard/", "evaluations/", "evaluations/step_N/", "trajectories/",
  "checkpoints/",
}
QUIRK = re.compile(r"\b[A-E]\d{1,2}\b")
ALL_QUIRKS = {
  f"{letter}{number}"
  for letter, count in dict(A=27, B=12, C=11, D=5, E=11).items()
  for number in range(1, count + 1)
}


def name_of(path):
  return str(path.relative_to(ROOT))


def rows(text, prefix):
  return re.findall(rf"^\| ({prefix}\d+) \| (.*) \|$", text, re.MULTILINE)


def test_every_quirk_has_one_row_of_its_own():
  found = [id for id, _ in rows(NOTES.read_text(), "[A-E]")]
  assert sorted(found) == sorted(ALL_QUIRKS)


def test_comments_refer_to_quirks_of_the_table():
  for path in sorted(ROOT.glob("stepsearch_jax/**/*.py")):
    for line in path.read_text().splitlines():
      if "quirk" in line or "released" in line:
        assert set(QUIRK.findall(line)) <= ALL_QUIRKS, (path, line)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_that_a_document_names_exist(path):
  named = re.findall(
    r"`((?:[\w.*-]+/)*[\w*-]+(?:/|\.(?:py|sh|md|yaml|yml|toml)))`",
    path.read_text(),
  )
  places = (ROOT, path.parent, ROOT / "stepsearch_jax")
  missing = [name for name in named
             if name not in OF_A_RUN
             and not any(any(place.glob(name)) for place in places)]
  assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_modules_that_a_document_runs_exist(path):
  for name in re.findall(r"python -m (stepsearch_jax[\w.]*)", path.read_text()):
    module = ROOT / name.replace(".", "/")
    assert module.with_suffix(".py").exists() or (
      module / "__main__.py"
    ).exists(), name


def commands(text):
  """(verb, flags) of every `stepsearch VERB` in a document."""
  text = text.replace("\\\n", " ")
  for line in re.findall(r"stepsearch ([a-z].*)", text):
    verb, _, rest = line.partition(" ")
    if verb in verbs.VERBS:
      rest = re.split(r"[`#|;)]", rest)[0]
      yield verb, re.findall(r"(?<!\S)--(\w+)", rest)


def flags_of(verb):
  """Names of the flags that a verb defines, takes over or shares."""
  sources = [cli_test.source_of(verb), ROOT / "stepsearch_jax/cli.py"]
  if "AgentFlags()" in sources[0].read_text():
    sources.append(ROOT / "stepsearch_jax/run/agent_flags.py")
  return {"help"} | {
    name for path in sources for name in re.findall(
      r'(?:DEFINE_\w+|declare_key_flag)\(\s*"(\w+)"', path.read_text())
  }


@pytest.mark.parametrize("path", [
  *DOCUMENTS, *(cli_test.source_of(verb) for verb in verbs.VERBS),
], ids=name_of)
def test_commands_that_a_document_shows_have_their_flags(path):
  for verb, named in commands(path.read_text()):
    given = {name for name in named if name != "config"}
    assert given <= flags_of(verb), verb


def test_the_commands_of_documents_are_found():
  found = list(commands((ROOT / "README.md").read_text()))
  assert ("view", ["output"]) in found
  assert ("index", ["corpus", "encoder", "max_length", "output"]) in found
  assert {verb for verb, _ in found} >= {"train", "ask", "serve", "plan"}


def test_nobody_is_told_of_a_folder_of_one_machine():
  for folder in ("stepsearch_jax", "configs", "launch"):
    for path in (ROOT / folder).glob("**/*.*"):
      if path.suffix in (".py", ".sh", ".md", ".yaml"):
        assert "/tmp" not in path.read_text(), path


def test_help_names_the_folder_that_cards_go_to():
  text = (ROOT / "stepsearch_jax/evaluate.py").read_text()
  (said,) = re.findall(r'"workdir", None, "(.*)"', text)
  (used,) = set(re.findall(r'workdir / "(eval\w*)"', text))
  assert f" {used}/" in said


def test_the_readme_stays_a_page_that_one_reads():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_every_launcher_is_explained():
  text = (ROOT / "launch/README.md").read_text()
  for path in (ROOT / "launch").iterdir():
    if path.is_file() and path.name != "README.md":
      assert f"| `{path.name}` | " in text, path.name


def test_every_config_has_a_row():
  text = (ROOT / "configs/README.md").read_text()
  for path in (ROOT / "configs").glob("*.py"):
    if path.name not in ("__init__.py", "arguments.py", "common.py"):
      assert f"| `{path.name}` | " in text, path.name


def test_the_map_names_every_place_of_the_package():
  text = NOTES.read_text().split("## Map")[1].split("\n## ")[0]
  for path in (ROOT / "stepsearch_jax").iterdir():
    if path.is_dir() and path.name != "__pycache__":
      assert f"`{path.name}/`" in text, path.name


def test_worked_example_has_the_numbers_that_the_package_computes():
  blocks = re.findall(
    r"<!-- worked example: \w+ -->\n(.*?)\n<!-- /worked example -->",
    NOTES.read_text(), re.DOTALL,
  )
  assert "\n\n".join(blocks) == "\n".join(worked_example.lines())


def named_configs():
  """Every config that a launcher or a README names, with its argument."""
  texts = [
    path.read_text() for path in sorted([
      *ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.yaml"), *DOCUMENTS,
      ROOT / "README.md", *ROOT.glob("stepsearch_jax/*/README.md"),
    ])
  ]
  shape = r"(?:--config[= ]|\b(?=configs/))((?:configs/\w+\.py|\w+)"
  shape += r"(?::[\w=,.]+\w)?)(?![\w/.])"
  found = {name for text in texts for name in re.findall(shape, text)}
  return sorted(found - {"and", "configs/common.py"})  # Words, no configs.


@pytest.mark.parametrize("name", named_configs())
def test_configs_that_launchers_and_documents_name_load(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  path, _, argument = cli.find_config(name).partition(":")
  spec = importlib.util.spec_from_file_location("named", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  Settings.from_config(module.get_config(argument or None), devices=1)


def test_the_names_of_configs_are_found():
  found = named_configs()
  assert "configs/quickstart.py:runlocal" in found
  assert "configs/quickstart.py:method=ppo" in found
  assert "stepsearch_qwen2_5_3b" in found and "x" not in found


def test_the_table_of_troubles_names_metrics_and_fields_that_exist():
  text = (ROOT / "launch/README.md").read_text()
  table = text.split("## When something goes wrong")[1].split("\n## ")[0]
  sources = "".join(
    path.read_text() for place in ("run", "ppo", "evaluation", "rollout")
    for path in (ROOT / "stepsearch_jax" / place).rglob("*.py")
  ) + (ROOT / "stepsearch_jax/train.py").read_text()
  metrics = set(re.findall(r"`(\w+/[\w/]+)`", table)) - {"val/em"}
  assert len(metrics) > 15
  for metric in metrics:
    assert f'"{metric}"' in sources, metric
  fields = identity.flat(common.base().to_dict())
  for field in re.findall(r"`(\w+(?:\.\w+)+)`", table):
    assert any(f == field or f.startswith(f"{field}.") for f in fields) or (
      field == "metrics.jsonl"), field
  # Whatever the sentinel speaks of has its row.
  limits = signs.Limits(**{
    f.name: 1 for f in dataclasses.fields(signs.Limits)})
  for check in signs.collapses(limits) + signs.signs(limits):
    assert check.metric.split()[-1] in metrics, check.metric

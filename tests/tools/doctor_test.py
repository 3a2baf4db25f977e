"""What the doctor says of versions, ports and devices."""

import socket

import jax
import numpy as np

from stepsearch_jax.tools import doctor


def test_a_missing_package_says_what_to_install(monkeypatch):
  monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
  lines = dict(line[::-1] for line in doctor.versions())
  (line,) = [text for text in lines if text.startswith("bm25s")]
  assert lines[line] == "note" and 'pip install -e ".[bm25]"' in line
  assert lines[f"jax {jax.__version__}"] == "ok"


def test_a_port_in_use_is_noted():
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    server.listen()
    port = str(server.getsockname()[1])
    ((state, line),) = doctor.ports([port])
  assert state == "note" and "in use" in line
  ((state, _),) = doctor.ports([port])
  assert state == "ok"


def test_a_device_that_computes_wrong_fails(monkeypatch):
  assert doctor.self_test(jax.devices()[0])[0] == "ok"
  monkeypatch.setattr(
    doctor.jnp, "dot", lambda a, b, precision: np.zeros((512, 512))
  )
  assert doctor.self_test(jax.devices()[0])[0] == "fail"


def test_models_and_indexes_that_can_be_found_are_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  hub = tmp_path / "hub"
  assert [state for state, _ in doctor.models(hub)] == ["note"]
  assert [state for state, _ in doctor.indexes()] == ["note"]
  for name, content in {
    "hub/models--Qwen--Qwen2.5-3B/refs": "", "small.gguf": "",
    "hf/config.json": '{"model_type": "llama"}',
    "runs/a/config.json": '{"config": {}}', "other/config.json": "{",
    "runs/a/index/manifest.json": '{"encoder": {"name": "e5"}, "count": 7}',
    "wiki/manifest.json": '{"encoder": {"name": "tfidf"}, "count": 9}',
    "site/manifest.json": "[]",
  }.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
  assert list(doctor.models(hub)) == [
    ("ok", "model Qwen/Qwen2.5-3B (in the hub's cache)"),
    ("ok", "model hf"), ("ok", "model small.gguf"),
  ]
  assert list(doctor.indexes()) == [
    ("ok", "index wiki: 9 passages, encoder tfidf"),
    ("ok", "index runs/a/index: 7 passages, encoder e5"),
  ]

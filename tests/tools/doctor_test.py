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

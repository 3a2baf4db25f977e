"""The launchers find the right Python, and its pins."""

import pathlib
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def executable(path, version):
  """A stand-in for Python `version`, None for one that does not start."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if version is None:
    path.write_text("#!/bin/sh\necho pyenv: not selected >&2\nexit 127\n")
  else:
    minor = version.split(".")[1]
    path.write_text(
      "#!/bin/sh\n"
      f'[ "$3" = {version} ] || [ "$3" = 3 ] || exit 1\n'
      f'[ {minor} -ge 11 ]\n'
    )
  path.chmod(0o755)


def find(tmp_path, **environment):
  return subprocess.run(
    ["/bin/bash", "-c", f"source {ROOT}/launch/venv.sh && find_python"],
    capture_output=True, text=True,
    env={"PATH": f"{tmp_path}/bin:{tmp_path}/tools", "HOME": str(tmp_path),
         **environment},
  )


@pytest.fixture
def machine(tmp_path):
  """A machine without any Python; commands that venv.sh needs are there."""
  (tmp_path / "bin").mkdir()
  (tmp_path / "tools").mkdir()
  (tmp_path / "tools/dirname").symlink_to("/usr/bin/dirname")
  return tmp_path


@pytest.mark.parametrize("on_path, pyenv, found", [
  (["3.11", "3.12"], [], "python3.12"),
  (["3.11"], ["3.12.1", "3.13.0"], ".pyenv/versions/3.12.1/bin/python"),
  (["3.11"], ["3.13.0"], ".pyenv/versions/3.13.0/bin/python"),
  (["3.11"], ["3.10.2"], "python3.11"),
])
def test_the_newest_python_is_found_3_12_first(
  machine, on_path, pyenv, found
):
  for version in on_path:
    executable(machine / "bin" / f"python{version}", version)
  # The shim of a version that pyenv has not selected does not start.
  if "3.12" not in on_path:
    executable(machine / "bin/python3.12", None)
  for version in pyenv:
    executable(machine / f".pyenv/versions/{version}/bin/python",
               version.rpartition(".")[0])
  done = find(machine)
  assert done.stdout.strip().endswith(found), done.stderr


def test_a_machine_without_python_and_a_wrong_choice_are_said(machine):
  done = find(machine)
  assert done.returncode == 1 and "Python >= 3.11 is needed" in done.stderr
  executable(machine / "bin/python3.10", "3.10")
  done = find(machine, PYTHON="python3.10")
  assert done.returncode == 1
  assert "PYTHON=python3.10 is no Python >= 3.11" in done.stderr
  executable(machine / "bin/mine", "3.11")
  assert find(machine, PYTHON="mine").stdout.strip() == "mine"


def test_each_python_has_one_jax_and_its_extras_the_same(monkeypatch):
  from packaging import requirements

  given = {}
  monkeypatch.setitem(sys.modules, "setuptools", types.SimpleNamespace(
    setup=lambda **settings: given.update(settings),
    find_packages=lambda **unused: [],
  ))
  exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"),
       {"__file__": str(ROOT / "setup.py")})
  for python, jax in (("3.11", "0.10.2"), ("3.12", "0.12.0.1"),
                      ("3.13", "0.12.0.1")):
    machine = {"python_version": python, "sys_platform": "linux",
               "platform_machine": "x86_64"}
    for extra in (None, "tpu", "gpu", "test"):
      rows = given["install_requires"] + given["extras_require"].get(extra, [])
      pins = [r for r in map(requirements.Requirement, rows)
              if r.marker is None or r.marker.evaluate(machine)]
      assert {str(r.specifier) for r in pins if r.name == "jax"} == {f"=={jax}"}
      assert len([r for r in pins if r.name == "flax"]) == 1
      if extra == "test":
        assert len([r for r in pins if r.name == "libtpu"]) == 1

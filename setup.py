"""Packaging: `pip install -e .` for the runtime, `pip install -e '.[test]'` for the tests."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "cc_jax/__init__.py").read_text()).group(1)

setup(
    name="cc_jax",
    version=VERSION,
    description="CustomContrast (AAAI 2025) in JAX/Flax: subject-driven text-to-image drawing",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # The suite runs on 3.11 (jax 0.10), the checks on a GPU on 3.12 (jax 0.11). All packages below
    # have wheels for 3.13, where nobody ran it yet; tensorflow has none for 3.14.
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["cc_jax*", "configs*", "data_pipeline*"]),
    package_data={"cc_jax": ["assets/**/*"]},
    # Lower bounds are the oldest versions that were tested. An upper bound stands only where a
    # version is known to break, with what breaks.
    install_requires=[
        "jax>=0.10.2",  # arrays, programs, meshes
        "flax>=0.12.8",  # NNX: the networks
        "optax>=0.2.8",  # AdamW, schedules, clipping
        "orbax-checkpoint>=0.12.8",  # the training state, on any mesh
        "transformers>=5.17",  # CLIP's tokenizer
        "diffusers>=0.42",  # the layout of bases: its version goes into model_index.json
        "tensorflow>=2.21",  # tf.data, the pipeline of triples; runs on the CPU alone
        "tensorflow-datasets>=4.9.10",  # data sets on disk, subjects3d's among them
        "array_record>=0.8",  # the random-access files that TFDS writes on request
        "ml_collections>=1.1",  # configs and their flags
        "absl-py>=2.1",  # flags, logging
        "etils>=1.9",  # epath: folders and buckets alike
        "jaxtyping>=0.3",  # shapes in signatures
        "ml_dtypes>=0.5",  # bfloat16 and fp8 in numpy
        "huggingface_hub>=1.0",  # bases by their hub ids
        "safetensors>=0.5",  # weights in and out
        "tokenizers",  # trains the mini base's vocabulary
        "tqdm>=4.66",  # rate and time left
        "tensorboardX>=2.6",  # the log for TensorBoard
        "pillow>=10",  # pictures
        "pyarrow>=17",  # manifests of data sets, Parquet
        "scipy>=1.13",  # rank correlations
        "matplotlib>=3.9",  # the laboratory's figures
        "numpy>=2",  # everything on the host
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10.2"],
        "cuda13": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "heif": ["pillow-heif"],  # telephones' .heic pictures in folders of one's own
        # 3D models: `python -m data_pipeline.objects` reads them and renders them.
        "objects": ["trimesh>=4", "moderngl>=5.10"],
        # Masks of photographs by a network that the user names: `generate --mask=auto`.
        "segment": ["onnxruntime>=1.18"],
        # `python -m data_pipeline.prepare`. Beam 2.77 wants pillow<13, protobuf<7, pyarrow<26.
        "prepare": ["apache-beam>=2.77", "onnxruntime>=1.18"],
        # What the command `tfds` imports and does not install.
        "tfds": ["apache-beam", "mlcroissant"],
        "notebooks": ["jupyterlab>=4", "ipywidgets>=8"],
        # torch: the version that the parity tests were run with, and whose CPU wheel CI has.
        # Tests of `prepare` ask for that extra, and are skipped without it.
        "test": ["pytest>=8", "pytest-xdist>=3.8", "torch==2.13.0", "ruff", "trimesh>=4",
                 "moderngl>=5.10", "onnxruntime>=1.18"],
    },
)

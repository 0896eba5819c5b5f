"""What a command imports before it has anything to do: values, not times."""

import subprocess
import sys

import pytest

HEAVY = ("diffusers", "jax", "flax", "matplotlib", "optax", "orbax", "PIL", "scipy",
         "tensorflow", "tensorflow_datasets", "tokenizers", "torch", "transformers")  # fmt: skip
COMMAND = """
import sys
{statement}
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""


@pytest.mark.parametrize("statement, needed", [
  ("import cc_jax.generate", ""),
  ("import data_pipeline", "PIL"),
  ("import cc_jax.sampling.pipeline", "PIL flax jax optax"),
  ("import cc_jax.train", "PIL flax jax optax orbax"),
])  # fmt: skip
def test_a_command_imports_what_it_needs(statement, needed):
  """Flax brings optax."""
  command = [sys.executable, "-c", COMMAND.format(statement=statement), *HEAVY]
  found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
  assert set(found) <= set(needed.split())


def test_generate_still_has_its_pipeline():
  from cc_jax import generate
  from cc_jax.sampling import pipeline

  assert generate.load is pipeline.load and generate.Pipeline is pipeline.Pipeline
  with pytest.raises(AttributeError, match="has no attribute 'lod'"):
    generate.lod  # noqa: B018

"""Makes the files of this folder with the code of commit 0d5bef4; README.md has the command."""

import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

import conftest  # noqa: F401 (before jax: XLA's flags of the tests)
import jax
import tiny

import data_pipeline
from cc_jax import train

HERE = Path(__file__).parent.resolve()
TIMES = ("seconds", "images", "share", "mfu")  # these say how fast, not what


def loader(_, tokenizer, *, batch_size, seed, start_step=0, **kwargs):
  del kwargs
  return tiny.batches(tokenizer, batch_size, seed=seed, start=start_step)


def main(out: Path) -> None:
  jax.config.update("jax_disable_most_optimizations", True)  # as the tests run
  data_pipeline.make_loader = loader
  changes = json.loads((HERE / "config.json").read_text())
  with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)  # the record's name of the base is 'base', no path of this machine
    tiny.tiny_base("base")
    config = tiny.tiny_config("base", **{k.replace(".", "__"): v for k, v in changes.items()})
    train.train(config, "run")
    with tarfile.open(out / "checkpoint.tar.xz", "w:xz") as tar:
      tar.add("run/checkpoints/3", "checkpoints/3")
    (out / "adapter.safetensors").write_bytes(Path("run/adapter.safetensors").read_bytes())
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
  main(Path(sys.argv[1] if len(sys.argv) > 1 else HERE).resolve())

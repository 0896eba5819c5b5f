"""The laboratory: trains and scores every variant of the method, and draws tables and figures.

    python -m cc_jax.lab --suite=ablation            # all arms of configs/lab.py, then the report
    python -m cc_jax.lab --suite=ablation --arms=core,control   # some families, or single arms
    python -m cc_jax.lab --suite=ablation --fast     # toy base, two steps, every table and figure
    python -m cc_jax.lab --suite=sweep               # only the arms swept over the adapter's scale
    python -m cc_jax.lab --suite=report              # tables and figures from the result files
    python -m cc_jax.lab --suite=pack                # short result files, to be committed
    python -m cc_jax.lab --suite=pictures --checkpoint=runs/lab/method-0 \\
        --against=runs/lab/self_reconstruction-0     # the paper's pictures

Each run ends in one JSON file under results/lab, which is committed. The suite skips runs whose
file exists, on any machine, and a run that was killed goes on from its checkpoint.
"""

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from cc_jax import cli
from cc_jax.errors import UserError
from cc_jax.lab.arms import chosen_arms, fast_arms
from cc_jax.lab.config_checks import check_lab_config
from cc_jax.lab.pictures import pictures
from cc_jax.lab.report import report
from cc_jax.lab.results import pack
from cc_jax.lab.runs import run_suite
from cc_jax.lab.toy import toy_base
from cc_jax.parallel.distributed import set_cpu_devices
from cc_jax.training.setup import use_compilation_cache
from configs import lab as lab_config
from data_pipeline.subjects3d.factors import SPLITS


def define_flags() -> None:
  """The command's flags."""
  config_flags.DEFINE_config_file("config", "configs/lab.py")
  flags.DEFINE_enum("suite", "ablation", ["ablation", "sweep", "report", "pack", "pictures"],
                    "What is done.")
  flags.DEFINE_bool("fast", False, "A toy base, two steps, one arm per family: does it all run?")
  flags.DEFINE_list("arms", [], "Arms or families of configs/lab.py's ARMS; all by default.")
  flags.DEFINE_integer("candidates", 0, "Values tried of an arm that is tuned; 0 = all.")
  flags.DEFINE_integer("budget", None, "Training steps of every run; config.run.train.steps.")
  flags.DEFINE_string("split", None, "validation (default) or test: once, at the end.")
  flags.DEFINE_string("workdir", None, "Checkpoints and adapters of the runs; runs/lab by default.")
  flags.DEFINE_string("results", None, "Folder of results; results/lab/<setting> by default.")
  flags.DEFINE_string("figures", None, "Folder of tables and figures; docs/lab by default.")
  flags.DEFINE_string("checkpoint", None, "pictures: an adapter file or a run's folder.")
  flags.DEFINE_string("against", None, "pictures: another, beside it where two are shown.")


def main(argv: Sequence[str]) -> None:
  """The command line."""
  del argv
  f = flags.FLAGS
  config = f.config
  check_lab_config(config)
  subfolder = "" if config.setting == "cut_outs" else config.setting
  workdir = Path(f.workdir or Path("runs/lab", subfolder))
  results = workdir / "results" if f.fast else Path("results/lab", config.setting)
  results = Path(f.results or results)
  figures = Path(f.figures or (workdir / "figures" if f.fast else Path("docs/lab", subfolder)))
  if f.suite == "pack":
    pack(results)
    return
  if f.fast:
    lab_config.fast(config)
    # Compiling is what takes the time: it does little, and no run repeats what another did.
    if version("jaxlib").startswith("0.10."):  # XLA's older emitters compile in 2/5 of the time
      old_emitters = "--xla_cpu_use_fusion_emitters=false"
      os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {old_emitters}".strip()
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  if f.budget is not None:
    config.run.train.steps = f.budget
  config.score.split = f.split or config.score.split
  if config.score.split not in SPLITS:
    raise UserError(f"--split={config.score.split} is unknown; use one of {', '.join(SPLITS)}")
  if f.suite == "report":
    report(results, figures, split=config.score.split, setting=config.setting)
    return
  check_lab_config(config)  # again: flags have changed it
  set_cpu_devices(config.run.mesh, config.run.train.batch_size)
  use_compilation_cache(epath.Path(workdir))
  workdir.mkdir(parents=True, exist_ok=True)
  if f.fast:
    config.run.base = str(toy_base(workdir / "toy_base"))
  checkpoint, against = f.checkpoint, f.against
  if f.suite != "pictures":
    names = chosen_arms(f.arms) or list(
      config.score.sweep_arms if f.suite == "sweep" else
      fast_arms() if f.fast else lab_config.ARMS)
    run_suite(config, names, workdir=workdir, results=results,
              candidates=1 if f.fast else f.candidates)
    report(results, figures, split=config.score.split, setting=config.setting)
    if not (f.fast and f.suite == "ablation"):
      return
  if f.fast and checkpoint is None:
    checkpoint, against = workdir / "method-0", workdir / "self_reconstruction-0"
  if checkpoint is None:
    raise UserError("--suite=pictures needs --checkpoint, a run's folder: runs/lab/method-0")
  pictures(config, checkpoint, against, figures)


if __name__ == "__main__":
  cli.run(main, define_flags)

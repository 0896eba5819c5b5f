"""The parameter table of a config, without weights: `--abstract`."""

import jax
import ml_collections

from cc_jax.customcontrast.param_groups import group_by_module
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.parallel.sharding_report import align_table
from cc_jax.training.setup import build_abstract
from cc_jax.training.step import init_state


def parameter_table(config: ml_collections.ConfigDict) -> str:
  """Tensors, parameters and MiB of each network and of the training state; see `build_abstract`."""
  config, base, (_, trainable, frozen) = build_abstract(config)
  NoiseSchedule.from_config(base.scheduler_config)
  state = jax.eval_shape(lambda t: init_state(t, config), trainable)
  rows = [("part", "", "tensors", "parameters", "MiB")]
  for kind, params in (("trained", trainable), ("frozen", frozen)):
    for module, names in group_by_module(params).items():
      rows.append((module, kind, *_sizes(params[name] for name in names)))
    rows.append(("all", kind, *_sizes(params.values())))
  rows.append(("optimizer", "state", *_sizes(jax.tree.leaves(state.opt_state))))
  rows.append(("EMA", "state", *_sizes(jax.tree.leaves(state.ema))))
  return align_table(rows, left=2)


def _sizes(arrays) -> tuple[str, str, str]:
  arrays = list(arrays)
  mebibytes = sum(x.size * x.dtype.itemsize for x in arrays) / 2**20
  return str(len(arrays)), f"{sum(x.size for x in arrays):,}", f"{mebibytes:,.1f}"

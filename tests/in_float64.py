"""Importing this first makes the whole program compute in float64, and SGD out of the optimizer.

For processes that compare meshes or process counts: only differences that are not rounding remain.
Small arrays are sharded like large ones.
"""

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402

jnp.float32 = jnp.float64  # the precision of losses, norms and defaults

import optax  # noqa: E402

from cc_jax.parallel import rules, sharding_report  # noqa: E402
from cc_jax.training import config_checks, optimizer  # noqa: E402

optimizer.make_optimizer = lambda settings: optax.trace(decay=0.0)  # its state is the gradient
rules.RULES = tuple(rule._replace(min_size=2) for rule in rules.RULES)
sharding_report.MAX_REPLICATED_RATIO = 1.0  # the tiny networks' sizes are odd on purpose
config_checks.RULES |= dict.fromkeys(("train.dtype", "train.base_dtype"), config_checks.text)

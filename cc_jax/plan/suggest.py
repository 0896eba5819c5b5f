"""The fastest way to train that fits: which rematerialisation, which attention, how many images.

A compile takes minutes, so few are tried. More images a chip are mostly faster, and working again
never is, unless it makes room: at each batch the policies are tried from the one that computes
least again, until one fits, and a larger batch begins at that policy.
"""

import math
import shlex
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_collections

from cc_jax.errors import UserError
from cc_jax.parallel.sharding_report import align_table
from cc_jax.plan.estimate import Overflow, make_plan
from cc_jax.plan.lower import make_program
from cc_jax.plan.topology import Slice

WORTH = 1.02  # a larger batch must be so many times as fast
FAR = 1.6  # what needs so many times the memory does not fit with the next policy either


class Policy(NamedTuple):
  """Values of train.remat_unet and train.remat_text."""

  unet: tuple[str, ...]
  text: str


def policies(blocks: int) -> tuple[Policy, ...]:
  """From none to all; the second concerns the UNet's outermost blocks, whose pictures are largest.

  Args:
    blocks: of the UNet: down, mid, up.
  """
  outermost = ("dots", *["none"] * (blocks - 2), "dots")
  return (
    Policy(("none",), "none"), Policy(outermost, "none"), Policy(("dots",), "dots"),
    Policy(("full",), "full"),
  )  # fmt: skip


class Choice(NamedTuple):
  """What may be chosen; `attention` '' leaves the config's."""

  images: int  # a chip
  policy: Policy
  attention: str = ""

  def overrides(self, chips: int) -> dict[str, object]:
    """Config keys and their values on a slice of so many chips."""
    values = {
      "train.batch_size": self.images * chips,
      "train.remat_unet": self.policy.unet,
      "train.remat_text": self.policy.text,
    }
    return values | ({"train.attention": self.attention} if self.attention else {})

  def apply(self, config: ml_collections.ConfigDict, chips: int) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(self.overrides(chips))
    return config


class Trial(NamedTuple):
  """What a compile said."""

  rate: float = 0.0  # images per second and chip; 0 = does not fit, or cannot be
  needed: float = 0.0  # of the memory of a chip
  reason: str = ""  # why it cannot be


Trials = dict[Choice, Trial]


def search(
  evaluate: Callable[[Choice], Trial], images: int, ladder: Sequence[Policy],
  attentions: Sequence[str] = ("",), compiles: int = 12,
) -> Trials:
  """The trials in order; `fastest` has the result.

  Args:
    evaluate: compiles.
    images: a chip; the first batch that is tried.
    ladder: from the policy that computes least again to the one that needs least memory.
    attentions: values of train.attention, the one that should be the fastest first.
    compiles: at most so many.
  """
  trials: Trials = {}

  def ask(choice: Choice) -> Trial:
    for other, trial in trials.items():  # fewer images did not fit
      if not trial.rate and other == choice._replace(images=min(other.images, choice.images)):
        return trial
    if choice not in trials and len(trials) < compiles:
      trials[choice] = evaluate(choice)
    return trials.get(choice, Trial())

  def climb(images: int, level: int, attention: str, end: int = len(ladder)) -> int | None:
    """The first policy from `level` to before `end` with which so many images fit."""
    while level < end:
      trial = ask(Choice(images, ladder[level], attention))
      if trial.rate:
        return level
      if trial.reason:
        return None
      far = 1 + (trial.needed > FAR) + 2 * (trial.needed > FAR**2)
      level = max(level + 1, min(level + far, end - 1))
    return None

  while images:
    level = climb(images, 0, attentions[0])
    for other in attentions[1:] if level is not None else ():
      ask(Choice(images, ladder[level], other))
    if fastest(trials) or trials and all(trial.reason for trial in trials.values()):
      break
    needed = min((t.needed for c, t in trials.items() if c.images == images), default=2.0)
    images //= 2 ** max(1, math.floor(math.log2(needed))) if needed > 0 else 2
  best = fastest(trials)
  while best and len(trials) < compiles:  # twice as many, as long as it pays
    before, level = trials[best].rate, ladder.index(best.policy)
    climb(2 * best.images, level, best.attention)
    best = fastest(trials)
    if trials[best].rate < WORTH * before or best.images == images:
      break
    images = best.images
  if best and best.images > 1:  # between what paid and what did not
    climb(best.images * 3 // 2, ladder.index(best.policy), best.attention)
  best, before = fastest(trials), None
  while best != before and best.images > 1 and not any(
    trial.rate and best.images // 2 <= choice.images < best.images
    for choice, trial in trials.items()
  ):  # the first batch was large: half of it, with less that is computed again
    climb(best.images // 2, 0, best.attention, end=ladder.index(best.policy))
    best, before = fastest(trials), best
  return trials


def evaluate_by(
  config: ml_collections.ConfigDict, slice_: Slice, say: Callable[[str], None]
) -> Callable[[Choice], Trial]:
  """Compiles the training step of a choice for the slice; `say` gets a line before and after."""
  chips = len(slice_.devices)

  def evaluate(choice: Choice) -> Trial:
    say("compiling " + " ".join(f"{k}={v}" for k, v in choice.overrides(chips).items()) + " ...")
    began = time.perf_counter()
    try:
      plan = make_plan(make_program(choice.apply(config, chips), slice_, "train", 0), slice_)
    except UserError as error:
      say(f"  {error}")
      return Trial(reason="cannot be")
    if isinstance(plan, Overflow):
      trial = Trial(needed=plan.needed / plan.limit)
    else:
      rate = plan.numbers()["images_per_second_per_chip"] if plan.fits else 0.0
      trial = Trial(rate, plan.memory.total / plan.chip.memory)
    result = f"{trial.rate:.4g} images/s a chip" if trial.rate else "does not fit"
    say(f"  {result}; {time.perf_counter() - began:.0f} s")
    return trial

  return evaluate


def fastest(trials: Trials) -> Choice | None:
  """None if nothing fits."""
  choice = max(trials, key=lambda c: trials[c].rate, default=None)
  return choice if choice and trials[choice].rate else None


def describe_trial(choice: Choice, trial: Trial) -> tuple[str, ...]:
  """A row of the table."""
  rate = f"{trial.rate:.4g}" if trial.rate else trial.reason or "does not fit"
  memory = f"{trial.needed:.0%}" if trial.needed == trial.needed and trial.needed else ""
  words = (",".join(choice.policy.unet), choice.policy.text, choice.attention)
  return (str(choice.images), *words, memory, rate)


def describe_trials(trials: Trials) -> str:
  """A table of what was tried, the fastest first."""
  head = ("images a chip", "remat_unet", "remat_text", "attention", "memory", "images/s a chip")
  rows = sorted(trials.items(), key=lambda item: -item[1].rate)
  return align_table([head, *(describe_trial(*row) for row in rows)], left=0)


def to_json(trials: Trials, chips: int) -> list[dict[str, object]]:
  """The trials in order, for --json; `memory` is the part of a chip's that is needed."""
  return [
    {**choice.overrides(chips), "images_per_second_per_chip": trial.rate,
     "memory": trial.needed if math.isfinite(trial.needed) else None, "fits": trial.rate > 0}
    for choice, trial in trials.items()
  ]  # fmt: skip


def command(choice: Choice, chips: int, typed: Sequence[str], default: str) -> str:
  """The command that trains so, with the `--config` flags that were typed, or the default config.

  Args:
    typed: flags, each as --name=value.
  """
  values = {f"--config.{key}": value for key, value in choice.overrides(chips).items()}
  kept = [word for word in typed
          if word.startswith("--config") and word.split("=")[0] not in values]  # fmt: skip
  if not any(word.startswith("--config=") for word in kept):
    kept = [f"--config={default}", *kept]
  words = ["python", "-m", "cc_jax.train", *kept, *(f"{k}={v}" for k, v in values.items())]
  return shlex.join([*words, "--workdir=WORKDIR"])

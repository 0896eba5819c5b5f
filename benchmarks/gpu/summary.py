"""The lines of results as tables: DIR/<device>.md, as far as they go."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import read


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
  arguments = parser.parse_args()
  rows = read(os.environ["GPU_RESULTS"])
  rate = next((row for row in rows if "tflops" in row), {})
  device = rate.get("device", "unknown device")
  name = re.sub(r"\W+", "-", device.lower()).strip("-") + ("-tiny" if arguments.tiny else "")
  (arguments.out / f"{name}.md").write_text(text(rows, device, rate, tiny=arguments.tiny))


def text(rows: Sequence[dict[str, Any]], device: str, rate: dict, *, tiny: bool = False) -> str:
  flops = next((row["gflops_an_image"] for row in rows if "gflops_an_image" in row), None)
  parts = [f"# {device}", "`benchmarks/gpu.sh` wrote this, from gpu.jsonl beside it."]
  if tiny:
    parts.append("**With --tiny: a try of the script. These numbers say nothing.**")
  if rate:
    parts.append(f"Measured bf16 product rate ({rate['side']} x {rate['side']}, JAX "
                 f"{rate['jax']}): {rate['tflops']:.1f} TFLOP/s.")
  parts.append("## Training: SD 1.5 adapter, 512 px, bf16, random weights")
  parts.append(training(rows, flops, rate))
  if flops:
    parts.append(f"Model FLOPs of our step: {flops:.1f} GFLOP an image, forward and backward, "
                 "nothing recomputed. Share: of the measured rate.")
  for base, title in (("sd15", "SD 1.5, 512 px"), ("sdxl", "SDXL, 1024 px")):
    parts += [f"## Sampling: {title}, bf16, guidance", sampling(rows, f"sample-{base}")]
  parts += ["## Where a step's time goes", *profiles(rows)]
  checks = [row for row in rows if row["part"] == "correct" and "what" in row]
  bad = [row for row in checks if row.get("ok") is False]
  parts.append("## Correctness")
  parts.append(f"{sum(row.get('ok') is True for row in checks)} checks hold, {len(bad)} do not.")
  parts.append(table(("check", "relative error", "limit", ""), [
    (row["what"], number(row.get("error"), ".1e"), number(row.get("limit"), ".0e"),
     {True: "holds", False: "**fails** " + row.get("failed", "")}.get(
       row.get("ok"), row.get("skipped", "")))
    for row in checks]))
  parts.append("## Not measured")
  parts.append("\n".join(
    f"- {row['part']}: {word} {row[word]}" for row in rows
    for word in ("skipped", "ended", "failed") if word in row and row not in checks) or "Nothing.")
  return "\n\n".join(parts) + "\n"


def training(rows, flops: float | None, rate: dict) -> str:
  lines = []
  for row in rows:
    if row["part"] == "train" and "who" in row:
      share = None
      if flops and rate and row["who"] == "cc_jax" and "images_a_second" in row:
        share = 100 * row["images_a_second"] * flops * 1e9 / (rate["tflops"] * 1e12)
      speed = "does not fit" if row.get("does_not_fit") else number(row["images_a_second"], ".1f")
      lines.append((row["who"], row["batch"], speed, number(row.get("peak_gib"), ".1f"),
                    number(share, ".1f", " %")))
  return table(("", "batch", "images/s", "peak GiB", "share of the product rate"), lines)


def sampling(rows, part: str) -> str:
  return table(("", "pictures", "steps", "s a picture", "peak GiB", "first call, s"), [
    (row["who"], row["batch"], row.get("steps", ""),
     "does not fit" if row.get("does_not_fit") else number(row["seconds_an_image"], ".3f"),
     number(row.get("peak_gib"), ".1f"), number(row.get("first_seconds"), ".1f"))
    for row in rows if row["part"] == part and "who" in row])


def profiles(rows) -> list[str]:
  found = []
  for row in rows:
    if "kinds" in row:
      found.append(f"{row['profile']}, {row['device_seconds']:.3f} s of the device in the trace:")
      for title, key in (("kind of kernel", "kinds"), ("kernel", "kernels")):
        found.append(table((title, "share"), [
          (f"`{name[:90]}`", number(100 * share, ".1f", " %"))
          for name, share in row[key].items()]))
  return found or ["No profile."]


def table(head: Sequence[str], lines: Sequence[Sequence]) -> str:
  if not lines:
    return "Nothing measured."
  rows = [head, ["---"] * len(head), *lines]
  return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def number(value: float | None, form: str, unit: str = "") -> str:
  return "" if value is None else f"{value:{form}}{unit}"


if __name__ == "__main__":
  main()

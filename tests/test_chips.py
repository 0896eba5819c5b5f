"""The table of chips against their data sheets, typed a second time, and against arithmetic."""

import dataclasses

import pytest

from cc_jax.plan import chips

# name: bf16 TFLOP/s and, if that is with sparsity, 2; GB of memory; GB/s of memory; GB/s of links,
# both directions together. TPUs: GiB, and v7x for the whole chip, which is two devices.
SHEETS = {
  "v4": (275, 1, 32, 1200, 600),
  "v5e": (197, 1, 16, 819, 400),
  "v5p": (459, 1, 95, 2765, 1200),
  "v6e": (918, 1, 32, 1638, 800),
  "v7x": (2307, 1, 192, 7380, 1200),
  "a100-40": (624, 2, 40, 1555, 600),
  "a100-80": (624, 2, 80, 2039, 600),
  "a100-80-pcie": (624, 2, 80, 1935, 600),
  "l4": (242, 2, 24, 300, 64),
  "l40s": (733, 2, 48, 864, 64),
  "rtx4090": (330.4, 2, 24, 1008, 64),
  "rtx5090": (419, 2, 32, 1792, 128),
  "h100": (1979, 2, 80, 3350, 900),
  "h100-pcie": (1513, 2, 80, 2000, 600),
  "h100-nvl": (1671, 2, 94, 3900, 600),
  "h200": (1979, 2, 141, 4800, 900),
  "h200-nvl": (1671, 2, 141, 4800, 900),
  "b200": (4500, 2, 180, 8000, 1800),
}
# Multiprocessors, multiplications with additions a cycle and multiprocessor in bf16 with sums in
# float32, GHz: the boost clock, for H100 that of its tensor cores.
UNITS = {
  "a100-40": (108, 1024, 1.41), "a100-80": (108, 1024, 1.41), "a100-80-pcie": (108, 1024, 1.41),
  "l4": (58, 512, 2.04), "l40s": (142, 512, 2.52), "rtx4090": (128, 256, 2.52),
  "rtx5090": (170, 256, 2.407), "h100": (132, 2048, 1.83), "h200": (132, 2048, 1.83),
  "h100-pcie": (114, 2048, 1.62), "b200": (148, 4096, 1.835),
}  # fmt: skip


@pytest.mark.parametrize("chip", chips.CHIPS, ids=lambda chip: chip.name)
def test_data_sheets(chip):
  flops, sparse, memory, bandwidth, links = SHEETS[chip.name]
  devices = 2 if chip.name == "v7x" else 1
  unit = 2**30 if chip.kinds[0].startswith("TPU") else 1e9
  assert chip.flops == pytest.approx(flops / sparse / devices * 1e12, rel=0.015)
  assert chip.memory == memory / devices * unit
  assert chip.bandwidth == bandwidth / devices * 1e9
  assert chip.interconnect == links / devices / 2 * 1e9  # one direction
  assert chip.source.startswith("https://")
  if chip.name in UNITS:
    count, products, clock = UNITS[chip.name]
    assert chip.flops == pytest.approx(2 * count * products * clock * 1e9, rel=0.02)
  if chip.clock:  # 131,072 operations a cycle and set of matrix units
    sets = chip.flops / chip.clock / 131_072
    assert sets == pytest.approx(round(sets), rel=0.01)


def test_the_table_is_whole_and_names_are_found_once():
  assert SHEETS.keys() == {chip.name for chip in chips.CHIPS}
  kinds = [kind for chip in chips.CHIPS for kind in (chip.name, *chip.kinds)]
  assert len(kinds) == len(set(kinds)) and all(chips.find(k) for k in kinds)
  assert chips.find("NVIDIA H200").name == "h200" and chips.find("TPU7x").name == "v7x"
  assert chips.find("cpu") is None
  with pytest.raises(dataclasses.FrozenInstanceError):
    chips.CHIPS[0].flops = 0

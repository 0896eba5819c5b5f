"""Triples per processor second at 512 px from 12-megapixel and 1080p JPEGs with PNG masks.

    JAX_PLATFORMS=cpu python benchmarks/photographs.py [--against=CHECKOUT]
    JAX_PLATFORMS=cpu python benchmarks/photographs.py --simulated=1000000

One process for each of: `data.decoder='tensorflow'`; `'pillow'`; torch's DataLoader with Pillow in
one worker process, doing the same work on the same files (decode three pictures and masks, find the
subject, compose two on white, place and resize three); and, with --against, the source 'folder' of
another checkout of this project. They take turns, and processor time is that of the process and its
children, so that other programs on the machine disturb little. Start and warming up do not count.

--simulated: starts on a manifest of so many frames, ten a subject, which share a few real files.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {"12 MP": (3024, 4032), "1080p": (1080, 1920)}
ROUNDS = int(os.environ.get("ROUNDS", 3))


class Words:
  """A tokenizer of which every word is a token."""

  model_max_length, pad_token_id = 16, 0

  def __call__(self, text, verbose=False):
    return {"input_ids": [1, *(3 + len(word) for word in text.split()), 2]}

  def decode(self, ids):
    return "mug" if list(ids) == [6] else ""


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
  """Shapes of all sizes and a camera's noise: as many bytes as photographs have."""
  pixels = rng.normal(128, 5, (height, width, 3)).astype(np.float32)
  for cells in (4, 16, 64, 256):
    coarse = rng.normal(0, 60 / cells**0.4, (cells, cells, 3)).astype(np.float32)
    for c in range(3):
      pixels[..., c] += np.asarray(Image.fromarray(coarse[..., c]).resize((width, height)))
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_folder(root: Path, height: int, width: int, subjects: int = 2) -> None:
  """Subjects of three pictures, in the layout of `data_pipeline.sources.folder`."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:height, :width]
  for n in range(subjects):
    place = root / f"{n}"
    place.mkdir(parents=True)
    for f in range(3):
      photograph(rng, height, width).save(place / f"{f}.jpg", quality=90)
      centre = rng.uniform(0.4, 0.6, 2) * (height, width)
      radius = rng.uniform(0.25, 0.35, 2) * min(height, width)
      inside = ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1
      Image.fromarray(inside.astype(np.uint8) * 255).save(place / f"{f}_mask.png")
    captions = {f"{f}.jpg": "a mug on a table" for f in range(3)}
    (place / "captions.json").write_text(json.dumps(dict(class_noun="mug", captions=captions)))


def ours(folder: str, decoder: str):
  """The batches of source 'folder', also of a checkout that does not know data.decoder."""
  import data_pipeline
  from configs.subjects3d import get_config

  data = get_config().data
  data.source, data.name, data.image_size = "folder", folder, 512
  if "decoder" in data:
    data.decoder = decoder
  return data_pipeline.make_loader(data, Words(), batch_size=4, seed=0)


class PillowTriples:
  """A torch Dataset of rows, as one writes it with Pillow."""

  def __init__(self, folder: str):
    self._places = sorted(Path(folder).iterdir())

  def __len__(self) -> int:
    return 1 << 30

  def __getitem__(self, index: int):
    rng = np.random.default_rng(index)
    place = self._places[index % len(self._places)]
    frames = [self._load(place, f) for f in rng.permutation(3)]
    positive = self._placed(*frames[0], rng.uniform(0.4, 0.9), rng.random(2))
    reference = self._placed(*frames[1], 0.8, np.full(2, 0.5))
    image, mask, (x0, y0, x1, y1) = frames[2]
    side = min(image.size)
    left, top = np.clip(
      ((x0 + x1 - side) / 2, (y0 + y1 - side) / 2), 0, np.array(image.size) - side)
    box = (left, top, left + side, top + side)
    target = image.resize((512, 512), Image.Resampling.BICUBIC, box)
    mask = mask.resize((512, 512), Image.Resampling.BILINEAR, box)
    return {name: np.array(value) for name, value in dict(
      positive=positive, reference=reference, target=target, target_mask=mask).items()}  # fmt: skip

  def _load(self, place: Path, f: int):
    image = Image.open(place / f"{f}.jpg").convert("RGB")
    mask = Image.open(place / f"{f}_mask.png").convert("L")
    return image, mask, mask.point([255 * (v >= 128) for v in range(256)]).getbbox()

  def _placed(self, image, mask, box, ratio, position):
    """The subject alone is composed: least work."""
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0) / ratio
    extent = ratio * np.array([x1 - x0, y1 - y0]) / max(x1 - x0, y1 - y0)
    x, y = extent / 2 + position * (1 - extent)
    left, top = (x0 + x1) / 2 - x * side, (y0 + y1) / 2 - y * side
    margin = int(np.ceil(2 * max(1, side / 512)))
    west, north = int(left) - margin - 1, int(top) - margin - 1
    sides = int(side) + 2 * margin + 3
    patch = Image.new("RGB", (sides, sides), "white")
    patch.paste(image.crop(box), (x0 - west, y0 - north), mask.crop(box))
    box = (left - west, top - north, left - west + side, top - north + side)
    return patch.resize((512, 512), Image.Resampling.BICUBIC, box)


def torch_batches(folder: str):
  import torch

  torch.set_num_threads(1)
  return iter(torch.utils.data.DataLoader(
    PillowTriples(folder), batch_size=4, num_workers=1, prefetch_factor=2))  # fmt: skip


def seconds_of_all() -> float:
  """Processor seconds of this process and of its children that still run."""
  ticks = 0
  for stat in Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = stat.read_text().rsplit(")", 1)[1].split()
    except OSError:
      continue
    if int(fields[1]) == os.getpid() or stat.parent.name == str(os.getpid()):
      ticks += int(fields[11]) + int(fields[12])
  return ticks / os.sysconf("SC_CLK_TCK")


def measure(kind: str, folder: str) -> None:
  """For each line that comes in, the processor seconds of a few batches."""
  if kind == "simulated":
    return start_on_manifest(folder)
  batches = torch_batches(folder) if kind == "torch" else ours(folder, kind)
  for _ in range(4):  # what is prefetched has to be full before and after
    next(batches)
  steps = 1 if kind == "folder" else 4
  for _ in sys.stdin:
    start = seconds_of_all()
    for _ in range(steps):
      next(batches)
    print((seconds_of_all() - start) / (4 * steps), flush=True)
  os._exit(0)


def compare(scratch: Path, against: str) -> None:
  here = Path(__file__).parent.parent
  print(f"{'pictures':<10}{'':<26}{'s a triple':>12}{'triples/s':>11}{'of torch':>10}")
  for name, (height, width) in SIZES.items():
    folder = scratch / name.replace(" ", "")
    write_folder(folder, height, width)
    kinds = {"tensorflow": here, "pillow": here, "torch": here}
    if against:
      kinds["folder"] = Path(against)
    seconds: dict[str, float] = {}
    for kind, root in kinds.items():  # one after the other: two would share two cores
      path = dict(os.environ, PYTHONPATH=str(root), TF_CPP_MIN_LOG_LEVEL="3")
      process = subprocess.Popen(
        [sys.executable, __file__, f"--measure={kind}", f"--folder={folder}"], env=path, cwd=root,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
      rounds = 1 if kind == "folder" else ROUNDS
      out, _ = process.communicate("\n" * rounds)
      seconds[kind] = min(map(float, out.split()))
    for kind, value in seconds.items():
      label = f"{kind} of {against}" if kind == "folder" else kind
      print(f"{name:<10}{label:<26}{value:>12.3f}{1 / value:>11.2f}"
            f"{seconds['torch'] / value:>9.2f}x", flush=True)  # fmt: skip


def simulate(count: int, scratch: Path) -> None:
  """Start and first batch of a manifest of `count` frames."""
  import pyarrow as pa

  import data_pipeline.manifest as manifests

  write_folder(scratch / "real", 300, 400, subjects=1)
  subjects = count // 10
  number = np.arange(count)
  full = lambda value, kind: pa.array(np.full(count, value, kind))  # noqa: E731
  columns = {field.name: full(0, field.type.to_pandas_dtype()) for field in manifests.FRAMES
             if field.type not in (pa.string(), pa.list_(pa.string()))}  # fmt: skip
  columns["picture"] = pa.array([f"0/./{n % 3}.jpg" for n in number])
  columns["mask"] = pa.array([f"0/./{n % 3}_mask.png" for n in number])
  columns["mask_kind"] = pa.array(["file"] * count)
  columns["captions"] = pa.array([[f"a mug on table {n}"] for n in number])
  columns["picture_length"] = columns["mask_length"] = full(-1, np.int64)
  columns["is_reference"] = pa.array(np.ones(count, bool))
  rows = {key: pa.array([value] * subjects) for key, value in
          dict(noun="mug", family="", licence="", creator="").items()}  # fmt: skip
  rows |= dict(name=pa.array([f"subject {n}" for n in range(subjects)]),
               first=pa.array(np.arange(subjects) * 10), count=pa.array(np.full(subjects, 10)))
  tables = [
    pa.table({field.name: values[field.name].cast(field.type) for field in schema}, schema=schema)
    for schema, values in ((manifests.SUBJECTS, rows), (manifests.FRAMES, columns))
  ]
  manifests.Manifest("simulated", "captures", str(scratch / "real"), *tables).write(scratch / "m")
  # In a process of its own: what wrote it shall not count.
  subprocess.run([sys.executable, __file__, "--measure=simulated", f"--folder={scratch / 'm'}"],
                 env=dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3"), check=True)  # fmt: skip


def start_on_manifest(folder: str) -> None:
  """Prints how long the first batch takes, and the memory."""
  from configs.subjects3d import get_config
  from data_pipeline.example import Maker
  from data_pipeline.manifest import Manifest
  from data_pipeline.manifest_frames import ManifestSubjects
  from data_pipeline.sources.rows import make_batches

  start, before = time.perf_counter(), time.process_time()
  data = get_config().data
  maker = Maker(data, [Words()], batch_size=32, seed=0, s_words=2)
  loaded = ManifestSubjects(Manifest.read(folder))
  next(make_batches(maker, loaded, start_step=0, rows=range(32)))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  seconds = round(time.perf_counter() - start, 1), round(time.process_time() - before, 1)
  print(json.dumps(dict(
    frames=loaded.pictures, subjects=len(loaded.names), first_batch_s=seconds[0],
    processor_s=seconds[1], peak_rss_gb=round(peak, 2))), flush=True)
  os._exit(0)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--against", default="", help="another checkout, such as of commit 0d5bef4")
  parser.add_argument("--simulated", type=int, default=0, help="frames of a simulated manifest")
  parser.add_argument("--scratch", default="", help="folder for the pictures; '' = a temporary one")
  parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
  parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    return measure(args.measure, args.folder)
  with tempfile.TemporaryDirectory() as temporary:
    scratch = Path(args.scratch or temporary)
    simulate(args.simulated, scratch) if args.simulated else compare(scratch, args.against)


if __name__ == "__main__":
  main()

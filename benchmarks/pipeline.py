"""Triples per second of each source, beside a bare tf.data pipeline that only decodes.

    JAX_PLATFORMS=cpu python benchmarks/pipeline.py

The baseline does the least that any pipeline must: it decodes three PNGs of 64 x 64 a triple (ours
decodes three more for the masks, cuts out, places, resizes twice and tokenises). All are measured
in one run, one after the other; the best of three rounds counts, since other programs only slow a
round down.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import data_pipeline
from cc_jax.bases.tokenizer import train_tokenizer
from configs.subjects3d import get_config
from data_pipeline.cores import available_cores
from data_pipeline.sources.tf_data import import_tensorflow
from data_pipeline.subjects3d import captions, multi_view

ROUNDS = 3


def rate(iterator, steps: int, batch_size: int) -> float:
  """Rows per second, after two batches of warming up."""
  next(iterator), next(iterator)
  seconds = []
  for _ in range(ROUNDS):
    start = time.perf_counter()
    for _ in range(steps):
      next(iterator)
    seconds.append(time.perf_counter() - start)
  return steps * batch_size / min(seconds)


def bare_decoding(subjects: multi_view.MultiView, batch_size: int):
  """tf.data: three encoded frames -> uint8 [3, h, w, 3], in parallel, batched, prefetched."""
  tf = import_tensorflow()
  encoded = [encode(frame) for frame in subjects.frames.reshape(-1, *subjects.frames.shape[2:])]
  encoded = np.array(encoded[: len(encoded) // 3 * 3], object).reshape(-1, 3)
  data = tf.data.Dataset.from_tensor_slices(encoded.astype("S")).repeat()
  decode = lambda row: tf.stack([tf.io.decode_png(row[n], 3) for n in range(3)])  # noqa: E731
  data = data.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
  return data.batch(batch_size).prefetch(2).as_numpy_iterator()


def encode(image: np.ndarray) -> bytes:
  out = io.BytesIO()
  Image.fromarray(image).save(out, "png")
  return out.getvalue()


def write_folder(folder: Path, subjects: multi_view.MultiView) -> None:
  """The subjects as PNGs with alpha in the layout of `data_pipeline.sources.folder`."""
  for n, noun in enumerate(subjects.class_noun):
    place = folder / f"{n:04d}"
    place.mkdir()
    for f, (image, mask) in enumerate(zip(subjects.frames[n], subjects.masks[n])):
      Image.fromarray(np.dstack([image, mask])).save(place / f"{f}.png")
    texts = {f"{f}.png": text for f, text in enumerate(subjects.captions[n])}
    (place / "captions.json").write_text(json.dumps({"class_noun": noun, "captions": texts}))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--steps", type=int, default=30, help="batches a round")
  parser.add_argument("--data_dir", default="", help="of TFDS; written to on first use")
  args = parser.parse_args()
  data = get_config().data
  data.data_dir = args.data_dir
  with tempfile.TemporaryDirectory() as scratch:
    scratch = Path(scratch)
    texts = captions.corpus(5000, np.random.default_rng(0))
    tokenizer = train_tokenizer(texts, scratch / "tokenizer", vocab_size=1280, max_length=32)
    subjects = data_pipeline.load_subjects(data.name, "validation", data.data_dir)
    (scratch / "folder").mkdir()
    write_folder(scratch / "folder", subjects)
    rates = {"bare tf.data, 3 PNGs": rate(
        bare_decoding(subjects, args.batch_size), args.steps, args.batch_size)}  # fmt: skip
    for source, name in (("tfds", data.name), ("folder", str(scratch / "folder")), ("render", "")):
      data.source, data.name = source, name
      loader = data_pipeline.make_loader(data, tokenizer, batch_size=args.batch_size, seed=0)
      # The renderer is a hundred times slower than decoding.
      steps = max(1, args.steps // 6) if source == "render" else args.steps
      rates[source] = rate(loader, steps, args.batch_size)
      loader.close()
  base = next(iter(rates.values()))
  print(f"{available_cores()} cores, batch {args.batch_size}, 64 x 64, best of {ROUNDS}")
  print(f"{'source':<22}{'triples/s':>10}{'of the baseline':>17}")
  for source, value in rates.items():
    print(f"{source:<22}{value:>10.0f}{value / base:>16.0%}")


if __name__ == "__main__":
  main()

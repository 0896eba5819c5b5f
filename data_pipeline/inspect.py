"""What a training would see of a data set: its layout, counts, what is left out, a contact sheet.

    python -m data_pipeline.inspect PATH [--layout=auto] [--split=train] [--sheet=sheet.png]

--manifest=FOLDER writes the list of all frames, which data_pipeline.prepare and
data.source='captures' read in place of the data set. The pictures of the sheet are read as training
reads them. --check=200 decodes so many pictures, evenly spaced, and counts the bad ones among them.
"""

import argparse
import collections
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline import readers, sampling, triples
from data_pipeline.errors import DataError
from data_pipeline.layouts import CHOICES

_ROWS, _CELL, _TEXT, _LINE = 8, 128, 190, 14
_COLUMNS = ("positive", "reference", "target", "target with its mask")
_PALE = 0.75  # how much of white lies on what is not the subject


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m data_pipeline.inspect", description=__doc__, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("path", help="the data set's folder, local or in a bucket")
  parser.add_argument("--layout", default="auto", choices=CHOICES)
  parser.add_argument("--split", default="train", help="Open Images has several")
  parser.add_argument("--sheet", default="sheet.png", help="where the contact sheet is written; '' "
                      "= nowhere")
  parser.add_argument("--manifest", default="", help="a folder to write the manifest into")
  parser.add_argument("--check", type=int, default=50, help="how many pictures to decode")
  parser.add_argument("--names", type=int, default=3, help="how many names for each reason")
  args = parser.parse_args(argv)
  try:
    _check(args)
    # Whatever is bad is shown; how much of it a training bears, its data.max_bad_share says.
    captures = readers.read(args.path, args.layout, split=args.split, max_bad_share=0.999999)
    for line in report(captures, args.names):
      print(line)
    for line in check_pictures(captures, args.check, args.names):
      print(line)
    if args.manifest:
      write_manifest(captures, args.manifest)
      print(f"{args.manifest}: the manifest")
    if args.sheet:
      contact_sheet(captures).save(args.sheet)
      print(f"{args.sheet}: a triple of each of some subjects; look at it")
  except DataError as error:
    sys.exit(f"error: {error}")
  except OSError as error:
    sys.exit(f"error: {error.filename or args.sheet} cannot be written "
             f"({error.strerror or error})")


def _check(args: argparse.Namespace) -> None:
  """Raises DataError for what would fail when the work is done."""
  if args.check < 0:
    raise DataError(f"--check={args.check} must be 0 or more")
  ending = Path(args.sheet).suffix.lower()
  if args.sheet and Image.registered_extensions().get(ending) not in Image.SAVE:
    raise DataError(f"--sheet={args.sheet} names no kind of picture; let it end in .png")


def write_manifest(captures: readers.Captures, folder: str) -> None:
  """Raises DataError where there is none: of the layout 'folder', and of pictures in Parquet files.
  """
  if not hasattr(captures.subjects, "manifest"):
    raise DataError(f"data sets of the layout {captures.layout!r} have no manifest; leave out "
                    "--manifest")
  captures.subjects.manifest.write(folder)


def report(captures: readers.Captures, names: int = 3) -> Iterator[str]:
  """Lines of text: the layout, counts, notes, and what is left out."""
  subjects = captures.subjects
  yield f"{subjects.where}: layout {captures.layout!r}"
  nouns = len(set(subjects.table.class_id.tolist()))
  yield f"subjects: {len(subjects.names):,} of {nouns:,} class nouns"
  manifest = getattr(subjects, "manifest", None)
  if manifest is None:
    yield f"frames: {subjects.pictures:,}"
  else:
    yield from _frames(manifest)
  for note in captures.notes:
    yield f"note: {note}"
  yield f"left out: {len(captures.left_out):,}"
  groups: dict[str, list] = {}
  for item in captures.left_out:
    groups.setdefault(_kind(item.reason), []).append(item)
  for items in sorted(groups.values(), key=len, reverse=True):
    yield f"  {len(items):,} such as {items[0].name}: {items[0].reason}"
    if len(items) > 1 and names > 1:
      yield f"    also {', '.join(item.name for item in items[1:names])}"


def _frames(manifest) -> Iterator[str]:
  frames = manifest.frames
  counts = manifest.subjects["count"].to_numpy()
  yield (f"frames: {frames.num_rows:,}, {counts.min()} to {counts.max()} a subject (median "
         f"{int(np.median(counts))})")
  kinds = collections.Counter(frames["mask_kind"].to_pylist())
  words = {"file": "of their own", "alpha": "in alpha", "none": "missing"}
  yield "masks: " + ", ".join(f"{count:,} {words[kind]}" for kind, count in sorted(kinds.items()))
  captions = [caption for texts in frames["captions"].to_pylist() for caption in texts]
  lengths = [len(caption.split()) for caption in captions] or [0]
  yield (f"captions: {len(captions):,}, {len(set(captions)):,} of them different, {min(lengths)} "
         f"to {max(lengths)} words")
  widths, heights = frames["width"].to_numpy(), frames["height"].to_numpy()
  sizes = collections.Counter(zip(widths.tolist(), heights.tolist())).most_common(5)
  known = ", ".join(f"{w} x {h} ({n:,})" for (w, h), n in sizes if w)
  if known:
    yield f"sizes as annotated, the most frequent: {known}"
  licences = collections.Counter(manifest.subjects["licence"].to_pylist())
  yield "licences: " + ", ".join(f"{name or 'not said'} ({n:,})" for name, n in licences.items())


def _kind(reason: str) -> str:
  """Reasons that differ in names and numbers are one kind."""
  named = lambda word: any(c.isdigit() or c in "/_" for c in word)  # noqa: E731
  return " ".join(word for word in reason.split() if not named(word))


def check_pictures(captures: readers.Captures, count: int, names: int = 3) -> Iterator[str]:
  """Decodes `count` frames, evenly spaced over subjects, and says what is wrong with some."""
  subjects, sizes, areas, bad = captures.subjects, collections.Counter(), [], []
  chosen = np.unique(np.linspace(0, len(subjects.names) - 1, min(count, len(subjects.names))))
  if not count:
    return
  for number in chosen.round().astype(int):
    try:
      subject = subjects[int(number)]
      picture, mask = subject.frame(int(number) % len(subject.is_reference()))
    except DataError as error:
      bad.append(str(error))
      continue
    sizes[f"{picture.shape[1]} x {picture.shape[0]}"] += 1
    areas.append(np.mean(mask >= triples.OPAQUE))
  yield f"decoded: {len(chosen)}, of which {len(bad)} are bad"
  for error in bad[:names]:
    yield f"  {error}"
  if areas:
    common = ", ".join(f"{size} ({n})" for size, n in sizes.most_common(5))
    yield f"sizes: {common}"
    low, middle, high = np.quantile(areas, (0, 0.5, 1))
    yield f"the subject covers {low:.0%} to {high:.0%} of a picture (median {middle:.0%})"


def contact_sheet(captures: readers.Captures, seed: int = 0) -> Image.Image:
  """Triples of up to eight subjects, as training would draw them, with the target's caption.

  Raises DataError where no subject's pictures can be read.
  """
  subjects, config = captures.subjects, triples.TripleConfig(image_size=_CELL - 4)
  order = np.random.default_rng(seed).permutation(len(subjects.names))
  drawn, last = [], None
  for number in order[: 4 * _ROWS]:
    try:
      drawn.append((int(number), _triple(subjects[int(number)], int(number), seed, config)))
    except DataError as error:
      last = error
    if len(drawn) == _ROWS:
      break
  if not drawn:
    raise last
  width = _TEXT + len(_COLUMNS) * _CELL
  sheet = Image.new("RGB", (width, 20 + len(drawn) * _CELL), (220, 220, 220))
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
  for column, title in enumerate(_COLUMNS):
    draw.text((_TEXT + column * _CELL + 4, 4), title, "black", font)
  for row, (number, (pictures, caption)) in enumerate(drawn):
    top = 20 + row * _CELL
    lines = [subjects.names[number], f"[{subjects[number].noun}]", *_wrapped(caption)]
    for n, line in enumerate(lines[: _CELL // _LINE - 1]):
      draw.text((4, top + 4 + n * _LINE), line[:32], "black", font)
    for column, picture in enumerate(pictures):
      sheet.paste(Image.fromarray(picture), (_TEXT + column * _CELL + 2, top + 2))
  return sheet


def _triple(subject, number: int, seed: int, config: triples.TripleConfig):
  """The four pictures of a row, and the caption."""
  rng = sampling.row_rng(seed, 0, number)
  frames = sampling.choose_frames(rng, subject.is_reference())
  images, masks = zip(*(subject.frame(f) for f in frames))
  shown = triples.make_triple(rng, images, masks, config)
  alpha = shown["target_mask"][..., None] / 255
  pale = shown["target"] + (255 - shown["target"]) * _PALE * (1 - alpha)
  pictures = [shown[name] for name in _COLUMNS[:3]] + [np.rint(pale).astype(np.uint8)]
  return pictures, subject.captions(frames[2])[0]


def _wrapped(text: str, width: int = 32) -> list[str]:
  lines = [""]
  for word in text.split():
    if len(lines[-1]) + len(word) >= width:
      lines.append("")
    lines[-1] += f" {word}" if lines[-1] else word
  return lines


if __name__ == "__main__":
  main()

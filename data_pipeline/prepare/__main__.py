r"""Prepares a data set: missing masks and captions, crops, sizes, duplicates; writes TFDS shards.

    python -m data_pipeline.prepare --data=PATH --out=OUT [--segmenter=u2netp.onnx] ...
    python -m data_pipeline.prepare --config=configs/mine.py --out=OUT

PATH: a manifest, or a folder of subjects. The training then reads it with data.source='tfds',
data.name=NAME and data.data_dir=OUT. Stopped or killed, the same command goes on. Elsewhere:
--runner=DataflowRunner (or FlinkRunner, SparkRunner) and Beam's own options for it. docs/prepare.md
has more.
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.prepare.settings import ENCODINGS, FILE_FORMATS, Settings

_HELP = {
  "name": "the data set's name; by default made of the folder's",
  "segmenter": "FILE.onnx[:KIND], a network that makes the masks that are missing",
  "captioner": "module:function, called with picture and noun for captions that are missing",
  "caption_template": "what captions that are missing are made of, without a captioner",
  "margin": "around the subject, as a share of its longer side; inf = no crop",
  "max_side": "pixels; larger frames are made smaller",
  "min_subject": "pixels; frames whose subject is smaller are left out",
  "copy_bits": "of 256 that may differ between copies, of which one stays; -1 keeps all",
  "max_bad_share": "of all frames that may be unusable; by default the config's, else 0",
  "encoding": f"of frames: {' or '.join(ENCODINGS)}",
  "file_format": " or ".join(FILE_FORMATS),
  "frames_per_shard": "about so many frames to a file",
}


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  try:
    _main(argv)
  except DataError as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit("interrupted; the same command goes on from here")


def _main(argv: Sequence[str] | None) -> None:
  args, options = _parser().parse_known_args(argv)
  if args.workers < 0:
    raise DataError(f"--workers={args.workers} must be 0, a process for every core, or more")
  data, layout, bad_share = args.data, "auto", 0.0
  if args.config:
    config = _read_config(args.config)
    bad_share = config.max_bad_share
    if not data:  # the config's layout is that of its own data
      data, layout = _data_of(config, args.config)
  layout = args.layout or layout
  if not data:
    raise DataError("there is nothing to prepare; name it with --data=PATH or --config=FILE")
  values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)
            if getattr(args, field.name) is not None}  # fmt: skip
  values = {"name": _name_of(data), "max_bad_share": bad_share} | values
  from data_pipeline.prepare import inputs, run

  settings = Settings(**values)
  settings.check()
  manifest = inputs.read_manifest(
    data, layout, settings.max_bad_share, needs_masks=not settings.segmenter)
  folder = run.prepare(manifest, settings, args.out, workers=args.workers, options=options)
  counts = json.loads((folder / "manifest.json").read_text())["counts"]
  left_out = ", ".join(f"{n} {kind}" for kind, n in counts["left_out"].items()) or "nothing"
  print(f"{counts['subjects']} subjects, {counts['frames']} frames; left out: {left_out}; "
        f"{folder / 'manifest.json'} names them", file=sys.stderr)
  print(f"--config.data.source=tfds --config.data.name={settings.name} "
        f"--config.data.data_dir={args.out}")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m data_pipeline.prepare", description=__doc__, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", help="a manifest, or a folder of subjects")
  parser.add_argument("--layout", help="of --data, as data.layout has it; by default found out")
  parser.add_argument("--config", help="a config file, whose config.data names the data")
  parser.add_argument("--out", required=True, help="the folder of TFDS data sets to write into")
  parser.add_argument("--workers", type=int, default=0, help="processes; 0 = one for every core")
  for field in dataclasses.fields(Settings):
    kind = {"int": int, "float": float}.get(getattr(field.type, "__name__", field.type), str)
    default = "" if field.default in ("", dataclasses.MISSING) else f" ({field.default})"
    parser.add_argument(f"--{field.name}", type=kind,
                        help=(_HELP[field.name] + default).replace("%", "%%"))
  return parser


def _read_config(file: str):
  """The `config.data` of a config file."""
  if not Path(file).is_file():
    raise DataError(f"--config={file} is missing; check the path")
  spec = importlib.util.spec_from_file_location("config_to_prepare", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise DataError(f"--config={file} has no get_config(); name a file such as those of configs/")
  return module.get_config().data


def _data_of(data, file: str) -> tuple[str, str]:
  """Path and layout of the data that the config file names."""
  if data.source not in ("folder", "captures"):
    raise DataError(f"--config={file}: data.source={data.source!r} is no folder of pictures; set "
                    "'folder' or 'captures', or name the folder with --data")
  layout = "folder" if data.source == "folder" else getattr(data, "layout", "auto")
  return data.name, layout


def _name_of(path: str) -> str:
  """A TFDS name made of a path's last part."""
  stem = re.sub(r"[^a-z0-9]+", "_", Path(path).name.lower()).strip("_")
  return stem if stem[:1].isalpha() else f"set_{stem}".rstrip("_")


if __name__ == "__main__":
  main()

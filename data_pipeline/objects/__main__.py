"""`python -m data_pipeline.objects --models=FOLDER_OR_SH3F --out=DATA`: see --help."""

import argparse
import sys

from data_pipeline.cores import available_cores
from data_pipeline.errors import DataError
from data_pipeline.objects import catalogue


def main() -> None:
  """Renders a folder of 3D models into a TFDS data set, or, with --sheet, some into a picture."""
  parser = argparse.ArgumentParser(
    prog="python -m data_pipeline.objects", description=catalogue.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--models", required=True,
                      help="folder of .glb, .gltf, .obj files and .sh3f catalogues, or one of them")
  parser.add_argument("--out", default="", help="data.data_dir of a training: the data set's place")
  parser.add_argument("--views", type=int, default=24, help="pictures of each model")
  parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--licences", default="any", choices=catalogue.LICENCES,
                      help="cc0: public domain alone; cc-by: attribution too")
  parser.add_argument("--workers", type=int, default=available_cores(), help="processes")
  parser.add_argument("--max_bad_share", type=float, default=0.1,
                      help="share of models that may be broken or empty")
  parser.add_argument("--sheet", default="", metavar="PNG",
                      help="writes a contact sheet of --count models instead of a data set")
  parser.add_argument("--count", type=int, default=12)
  parser.add_argument("--subjects", default="", help="keys of the sheet's models, with commas")
  args = parser.parse_args()
  try:
    if args.sheet:
      _sheet(args)
    elif not args.out:
      raise DataError("where to? set --out=DATA, or --sheet=PNG for a look at some models")
    else:
      from data_pipeline.objects import dataset

      folder = dataset.build(
        args.models, args.out, views=args.views, size=args.size, seed=args.seed,
        licences=args.licences, workers=args.workers, max_bad_share=args.max_bad_share,
      )
      print(f"{folder}\n{dataset.summary(folder)}")
  except DataError as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit("interrupted; the same command goes on from here")


def _sheet(args) -> None:
  import numpy as np

  from data_pipeline.objects import sheet, worker

  worker.check_drawing(args.size, args.seed)
  if args.count < 1:
    raise DataError(f"--count={args.count} must be 1 or more")
  sheet.check_file(args.sheet)
  models, _ = catalogue.find_models(args.models, args.licences)
  worker.check_renderer(args.size)
  if args.subjects:
    by_key = {model.key: model for model in models}
    unknown = [key for key in args.subjects.split(",") if key not in by_key]
    if unknown:
      raise DataError(f"--subjects: no model {unknown[0]!r} in {args.models}")
    chosen = [by_key[key] for key in args.subjects.split(",")]
  else:
    order = np.random.default_rng(args.seed).permutation(len(models))
    chosen = [models[n] for n in sorted(order[: args.count])]
  image = sheet.contact_sheet(chosen, size=args.size, seed=args.seed)
  sheet.save(image, args.sheet, colors=256)
  for model in chosen:
    print(f"{model.key}: {model.noun}, {model.licence or 'licence not stated'}, {model.creator}")


if __name__ == "__main__":
  main()

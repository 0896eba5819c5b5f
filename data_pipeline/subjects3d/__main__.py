"""`python -m data_pipeline.subjects3d --config=small`: writes the TFDS data set, offline.

It does the same as `tfds build data_pipeline/subjects3d/builder.py`, a command that needs packages
(apache_beam, mlcroissant) which tensorflow-datasets 4.9.10 does not install.
"""

import argparse
import sys

from data_pipeline.errors import DataError
from data_pipeline.subjects3d.multi_view import CONFIGS


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m data_pipeline.subjects3d")
  parser.add_argument("--config", default="small", choices=CONFIGS)
  parser.add_argument("--data_dir", default="", help="default: that of TFDS")
  args = parser.parse_args()
  try:
    from data_pipeline.subjects3d.builder import build

    print(build(f"subjects3d/{args.config}", args.data_dir).data_path)
  except DataError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()

"""Which data set `config.data` means, and its TFDS builder."""

import re


def is_subjects3d(data_config) -> bool:
  """Whether `config.data` asks for the rendered world, whose factors are known.

  Its TFDS data set is subjects3d[/config][:version] and no other name that begins so.
  """
  if data_config.source == "render":
    return True
  return data_config.source == "tfds" and re.split("[/:]", data_config.name)[0] == "subjects3d"


def open_builder(data_config):
  """The TFDS builder of `config.data`; subjects3d is written on its first use."""
  if is_subjects3d(data_config):
    from data_pipeline.subjects3d import builder as subjects3d

    return subjects3d.build(data_config.name, data_config.data_dir)
  from data_pipeline.sources import tfds_source

  return tfds_source.open_builder(data_config.name, data_config.data_dir)

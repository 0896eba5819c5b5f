"""Preparation: a manifest's frames become a TFDS data set, once, on one machine or many.

`run.prepare` is the way through: `parts.py` does the work of a group of subjects (`frames.py` of
one frame) and leaves it in files, `selection.py` decides over all of them what stays (`copies.py`:
duplicates), `shards.py` writes that as TFDS shards. Apache Beam spreads groups over workers. What
is written depends on the manifest and the settings alone.
"""

"""Training on 3D models rendered in many views: pictures that nobody drew for us.

The models: any folder of .glb, .gltf, .obj, or Debian's `sweethome3d-furniture` (CC0 and CC-BY; 119
MB), unpacked without installing it. Render them once (17,000 views):

    apt-get download sweethome3d-furniture
    dpkg-deb -x sweethome3d-furniture_*.deb sh3d
    python -m data_pipeline.objects --models=sh3d/usr/share/sweethome3d/furniture \\
        --out=data/objects --views=24 --size=128

Then train, with the mini base and its image encoder, and draw for held-out individuals:

    python -m cc_jax.train --config=configs/objects.py --workdir=runs/objects

The image encoder that ships with the mini base has seen the ten shapes of subjects3d alone. With
DINOv2-small (a transformers folder) in its place:

    python -m cc_jax.train --config=configs/objects.py --workdir=runs/objects_dino \\
        --config.encoder.image_encoder=PATH/TO/dinov2-small \\
        --config.encoder.image_layers="(3,6,9,12)"

Individuals, not classes, are split: 80 % train, 10 % validation, 10 % test, by the hash of a
model's name. A third of each batch are individuals of one class noun: hard negatives.
What was not done: the mini base was trained on subjects3d and draws no furniture by its own; its
UNet is frozen here, so pictures show what the adapter alone can add.
"""

import ml_collections

from configs import subjects3d


def get_config() -> ml_collections.ConfigDict:
  """The table of `configs/subjects3d.py` with what this data needs."""
  c = subjects3d.get_config()
  c.data.source = "tfds"
  c.data.name = "objects"
  c.data.data_dir = "data/objects"  # --out of python -m data_pipeline.objects
  c.data.image_size = 64  # the mini base's
  c.data.group = "class"  # individuals of one noun
  c.data.group_ratio = 0.33
  c.data.caption_drop_detail_prob = 0.1
  c.injection.low_rank = 0
  c.train.steps = 3000
  c.train.save_every = 500
  c.train.sample_every = 1000
  # Other scenes than the pictures', in words that the mini base knows.
  c.sample.prompts = (
    "a {noun} on the beach", "a {noun} in the snow", "a {noun} by a brick wall",
  )  # fmt: skip
  return c

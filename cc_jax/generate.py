r"""Draws a subject, given by reference pictures, as a sentence asks; or just draws a sentence.

  python -m cc_jax.generate --reference=a.png --class_noun=teapot \
    --prompt="a teapot on the beach" --out=out.png

With an adapter of your own: --checkpoint=runs/first. With a fine-tune of its base: --base=FOLDER.
Two subjects: --class_noun=vase,toy --reference=vase.png,toy.png --prompt="a vase beside a toy".

In Python:

  from cc_jax import generate
  pipe = generate.load()
  images = pipe("a teapot on the beach", class_noun="teapot", references=["a.png"])
  images[0].save("out.png")
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ml_collections
from absl import flags

from cc_jax import cli
from cc_jax.errors import UserError, expand_user

# JAX and Flax take two seconds of processor time to import. They are imported where they are used,
# so that importing this module costs next to nothing.
if TYPE_CHECKING:
  import jax

  from cc_jax.sampling.pipeline import Pipeline, load

__all__ = ["Pipeline", "load"]

# Flags that go to `Pipeline.__call__` as they are.
_PIPELINE_FLAGS = (
  "prompt", "class_noun", "scale", "guidance", "image_guidance", "steps", "seed", "sampler", "eta",
  "negative_prompt", "num_images", "height", "width", "image", "strength", "clip_skip",
  "long_prompts",
)  # fmt: skip
# Flags that are pairs of pixels: SDXL's size conditions.
_PAIR_FLAGS = {
  "original_size": "HEIGHT,WIDTH that SDXL is told its picture once had.",
  "crop": "TOP,LEFT that SDXL is told was cut off.",
  "target_size": "HEIGHT,WIDTH that SDXL is told it draws.",
}


def __getattr__(name: str):
  """`Pipeline` and `load`, imported when they are first asked for."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from cc_jax.sampling import pipeline

  return getattr(pipeline, name)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """The command's flags."""
  from cc_jax.diffusion.samplers import SAMPLERS
  from cc_jax.models.attention_kinds import KINDS
  from cc_jax.models.params import DTYPES
  from data_pipeline.tokens import LONG_PROMPTS

  def text(name: str, default: str | None, meaning: str) -> None:
    flags.DEFINE_string(name, default, meaning, flag_values=values)

  def files(name: str, meaning: str) -> None:
    flags.DEFINE_multi_string(name, [], meaning, flag_values=values)

  def number(name: str, default: float | None, meaning: str) -> None:
    define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_float
    define(name, default, meaning, flag_values=values)

  text("prompt", "", "What to draw, for example 'a teapot on the beach'.")
  files("reference", "Pictures of one subject: a.png,b.png. A name with a comma in it has a "
        "--reference of its own. None draws with the base alone.")
  files("mask", "A picture per reference, white on the subject: a.png,b.png; nothing where there "
        "is none: ,b.png. The word auto, alone or in a mask's place, leaves it to --segmenter.")
  text("segmenter", None, "For --mask=auto: FILE.onnx, a network that finds subjects, such as "
       "u2netp.onnx or an ISNet; FILE.onnx:KIND says of which kind it is. Needs onnxruntime.")
  text("class_noun", None, "What the subject is: a word of the prompt. Several subjects, in its "
       "order: vase,toy, with --reference=vase.png,toy.png, and a.png+b.png for two of one.")
  text("checkpoint", None, "An adapter, or a training's workdir; the shipped adapter by default.")
  text("base", None, "A folder in the diffusers layout, a .safetensors file or a hub id: the base "
       "that the adapter was trained on, or one of its family; the adapter's own by default.")
  flags.DEFINE_bool("strict_base", False, "Refuse every base but the adapter's very own.",
                    flag_values=values)
  text("image_encoder", None, "The folder or hub id of the image encoder that the adapter was "
       "trained with, where it is not where the adapter says.")
  number("scale", 1.0, "How much of the subject; 0 draws with the base alone.")
  number("guidance", 5.0, "Classifier-free guidance; up to 1 = none.")
  number("image_guidance", None, "The image's own guidance, apart from the prompt's.")
  number("steps", 20, "Denoising steps.")
  text("sampler", None, f"{' or '.join(SAMPLERS)}; the base's own by default.")
  number("seed", 0, "The first picture's; the next ones' follow.")
  number("eta", 0.0, "The share of fresh noise in ddim's steps.")
  number("num_images", 1, "Number of pictures; several are written as out-SEED.png.")
  text("negative_prompt", None, "What the picture should not show; to SDXL none is not ''.")
  flags.DEFINE_enum("long_prompts", "cut", LONG_PROMPTS, "Prompts over 77 tokens: their end is cut "
                    "off, they go on in pieces of 75, or they are refused.", flag_values=values)
  for side in ("height", "width"):
    flags.DEFINE_integer(side, None, "In pixels; the base's own by default.", flag_values=values)
  text("image", None, "A picture to start from in place of noise alone (img2img).")
  number("strength", 0.8, "With --image: the share of the steps that is run; 1 keeps little.")
  files("lora", "LoRA files to merge into the base, a.safetensors[:0.8][,b.safetensors].")
  number("clip_skip", 0, "Layers of the text encoders left out at the end.")
  for name, meaning in _PAIR_FLAGS.items():
    flags.DEFINE_list(name, [], meaning, flag_values=values)
  text("dtype", "float32", f"Of parameters and computation: {' or '.join(DTYPES)}.")
  flags.DEFINE_enum("attention", "auto", KINDS, "auto is the chip's own: cudnn on NVIDIA (with "
                    "--dtype=bfloat16), pallas on a TPU, else xla.", flag_values=values)
  text("out", "out.png", "The PNG file to write.")


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """The command."""
  from cc_jax.models.params import DTYPES
  from cc_jax.sampling import arguments as given
  from cc_jax.sampling import pipeline
  from cc_jax.sampling.auto_masks import AUTO, fill_masks
  from cc_jax.sampling.images import save
  from cc_jax.sampling.sampler import check_guidance

  del argv
  outputs = _check_outputs(values.out, values.seed, values.num_images)
  if values.dtype not in DTYPES:
    raise UserError(f"--dtype={values.dtype} is unknown; use {' or '.join(DTYPES)}")
  if values.steps < 1:
    raise UserError(f"--steps={values.steps}: a sampler takes at least 1 step, usually 20")
  check_guidance(values.guidance, values.image_guidance)
  arguments = {name: getattr(values, name) for name in _PIPELINE_FLAGS}
  arguments |= {name: _parse_pair(name, getattr(values, name))
                for name in _PAIR_FLAGS if getattr(values, name)}
  reference, mask = (split_files(files) for files in (values.reference, values.mask))
  references, masks = reference, [file or None for file in mask]
  if "," in (values.class_noun or ""):
    arguments["class_noun"] = [noun.strip() for noun in values.class_noun.split(",")]
    references = [_split_subject(files) for files in reference]
    masks = [[file or None for file in _split_subject(files)] if files else None for files in mask]
  if mask == [AUTO]:  # one word for all
    masks = [[AUTO] * len(r) if isinstance(r, list) else AUTO for r in references]
  # What needs no base is found before it is loaded.
  given.as_prompts(values.prompt)
  given.as_seeds(values.seed, values.num_images)
  nouns = given.as_nouns(arguments["class_noun"])
  shown = given.pictures_by_subject(references, masks or None, nouns)
  for file in [file for subjects in shown for files in subjects for file in files]:
    if file not in (None, AUTO) and not _is_file(file):
      raise UserError(f"{file} is missing; check the path")
  cut = fill_masks(*shown, values.segmenter)
  masks = cut if len(nouns) > 1 else cut[0]
  lora = split_files(values.lora, lambda text: _is_file(_parse_lora(text)[0]))
  with warnings.catch_warnings():
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    pipe = pipeline.load(
      values.checkpoint, values.base, image_encoder=values.image_encoder,
      lora=[_parse_lora(text) for text in lora], strict_base=values.strict_base,
      mesh=data_mesh(values.num_images), dtype=values.dtype,
      attention=values.attention)
    if pipe.sampler.kernels.kernel != "xla":
      print(pipe.sampler.kernels.describe(), file=sys.stderr)
    images = pipe(references=references, masks=masks or None, progress=True, **arguments)
  for seed, (path, image) in enumerate(zip(outputs, images, strict=True), values.seed):
    settings = arguments | dict(
      seed=seed, num_images=1, reference=reference, mask=mask, dtype=values.dtype,
      lora=lora, checkpoint=pipe.source, base=pipe.base.name, base_hash=pipe.base.hash,
    )  # fmt: skip
    if values.segmenter:
      settings["segmenter"] = values.segmenter
    save(image, path, settings)
    print(path)


def data_mesh(num_images: int) -> jax.sharding.Mesh | None:
  """A mesh of one device per image, as far as there are devices; None for a single one."""
  import jax

  from cc_jax.parallel.mesh import make_mesh

  size = min(num_images, len(jax.devices()))
  return make_mesh(ml_collections.ConfigDict({"data": size}), size) if size > 1 else None


def _check_outputs(out: str, seed: int, num_images: int) -> list[Path]:
  """Where the pictures go; the files of an earlier run stay until their successors are complete."""
  path = Path(expand_user(out))
  if path.suffix.lower() != ".png":
    raise UserError(f"--out={out} is no .png file; pictures are written as PNG only")
  if not path.parent.is_dir():
    raise UserError(f"--out={out}: the folder {path.parent} does not exist; make it first")
  paths = [path]
  if num_images > 1:
    paths = [path.with_name(f"{path.stem}-{seed + k}.png") for k in range(num_images)]
  for one in paths:
    writable = os.access(path.parent, os.W_OK) and (not one.exists() or os.access(one, os.W_OK))
    if one.is_dir() or not writable:
      raise UserError(f"--out={out}: {one} cannot be written; choose another path")
  return paths


def split_files(
  values: Sequence[str], is_file: Callable[[str], bool] | None = None
) -> list[str]:
  """The files of a flag that may be repeated: each value is a file, or several with commas between.

  An empty name stays, where a reference has no mask; a flag that is empty altogether names none.
  """
  if list(values) == [""]:
    return []
  names = []
  for value in values:
    try:
      split = [] if (is_file or _is_file)(value) else flags.ListParser().parse(value)
    except ValueError as error:  # a quote that is not closed: this is a line of CSV
      raise UserError(f"{value!r} is no list of files; write a.png,b.png") from error
    names += split or [value]
  return names


def _split_subject(value: str) -> list[str]:
  """'a.png+b.png': two pictures of one subject, unless that is a file's name."""
  return [value] if _is_file(value) else value.split("+")


def _is_file(name: str) -> bool:
  return os.path.isfile(expand_user(name))


def _parse_pair(name: str, parts: Sequence[str]) -> tuple[int, int]:
  if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
    raise UserError(f"--{name}={','.join(parts)} is no pair of pixels; write --{name}=1024,1024")
  return int(parts[0]), int(parts[1])


def _parse_lora(text: str) -> tuple[str, float]:
  """'file' or 'file:scale'; the path itself may hold a colon."""
  path, _, scale = text.rpartition(":")
  try:
    return (path, float(scale)) if path else (text, 1.0)
  except ValueError:
    return text, 1.0


if __name__ == "__main__":
  cli.run(main, define_flags)

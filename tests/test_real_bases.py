"""The configs of the real bases, from the hub's cache to a picture and scores, as one types them.

The cache holds what is published, under the ids and commits of the configs, with the widths of a
toy: the published config.json files, shrunk, and random weights. C4, C20.
"""

import importlib
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
from PIL import Image, ImageDraw
from safetensors import safe_open
from typed import run_typed

from cc_jax.bases.files import ASSETS, COMPONENTS, NETWORKS, network_class
from cc_jax.bases.save import save_module
from cc_jax.bases.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
IMAGE = 16  # px; the VAE halves once in place of three times
# What replaces the published numbers; kinds of blocks, biases, activations ... stay.
UNET = dict(
  sample_size=IMAGE // 2, block_out_channels=[8], layers_per_block=1, norm_num_groups=4,
  cross_attention_dim=12, attention_head_dim=2, down_block_types=["CrossAttnDownBlock2D"],
  up_block_types=["CrossAttnUpBlock2D"],
)  # fmt: skip
UNETS = {
  "sd15": UNET,
  "sd21": UNET | dict(attention_head_dim=[4]),
  # 12 + 20 wide: two text encoders; 6 size conditions of 8 and the pooled text.
  "sdxl": UNET | dict(
    attention_head_dim=[4], transformer_layers_per_block=[1], cross_attention_dim=32,
    addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 14,
  ),
}  # fmt: skip
SMALL = {
  "vae": dict(
    block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, sample_size=IMAGE,
    down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
  ),
  "text_encoder": dict(
    hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    projection_dim=12,
  ),
  "text_encoder_2": dict(
    hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    projection_dim=14,
  ),
  "image_encoder": dict(
    hidden_size=18, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    projection_dim=10, image_size=28,
  ),
}  # fmt: skip
FLAGS = {
  "data.image_size": IMAGE, "encoder.image_layers": "(1,2)", "encoder.width": 12,
  "encoder.depth": 1, "encoder.heads": 2, "encoder.visual_queries": 3, "encoder.textual_queries": 4,
  "injection.location_width": 4, "train.steps": 2, "train.batch_size": 4, "train.log_every": 1,
  "train.warmup_steps": 1, "train.ema": 0.5, "sample.steps": 2, "sample.subjects": 2,
  "mesh.cpu_devices": 1,
}  # fmt: skip
QUICK = {"train.dtype": "float32", "train.base_dtype": "float32"}
MORE = {
  "sd15": QUICK | {"train.save_every": 1, "train.prompt_sensitivity_every": 0},
  # The same objectives as sd15's are not compiled again.
  "sd21": QUICK | {"train.prompt_sensitivity_every": 0, "objective.lambda_cscl": 0,
                   "objective.lambda_macl": 0, "encoder.layer_groups": "(4,)"},
  # Half of the compilation would be that of a second forward pass.
  "sdxl": QUICK | {"encoder.layer_groups": "(2,2)", "train.remat_unet": "('none',)",
                   "train.remat_text": "none", "train.prompt_sensitivity_every": 0},
}
NOUNS = ("mug", "toy car", "plush bear", "vase", "cap")  # two of them are held out


def ids(name: str) -> tuple[str, str]:
  """What the config names: (base, image encoder)."""
  config = importlib.import_module(f"configs.{name}").get_config()
  found = config.base, config.encoder.image_encoder
  assert all(id_.count("@") == 1 for id_ in found), f"{found} are no hub ids at a commit"
  return found


def write_network(folder: Path, part: str, published: Path, changes: dict) -> None:
  """config.json as published but for the changes, and random weights under the published name."""
  values = json.loads((published / "config.json").read_text()) | changes
  cls = network_class(part, values.get("_class_name") or values["architectures"][0])
  save_module(tiny.random_module(cls, NETWORKS[cls].config.from_dict(values), 0), folder)
  (folder / "config.json").write_text(json.dumps(values))


def write_base(folder: Path, name: str, published: Path, made: dict[str, Path]) -> None:
  """A pipeline's folder in the published layout: its networks, tokenizers and scheduler.

  `made` are networks and a tokenizer for all bases: the published ones, too, have the same shapes.
  """
  folder.mkdir(parents=True)
  shutil.copy(published / "model_index.json", folder)
  shutil.copytree(published / "scheduler", folder / "scheduler")
  if "tokenizer" not in made:
    texts = [f"a {noun} on the beach" for noun in NOUNS] + ["a photo of a mug in the snow"]
    train_tokenizer(texts, folder / "tokenizer", 600, 77)
    made["tokenizer"] = folder / "tokenizer"
  vocabulary = json.loads((made["tokenizer"] / "vocab.json").read_text())
  for suffix in ("", "_2") if name == "sdxl" else ("",):
    tokenizer = folder / f"tokenizer{suffix}"
    if tokenizer != made["tokenizer"]:
      shutil.copytree(made["tokenizer"], tokenizer)
    # SD 2's and SDXL's second one pad with the piece of id 0.
    pad = "!" if suffix or name == "sd21" else "<|endoftext|>"
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
      values = json.loads((tokenizer / file).read_text()) | {"pad_token": pad}
      (tokenizer / file).write_text(json.dumps(values))
  for part in (part for part in COMPONENTS if (published / part).is_dir()):
    changes = SMALL.get(part, UNETS[name])
    changes |= {"vocab_size": len(vocabulary)} if part.startswith("text") else {}
    if part in made:
      shutil.copytree(made[part], folder / part)
      values = json.loads((published / part / "config.json").read_text()) | changes
      (folder / part / "config.json").write_text(json.dumps(values))
    else:
      write_network(folder / part, part, published / part, changes)
    if part != "unet":
      made.setdefault(part, folder / part)


def into_cache(home: Path, id_: str, write) -> None:
  """What `write(folder)` makes of the id's folder, as a download leaves it: links to blobs."""
  repository, revision = id_.split("@")
  owner, model, *inside = repository.split("/")
  root = home / "hub" / f"models--{owner}--{model}"
  snapshot = root / "snapshots" / revision
  write(snapshot.joinpath(*inside))
  (root / "blobs").mkdir()
  for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
    file.rename(root / "blobs" / f"{number}")
    file.symlink_to(os.path.relpath(root / "blobs" / f"{number}", file.parent))


def write_pictures(folder: Path) -> Path:
  """Subjects in another light and place on every picture, each with a mask beside it."""
  rng = np.random.default_rng(0)
  for number, noun in enumerate(NOUNS):
    subject, captions = folder / noun.replace(" ", "_"), {}
    subject.mkdir(parents=True)
    colour = tuple(int(c) for c in rng.integers(40, 255, 3))
    for index, (width, height) in enumerate([(48, 36), (36, 48), (40, 40)]):
      coarse = rng.integers(0, 200, (3, 4, 3), dtype=np.uint8)
      image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
      mask = Image.new("L", (width, height))
      box = (6 + 3 * index, 5 + number, width - 8, height - 6)
      for picture, fill in ((image, colour), (mask, 255)):
        ImageDraw.Draw(picture).ellipse(box, fill=fill)
      image.save(subject / f"{index}.jpg")
      mask.save(subject / f"{index}_mask.png")
      captions[f"{index}.jpg"] = f"a {noun} on the beach" if index else f"a photo of a {noun}"
    text = json.dumps({"class_noun": noun, "captions": captions})
    (subject / "captions.json").write_text(text)
  return folder


@pytest.fixture(scope="module")
def made():
  """Networks and a tokenizer that one base takes over from another."""
  return {}


@pytest.fixture
def world(name, made, tmp_path):
  """The cache with the base and the image encoder, and the pictures."""
  home = tmp_path / "huggingface"
  base, encoder = ids(name)
  published = ASSETS / "architectures" / base.split("@")[0].split("/")[1]
  into_cache(home, base, lambda path: write_base(path, name, published, made))
  published = ASSETS / "architectures" / "IP-Adapter" / "models" / "image_encoder"
  into_cache(home, encoder, lambda path: write_network(
    path, "image_encoder", published, SMALL["image_encoder"]))  # fmt: skip
  write_pictures(tmp_path / "my_subjects")
  return tmp_path


@pytest.fixture
def run(world, quick_compile, monkeypatch, capsys):
  """`python -m cc_jax.COMMAND FLAGS`, in this process: imports are half of a small command."""
  monkeypatch.chdir(world)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(world / "huggingface/hub"))
  return lambda command, *words: run_typed(command, words, capsys)[0]


@pytest.mark.parametrize("name", list(UNETS))
def test_train_generate_evaluate_as_typed(name, run, world):
  base, encoder = ids(name)
  overrides = [f"--config.{key}={value}" for key, value in (FLAGS | MORE[name]).items()]
  out = run("train", f"--config={ROOT}/configs/{name}.py", f"--workdir=runs/{name}",
            "--config.data.name=my_subjects", *overrides)  # fmt: skip
  workdir = world / "runs" / name
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if "loss" in line] == [1, 2]
  for line in lines:
    assert all(np.isfinite(value) for key, value in line.items() if key.startswith("loss"))
  assert "trained, " in out
  with safe_open(workdir / "adapter.safetensors", "numpy") as stored:
    metadata = stored.metadata()
    assert all(np.isfinite(stored.get_tensor(key)).all() for key in stored.keys())
  notes = json.loads(metadata["notes"])
  assert (notes["steps"], notes["data"]) == ("2", "folder my_subjects")
  adapter = json.loads(metadata["config"])
  assert (metadata["base"], adapter["encoder"]["image_encoder"]) == (base, encoder)

  sheet = np.asarray(Image.open(workdir / "grid.png"))  # two held-out subjects, four prompts
  assert sheet.std() > 5
  run("generate", f"--checkpoint=runs/{name}", "--class_noun=mug", "--steps=2",
      "--reference=my_subjects/mug/0.jpg", "--mask=my_subjects/mug/0_mask.png",
      "--prompt=a mug on the beach", "--num_images=8", "--out=mug.png")  # fmt: skip
  picture = np.asarray(Image.open(world / "mug-0.png"))
  assert picture.shape == (IMAGE, IMAGE, 3) and picture.std() > 5  # levels of 255

  out = run("evaluate", f"--checkpoint=runs/{name}", f"--workdir=scores/{name}", "--count=1",
            "--steps=2")  # fmt: skip
  assert "trained on folder my_subjects" in out and base in out
  scores = json.loads((world / "scores" / name / "scores.json").read_text())
  assert scores["subjects"] == 1
  for part in ("adapter", "base"):
    for score in ("fidelity", "control", "scene", "class_id"):
      assert 0 <= scores[part][score] <= 1


@pytest.mark.parametrize("name", list(UNETS))
def test_contrast_weighs_what_was_tried(name):
  """C20: 0.1 drowned the diffusion gradient (docs/method.md); the laboratory used 0.001."""
  config = importlib.import_module(f"configs.{name}").get_config()
  tried = json.loads((ASSETS / "lab_config_keys.json").read_text())
  for key in ("lambda_cscl", "cscl_temperature", "lambda_macl", "macl_temperature", "macl_scaling"):
    assert config.objective[key] == tried[f"objective.{key}"]

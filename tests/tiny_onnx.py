"""A network in an ONNX file, written by hand: a weighted sum of a picture's three channels.

Fields and their numbers: onnx/onnx.proto of the ONNX specification.
"""

import numpy as np

FLOAT, INT32 = 1, 6


def varint(n):
  out = b""
  while n > 127:
    out += bytes([n & 127 | 128])
    n >>= 7
  return out + bytes([n])


def field(number, value):
  """A number, a text, bytes or a message (a list of fields)."""
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  data = b"".join(value) if isinstance(value, list) else value.encode() if isinstance(
    value, str) else value
  return varint(number << 3 | 2) + varint(len(data)) + data


def value_info(name, shape, kind=FLOAT):
  dims = [field(1, [field(1, d) if isinstance(d, int) else field(2, d)]) for d in shape]
  return [field(1, name), field(2, [field(1, [field(1, kind), field(2, dims)])])]


def tensor(name, array):
  array = np.asarray(array, "<f4")
  return [*(field(1, d) for d in array.shape), field(2, FLOAT), field(8, name),
          field(9, array.tobytes())]


def node(kind, inputs, output):
  return [*(field(1, name) for name in inputs), field(2, output), field(4, kind)]


def model(nodes, inputs, outputs, tensors=()):
  graph = [*(field(1, n) for n in nodes), field(2, "tiny"), *(field(5, t) for t in tensors),
           *(field(11, i) for i in inputs), *(field(12, o) for o in outputs)]
  return b"".join([field(1, 8), field(7, graph), field(8, [field(1, ""), field(2, 13)])])


def weighted_sum(weights, bias, side="side"):
  """[1, 3, side, side] -> [1, 1, side, side]; `side` is a number, or a name where it is open."""
  shape = [1, 3, side, side]
  return model(
    [node("Conv", ["picture", "weights", "bias"], "mask")],
    [value_info("picture", shape)], [value_info("mask", [1, 1, side, side])],
    [tensor("weights", np.reshape(weights, (1, 3, 1, 1))), tensor("bias", [bias])])


def write_red(path, side=16):
  """A segmenter of the kind isnet whose mask is the red channel; returns its name with the kind."""
  path.write_bytes(weighted_sum([1, 0, 0], 0.5, side))
  return f"{path}:isnet"

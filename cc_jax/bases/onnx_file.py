"""Tensors and nodes of an ONNX file, without the onnx package; nothing in the file is run.

A file is one protobuf message. Of onnx.proto (github.com/onnx/onnx) we need: ModelProto.graph 7;
GraphProto.node 1, .initializer 5; NodeProto.input 1, .output 2, .op_type 4; TensorProto.dims 1,
.data_type 2, .float_data 4, .name 8, .raw_data 9. protobuf's wire format: each field is a varint
(number << 3 | kind); kind 0 is a varint, 1 eight bytes, 2 a length and so many bytes, 5 four bytes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cc_jax.errors import UserError

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_FLOAT = 1  # TensorProto.DataType


class Node(NamedTuple):
  """An operation: its kind and the names of its inputs and outputs."""

  kind: str
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]


class OnnxFile(NamedTuple):
  """Float32 tensors by name (others are left out), and the nodes in order."""

  tensors: dict[str, np.ndarray]
  nodes: tuple[Node, ...]


def read_onnx(data: bytes, what: str = "the ONNX file") -> OnnxFile:
  """Reads the graph of a model.

  Raises:
    UserError: it breaks off, or is no ONNX model.
  """
  tensors: dict[str, np.ndarray] = {}
  nodes: list[Node] = []
  try:
    graphs = [value for number, value in _fields(memoryview(data)) if number == 7]
    for number, value in _fields(graphs[0]):
      if number == 1:
        nodes.append(_node(value))
      elif number == 5:
        name, tensor = _tensor(value)
        if tensor is not None:
          tensors[name] = tensor
  except (IndexError, ValueError, TypeError, UnicodeDecodeError) as error:
    raise UserError(f"{what} is no readable ONNX model ({error}); get it again") from error
  return OnnxFile(tensors, tuple(nodes))


def _node(data: memoryview) -> Node:
  kind, inputs, outputs = "", [], []
  for number, value in _fields(data):
    if number == 1:
      inputs.append(_text(value))
    elif number == 2:
      outputs.append(_text(value))
    elif number == 4:
      kind = _text(value)
  return Node(kind, tuple(inputs), tuple(outputs))


def _tensor(data: memoryview) -> tuple[str, np.ndarray | None]:
  """Name and values; None in place of values that are not float32."""
  shape: list[int] = []
  name, kind, values = "", 0, np.zeros(0, "<f4")
  for number, value in _fields(data):
    if number == 1:
      shape += [value] if isinstance(value, int) else list(_varints(value))  # or packed
    elif number == 2:
      kind = value
    elif number == 8:
      name = _text(value)
    elif number in (4, 9) and len(value) % 4 == 0:  # a single unpacked float is no case of ours
      values = np.frombuffer(value, "<f4")
  return name, values.reshape(shape) if kind == _FLOAT else None


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
  """(number, value) of a message's fields: varints as int, everything else as bytes."""
  place = 0
  while place < len(data):
    key, place = _varint(data, place)
    number, kind = key >> 3, key & 7
    if kind == _VARINT:
      value, place = _varint(data, place)
      yield number, value
      continue
    if kind == _BYTES:
      size, place = _varint(data, place)
    elif kind in (_EIGHT, _FOUR):
      size = 8 if kind == _EIGHT else 4
    else:
      raise ValueError(f"field of kind {kind}")
    if place + size > len(data):
      raise ValueError("it breaks off")
    yield number, data[place : place + size]
    place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
  """An integer in groups of seven bits, the lowest first, and the place behind it."""
  result = shift = 0
  while True:
    byte = data[place]
    place += 1
    result |= (byte & 127) << shift
    if byte < 128:
      return result, place
    shift += 7


def _varints(data: memoryview) -> Iterator[int]:
  place = 0
  while place < len(data):
    value, place = _varint(data, place)
    yield value


def _text(data: memoryview) -> str:
  return bytes(data).decode()

#!/usr/bin/env bash
# Pillow 13.0.0: converting a 16-bit grey picture to 8 bits clips it instead of scaling it.
#
# One would guess that convert("L") and convert("RGB") map 65535 to 255, since a 16-bit colour PNG is
# scaled to 8 bits as it is opened.
# What happens: the grey picture opens as mode "I;16" with its own numbers, and all above 255 become 255.
# Nearly every picture turns white, without a word.
# Why it matters: depth maps, masks and scans are often 16-bit grey PNGs, and `.convert("RGB")` is how most
# programs load a picture. Scale the numbers before.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" pillow==13.0.0
PYTHONPATH=$folder python3 - "$folder" <<'PY'
import struct, sys, zlib

from PIL import Image

def png(path, colour_type, channels):  # 16 bits a channel, one row of four pixels
  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  head = struct.pack(">IIBBBBB", 4, 1, 16, colour_type, 0, 0, 0)
  row = b"\0" + b"".join(struct.pack(">H", value) * channels for value in (0, 200, 32768, 65535))
  data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
  with open(path, "wb") as file:
    file.write(b"\x89PNG\r\n\x1a\n" + data)
  return Image.open(path)

def values(picture):
  return [picture.getpixel((x, 0)) for x in range(4)]

grey, colour = png(f"{sys.argv[1]}/grey.png", 0, 1), png(f"{sys.argv[1]}/colour.png", 2, 3)
as_l, as_rgb = values(grey.convert("L")), values(grey.convert("RGB").getchannel(0))
scaled = values(colour.convert("L"))
print("grey:", grey.mode, values(grey), "L:", as_l, "RGB:", as_rgb)
print("colour:", colour.mode, "L:", scaled)
assert as_l == as_rgb == [0, 200, 255, 255] and scaled == [0, 0, 128, 255], "it has changed"
PY
# grey: I;16 [0, 200, 32768, 65535] L: [0, 200, 255, 255] RGB: [0, 200, 255, 255]
# colour: RGB L: [0, 0, 128, 255]

#!/usr/bin/env bash
# transformers 5.23.0: image processors lay transparent pictures on white; Pillow's convert drops alpha.
#
# One would guess that do_convert_rgb of CLIPImageProcessor does what picture.convert("RGB") does, which
# most scripts that compute CLIP-I call before the processor: the colours as stored, alpha dropped.
# What happens: the processor composes RGBA pictures on a white background first. A cut-out whose hidden
# pixels are black has a white background by the one way and a black one by the other.
# Why it matters: CLIP-I, DINO-I and the like of cut-out subjects differ between two scripts that "use
# the same processor", by nothing but who converts the picture.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" transformers==5.23.0 pillow==12.3.0 numpy==2.4.6
PYTHONPATH=$folder python3 - <<'PY'
import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

cut_out = Image.fromarray(np.zeros((224, 224, 4), np.uint8))  # black, and transparent everywhere
processor = CLIPImageProcessorPil(do_normalize=False, do_rescale=False)
by_processor = np.asarray(processor(cut_out)["pixel_values"][0]).mean()
by_pillow = np.asarray(processor(cut_out.convert("RGB"))["pixel_values"][0]).mean()
print(by_processor, by_pillow)
assert (by_processor, by_pillow) == (255, 0), "it has changed"
PY
# 255.0 0.0

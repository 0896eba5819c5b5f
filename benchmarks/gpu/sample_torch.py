"""The peer of sample_ours.py: diffusers' pipeline, eager first and then with torch.compile.

Its prompts are given as embeddings, so that its text encoders do not run; ours do. The VAE decodes
in bf16, as ours does.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from diffusers import (
  AutoencoderKL,
  DDIMScheduler,
  StableDiffusionPipeline,
  StableDiffusionXLPipeline,
  UNet2DConditionModel,
)

from benchmarks.gpu.record import record
from benchmarks.gpu.sizes import architecture, is_out_of_memory

GUIDANCE, TOKENS = 7.5, 77


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("--base", choices=("sd15", "sdxl"), default="sd15")
  arguments = parser.parse_args()
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.manual_seed(0)
  folder, _ = architecture(arguments.base, tiny=arguments.tiny)
  networks = {}
  with torch.device(device):
    for name, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
      network = cls.from_config(cls.load_config(folder / name)).eval().requires_grad_(False)
      networks[name] = network.to(torch.bfloat16, memory_format=torch.channels_last)
  networks["vae"].register_to_config(force_upcast=False)
  networks |= dict(scheduler=DDIMScheduler.from_config(DDIMScheduler.load_config(
    folder / "scheduler")), text_encoder=None, tokenizer=None)
  if arguments.base == "sdxl":
    pipe = StableDiffusionXLPipeline(
      **networks, text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
  else:
    pipe = StableDiffusionPipeline(
      **networks, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
  pipe.set_progress_bar_config(disable=True)
  eager = pipe.unet
  for mode in ("eager", "compiled"):
    if mode == "compiled":
      options = dict(backend="eager" if arguments.tiny else "inductor", dynamic=False)
      pipe.unet = torch.compile(eager, **options)
      pipe.vae.decode = torch.compile(pipe.vae.decode, **options)
    for count in (1,) if arguments.tiny else (1, 4):
      try:
        measure(pipe, mode, count, arguments, device)
      except Exception as error:
        if not is_out_of_memory(error):
          raise
        record(f"sample-{arguments.base}", who=f"diffusers, {mode}", batch=count,
               does_not_fit=True)


def measure(pipe, mode: str, count: int, arguments, device: str) -> None:
  steps, rounds = (2, 1) if arguments.tiny else (30, 3)
  width = pipe.unet.config.cross_attention_dim
  options = dict(device=device, dtype=torch.bfloat16)
  text = {name: torch.randn(count, TOKENS, width, **options)
          for name in ("prompt_embeds", "negative_prompt_embeds")}
  if arguments.base == "sdxl":
    pooled = (pipe.unet.config.projection_class_embeddings_input_dim
              - 6 * pipe.unet.config.addition_time_embed_dim)
    text |= {name: torch.randn(count, pooled, **options)
             for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}

  def draw() -> float:
    began = time.perf_counter()
    pipe(num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np", **text)
    return time.perf_counter() - began

  if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
  first = draw()
  seconds = float(np.median([draw() for _ in range(rounds)]))
  peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
  record(f"sample-{arguments.base}", who=f"diffusers, {mode}", batch=count, steps=steps,
         seconds=seconds, seconds_an_image=seconds / count, first_seconds=first, peak_gib=peak)


if __name__ == "__main__":
  main()

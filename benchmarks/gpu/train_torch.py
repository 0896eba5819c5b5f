"""The peer of train_ours.py: the training step of an IP-Adapter-plus for SD 1.5, in PyTorch.

diffusers' UNet with IP-Adapter's cross-attentions and its Resampler, the VAE, CLIP's text and image
encoders of the same configs, bf16 autocast, SDPA, torch.compile, fused AdamW. It trains fewer parts
than ours: no text encoder for every layer, no contrast, no averaged weights. Eager comes first, so
that there is a number also where compiling takes too long.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from transformers import (
  CLIPTextConfig,
  CLIPTextModel,
  CLIPVisionConfig,
  CLIPVisionModelWithProjection,
)

from benchmarks.gpu.record import record
from benchmarks.gpu.sizes import architecture, growing_batches, is_out_of_memory

QUERIES, TOKENS = 16, 77


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("--first", type=int, default=4)
  parser.add_argument("--most", type=int, default=256)
  arguments = parser.parse_args()
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.manual_seed(0)
  step = Step(device, tiny=arguments.tiny)
  # Eager only once; then compiled, at growing batches.
  measure(step, "eager", arguments.first)
  torch._dynamo.config.cache_size_limit = 64
  step.loss = torch.compile(step.loss, backend="eager" if arguments.tiny else "inductor",
                            dynamic=False)

  def fits(batch: int) -> bool:
    try:
      measure(step, "compiled", batch)
      return True
    except Exception as error:
      if not is_out_of_memory(error):
        raise
    record("train", who="PyTorch, compiled", batch=batch, does_not_fit=True)
    step.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return False

  growing_batches(arguments.first, 4 if arguments.tiny else arguments.most, fits)


class Step:
  """Networks, optimizer and one training step."""

  def __init__(self, device: str, *, tiny: bool):
    self.rounds, self.steps = (1, 1) if tiny else (3, 4)  # to be measured
    folder, vision = architecture("sd15", tiny=tiny)
    self.device, self.side = device, 16 if tiny else 512
    read = lambda path: json.loads((path / "config.json").read_text())  # noqa: E731
    with torch.device(device):
      self.vae = _frozen(AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")))
      self.text = _frozen(CLIPTextModel(CLIPTextConfig(**read(folder / "text_encoder"))))
      self.vision = _frozen(CLIPVisionModelWithProjection(CLIPVisionConfig(**read(vision))))
      unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
      self.unet = _frozen(unet)
      trained = self._add_adapter()
    self.schedule = DDPMScheduler.from_config(DDPMScheduler.load_config(folder / "scheduler"))
    alphas = self.schedule.alphas_cumprod.to(device)
    self.signal, self.spread = alphas.sqrt(), (1 - alphas).sqrt()
    self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01,
                                       fused=device == "cuda")
    self.trained = sum(p.numel() for p in trained)

  def _add_adapter(self) -> list:
    unet = self.unet
    width = unet.config.cross_attention_dim
    heads = 2 if width < 64 else 12
    resampler = IPAdapterPlusImageProjection(
      embed_dims=self.vision.config.hidden_size, output_dims=width, hidden_dims=width,
      depth=1 if width < 64 else 4, dim_head=width // heads, heads=heads, num_queries=QUERIES)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([resampler])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    processors = {}
    for name in unet.attn_processors:
      attention = unet.get_submodule(name.removesuffix(".processor"))
      if name.endswith("attn1.processor"):
        processors[name] = AttnProcessor2_0()
      else:
        processors[name] = IPAdapterAttnProcessor2_0(
          attention.to_q.out_features, cross_attention_dim=width, num_tokens=(QUERIES,))
    unet.set_attn_processor(processors)
    modules = [resampler, *(p for p in processors.values() if isinstance(p, torch.nn.Module))]
    trained = [p for module in modules for p in module.float().parameters() if p.dim()]
    for p in trained:
      p.requires_grad_(True)
    return trained

  def batch(self, size: int) -> dict[str, torch.Tensor]:
    shape = (size, 3, self.side, self.side)
    pixels = self.vision.config.image_size
    return dict(
      target=torch.randn(shape, device=self.device),
      reference=torch.randn((size, 3, pixels, pixels), device=self.device),
      ids=torch.randint(1, 90, (size, TOKENS), device=self.device))

  def loss(self, target, reference, ids):
    with torch.no_grad():
      latents = self.vae.encode(target.to(torch.bfloat16)).latent_dist.sample()
      latents = latents * self.vae.config.scaling_factor
      text = self.text(ids)[0]
      features = self.vision(reference.to(torch.bfloat16), output_hidden_states=True)
      features = features.hidden_states[-2]
    t = torch.randint(0, 1000, (len(ids),), device=self.device)
    noise = torch.randn_like(latents)
    shape = (-1, 1, 1, 1)
    noisy = self.signal[t].view(shape) * latents + self.spread[t].view(shape) * noise
    prediction = self.unet(noisy.to(torch.bfloat16), t, text,
                           added_cond_kwargs={"image_embeds": [features[:, None]]}).sample
    return F.mse_loss(prediction.float(), noise.float())

  def __call__(self, batch) -> torch.Tensor:
    with torch.autocast(self.device, torch.bfloat16):
      loss = self.loss(**batch)
    loss.backward()
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return loss


def _frozen(module: torch.nn.Module) -> torch.nn.Module:
  module = module.eval().requires_grad_(False)
  return module.to(torch.bfloat16, memory_format=torch.channels_last)


def measure(step: Step, mode: str, size: int) -> None:
  cuda = step.device == "cuda"
  if cuda:
    torch.cuda.reset_peak_memory_stats()
  batch = step.batch(size)
  began = time.perf_counter()
  loss = float(step(batch))
  compile_seconds = time.perf_counter() - began
  step(batch)
  times = []
  for _ in range(step.rounds):
    if cuda:
      torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(step.steps):
      last = step(batch)
    loss = float(last)  # waits
    if cuda:
      torch.cuda.synchronize()
    times.append((time.perf_counter() - began) / step.steps)
  seconds = float(np.median(times))
  peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
  record("train", who=f"PyTorch, {mode}", batch=size, seconds=seconds,
         images_a_second=size / seconds, spread=float((max(times) - min(times)) / seconds),
         peak_gib=peak, compile_seconds=compile_seconds, loss=loss, trained=step.trained,
         torch=torch.__version__)


if __name__ == "__main__":
  main()

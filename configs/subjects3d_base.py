"""The mini base: VAE, CLIP pair and UNet of subjects3d, trained from nothing.

  python -m cc_jax.pretrain --config=configs/subjects3d_base.py --workdir=runs/base

On 4 cores without accelerator: rendering 1 minute, VAE 12 (25.0 dB), CLIP pair 35, UNet 3 hours
(about 110 samples/s). The shipped base was trained in pieces, each initialised from the one before
(`init_from`): 5,800 steps of the UNet by an earlier recipe (mask_weight 2); 21,000 more, up
to step 12,000 of them with calm_ratio 0.5; at last, for patterns, 6,000 with world.plain_ratio 0.2,
calm_ratio 0.6 and learning_rate 8e-4. It draws class 96, main colour 99 and scene 100 % of 200
prompts as asked (`python -m cc_jax.evaluate --what=base`). To train it on:
`--config.init_from=subjects3d-base` and other `--config.unet.train.steps`.

CLIP: 700 steps of both towers with white_ratio 0.5, 1,800 of the image encoder alone (freeze_text),
both by captions only (factor_weight and position_scale 0): a linear probe named 43 % of the classes
(docs/lab.md, "What the image encoder must know"). Then, with the factors, on pictures of their own
(world.recombine, plain_ratio 0.2, calm_ratio 0.3), 800 steps and, with clip.code_positions put
upon them once (a random start has it from the beginning), 4,200 of batch 128 (31 minutes on 4
cores); at last 800 of the projection alone (freeze_features, contrast_weight 0, white_ratio 0.9,
batch 256, learning_rate 3e-3; 8 minutes on one core). At the end of the 4,200 it told class 94,
colours 98 and 98 and pattern 82 % of what it was shown (clip.jsonl). What can be read from it of
subjects never seen, and how well S follows real similarity: docs/lab/tables.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The table of decisions of `python -m cc_jax.pretrain`."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.stages = ("tokenizer", "vae", "clip", "unet")  # or ("judge",): configs/subjects3d_judge.py
  c.init_from = ""  # a base folder whose weights the training goes on from; '' = random

  c.world = ml_collections.ConfigDict()  # what is rendered before the training starts
  c.world.images = 60_000
  c.world.calm_ratio = 0.5  # fraction with narrow irrelevant factors, which is easier
  c.world.plain_ratio = 0.5  # fraction without pattern, which shows shapes better
  c.world.recombine = False  # whether patterns and proportions are shuffled among subjects
  c.world.split = "train"
  c.world.captions = 4  # phrasings per image
  c.world.processes = 0  # 0 = one per core

  c.tokenizer = ml_collections.ConfigDict()
  c.tokenizer.vocab_size = 1280  # at most; merging stops when every word is one piece
  c.tokenizer.max_length = 32

  # The networks, in the words of diffusers' and transformers' config.json.
  c.vae = ml_collections.ConfigDict()
  c.vae.model = ml_collections.ConfigDict(dict(
      in_channels=3, out_channels=3, latent_channels=8, sample_size=64,
      block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8,
      down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
      mid_block_add_attention=False, scaling_factor=1.0, act_fn="silu"))
  c.vae.train = _train(steps=1400, batch=32, learning_rate=2e-3)
  c.vae.kl = 1e-5
  c.vae.freeze_encoder = False  # with init_from: train the decoder alone; the latents stay

  c.clip = ml_collections.ConfigDict()
  c.clip.text = ml_collections.ConfigDict(dict(
      hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
      hidden_act="gelu", projection_dim=128))
  c.clip.vision = ml_collections.ConfigDict(dict(
      hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
      hidden_act="gelu", projection_dim=128, image_size=64, patch_size=8))
  c.clip.white_ratio = 0.75  # fraction cut out on white, as the adapter's references are
  c.clip.freeze_text = False  # with init_from: train the image encoder alone
  c.clip.freeze_features = False  # and of that one the projection alone, which MACL's S comes from
  c.clip.contrast_weight = 1.0
  c.clip.position_scale = 0.8  # of the code in a random start's positions; 0 = CLIP's own start
  # Weight of classifying the factors (pretrain.clip.FactorHeads) and of similarity_correlation; 0 =
  # captions alone.
  c.clip.factor_weight = 0.3
  c.clip.mirror_ratio = 0.5  # fraction of the pictures that are mirrored
  c.clip.train = _train(steps=2500, batch=192, learning_rate=1.5e-3)

  c.unet = ml_collections.ConfigDict()
  c.unet.model = ml_collections.ConfigDict(dict(
      sample_size=16, in_channels=8, out_channels=8, center_input_sample=False,
      block_out_channels=(48, 128), layers_per_block=1, norm_num_groups=16,
      down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
      up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
      transformer_layers_per_block=1, attention_head_dim=4, use_linear_projection=True,
      cross_attention_dim=128, addition_embed_type="text", addition_embed_type_num_heads=4))
  c.unet.scheduler = ml_collections.ConfigDict(dict(
      _class_name="DPMSolverMultistepScheduler", num_train_timesteps=1000,
      beta_schedule="squaredcos_cap_v2", beta_start=1e-4, beta_end=0.02,
      prediction_type="v_prediction", timestep_spacing="trailing", algorithm_type="dpmsolver++",
      solver_order=2, steps_offset=1, clip_sample=False))
  c.unet.train = _train(steps=24_000, batch=48, learning_rate=1.1e-3, ema=0.998)
  c.unet.noise_shift = 2.0  # u -> s u / (1 + (s - 1) u): more of the noisy times
  c.unet.mask_weight = 6.0  # loss weight 1 + mask_weight * subject mask, grown by one latent
  c.unet.drop_caption = 0.1
  c.unet.calm_until = 0.3  # fraction of the steps in which there are more calm pictures still
  c.unet.calm_ratio = 0.75  # fraction of a batch that is calm, afterwards

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1
  c.mesh.cpu_devices = -1
  return c


def _train(steps: int, batch: int, learning_rate: float, ema: float = 0.995):
  return ml_collections.ConfigDict(dict(
      steps=steps, batch=batch, learning_rate=learning_rate, ema=ema, warmup=100, beta2=0.99,
      weight_decay=0.0, clip_norm=1.0, save_every=200))

"""The mini base: VAE, CLIP pair and UNet of subjects3d, trained from scratch.

  python -m cc_jax.pretrain --config=configs/subjects3d_base.py --workdir=runs/base

On 4 cores without accelerator: the pictures 1 minute, VAE 12 (25.0 dB), CLIP pair 35, UNet at about
110 samples/s 3 hours for these steps. To train the shipped base further:
`--config.init_from=subjects3d-base` and other `--config.unet.train.steps`.

The shipped base was trained in parts, each from the one before by `init_from`. UNet: 5,800 steps by
an earlier recipe (mask_weight 2); 21,000 more, up to step 12,000 of them with calm_share 0.5; at
last, for patterns, 6,000 with world.plain_share 0.2, calm_share 0.6 and learning_rate 8e-4. It
draws class 96, main colour 99 and scene 100 % of 200 prompts as asked (`python -m cc_jax.evaluate
--what=base`). CLIP: 700 steps of both encoders with white_share 0.5, 1,800 of the image encoder
alone (freeze_text), both by captions only (factor_weight and position_scale 0): a linear probe
named 43 % of the classes (docs/lab.md, "What the image encoder must know"). Then with the factors,
on other pictures (world.recombine, plain_share 0.2, calm_share 0.3), 800 steps and, after
pretrain.clip.code_positions was applied once (a random start has it from the beginning), 4,200 of
batch 128 (31 minutes on 4 cores): class 94, colours 98 and 98, pattern 82 % right (clip.jsonl). At
last 800 of the projection alone (freeze_features, contrast_weight 0, white_share 0.9, batch 256,
learning_rate 3e-3; 8 minutes on one core). How well subjects never seen are read, and how well S
follows real similarity: docs/lab/tables.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The table of decisions of `python -m cc_jax.pretrain`."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.stages = ("tokenizer", "vae", "clip", "unet")  # or ("judge",): configs/subjects3d_judge.py
  c.init_from = ""  # a base folder whose weights the training starts from; '' = random

  c.world = ml_collections.ConfigDict()  # what is rendered before the training starts
  c.world.images = 60_000
  c.world.calm_share = 0.5  # share with narrow irrelevant factors: the easy lessons
  c.world.plain_share = 0.5  # share that loses its pattern: shapes are seen better
  c.world.recombine = False  # whether patterns and proportions are permuted among subjects
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
  c.vae.freeze_encoder = False  # with init_from: train the decoder alone; latents do not change

  c.clip = ml_collections.ConfigDict()
  c.clip.text = ml_collections.ConfigDict(dict(
      hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
      hidden_act="gelu", projection_dim=128))
  c.clip.vision = ml_collections.ConfigDict(dict(
      hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
      hidden_act="gelu", projection_dim=128, image_size=64, patch_size=8))
  c.clip.white_share = 0.75  # pictures cut out on white: what the adapter will show the encoder
  c.clip.freeze_text = False  # with init_from: train the image encoder alone
  c.clip.freeze_features = False  # and of it the projection alone, which MACL's S comes from
  c.clip.contrast_weight = 1.0
  c.clip.position_scale = 0.8  # of the code in a random start's positions; 0 = CLIP's own start
  # Of the factors (clip.FactorHeads) and of subjects' similarity; 0 = captions alone.
  c.clip.factor_weight = 0.3
  c.clip.mirror_share = 0.5  # share of the pictures that are shown left for right
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
  c.unet.calm_until = 0.3  # share of the steps over which calm pictures are favoured even more
  c.unet.calm_share = 0.75  # share of a batch from the calm pictures, afterwards

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1
  c.mesh.cpu_devices = -1
  return c


def _train(steps: int, batch: int, learning_rate: float, ema: float = 0.995):
  return ml_collections.ConfigDict(dict(
      steps=steps, batch=batch, learning_rate=learning_rate, ema=ema, warmup=100, beta2=0.99,
      weight_decay=0.0, clip_norm=1.0, save_every=200))

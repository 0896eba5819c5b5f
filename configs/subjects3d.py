"""CustomContrast on subjects3d: the main job, at the size of a laptop.

  python -m cc_jax.train --config=configs/subjects3d.py --workdir=runs/first

On 2 cores without accelerator: 16 minutes, 3.2 GB. Expect on 40 test subjects: scene 100 %, class
98 %, main colour of the reference 75 % (the base: 2 %), second colour 78 % (8 %), pattern 30 %
(11 %). It is far too small for a TPU slice: on v5e:4x4 with 2 images per chip, the plan says 0.134
of 16 GiB and 0.84 ms per step (docs/scale.md).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The table of decisions. Every key is read by something; unknown keys are errors.

  What each may be is in cc_jax/training/config_checks.py.
  """
  c = ml_collections.ConfigDict()
  c.seed = 0
  # A folder in the diffusers layout; 'subjects3d-base' ships with the package.
  c.base = "subjects3d-base"

  c.data = ml_collections.ConfigDict()
  c.data.source = "tfds"  # 'tfds' | 'render' (no tensorflow) | 'folder' | 'captures' (docs/data.md)
  c.data.name = "subjects3d/small"  # TFDS data set; with 'folder' and 'captures', the folder's path
  c.data.layout = "auto"  # of captures: 'mvimgnet', 'co3d' ...; 'auto' = what the folder looks like
  c.data.data_dir = ""  # where TFDS data sets are written; '' = TFDS' default
  c.data.image_size = 64
  c.data.reference_ratio = 0.8  # longer side of the reference's subject / side of the canvas
  c.data.reference_jitter = 0.0  # random change of the reference's size and place, 0 = none
  c.data.positive_ratio = (0.4, 0.9)  # the same for the positive: a range
  # The reference is 'centred'; the lab also shows it 'in_place' (as in its frame, on white), at a
  # 'random' size and place like positives, or the whole 'frame' with its background.
  c.data.reference_layout = "centred"
  # Each frame has so many fixed sizes and places, as a positive and (where these are random) as a
  # reference, of which a step draws one; 0 = a fresh one each time.
  c.data.placements = 0
  # Frozen features are read, not computed: `python -m cc_jax.cache` writes them (docs/scale.md).
  c.data.cached = False
  c.data.cache_dir = ""  # where they lie; '' = beside the data
  c.data.frames = "multi_view"  # 'self': the reference is the target's frame (a control)
  # Probability that a caption is only the class noun, "a teapot": real captions are often as short.
  c.data.caption_drop_detail_prob = 0.0
  # Subjects of a folder, or of a TFDS set with 'train' only, that training leaves out: pictures are
  # drawn of them while it goes on. Families stay together. 0 = pictures of training subjects.
  c.data.holdout_subjects = 0
  # Share of the pictures that may be unreadable: others take their place. 0 = each is an error.
  c.data.max_bad_share = 0.0
  # Of pictures in files: 'tensorflow' (parts of JPEGs, many threads) | 'pillow' (the reference) |
  # 'auto': tensorflow where they are large JPEGs. They agree within 2 levels (docs/graph_input.md).
  c.data.decoder = "auto"
  c.data.group = "family"  # hard negatives: 'class' | 'family'
  c.data.group_ratio = 0.0  # fraction of the global batch that is drawn from one group

  c.encoder = ml_collections.ConfigDict()  # the MFI-Encoder
  c.encoder.image_encoder = ""  # folder of CLIP or DINOv2; '' = the base's image_encoder/
  c.encoder.image_layers = (1, 2, 3, 4)  # hidden states concatenated [R]; 0 = the encoder's input
  c.encoder.width = 128
  c.encoder.depth = 2  # [R]
  c.encoder.heads = 4
  c.encoder.visual_queries = 16
  c.encoder.textual_queries = 8
  # W: the first W textual tokens of a layer are its pseudo-words [R]. Of 1, 2 and 4 the last is the
  # best on validation subjects (docs/lab.md).
  c.encoder.s_words = 4
  # How (t, l) enters the queries: 'fourier_mlp' | 'none' [R].
  c.encoder.timestep_layer = "fourier_mlp"
  c.encoder.textual_cls = "mean"  # 'mean' over layers | 'last' [R]
  c.encoder.s_plus_space = "per_layer"  # 'per_layer' | 'shared' by all layers | 'none' in use [R]
  c.encoder.s_plus_norm = "class_noun"  # 'class_noun' | 'free' [R]
  # The pooled text (or, for addition_embed_type 'text', the whole text) that goes to the time
  # embedding: from the prompt without S+ ('plain') or the mean over layers with it ('s_plus') [R].
  # The mini base takes much of colour and class from there.
  c.encoder.s_plus_pooled = "s_plus"
  c.encoder.fusion = "tv_fusion"  # 'tv_fusion' | 'visual_tokens' (the laboratory's control) [R]
  # Sizes of the groups of layers that share an S+ (SDXL has 70 layers); () = each its own.
  c.encoder.layer_groups = ()
  c.encoder.contrast_head = 0  # width of a projection head between the S+ tokens and MACL; 0 = none

  c.injection = ml_collections.ConfigDict()
  c.injection.form = "complementary"  # 'complementary' | 'visual_only' | 'shared' [R]
  c.injection.location = True  # the timestep-location map; False = 1 everywhere
  c.injection.location_width = 32
  c.injection.low_rank = 0  # rank of the visual K/V; 0 = full
  c.injection.gate_start = 0.0  # of the factor on the visual path; 0: training starts at the base

  c.objective = ml_collections.ConfigDict()
  # [R] At 0.1 each and macl_scaling 'inverse', contrast drowned the diffusion loss: the gradients
  # at the textual Q-Former were 3.65 and 0.013. Soft targets give smaller ones (docs/lab.md).
  c.objective.lambda_cscl = 0.001
  c.objective.cscl_temperature = 0.07  # [R]
  c.objective.cscl_frame = "same_frame"  # 'same_frame' | 'cross_frame' [R]
  c.objective.lambda_macl = 0.05  # [R]
  c.objective.macl_temperature = 0.3  # [R]
  # [R] 'inverse' | 'complement' | 'two_minus' | 'log_complement' | 'literal' | 'none' |
  # 'soft_target'
  c.objective.macl_scaling = "soft_target"
  c.objective.macl_soft_temperature = 0.3
  c.objective.macl_symmetric = False  # [R]
  c.objective.macl_pooling = "mean"  # 'mean' | 'per_token' [R]
  # How both compare the global batch: 'naive': N x N matrices | 'tiled': gathered keys, a tile at a
  # time | 'ring': blocks passed around | 'auto': by memory. The losses are the same.
  c.objective.contrast = "auto"
  c.objective.tile = 1024  # columns in a tile of 'tiled' and 'ring'
  c.objective.min_snr_gamma = 0.0  # 0 = plain loss
  c.objective.timestep_shift = 2.0  # > 1: more of the noisy timesteps; 1 = uniform [R]
  c.objective.subject_weight = 2.0  # diffusion loss weighs 1 + this where the subject is [R]
  c.objective.drop_text = 0.05
  c.objective.drop_image = 0.05
  c.objective.drop_both = 0.05

  c.train = ml_collections.ConfigDict()
  c.train.steps = 800
  c.train.batch_size = 32  # global
  c.train.grad_accum_steps = 1  # microbatches that a batch is divided into; same gradient
  c.train.learning_rate = 1e-3
  c.train.gate_lr_mult = 10.0  # learning rate of the gates / that of all else
  c.train.schedule = "cosine"  # 'cosine' | 'constant', after the warm-up
  c.train.warmup_steps = 100
  c.train.weight_decay = 0.01
  c.train.beta1 = 0.9
  c.train.beta2 = 0.99
  c.train.clip_norm = 1.0  # of the whole gradient; 0 = no clipping
  c.train.ema = 0.995
  c.train.dtype = "float32"  # compute: 'float32' | 'bfloat16'
  c.train.base_dtype = "float32"  # storage of the frozen base
  # 'xla' | 'cudnn' (NVIDIA, bfloat16) | 'pallas' (TPU) | 'auto': the chip's, docs/attention.md.
  c.train.attention = "auto"
  # What the backward pass recomputes: 'none' | 'dots' (all but convolutions and products with
  # weights) | 'full'. For the UNet one word, or one for each of its blocks down, mid, up.
  c.train.remat_unet = ("none",)
  c.train.remat_text = "none"  # the text encoders, which see a sequence for every layer
  c.train.warm_start = ""  # an IP-Adapter(-plus) .safetensors file to start from; '' = random
  c.train.max_bad_steps = 10  # steps in a row that are not finite, and skipped, until a run stops
  c.train.log_every = 50
  c.train.save_every = 500  # a checkpoint, and adapter.safetensors as it is then
  c.train.keep = 2
  c.train.keep_every = 0  # steps whose multiples are kept for good, adapter and all; 0 = none
  c.train.sample_every = 500  # 0 = only at the end
  c.train.prompt_sensitivity_every = 500  # how much a wrong word raises the loss; 0 = never

  c.mesh = ml_collections.ConfigDict()
  # Devices along each axis; -1 for one of them = all remaining. The batch is sharded over data and
  # fsdp; parameters, optimizer and EMA over fsdp and tensor (cc_jax.parallel.rules.RULES).
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  # In all; -1 = what the cluster says (Slurm, Open MPI, a TPU slice, Kubernetes).
  c.mesh.processes = 1
  c.mesh.cpu_devices = -1  # virtual CPU devices when there is no accelerator; -1 = one per core

  c.sample = ml_collections.ConfigDict()  # the grid and the scores at the end of the run
  c.sample.split = "test"  # of subjects3d; of other data, subjects that training leaves out
  c.sample.subjects = 40
  c.sample.sampler = "dpmsolver++"
  c.sample.steps = 20
  c.sample.guidance = 5.0
  c.sample.image_guidance = -1.0  # guidance of the image, separate from the text's, if >= 0
  c.sample.scale = 1.0
  # Drawn every sample_every steps, and at the end of data other than subjects3d; {noun} is the
  # subject's class noun. () = other scenes (subjects3d), the subjects' own captions (other data).
  c.sample.prompts = ()
  return c

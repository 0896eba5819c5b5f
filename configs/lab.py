"""The laboratory: measures on subjects3d what each part of the method contributes.

    python -m cc_jax.lab --suite=ablation --budget=3000   # steps of every run (600)
    python -m cc_jax.lab --suite=ablation --arms=core --split=test   # finished arms, once
    python -m cc_jax.lab --config=configs/lab.py:photographs --suite=ablation --arms=core

The last one repeats it on subjects shown as in photographs: references keep their background, and
half of the captions name only the class. A variant is one line of `ARMS`: a name, its family and
what it changes in `run`. Running times: docs/lab.md.
"""

from typing import Any, NamedTuple

import ml_collections

from configs import subjects3d


class Arm(NamedTuple):
  """One variant of the training.

  family: arms that are compared with each other; 'core' and 'control' run with all seeds.
  changes: dotted keys of the training's config and their values.
  tune: a key and its candidates; the first seed's scores on the validation subjects choose for all.
  first: a fraction of the steps, and the changes for that first phase; its rate is constant.
  """

  family: str
  changes: dict[str, Any] = {}  # noqa: RUF012
  tune: tuple[str, tuple] | None = None
  first: tuple[float, dict[str, Any]] | None = None


SELF = {"data.frames": "self"}  # the reference is cut out of the target frame
OFF = {"objective.lambda_cscl": 0.0, "objective.lambda_macl": 0.0}
AUGMENTED = {"data.reference_layout": "random"}  # as MCL's positives are
# IP-Adapter-plus (arXiv 2308.06721): Resampler tokens of the penultimate features in decoupled
# cross-attention, whose K and V start as the text's; no S+, no map, no gate, text left alone; AdamW
# at a constant rate. Its dropout (5 % each) and decay are this project's defaults. Shared with all
# arms: how references are shown, batch, steps, average, and the diffusion loss' weights.
IP_ADAPTER = SELF | OFF | {
  "encoder.s_plus_space": "none", "encoder.fusion": "visual_tokens", "encoder.image_layers": (-2,),
  "injection.form": "visual_only", "injection.location": False, "injection.gate_start": 1.0,
  "train.gate_lr_mult": 0.0, "train.schedule": "constant",
}  # fmt: skip
RATES = ("train.learning_rate", (3e-3, 1e-3, 3e-4, 1e-2))  # the likeliest first: see --candidates


def _weight(factor: float) -> dict[str, float]:
  start = subjects3d.get_config().objective
  return {f"objective.{name}": factor * start[name] for name in ("lambda_cscl", "lambda_macl")}


def _sharp(scaling: str) -> dict[str, Any]:
  names = ("macl_scaling", "macl_temperature", "macl_soft_temperature", "lambda_macl")
  return {f"objective.{name}": value for name, value in zip(names, (scaling, 0.07, 0.07, 5e-4))}


ARMS = {
  # The claim: self-reconstruction entangles, contrast on several levels decouples.
  "method": Arm("core"),
  "self_reconstruction": Arm("core", SELF | OFF),
  "ip_adapter_plus": Arm("core", IP_ADAPTER, tune=RATES),
  "multi_view": Arm("core", OFF),
  "cscl": Arm("core", {"objective.lambda_macl": 0.0}),
  "macl": Arm("core", {"objective.lambda_cscl": 0.0}),
  # Is it the contrast, or the other frame, or that references were moved about?
  "self_mcl": Arm("control", SELF),
  "self_augmented": Arm("control", SELF | OFF | AUGMENTED),
  "multi_view_augmented": Arm("control", OFF | AUGMENTED),
  # How the real similarity enters MACL. The method's soft targets leave room for the others' order
  # at temperature 0.3, which is too mild for one positive; these have InfoNCE's 0.07, and a weight
  # at which they do not drown the diffusion loss.
  "macl_inverse": Arm("scaling", _sharp("inverse")),
  "macl_none": Arm("scaling", _sharp("none")),
  "macl_literal": Arm("scaling", _sharp("literal")),
  "macl_complement": Arm("scaling", _sharp("complement")),
  "macl_two_minus": Arm("scaling", _sharp("two_minus")),
  "macl_log_complement": Arm("scaling", _sharp("log_complement")),
  "macl_none_strong": Arm("scaling", {"objective.macl_scaling": "none"}),  # as strong as S's own
  "macl_soft_sharp": Arm("scaling", _sharp("soft_target")),
  "macl_symmetric": Arm("contrast", {"objective.macl_symmetric": True}),
  "macl_per_token": Arm("contrast", {"objective.macl_pooling": "per_token"}),
  "macl_head": Arm("contrast", {"encoder.contrast_head": 128}),
  "macl_per_token_head": Arm(
    "contrast", {"objective.macl_pooling": "per_token", "encoder.contrast_head": 128}),
  "cscl_cross_frame": Arm("contrast", {"objective.cscl_frame": "cross_frame"}),
  "cscl_mild": Arm("contrast", {"objective.cscl_temperature": 0.3}),
  "location_off": Arm("injection", {"injection.location": False}),
  "form_visual_only": Arm("injection", {"injection.form": "visual_only"}),
  "form_shared": Arm("injection", {"injection.form": "shared"}),
  "visual_tokens": Arm("encoder", {"encoder.fusion": "visual_tokens"}),
  "no_timestep_layer": Arm("encoder", {"encoder.timestep_layer": "none"}),
  "last_layer": Arm("encoder", {"encoder.image_layers": (-1,)}),
  "depth_4": Arm("encoder", {"encoder.depth": 4}),
  "textual_queries_16": Arm("encoder", {"encoder.textual_queries": 16}),
  "textual_cls_last": Arm("encoder", {"encoder.textual_cls": "last"}),
  "s_plus_shared": Arm("s_plus", {"encoder.s_plus_space": "shared"}),
  "s_plus_none": Arm("s_plus", {"encoder.s_plus_space": "none"}),
  "s_words_1": Arm("s_plus", {"encoder.s_words": 1}),
  "s_words_4": Arm("s_plus", {"encoder.s_words": 4}),
  "multi_view_s_words_4": Arm("s_plus", OFF | {"encoder.s_words": 4}),
  "self_s_words_4": Arm("s_plus", SELF | OFF | {"encoder.s_words": 4}),
  "s_plus_free_norm": Arm("s_plus", {"encoder.s_plus_norm": "free"}),
  "plain_pooled": Arm("s_plus", {"encoder.s_plus_pooled": "plain"}),
  "same_class": Arm("negatives", {"data.group": "class", "data.group_ratio": 0.5}),
  "same_family": Arm("negatives", {"data.group": "family", "data.group_ratio": 0.5}),
  "weight_01": Arm("weights", _weight(0.1)),
  "weight_03": Arm("weights", _weight(0.3)),
  "weight_3": Arm("weights", _weight(3.0)),
  "weight_10": Arm("weights", _weight(10.0)),
  "macl_weight_01": Arm("weights", {"objective.lambda_macl": 0.005}),
  "macl_weight_4": Arm("weights", {"objective.lambda_macl": 0.2}),
  # Uniform timesteps and the same weight everywhere, as papers of adapters train.
  "plain_diffusion": Arm(
    "weights", {"objective.timestep_shift": 1.0, "objective.subject_weight": 0.0}),
  # Contrast outweighs the diffusion loss by far, which then finds features that differ already.
  "contrast_first": Arm("warmup", first=(0.2, _weight(200))),
  # How the reference is shown: with its background the scene can leak, re-centred no size can.
  "whole_frame": Arm("reference", {"data.reference_layout": "frame"}),
  "whole_frame_self": Arm("reference", SELF | OFF | {"data.reference_layout": "frame"}),
  "centred": Arm("reference", {"data.reference_layout": "centred"}),
  # How much of IP-Adapter-plus' difference is due to its features? It gets the method's here.
  "ip_adapter_features": Arm(
    "encoder", {k: v for k, v in IP_ADAPTER.items() if k != "encoder.image_layers"}),
}


def get_config(setting: str = "cut_outs") -> ml_collections.ConfigDict:
  """The config of `python -m cc_jax.lab --config=configs/lab.py[:setting]`.

  'cut_outs': references on white, captions that name the whole context; 'photographs': neither.
  Raises ValueError for another setting.
  """
  if setting not in ("cut_outs", "photographs"):
    raise ValueError(f"setting {setting!r} is unknown; configs/lab.py has cut_outs, photographs")
  c = ml_collections.ConfigDict()
  c.setting = setting
  c.seeds = (0, 1, 2)  # of core arms and controls
  c.side_seeds = (0,)

  c.run = subjects3d.get_config()  # of every run, but for what its arm changes
  c.run.data.name = "subjects3d/full"  # 3,520 subjects; rendered on first use, a minute on 4 cores
  c.run.encoder.s_words = 2  # as all arms were trained; `s_words_4` has since become the default
  # References show the subject where and as large as it stands in its frame, on white: re-centred
  # ones would hide size and place, and then no arm could leak them.
  c.run.data.reference_layout = "in_place"
  if setting == "photographs":
    c.run.data.reference_layout = "frame"
    c.run.data.caption_drop_detail_prob = 0.5
  c.run.train.steps = 600 if setting == "cut_outs" else 400  # the budget; --budget for more
  c.run.train.sample_every = 200  # when a run is scored on its way
  c.run.train.prompt_sensitivity_every = 0
  c.run.train.max_bad_steps = 20  # a rate that is too high is a low score, not the suite's end

  c.score = ml_collections.ConfigDict()
  c.score.split = "validation"  # 'test' once, at the end
  c.score.subjects = 120
  c.score.styled = 4  # every so many prompts, one asks for a sketch or a watercolour too; 0 = none
  c.score.hatted = 2  # and so many, one asks for a hat, which the base draws in half of them
  c.score.rounds = 1  # how often each is drawn, every time with another reference and prompt
  c.score.interventions = 50  # subjects on which leakage is measured, 6 pictures each; or 0
  c.score.curve_subjects = 60  # on the way
  c.score.curve_interventions = 30
  c.score.probe_subjects = 200  # whose features are looked at; or 0
  c.score.probe_views = 4
  c.score.timestep = 500  # at which S+ is looked at
  c.score.batch = 48  # pictures at once
  c.score.sweep_arms = ("method", "ip_adapter_plus")
  c.score.sweep_scales = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
  c.score.sweep_subjects = 120
  return c


def fast(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The same suite in minutes: two steps, two seeds, few subjects. Its numbers mean nothing."""
  c.seeds = (0, 1)
  c.run.data.source = "render"
  c.run.encoder.update(image_layers=(1, 2), width=16, depth=1, heads=2, visual_queries=3)
  c.run.injection.location_width = 4
  c.run.mesh.cpu_devices = 1  # compiles sooner
  c.run.train.update(
    steps=2, batch_size=8, warmup_steps=1, sample_every=1, save_every=0, log_every=1
  )
  c.run.sample.update(steps=2)
  c.score.update(subjects=8, interventions=4, curve_subjects=4, curve_interventions=2,
                 probe_subjects=12, probe_views=3, batch=8, sweep_scales=(0.5, 1.0),
                 sweep_subjects=4)
  return c

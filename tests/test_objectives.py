"""The objectives against values by hand and a naive float64 loop written from the formulas."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.objectives import diffusion, infonce
from cc_jax.objectives.cscl import cscl
from cc_jax.objectives.macl import POOLINGS, SCALINGS, macl

IDS = np.array([3, 7, 3, -1, -1])  # 0 and 2 are one subject; -1 is unknown, not a subject
L, N, Q, D = 2, 5, 2, 3


# Compiled whole: op by op, JAX would compile every operation of every test.
macl_jit = jax.jit(
  macl,
  static_argnames=("temperature", "scaling", "soft_temperature", "symmetric", "pooling"),
)
cscl_jit = jax.jit(cscl, static_argnames="temperature")


# The oracle: numpy float64, one pair at a time.


def cosine(a, b):
  return sum(x * y for x, y in zip(a, b)) / (
    math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
  )


def is_allowed(ids, j, k):
  return j == k or ids is None or ids[j] != ids[k] or ids[j] < 0


def scaled(c, s, tau, scaling):
  return {
    "inverse": (c / (s * tau) if c > 0 else c * s / tau),
    "complement": (1 - s) * c / tau,
    "two_minus": (2 - s) * c / tau,
    "log_complement": c / tau + math.log(1 - s + 1e-6),
    "literal": s * c / tau,
    "none": c / tau,
    "soft_target": c / tau,
  }[scaling]


def row_loss(logits, target_logits):
  """Cross-entropy of one row given as {k: logit}; targets by a softmax, or {j: 0.0} for one."""
  z = sum(math.exp(v) for v in logits.values())
  q = {k: math.exp(v) for k, v in target_logits.items()}
  return -sum(q[k] / sum(q.values()) * math.log(math.exp(logits[k]) / z) for k in q)


def naive_macl(z, z_plus, embed, *, tau, scaling, tau_s, symmetric, pooling, ids):
  if pooling == "mean":
    z, z_plus = z.mean(2, keepdims=True), z_plus.mean(2, keepdims=True)
  losses = []
  for a, b in [(z, z_plus), (z_plus, z)] if symmetric else [(z, z_plus)]:
    layers, n, queries, _ = a.shape
    for layer, q, j in itertools.product(range(layers), range(queries), range(n)):
      logits, targets = {}, {j: 0.0}
      for k in range(n):
        if not is_allowed(ids, j, k):
          continue
        c = cosine(a[layer, j, q], b[layer, k, q])
        s_jk = min(max(cosine(embed[j], embed[k]), 0.1), 1.0)
        logits[k] = c / tau if j == k else scaled(c, s_jk, tau, scaling)
        if scaling == "soft_target":
          targets[k] = (1.0 if j == k else s_jk) / tau_s
      losses.append(row_loss(logits, targets))
  return np.mean(losses)


def naive_cscl(v, t, *, tau, ids):
  total, n = 0.0, len(v)
  for i in range(n):
    rows = {j: cosine(v[i], t[j]) / tau for j in range(n) if is_allowed(ids, i, j)}
    columns = {j: cosine(v[j], t[i]) / tau for j in range(n) if is_allowed(ids, i, j)}
    total += row_loss(rows, {i: 0.0}) + row_loss(columns, {i: 0.0})
  return total / (2 * n)


def finite_difference(f, x, h=1e-5):
  gradient = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    step = np.zeros_like(x)
    step[i] = h
    gradient[i] = (f(x + step) - f(x - step)) / (2 * h)
  return gradient


def relative(ours, theirs):
  return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope="module")
def tokens():
  rng = np.random.default_rng(0)
  z, z_plus = (rng.standard_normal((L, N, Q, D)) + 0.3 for _ in range(2))
  return z, z_plus, rng.standard_normal((N, D))  # some S are below 0.1, where they are clipped


# MACL


@pytest.mark.parametrize("scaling", SCALINGS)
def test_macl_is_the_naive_loop(scaling, tokens):
  """Value in every pooling, direction and mask; gradient where all of these are on."""
  z, z_plus, embed = tokens
  arrays = [jnp.asarray(a, jnp.float32) for a in tokens]
  ids_2xN = jnp.stack([jnp.full(N, -1), jnp.asarray(IDS)])  # nobody known, which masks nothing

  def ours(z, z_plus, embed, ids, pooling, symmetric):
    return macl(
      z,
      z_plus,
      embed,
      temperature=0.2,
      scaling=scaling,
      soft_temperature=0.15,
      symmetric=symmetric,
      pooling=pooling,
      subject_ids=ids,
    )[0]

  def naive(z, z_plus, ids, pooling, symmetric):
    return naive_macl(
      z,
      z_plus,
      embed,
      tau=0.2,
      scaling=scaling,
      tau_s=0.15,
      symmetric=symmetric,
      pooling=pooling,
      ids=ids,
    )

  variants = list(itertools.product(POOLINGS, (False, True)))
  values = jax.jit(
    jax.vmap(lambda ids: jnp.stack([ours(*arrays, ids, *variant) for variant in variants]))
  )(ids_2xN)
  expected = [[naive(z, z_plus, ids, *variant) for variant in variants] for ids in (None, IDS)]
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  assert len(set(np.round(np.ravel(values), 4))) == 8  # each choice matters

  last = ("per_token", True)
  dz, dz_plus, d_embed = jax.jit(jax.grad(ours, (0, 1, 2)), static_argnums=(4, 5))(
    *arrays, ids_2xN[1], *last
  )
  assert relative(dz, finite_difference(lambda x: naive(x, z_plus, IDS, *last), z)) < 1e-5
  assert relative(dz_plus, finite_difference(lambda x: naive(z, x, IDS, *last), z_plus)) < 1e-5
  np.testing.assert_array_equal(d_embed, 0.0)  # S is a measurement, not something to learn


def plane(*degrees):
  """Unit vectors of the plane, scaled unevenly, as [1, N, 1, 2] tokens."""
  angle = jnp.radians(jnp.stack([jnp.asarray(d, jnp.float32) for d in degrees]))
  vectors = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
  vectors = vectors * (1 + np.arange(len(degrees)))[:, None]
  return jnp.asarray(vectors[None, :, None, :], jnp.float32)


@pytest.mark.parametrize(
  ("scaling", "negatives"),
  [
    # S = 0.5, τ = 0.5; the two negatives have cosines 1/2 and -1/2, so these are logits.
    ("none", (1.0, -1.0)),
    ("inverse", (2.0, -0.5)),
    ("complement", (0.5, -0.5)),
    ("two_minus", (1.5, -1.5)),
    ("literal", (0.5, -0.5)),
    ("log_complement", (1.0 + math.log(0.500001), -1.0 + math.log(0.500001))),
  ],
)
def test_macl_two_by_two_by_hand(scaling, negatives):
  """Anchors at 0° and 60°, positives at 0° and 120°: cosines [[1, -1/2], [1/2, 1/2]]."""
  embed = plane(10, 70)[0, :, 0]
  loss, metrics = macl_jit(plane(0, 60), plane(0, 120), embed, temperature=0.5, scaling=scaling)
  # Row 0: p = 2, negative cosine -1/2. Row 1: p = 1, negative cosine 1/2.
  expected = 0.5 * (math.log1p(math.exp(negatives[1] - 2)) + math.log1p(math.exp(negatives[0] - 1)))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["positive"], 0.75, rtol=1e-6)
  np.testing.assert_allclose(metrics["negative"], 0.0, atol=1e-6)


def test_soft_target_by_hand():
  """Orthogonal anchors that are their own positives: logits (1/τ, 0), targets from S = 0.5."""
  embed = plane(10, 70)[0, :, 0]
  loss, _ = macl_jit(
    plane(0, 90), plane(0, 90), embed, temperature=0.5, scaling="soft_target", soft_temperature=0.25
  )
  q = 1 / (1 + math.exp(-2.0))  # softmax(1 / 0.25, 0.5 / 0.25) of the positive
  expected = -q * math.log(1 / (1 + math.exp(-2.0))) - (1 - q) * math.log(1 / (1 + math.exp(2.0)))
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_s_is_clipped():
  """Cosines of -0.4, 0 and 0.1 count the same, and 0.2 does not."""
  z, z_plus = plane(0, 60), plane(10, 170)

  @jax.jit
  def losses(cosine):
    embed = plane(0, jnp.degrees(jnp.arccos(cosine)))[0, :, 0]
    options = {"temperature": 0.3, "soft_temperature": 0.5}
    return jnp.stack([macl(z, z_plus, embed, scaling=x, **options)[0] for x in SCALINGS])

  at_bound = losses(0.1)
  for cosine in (-0.4, 0.0):
    np.testing.assert_allclose(losses(cosine), at_bound, rtol=1e-6)
  other = np.abs(losses(0.2) / at_bound - 1) > 1e-4
  assert [name for name, differs in zip(SCALINGS, other) if not differs] == ["none"]


def test_masked_pairs_carry_no_gradient(tokens):
  """With all of one subject only the positives remain: loss 0 and no gradient whatever S is.
  With 0 and 2 of one subject, row 0 does not see positive 2."""
  z, z_plus, embed = (jnp.asarray(a, jnp.float32) for a in tokens)
  one_subject = jnp.zeros(N, jnp.int32)

  def losses(z):
    options = {"temperature": 0.1, "subject_ids": one_subject}
    return jnp.stack([macl(z, z_plus, embed, scaling=name, **options)[0] for name in SCALINGS])

  values, jacobian = jax.jit(lambda z: (losses(z), jax.jacrev(losses)(z)))(z)
  np.testing.assert_allclose(values, 0.0, atol=1e-6)
  np.testing.assert_allclose(jacobian, 0.0, atol=1e-6)

  def of_row_0(z_plus):
    cosines = infonce.cosine_matrix(z[0, :, 0], z_plus[0, :, 0])
    return infonce.cross_entropy(cosines / 0.1, infonce.allowed_pairs(jnp.asarray(IDS), N))[0]

  norms = np.linalg.norm(jax.jit(jax.grad(of_row_0))(z_plus)[0, :, 0], axis=-1)
  assert norms[2] == 0.0 and (norms[[0, 1, 3, 4]] > 1e-6).all()


def test_allowed_pairs():
  """Unknown subjects (-1) stay each other's negatives, and the diagonal always stays."""
  expected = np.ones((N, N), bool)
  expected[0, 2] = expected[2, 0] = False
  np.testing.assert_array_equal(infonce.allowed_pairs(jnp.asarray(IDS), N), expected)
  np.testing.assert_array_equal(infonce.allowed_pairs(None, 2), np.ones((2, 2), bool))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_finite_at_temperature_one_thousandth_and_for_zero_vectors(scaling, tokens):
  z, z_plus, embed = (jnp.asarray(a, jnp.float32) for a in tokens)
  z = z.at[:, 1].set(0.0).at[0, 0, 0].set(1e-30)

  def loss(z, z_plus):
    value, metrics = macl(
      z,
      z_plus,
      embed,
      temperature=0.001,
      scaling=scaling,
      soft_temperature=0.001,
      pooling="per_token",
      subject_ids=jnp.asarray(IDS),
    )
    return value, metrics

  (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(z, z_plus)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, metrics, gradients)))
  np.testing.assert_array_equal(gradients[0][:, 1], 0.0)  # a zero vector has no direction
  assert np.abs(gradients[0][:, 0, 1:]).max() > 0


def test_half_precision_features_are_contrasted_in_float32(tokens):
  arrays = [jnp.asarray(a, jnp.bfloat16) for a in tokens]
  half, _ = macl_jit(*arrays, temperature=0.05)
  full, _ = macl_jit(*(a.astype(jnp.float32) for a in arrays), temperature=0.05)
  assert half.dtype == jnp.float32 and half == full


def test_mean_pooling_is_of_tokens_before_normalising():
  """Tokens 3 e_x and 1 e_y: their mean points to atan(1/3), not to 45°."""
  token = jnp.array([[3.0, 0.0], [0.0, 1.0]])[None, None]
  other = jnp.array([[1.0, 0.0], [1.0, 0.0]])[None, None]
  _, metrics = macl_jit(token, other, jnp.ones((1, 2)), temperature=1.0)
  np.testing.assert_allclose(metrics["positive"], 3 / math.sqrt(10), rtol=1e-6)
  _, metrics = macl_jit(token, other, jnp.ones((1, 2)), temperature=1.0, pooling="per_token")
  np.testing.assert_allclose(metrics["positive"], 0.5, rtol=1e-6)


# CSCL


@pytest.mark.parametrize("ids", [None, IDS])
def test_cscl_is_the_naive_loop(ids):
  rng = np.random.default_rng(1)
  v, t = rng.standard_normal((N, D)), rng.standard_normal((N, D))

  def ours(v, t):
    subject_ids = None if ids is None else jnp.asarray(ids)
    return cscl(v, t, temperature=0.2, subject_ids=subject_ids)[0]

  def naive(v, t):
    return naive_cscl(v, t, tau=0.2, ids=ids)

  loss, (dv, dt) = jax.jit(jax.value_and_grad(ours, (0, 1)))(jnp.float32(v), jnp.float32(t))
  np.testing.assert_allclose(loss, naive(v, t), rtol=1e-5)
  assert relative(dv, finite_difference(lambda x: naive(x, t), v)) < 1e-5
  assert relative(dt, finite_difference(lambda x: naive(v, x), t)) < 1e-5


def test_cscl_two_by_two_by_hand():
  """V at 0° and 60°, T at 0° and 120°: cosines [[1, -1/2], [1/2, 1/2]], τ = 1/2."""
  v, t = plane(0, 60)[0, :, 0], plane(0, 120)[0, :, 0]
  loss, metrics = cscl_jit(v, t, temperature=0.5)
  rows = math.log1p(math.exp(-1 - 2)) + math.log1p(math.exp(1 - 1))
  columns = math.log1p(math.exp(1 - 2)) + math.log1p(math.exp(-1 - 1))
  np.testing.assert_allclose(loss, (rows + columns) / 4, rtol=1e-5)
  np.testing.assert_allclose(metrics["positive"], 0.75, rtol=1e-6)
  swapped, _ = cscl_jit(t, v, temperature=0.5)
  np.testing.assert_allclose(loss, swapped, rtol=1e-6)


def test_retrieval_accuracy():
  """Row 0 finds its positive, row 1 finds row 2's; a tie is no hit; the mask removes its rival."""
  cosines = jnp.array([[0.9, 0.1, 0.2], [0.0, 0.5, 0.6], [0.3, 0.4, 0.4]])
  free = infonce.retrieval_metrics(cosines, infonce.allowed_pairs(None, 3))
  np.testing.assert_allclose(free["accuracy"], 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(free["negative"], 1.6 / 6, rtol=1e-6)
  masked = infonce.retrieval_metrics(cosines, infonce.allowed_pairs(jnp.array([0, 1, 1]), 3))
  np.testing.assert_allclose(masked["accuracy"], 1.0)
  np.testing.assert_allclose(masked["negative"], (0.1 + 0.2 + 0.0 + 0.3) / 4, rtol=1e-6)


def test_cosine_matrix():
  vectors = plane(0, 60, 180)[0, :, 0]
  s = infonce.cosine_matrix(vectors, vectors)
  expected = [[1, 0.5, -1], [0.5, 1, -0.5], [-1, -0.5, 1]]
  np.testing.assert_allclose(s, expected, atol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "match"),
  [
    ({"scaling": "divide"}, "'divide'.*inverse, complement"),
    ({"pooling": "max"}, "'max'.*mean, per_token"),
    ({"temperature": 0.0}, "macl_temperature=0.0.*positive"),
    ({"soft_temperature": -1.0}, "macl_soft_temperature=-1.0"),
  ],
)
def test_macl_errors(arguments, match):
  z = plane(0, 60)
  with pytest.raises(UserError, match=match):
    macl(z, z, jnp.ones((2, 2)), **{"temperature": 0.1, **arguments})
  with pytest.raises(UserError, match="cscl_temperature=0"):
    cscl(z[0, :, 0], z[0, :, 0], temperature=0)


# Diffusion


def test_diffusion_loss_by_hand():
  prediction = jnp.arange(8.0).reshape(2, 2, 2, 1)
  target = jnp.zeros((2, 2, 2, 1))
  per_sample = [(0 + 1 + 4 + 9) / 4, (16 + 25 + 36 + 49) / 4]
  np.testing.assert_allclose(diffusion.per_sample_mse(prediction, target), per_sample)
  loss, metrics = diffusion.diffusion_loss(prediction, target, jnp.array([2.0, 0.5]))
  np.testing.assert_allclose(loss, (2 * per_sample[0] + 0.5 * per_sample[1]) / 2)
  np.testing.assert_allclose(metrics["mse"], sum(per_sample) / 2)

  mask = jnp.array([[[0.0, 1.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]])
  masked = diffusion.per_sample_mse(prediction, target, mask)
  np.testing.assert_allclose(masked, [(1 + 3 * 9) / 4, 0.0])
  gradient = jax.grad(lambda p: diffusion.diffusion_loss(p, target, mask=mask)[0])(prediction)
  np.testing.assert_array_equal(gradient[0, :, 0], 0.0)
  assert np.isfinite(gradient).all()


def test_diffusion_loss_is_float32():
  x = jnp.full((1, 1, 1, 1), 1.0, jnp.bfloat16)
  loss, _ = diffusion.diffusion_loss(x, jnp.full((1, 1, 1, 1), 0.75, jnp.bfloat16))
  assert loss.dtype == jnp.float32 and loss == 0.0625


def test_min_snr_weights_by_hand():
  snr = jnp.array([0.0, 1.0, 4.0, 20.0])
  weights = diffusion.min_snr_weights
  np.testing.assert_allclose(weights(snr, 5.0, "epsilon"), [1, 1, 1, 0.25])
  np.testing.assert_allclose(weights(snr, 5.0, "v_prediction"), [0, 0.5, 0.8, 5 / 21])
  np.testing.assert_allclose(weights(snr, 5.0, "sample"), [0, 1, 4, 5])
  np.testing.assert_array_equal(weights(snr, 0.0, "epsilon"), 1.0)
  with pytest.raises(UserError, match="min_snr_gamma=-1"):
    weights(snr, -1.0, "epsilon")
  with pytest.raises(UserError, match="flow"):
    weights(snr, 5.0, "flow")


def test_min_snr_weights_agree_on_the_error_of_x0():
  """The three prediction types' weighted losses are one and the same error of x_0."""
  rng = np.random.default_rng(3)
  x0, noise, wrong_x0 = (jnp.float32(rng.standard_normal((3, 2, 2, 1))) for _ in range(3))
  t = jnp.array([100, 400, 800])
  losses = []
  for kind in ("epsilon", "v_prediction", "sample"):
    schedule = NoiseSchedule.from_config({"prediction_type": kind})
    x_t = schedule.add_noise(x0, noise, t)
    direct = NoiseSchedule.from_config({"prediction_type": "sample"})
    wrong_noise = direct.to_eps(wrong_x0, x_t, t)
    error = diffusion.per_sample_mse(
      schedule.target(wrong_x0, wrong_noise, t), schedule.target(x0, noise, t)
    )
    losses.append(error * diffusion.min_snr_weights(schedule.snr(t), 5.0, kind))
  np.testing.assert_allclose(losses[0], losses[2], rtol=1e-3)
  np.testing.assert_allclose(losses[1], losses[2], rtol=1e-3)

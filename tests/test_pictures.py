"""Pictures and masks as people have them, at every door, against pixels that are known.

Rows P4 to P7, P15 and P18 of the faults of issue 18. A door is a way in: a folder of subjects, a
TFDS record, a reference on the command line, one handed over in Python, a picture to start from.
"""

import functools
import io
import struct
import types
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from cc_jax.customcontrast.model import CustomContrast
from cc_jax.errors import UserError
from cc_jax.models.clip_pixels import CLIP_PROCESSOR, clip_pixels
from cc_jax.sampling import images as pictures
from data_pipeline import images
from data_pipeline.errors import DataError
from data_pipeline.sources import folder
from data_pipeline.sources.features import Schema
from data_pipeline.sources.tf_data import import_tfds
from data_pipeline.sources.tfds_source import SubjectRecord

SIZE = 32
Y, X = np.mgrid[:SIZE, :SIZE]
SUBJECT = (X - 13) ** 2 / 9**2 + (Y - 18) ** 2 / 7**2 < 1
MASK = np.where(SUBJECT, np.uint8(255), np.uint8(0))
RGB = np.dstack([8 * X, 6 * Y + 20, np.where(SUBJECT, 200, 4 * X)]).astype(np.uint8)
RGB[2:6, 3:12] = (250, 10, 90)  # which way is up
GREY = RGB[..., 1]
DEEP = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE)).astype(np.uint16)
INDEX = (X // 8 + 4 * (Y // 8)).astype(np.uint8)  # 16 squares
PALETTE = np.random.default_rng(1).integers(0, 256, (16, 3)).astype(np.uint8)
CLEAR = np.where(INDEX == 3, np.uint8(0), np.uint8(255))


def grey(values):
  return np.repeat(values[..., None], 3, axis=-1)


def on_white(rgb, alpha):
  alpha = alpha[..., None].astype(int)
  return (rgb * alpha + 255 * (255 - alpha) + 127) // 255


def chunk(name, data):
  body = name + data
  return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(bits, kind, rows, *chunks):
  """A PNG by hand: Pillow writes no colours of 16 bits and no transparent grey of 16 bits."""
  header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], bits, kind, 0, 0, 0)
  data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
  parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def encoded(image, kind="PNG", **options):
  file = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
  return file.getvalue()


def palette(index, colors, **options):
  image = Image.fromarray(index.astype(np.uint8), "L").convert("P")
  image.putpalette(np.asarray(colors, np.uint8).tobytes() + bytes(768 - 3 * len(colors)))
  return encoded(image, **options)


# ---- the doors: each gives the subject on white, at its place in the picture


def by_folder(path, mask):
  rgb, mask = folder.Frame(path, mask, "a duck", True).load()
  return on_white(rgb, mask)


@functools.cache
def schema():
  features = import_tfds().features
  pictures, text = features.Sequence(features.Image()), features.Text()
  kinds = dict(frames=pictures, masks=pictures, captions=features.Sequence(text), class_noun=text)
  return Schema(features.FeaturesDict(kinds | {"subject_id": np.int32}), "a set")


def by_tfds(path, mask):
  values = {
    key: types.SimpleNamespace(bytes_list=types.SimpleNamespace(value=[file.read_bytes()]))
    for key, file in (("frames", path), ("masks", mask))
  }
  example = types.SimpleNamespace(features=types.SimpleNamespace(feature=values))
  return on_white(*SubjectRecord(example, b"", schema(), path.name).frame(0))


def by_command(path, mask):
  return pictures.read_reference(str(path), str(mask), size=SIZE, layout="in_place")


def by_pil(path, mask):
  with Image.open(path) as picture, Image.open(mask) as opened:
    return pictures.read_reference(picture, opened, size=SIZE, layout="in_place")


DOORS = (by_folder, by_tfds, by_command, by_pil)


def through(door, tmp_path, picture=None, mask=None):
  (tmp_path / "a.png").write_bytes(encoded(RGB) if picture is None else picture)
  (tmp_path / "m.png").write_bytes(encoded(MASK) if mask is None else mask)
  return door(tmp_path / "a.png", tmp_path / "m.png").astype(int)


# ---- pictures (P4)

ANIMATION = [Image.fromarray(PALETTE[INDEX]), Image.fromarray(255 - PALETTE[INDEX])]
TRANSPARENT = {"transparency": bytes([255, 255, 255, 0])}
# The file and what a viewer shows of it.
PICTURES = {
  "8-bit grey": (encoded(GREY), grey(GREY)),
  "16-bit grey": (encoded(DEEP), grey(np.rint(DEEP / 257))),
  "16-bit grey TIFF": (encoded(DEEP, "TIFF"), grey(np.rint(DEEP / 257))),
  "16-bit grey PGM": (encoded(DEEP, "PPM"), grey(np.rint(DEEP / 257))),
  "16-bit colours": (png(16, 2, RGB.astype(np.uint16) * 257), RGB),
  "16-bit grey and alpha": (
    png(16, 4, np.dstack([GREY, MASK]).astype(np.uint16) * 257), grey(GREY)),
  "16-bit colours and alpha": (
    png(16, 6, np.dstack([RGB, MASK]).astype(np.uint16) * 257), RGB),
  "16-bit grey, one of them transparent": (
    png(16, 0, DEEP, (b"tRNS", struct.pack(">H", int(DEEP[0, 0])))), grey(np.rint(DEEP / 257))),
  "32-bit integers": (encoded(GREY.astype(np.int32), "TIFF"), grey(GREY)),
  "floats": (encoded(np.float32(DEEP / 65535), "TIFF"), grey(np.rint(DEEP / 257))),
  "black or white": (encoded(Image.fromarray(SUBJECT)), grey(MASK)),
  "grey and alpha": (encoded(Image.fromarray(np.dstack([GREY, MASK]), "LA")), grey(GREY)),
  "palette": (palette(INDEX, PALETTE), PALETTE[INDEX]),
  "palette, one entry transparent": (palette(INDEX, PALETTE, **TRANSPARENT), PALETTE[INDEX]),
  "CMYK": (encoded(Image.fromarray(np.dstack([255 - RGB, 0 * GREY]), "CMYK"), "TIFF"), RGB),
  "animation": (
    encoded(ANIMATION[0], "PNG", save_all=True, append_images=ANIMATION[1:]), PALETTE[INDEX]),
  "frames of a TIFF": (
    encoded(ANIMATION[0], "TIFF", save_all=True, append_images=ANIMATION[1:]), PALETTE[INDEX]),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(kind, door, tmp_path):
  file, rgb = PICTURES[kind]
  np.testing.assert_array_equal(through(door, tmp_path, file), on_white(rgb, MASK))


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_to_start_from(kind, tmp_path):
  file, rgb = PICTURES[kind]
  alpha = {"palette, one entry transparent": CLEAR, "grey and alpha": MASK,
           "16-bit grey and alpha": MASK, "16-bit colours and alpha": MASK,
           }.get(kind, np.full_like(MASK, 255))  # fmt: skip
  if "one of them" in kind:
    alpha = np.where(DEEP == DEEP[0, 0], np.uint8(0), np.uint8(255))
  (tmp_path / "a.png").write_bytes(file)
  with Image.open(tmp_path / "a.png") as opened:
    for source in (tmp_path / "a.png", opened):
      got = pictures.read_start(source, width=SIZE, height=SIZE)
      np.testing.assert_array_equal(got, on_white(rgb, alpha))


def test_a_jpeg_of_printing_colours():
  """CMYK, which Adobe's programs, and Pillow, write inverted with a marker that says so."""
  inks = np.dstack([255 - grey(GREY), 0 * GREY])
  file = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
  assert b"Adobe" in file[:40]
  assert np.abs(images.read_image(file).astype(int) - grey(GREY)).max() <= 3


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La"])
def test_modes_of_pil(mode):
  image = Image.fromarray(RGB)
  if mode == "LAB":
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
  elif mode == "La":
    image = Image.fromarray(np.dstack([GREY, 0 * GREY + 255]), "LA").convert("La")
  else:
    image = image.convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
  wanted = grey(GREY) if mode == "La" else RGB
  far = np.abs(images.read_image(image)[..., :3].astype(int) - wanted)
  assert far.mean() < 2 and far.max() <= (40 if mode == "LAB" else 8)


# ---- masks (P4, P5)


def colored(color, mask=SUBJECT):
  return encoded(np.where(mask[..., None], np.uint8(color), np.uint8(0)))


SOFT = np.where(SUBJECT, np.uint8(255), (100 - 3 * X).astype(np.uint8))
BLACK, WHITE = np.zeros_like(RGB), np.full_like(RGB, 255)
VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
# The file and the mask in it, where it is not MASK.
MASKS = {
  "grey": encoded(MASK),
  "soft grey": (encoded(SOFT), SOFT),
  "soft grey as RGB": (encoded(grey(SOFT)), SOFT),
  "0 and 1": encoded(MASK // 255),
  "16 bits": encoded(MASK.astype(np.uint16) * 257),
  "16 bits, soft": (encoded(DEEP), np.rint(DEEP / 257)),
  "16 bits, 0 and 255": encoded(MASK.astype(np.uint16)),
  "16 bits, 0 and 1": encoded((MASK // 255).astype(np.uint16)),
  "floats": encoded(SUBJECT.astype(np.float32), "TIFF"),
  "integers": encoded(SUBJECT.astype(np.int32), "TIFF"),
  "black or white": encoded(Image.fromarray(SUBJECT)),
  "alpha over black": encoded(np.dstack([BLACK, MASK])),
  "alpha over white": encoded(np.dstack([WHITE, MASK])),
  "alpha over grey": encoded(Image.fromarray(np.dstack([MASK * 0 + 7, MASK]), "LA")),
  "cut-out": encoded(np.dstack([RGB, MASK])),
  "opaque alpha": encoded(np.dstack([grey(MASK), np.full_like(MASK, 255)])),
  "transparent entry": palette(SUBJECT, [(9, 9, 9), (200, 0, 0)], transparency=0),
  "red": colored((255, 0, 0)),
  "green": colored((0, 255, 0)),
  "blue": colored((0, 0, 255)),
  "Pascal VOC": palette(SUBJECT * 1, VOC),
  "Pascal VOC, two objects": palette(SUBJECT * (1 + (X > 13)), VOC),
  "Pascal VOC as RGB": encoded(np.uint8(VOC)[SUBJECT * (1 + 2 * (X > 13))]),
  "palette of labels": palette(SUBJECT * 2, [(n, n, n) for n in range(4)]),
  "palette with white first": palette(~SUBJECT, [(255, 255, 255), (0, 0, 0)]),
  "palette with red first": palette(~SUBJECT, [(255, 0, 0), (0, 0, 0)]),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, door, tmp_path):
  file, mask = MASKS[kind] if isinstance(MASKS[kind], tuple) else (MASKS[kind], MASK)
  np.testing.assert_array_equal(through(door, tmp_path, mask=file), on_white(RGB, mask))


def test_a_compressed_mask_of_a_colour_has_no_halo():
  mask = np.where(SUBJECT[..., None], np.uint8([255, 0, 0]), np.uint8(0)).repeat(2, 0).repeat(2, 1)
  got = images.read_mask(encoded(mask, "JPEG", quality=75))
  assert np.mean((got >= 128) != MASK.repeat(2, 0).repeat(2, 1) // 255) < 0.01
  assert got[mask.any(-1)].mean() > 240


def test_masks_that_say_nothing(tmp_path):
  """The values that were seen are in the message, whether all is background or all is subject."""
  for file, seen in ((BLACK, "0 to 0"), (BLACK + np.uint8(90), "90 to 90")):
    with pytest.raises(UserError, match=f"a.png: the mask .* is empty.* {seen}.*white"):
      through(by_command, tmp_path, mask=encoded(file))
    with pytest.raises(DataError, match=f"a.png: the mask .* is empty.* {seen}.*white"):
      through(by_folder, tmp_path, mask=encoded(file))
  with pytest.warns(UserWarning, match="values 255 to 255, .* subject everywhere"):
    through(by_command, tmp_path, mask=encoded(WHITE))
  on_paper = np.where(SUBJECT[..., None], np.uint8([255, 0, 0]), np.uint8(255))
  for door in DOORS:
    with pytest.raises((UserError, DataError), match="no black .*255 to 255"):
      through(door, tmp_path, mask=encoded(on_paper))


# ---- which way is up (P6)

TURNED = Image.fromarray(np.rot90(RGB))  # orientation 6: turn clockwise to look at it
EXIF = Image.Exif()
EXIF[0x112] = 6
XMP = (
  '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-'
  'ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {}</rdf:RDF></x:xmpmeta>'
)
XMP_FORMS = (
  'tiff:Orientation="6"/>', "tiff:Orientation='6'/>",
  "><tiff:Orientation>6</tiff:Orientation></rdf:Description>",
)


def with_text(key, value):
  text = PngImagePlugin.PngInfo()
  if key == "XML:com.adobe.xmp":
    text.add_itxt(key, value)
  else:  # as ImageMagick writes it
    kind = key.split()[-1]
    text.add_text(key, f"\n{kind}\n{len(value):8}\n{value.hex()}\n", zip=True)
  return encoded(TURNED, pnginfo=text)


def after_the_image_data(kind, data):
  """A PNG whose chunk comes last, where a reader of headers does not see it."""
  file = encoded(TURNED)
  end = len(file) - 12  # IEND
  assert file[end + 4 : end + 8] == b"IEND"
  return file[:end] + chunk(kind, data) + file[end:]


EXIF_BYTES = EXIF.tobytes() if EXIF.tobytes()[:4] == b"Exif" else b"Exif\0\0" + EXIF.tobytes()
PLACES = {
  "JPEG, EXIF": encoded(TURNED, "JPEG", exif=EXIF, quality=100, subsampling=0),
  "JPEG, XMP": encoded(TURNED, "JPEG", xmp=XMP.format(XMP_FORMS[0]).encode(), quality=100,
                       subsampling=0),
  "WebP, EXIF": encoded(TURNED, "WEBP", exif=EXIF, lossless=True),
  "WebP, XMP": encoded(TURNED, "WEBP", xmp=XMP.format(XMP_FORMS[0]).encode(), lossless=True),
  "TIFF": encoded(TURNED, "TIFF", tiffinfo={274: 6}),
  "PNG, eXIf": encoded(TURNED, exif=EXIF),
  "PNG, eXIf at the end": after_the_image_data(b"eXIf", EXIF_BYTES[6:]),
  "PNG, XMP at the end": after_the_image_data(
    b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + XMP.format(XMP_FORMS[0]).encode()),
  "PNG, raw EXIF": with_text("Raw profile type exif", EXIF_BYTES),
  "PNG, raw APP1": with_text("Raw profile type APP1", EXIF_BYTES),
  "PNG, raw XMP": with_text("Raw profile type xmp", XMP.format(XMP_FORMS[0]).encode()),
  **{f"PNG, XMP {n}": with_text("XML:com.adobe.xmp", XMP.format(form))
     for n, form in enumerate(XMP_FORMS)},
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("place", PLACES)
def test_orientation(place, door, tmp_path):
  far = through(door, tmp_path, PLACES[place]) - on_white(RGB, MASK)
  assert np.abs(far).max() <= (12 if "JPEG" in place else 0)


def test_orientation_of_pictures_to_start_from_and_of_masks(tmp_path):
  for place in ("PNG, eXIf", "PNG, XMP 0"):
    (tmp_path / "a.png").write_bytes(PLACES[place])
    for source in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
      np.testing.assert_array_equal(
        pictures.read_start(source, width=SIZE, height=SIZE), RGB)
      np.testing.assert_array_equal(pictures.to_image(Image.open(tmp_path / "a.png")), RGB)
  mask = encoded(np.rot90(MASK), exif=EXIF)
  np.testing.assert_array_equal(through(by_pil, tmp_path, mask=mask), on_white(RGB, MASK))
  image = Image.open(io.BytesIO(PLACES["PNG, eXIf"]))
  images.read_image(image)
  np.testing.assert_array_equal(image, TURNED)  # the caller's object stays as it is


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(orientation):
  exif = Image.Exif()
  exif[0x112] = orientation
  file = encoded(RGB[4:], exif=exif)  # 28 x 32: sides are swapped, too
  with Image.open(io.BytesIO(file)) as image:
    wanted = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(images.read_image(image), wanted)
    converted = image.convert("RGBA")  # keeps pixels and metadata as they are stored
  np.testing.assert_array_equal(images.read_image(file), wanted)
  np.testing.assert_array_equal(images.read_image(converted)[..., :3], wanted)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    upright = ImageOps.exif_transpose(converted)  # turned by the caller: not a second time
  np.testing.assert_array_equal(images.read_image(upright)[..., :3], wanted)


def test_broken_metadata_turns_nothing():
  text = PngImagePlugin.PngInfo()
  text.add_text("Raw profile type exif", "\nexif\n 4\nnot hexadecimal\n")
  for options in (dict(exif=b"Exif\0\0nonsense"), dict(pnginfo=text)):
    np.testing.assert_array_equal(images.read_image(encoded(RGB, **options)), RGB)


@pytest.mark.parametrize("door", [by_folder, by_tfds, by_command, by_pil])
def test_mask_drawn_on_the_stored_picture_follows_it(door, tmp_path):
  """A telephone's JPEG says how to turn it; its mask, of a program that does not look, cannot."""
  rgb, mask = RGB[:, 2:30], MASK[:, 2:30]  # 32 x 28
  stored = encoded(np.rot90(rgb), exif=EXIF)
  wanted = through(door, tmp_path, encoded(rgb), encoded(mask))
  for given in (mask, np.rot90(mask)):
    np.testing.assert_array_equal(through(door, tmp_path, stored, encoded(given)), wanted)


# ---- files that cannot be read (P15 and after)

WHOLE = encoded(RGB, "JPEG")
BROKEN = {
  "cut off": (WHOLE[:-60], "cannot be read .*truncated"),
  "empty": (b"", "empty file"),
  "text": (b"not a picture", "not a picture"),
  "floats of no scale": (encoded(np.float32(DEEP), "TIFF"), r"float32 and values from .* 65\d\d\d"),
  "negative integers": (encoded(np.int32(GREY) - 300, "TIFF"), "int32 and values from -290 to -94"),
}


def one_line(error):
  assert "\n" not in str(error.value) and isinstance(error.value, UserError | DataError)


@pytest.mark.parametrize("door", [by_folder, by_tfds, by_command])
@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_cannot_be_read(kind, door, tmp_path):
  file, message = BROKEN[kind]
  for what, given in (("a.png", dict(picture=file)), ("m.png|mask", dict(mask=file))):
    with pytest.raises((UserError, DataError), match=f"({what}).*{message}") as error:
      through(door, tmp_path, **given)
    one_line(error)
  (tmp_path / "a.png").write_bytes(file)
  with pytest.raises(UserError, match=f"a.png.*{message}") as error:
    pictures.read_start(tmp_path / "a.png", width=SIZE, height=SIZE)
  one_line(error)


def test_no_file(tmp_path):
  for path, message in ((tmp_path, "is a folder"), (tmp_path / "none.png", "none.png is missing")):
    for read in (
      lambda p: pictures.read_reference(p),
      lambda p: pictures.read_reference(RGB, str(p)),
      lambda p: pictures.read_start(p, width=8, height=8),
    ):
      with pytest.raises(UserError, match=message) as error:
        read(path)
      one_line(error)
  with pytest.raises(DataError, match="is a folder"):
    images.read_mask(tmp_path)
  for wrong in (7, {"a": 1}):
    with pytest.raises(UserError, match="the reference is of the type (int|dict); give a path"):
      pictures.read_reference(wrong)


def test_pil_object_of_a_broken_file():
  with Image.open(io.BytesIO(BROKEN["cut off"][0])) as image:
    with pytest.raises(UserError, match="the reference cannot be read"):
      pictures.read_reference(image)


@pytest.mark.parametrize("door", [by_folder, by_tfds, by_command])
def test_pictures_that_are_too_large(door, tmp_path, monkeypatch):
  """P15: 1,024 pixels are as 180 million."""
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
  small = encoded(RGB[:20, :20])
  for what, given in (("a.png", dict(mask=small)), ("m.png|mask", dict(picture=small))):
    with pytest.raises((UserError, DataError),
                       match=f"({what}).* more than 1,000 pixels.*smaller") as error:
      through(door, tmp_path, **given)
    one_line(error)
  with pytest.raises(UserError, match="a.png.* more than 1,000 pixels"):
    through(lambda path, _: pictures.read_start(path, width=8, height=8), tmp_path)
  with pytest.raises(DataError, match="a.png.* more than 1,000 pixels"):  # a frame without mask
    (tmp_path / "m.png").unlink()
    (tmp_path / "b.png").write_bytes(small)
    subject = tmp_path / "subject"
    subject.mkdir()
    (tmp_path / "a.png").rename(subject / "a.png")
    (tmp_path / "b.png").rename(subject / "b.png")
    (subject / "captions.json").write_text(
      '{"class_noun": "duck", "captions": {"a.png": "a duck", "b.png": "a duck"}}')
    folder.read_folder(tmp_path)


# ---- arrays (P18)

ARRAYS = {
  "RGB": (RGB, RGB),
  "int64": (RGB.astype(np.int64), RGB),
  "int32": (RGB.astype(np.int32), RGB),
  "uint16": (RGB.astype(np.uint16) * 257, RGB),
  "float64": (RGB / 255, RGB),
  "float32": (RGB.astype(np.float32) / 255, RGB),
  "float16": (np.float16(MASK[..., None] / 255), grey(MASK)),
  "overshooting by rounding": (RGB / 254.8, np.rint(RGB / 254.8 * 255)),
  "[h, w]": (GREY, grey(GREY)),
  "[h, w, 1]": (GREY[..., None], grey(GREY)),
  "bool": (SUBJECT, grey(MASK)),
  "RGBA of floats": (np.dstack([RGB, MASK]) / 255, RGB),
  "a JAX array": (jnp.asarray(RGB), RGB),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays(kind):
  array, rgb = ARRAYS[kind]
  got = pictures.read_reference(array, MASK, size=SIZE, layout="in_place")
  np.testing.assert_array_equal(got, on_white(rgb, MASK))
  start = pictures.read_start(array, width=SIZE, height=SIZE)
  np.testing.assert_array_equal(start, on_white(rgb, MASK) if "RGBA" in kind else rgb)


@pytest.mark.parametrize("mask", [
  MASK, MASK[..., None], grey(MASK), np.dstack([RGB, MASK]), SUBJECT, SUBJECT[..., None],
  SUBJECT.astype(int), MASK.astype(np.int32), SUBJECT.astype(float), MASK.astype(np.uint16) * 257,
  MASK // 255,
])  # fmt: skip
def test_masks_as_arrays(mask):
  got = pictures.read_reference(RGB, mask, size=SIZE, layout="in_place")
  np.testing.assert_array_equal(got, on_white(RGB, MASK))


@pytest.mark.parametrize("array, message", [
  (RGB.astype(float), r"\[32, 32, 3\], the type float64 and values from 0 to 250"),
  (RGB / 127.5 - 1, r"float64 and values from -1 to 0.96"),
  (RGB.astype(int) + 99, r"int64 and values from 99 to 349"),
  (RGB.astype(int) - 99, r"int64 and values from -99 to 151"),
  (np.full((8, 8), np.nan), "float64 and values from nan"),
  (RGB.transpose(2, 0, 1), r"the shape \[3, 32, 32\], the type uint8"),
  (RGB[None], r"the shape \[1, 32, 32, 3\]"),
  (RGB[0, 0], r"the shape \[3\]"),
  (RGB[..., :2], r"the shape \[32, 32, 2\]"),
  (RGB[:0], r"the shape \[0, 32, 3\], the type uint8 and no values"),
  (RGB.astype(complex), "complex128"),
  (RGB.astype(str), "<U"),
])  # fmt: skip
def test_arrays_that_are_no_pictures(array, message):
  for read in (
    lambda: pictures.read_reference(array),
    lambda: pictures.read_start(array, width=8, height=8),
    lambda: pictures.read_reference(RGB, array),
  ):
    with pytest.raises(UserError, match=f"(reference|image|mask) has .*{message}.*give") as error:
      read()
    one_line(error)


# ---- resizing for the image encoder (P7)


def hard(height, width):
  """A checkerboard of single pixels, beside noise of black and white."""
  noise = np.random.default_rng(0).integers(0, 2, (height, width, 3)) * 255
  y, x = np.mgrid[:height, :width]
  board = 255 * ((x + y) % 2)[..., None]
  return np.where((x < width // 2)[..., None], board, noise).astype(np.uint8)


@pytest.mark.parametrize("processor", ["CLIPImageProcessorPil", "BitImageProcessorPil"])
@pytest.mark.parametrize("height, width, edge, size, resample", [
  (64, 64, 224, 224, 3), (64, 64, 48, 48, 3), (90, 131, 64, 56, 3), (131, 90, 70, 64, 3),
  (21, 40, 40, 36, 3), (64, 64, 224, 224, 2), (131, 90, 70, 64, 2),
])  # fmt: skip
def test_resized_as_transformers_does(processor, height, width, edge, size, resample):
  image = hard(height, width)
  theirs = getattr(transformers, processor)(
    size={"shortest_edge": edge}, crop_size={"height": size, "width": size}, resample=resample)
  wanted = theirs(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
  method = {3: "cubic", 2: "linear"}[resample]
  ours = dict(CLIP_PROCESSOR, size=size, shortest_edge=edge, method=method)
  got = jax.jit(lambda pixels: clip_pixels(pixels, ours))(jnp.float32(image)[None] / 255)[0]
  # In levels of 255: not one is another.
  assert np.abs((got - wanted) * np.array(ours["std"]) * 255).max() < 0.01


@pytest.mark.parametrize("size", [224, 40])
def test_the_image_encoder_sees_what_transformers_would_show(size):
  """`image_features`, which training compiles, on the pictures that triples are made of."""
  image = hard(64, 64)
  theirs = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": size}, crop_size={"height": size, "width": size})
  wanted = theirs(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)

  def seen(pixels):
    return types.SimpleNamespace(hidden_states=[pixels], embedding=pixels)

  model = types.SimpleNamespace(
    image_encoder=seen, image_processor=dict(CLIP_PROCESSOR, size=size), image_layers=[0],
    dtype=jnp.float32)
  features = jax.jit(lambda pixels: CustomContrast.image_features(model, pixels))
  got = features(jnp.float32(image)[None] / 255)[1][0]
  assert np.abs((got - wanted) * np.array(CLIP_PROCESSOR["std"]) * 255).max() < 0.01

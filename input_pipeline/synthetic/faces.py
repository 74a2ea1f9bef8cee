"""Drawn faces in the official layout of CelebAMask-HQ, with exact masks and attributes.

A face consists of layers. A layer is a shape in the plane with a color and usually a part of `celebamask_hq.PARTS`.
Head coordinates have their origin between the cheeks, x right and y down; the head is about 1.2 high. An attribute is
true if its feature is drawn, even if hair or a hat covers it; attributes that are never drawn (`Young`, `Attractive`,
...) are always false. `Male` means a square jaw, more often short hair, and a beard only then; it is merely a label to
learn.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator

import cv2
import numpy as np
from absl import logging

from input_pipeline.celebamask_hq import ATTRIBUTE_FILE, ATTRIBUTES, PARTS
from mtl_sparse.runtime import progress

_VERSION = 1  # of the drawn data; increase it when the images or labels change
_HAIR = {"Black_Hair": (0.1, 0.08, 0.08), "Brown_Hair": (0.36, 0.22, 0.12), "Blond_Hair": (0.85, 0.7, 0.38)}
_HAIR["Gray_Hair"] = (0.62, 0.62, 0.63)


@dataclasses.dataclass(frozen=True)
class Face:
    """The parameters of a drawn face.

    Attributes:
      true: names of the attributes that are true.
      skin: RGB [3] in [0, 1], as the other colors.
      hair: color of the hair.
      cloth: color of the clothes; the hat has its channels in reverse order.
      backdrop: color of the background.
      jaw: exponent of the lower outline of the head; 2 is an ellipse.
      length: y of the lower end of the hair, in head coordinates.
      smile: height of the corners of the mouth above its middle, in head coordinates.
      shape: (eye distance, eye height, nose length, mouth width), each about 1.
      tilt: rotation of the head in radians.
      scale: one unit of head coordinates, in image heights.
      shift: offset (x, y) of the head from the image center, in units of head coordinates before the rotation.
    """

    true: frozenset[str]
    skin: np.ndarray
    hair: np.ndarray
    cloth: np.ndarray
    backdrop: np.ndarray
    jaw: float
    length: float
    smile: float
    shape: np.ndarray
    tilt: float
    scale: float
    shift: np.ndarray


def draw_folder(frames: int, height: int, width: int, seed: int, folder: str) -> pathlib.Path:
    """Draw faces into a CelebAMask-HQ folder, unless it exists.

    The folder is written under a temporary name and renamed when it is complete.

    Args:
      frames: number of faces of all splits together.
      height: height of the images in pixels.
      width: width of the images in pixels.
      seed: random seed.
      folder: parent folder. The name of the CelebAMask-HQ folder in it contains the other arguments.

    Returns:
      The CelebAMask-HQ folder.
    """
    target = pathlib.Path(folder).expanduser() / f"faces_v{_VERSION}_{frames}_{height}x{width}_seed{seed}"
    if target.is_dir():
        return target
    logging.info("Drawing %d embedded faces (not real data) into %s", frames, target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "CelebA-HQ-img").mkdir(parents=True)
    rows = []
    for index in progress.track(range(frames), "drawing faces"):
        face = random_face(np.random.default_rng((seed, index)))
        image, parts = draw(face, height, width, np.random.default_rng((seed, index, 1)))
        path = partial / "CelebA-HQ-img" / f"{index}.jpg"
        cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        masks = partial / "CelebAMask-HQ-mask-anno" / str(index // 2000)
        masks.mkdir(parents=True, exist_ok=True)
        for number in np.unique(parts[parts > 0]):
            cv2.imwrite(str(masks / f"{index:05d}_{PARTS[number - 1]}.png"), np.uint8(255) * (parts == number))
        rows.append(" ".join([f"{index}.jpg", *("1" if name in face.true else "-1" for name in ATTRIBUTES)]))
    (partial / ATTRIBUTE_FILE).write_text("\n".join([str(frames), " ".join(ATTRIBUTES), *rows]) + "\n")
    (partial / "faces.json").write_text(json.dumps({"version": _VERSION, "seed": seed, "frames": frames}) + "\n")
    partial.rename(target)
    return target


def random_face(rng: np.random.Generator) -> Face:
    """Draw random attributes, and the other parameters of a face to match."""

    def chance(probability: float) -> bool:
        return bool(rng.random() < probability)

    male = chance(0.5)
    hair = rng.choice(list(_HAIR))
    has = {
        "Male": male,
        "Smiling": chance(0.5),
        "Mouth_Slightly_Open": chance(0.4),
        "Eyeglasses": chance(0.3),
        "Bald": male and chance(0.15),
        "Wearing_Hat": chance(0.12),
        "Bushy_Eyebrows": chance(0.6 if male else 0.2),
        "Arched_Eyebrows": chance(0.2 if male else 0.5),
        "Big_Nose": chance(0.4),
        "Big_Lips": chance(0.3),
        "Narrow_Eyes": chance(0.25),
        "Mustache": male and chance(0.3),
        "Goatee": male and chance(0.25),
        "Wearing_Lipstick": not male and chance(0.5),
        "Wearing_Earrings": chance(0.1 if male else 0.4),
        "Wearing_Necklace": chance(0.05 if male else 0.3),
        "Rosy_Cheeks": chance(0.2),
        "Pale_Skin": chance(0.2),
    }
    has["No_Beard"] = not (has["Mustache"] or has["Goatee"])
    if not has["Bald"]:
        has[hair] = True
        has["Bangs"] = chance(0.3)
        has["Receding_Hairline"] = not has["Bangs"] and male and chance(0.25)
        has["Wavy_Hair"] = chance(0.4)
        has["Straight_Hair"] = not has["Wavy_Hair"]
    tone = 0.95 if has["Pale_Skin"] else rng.uniform(0.4, 0.85)
    long = chance(0.12 if male else 0.75)
    return Face(
        true=frozenset(name for name, true in has.items() if true),
        skin=tone * np.array([1.0, rng.uniform(0.78, 0.84) + 0.1 * has["Pale_Skin"], 0.68 + 0.22 * has["Pale_Skin"]]),
        hair=np.clip(np.array(_HAIR[hair]) * rng.uniform(0.8, 1.2), 0, 1),
        cloth=rng.uniform(0.1, 0.9, 3),
        backdrop=rng.uniform(0.1, 0.95, 3),
        jaw=rng.uniform(3.2, 4.2) if male else rng.uniform(1.7, 2.1),
        length=rng.uniform(0.6, 1.0) if long else rng.uniform(-0.15, 0.1),
        smile=rng.uniform(0.11, 0.17) if has["Smiling"] else rng.uniform(-0.08, -0.02),
        shape=rng.uniform(0.9, 1.1, 4),
        tilt=rng.uniform(-0.15, 0.15),
        scale=rng.uniform(0.64, 0.74),
        shift=rng.uniform(-0.07, 0.07, 2),
    )


def draw(face: Face, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one face.

    Args:
      face: the face.
      height: height of the image in pixels.
      width: width of the image in pixels.
      rng: random generator of the brightness and the image noise.

    Returns:
      The image uint8 [H, W, 3], and the parts uint8 [H, W]: 1 + index in PARTS of the part at each pixel center, or 0.
    """
    color, parts = _paint(face, *_head_coordinates(face, height, width))
    # Three more points per pixel smooth the edges of the image. Parts come from the center alone.
    for shift in ((0.3, 0.1), (-0.1, 0.3), (-0.2, -0.3)):
        color = color + _paint(face, *_head_coordinates(face, height, width, shift))[0]
    color = color / 4 * rng.uniform(0.85, 1.1) + rng.normal(0, 0.015, color.shape)
    return np.clip(color * 255, 0, 255).astype(np.uint8), parts


def _head_coordinates(face, height, width, shift=(0.0, 0.0)):
    """Return the head coordinates x and y [H, W] of the pixel centers, shifted by a fraction of a pixel."""
    v, u = np.mgrid[0:height, 0:width]
    x = ((u + 0.5 + shift[0]) - width / 2) / (height * face.scale) - face.shift[0]
    y = ((v + 0.5 + shift[1]) - height * 0.5) / (height * face.scale) - face.shift[1]
    cos, sin = np.cos(face.tilt), np.sin(face.tilt)
    return cos * x + sin * y, cos * y - sin * x


def _paint(face, x, y):
    """Return RGB [H, W, 3] and parts [H, W] at points in head coordinates."""
    color = face.backdrop * (0.85 + 0.15 * np.sin(3 * x + 2 * y))[..., None]
    parts = np.zeros(x.shape, np.uint8)
    for inside, part, rgb in _layers(face, x, y):
        rgb = np.broadcast_to(rgb, color.shape)
        color = np.where(inside[..., None], rgb, color)
        if part is not None:
            parts[inside] = 1 + PARTS.index(part)
    return color, parts


def _ellipse(x, y, center, half):
    return ((x - center[0]) / half[0]) ** 2 + ((y - center[1]) / half[1]) ** 2 < 1


_Layer = tuple[np.ndarray, str | None, np.ndarray]  # where [H, W], its part (None: keep the part below), RGB


@dataclasses.dataclass(frozen=True)
class _Points:
    """A face at points [H, W], with the shapes and colors that several layers use."""

    face: Face
    x: np.ndarray
    y: np.ndarray
    side: np.ndarray  # |x|
    shade: np.ndarray  # [H, W, 1], brightness
    skin: np.ndarray  # [H, W, 3], RGB
    dark: np.ndarray  # [3], RGB of brows and beard
    strands: np.ndarray  # [H, W, 1], brightness of hair
    waves: np.ndarray | float  # offset of the outline of the hair
    head: np.ndarray  # whether a point is on the head
    crown: np.ndarray  # whether a point is on the head or on the hair around it

    def has(self, attribute: str) -> bool:
        return attribute in self.face.true


def _points(face: Face, x: np.ndarray, y: np.ndarray) -> _Points:
    side = np.abs(x)
    shade = (1 - 0.25 * side**2 - 0.1 * y)[..., None]  # the light comes from the front and above
    power = np.where(y > 0, face.jaw, 2.0)
    return _Points(
        face,
        x,
        y,
        side=side,
        shade=shade,
        skin=face.skin * shade,
        dark=face.hair * 0.75,
        strands=(1 + 0.15 * np.sin(45 * x + 6 * y))[..., None],
        waves=0.03 * np.sin(16 * y) if "Wavy_Hair" in face.true else 0.0,
        head=(side / 0.45) ** power + (np.abs(y) / 0.6) ** power < 1,
        crown=_ellipse(x, y, (0, -0.06), (0.54, 0.66)),
    )


def _layers(face: Face, x: np.ndarray, y: np.ndarray) -> Iterator[_Layer]:
    """Yield the layers of a face, from back to front."""
    at = _points(face, x, y)
    yield from _body(at)
    yield from _skin(at)
    yield from _mouth(at)
    yield from _nose(at)
    yield from _eyes(at)
    yield from _hair(at)


def _body(at: _Points) -> Iterator[_Layer]:
    """Yield the hair behind the head, neck, clothes, ears and jewelry."""
    face, x, y, side = at.face, at.x, at.y, at.side
    if not at.has("Bald"):
        behind = (side < 0.52 + at.waves) & (y > -0.1) & (y < face.length)
        yield at.crown & (y < 0) | behind, "hair", face.hair * at.strands * 0.8
    yield (side < 0.2) & (y > 0.3) & (y < 0.95), "neck", at.skin * 0.85
    if at.has("Wearing_Necklace"):
        yield (np.abs(y - 0.65 + 0.9 * x**2) < 0.02) & (side < 0.2), "neck_l", np.array([0.9, 0.8, 0.3])
    yield y > 0.78 + 0.25 * np.clip(side - 0.15, 0, None) - 0.1 * (side < 0.15), "cloth", face.cloth * at.shade
    for name, sign in (("l_ear", -1), ("r_ear", 1)):
        yield _ellipse(x, y, (sign * 0.46, 0), (0.07, 0.13)), name, at.skin * 0.9
        if at.has("Wearing_Earrings"):
            yield _ellipse(x, y, (sign * 0.47, 0.17), (0.03, 0.05)), "ear_r", np.array([0.95, 0.85, 0.35])


def _skin(at: _Points) -> Iterator[_Layer]:
    """Yield the skin of the head, rosy cheeks and a goatee."""
    yield at.head, "skin", at.skin
    if at.has("Rosy_Cheeks"):
        yield _ellipse(at.side, at.y, (0.26, 0.16), (0.1, 0.08)), None, at.skin * np.array([1.1, 0.8, 0.8])
    if at.has("Goatee"):
        yield _ellipse(at.x, at.y, (0, 0.5), (0.14, 0.16)) & at.head, None, at.dark * at.strands


def _mouth(at: _Points) -> Iterator[_Layer]:
    """Yield the mustache, the lips and the inside of the mouth.

    The middle line of the mouth is a parabola whose ends rise with the smile.
    """
    face, has = at.face, at.has
    half_width = 0.25 * face.shape[3]
    along = np.clip(at.side / half_width, 0, 1)
    offset = at.y - (0.33 - face.smile * (along**2 - 0.5))
    thick = (0.06 if has("Big_Lips") else 0.04) * (1 - along**2)
    gap = (0.035 if has("Mouth_Slightly_Open") else 0.0) * (1 - along**2)
    lips = np.array([0.8, 0.1, 0.2]) if has("Wearing_Lipstick") else 0.4 * face.skin + np.array([0.3, 0.05, 0.05])
    within = at.side < half_width
    if has("Mustache"):
        yield (np.abs(offset + gap + 0.075) < 0.045) & within, None, at.dark * at.strands
    yield within & (offset < -gap) & (offset > -gap - thick), "u_lip", lips * 0.9
    yield within & (np.abs(offset) <= gap), "mouth", np.array([0.95, 0.93, 0.9]) if has("Smiling") else lips * 0.35
    yield within & (offset > gap) & (offset < gap + thick), "l_lip", lips


def _nose(at: _Points) -> Iterator[_Layer]:
    """Yield the nose and its nostrils."""
    y, side = at.y, at.side
    half_width = 0.1 if at.has("Big_Nose") else 0.06
    end = 0.18 * at.face.shape[2]
    nose = (y > -0.05) & (y < end) & (side < half_width * (0.35 + 0.65 * (y + 0.05) / (end + 0.05)))
    yield nose, "nose", at.skin * 0.93
    yield _ellipse(side, y, (half_width * 0.55, end - 0.02), (0.02, 0.012)), "nose", at.skin * 0.45


def _eyes(at: _Points) -> Iterator[_Layer]:
    """Yield the eyeglasses, which lie under the eyes, then eyes and brows."""
    x, y, side = at.x, at.y, at.side
    eye = (0.19 * at.face.shape[0], -0.1)
    if at.has("Eyeglasses"):
        lens = _ellipse(side, y, eye, (0.15, 0.12))
        frame = lens & ~_ellipse(side, y, eye, (0.125, 0.095)) | (np.abs(y + 0.1) < 0.015) & (side < eye[0] - 0.12)
        yield lens, "eye_g", at.skin * np.array([0.85, 0.92, 1.0])
        yield frame, "eye_g", np.array([0.08, 0.08, 0.1])
    half = (0.075, (0.025 if at.has("Narrow_Eyes") else 0.045) * at.face.shape[1])
    arch = 0.06 if at.has("Arched_Eyebrows") else 0.015
    thick = 0.03 if at.has("Bushy_Eyebrows") else 0.014
    brow = np.abs(y + 0.24 - arch * ((side - eye[0]) / 0.1) ** 2 * 0.5) < thick
    for name, there in (("l", x < 0), ("r", x > 0)):
        open_eye = _ellipse(side, y, eye, half) & there
        yield open_eye, f"{name}_eye", np.array([0.95, 0.95, 0.95])
        yield open_eye & _ellipse(side, y, eye, (0.035, 0.04)), f"{name}_eye", np.array([0.15, 0.12, 0.1])
        yield brow & (np.abs(side - eye[0]) < 0.11) & there, f"{name}_brow", at.dark


def _hair(at: _Points) -> Iterator[_Layer]:
    """Yield the hair in front of the head, and a hat."""
    face, x, y, side = at.face, at.x, at.y, at.side
    if not at.has("Bald"):
        line = -0.2 if at.has("Bangs") else -0.5 if at.has("Receding_Hairline") else -0.36
        fringe = line + 0.25 * side**2 + at.waves
        beside = ~at.head & (y < max(face.length, 0.0)) & (y < 0.3)
        yield at.crown & ((y < fringe) | beside & (y < 0.15)), "hair", face.hair * at.strands
    if at.has("Wearing_Hat"):
        cap = _ellipse(x, y, (0, -0.3), (0.56, 0.5)) & (y < -0.36)
        brim = (np.abs(y + 0.36) < 0.05) & (side < 0.66)
        yield cap | brim, "hat", face.cloth[::-1] * 0.8 * np.where(brim, 0.7, 1.0)[..., None]

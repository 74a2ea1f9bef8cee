"""Drawn faces in CelebAMask-HQ's official layout, with exact masks and attributes.

A face is made of layers, each a shape in the plane with a colour and, where it is one, a part of `celebamask_hq.PARTS`.
Coordinates are the head's: origin between the cheeks, x right, y down, the head about 1.2 high. An attribute is true
where what it names is drawn, though hair or a hat may cover it; those that are not drawn (`Young`, `Attractive`, ...)
are never true. `Male` stands for a square jaw, with short hair more often and beards only then: a label to learn, and
nothing more.
"""

import dataclasses
import json
import pathlib
import shutil

import cv2
import numpy as np
from absl import logging

from input_pipeline.celebamask_hq import ATTRIBUTE_FILE, ATTRIBUTES, PARTS

_VERSION = 1  # of what is drawn: raise it when the pictures change
_HAIR = {"Black_Hair": (0.1, 0.08, 0.08), "Brown_Hair": (0.36, 0.22, 0.12), "Blond_Hair": (0.85, 0.7, 0.38)}
_HAIR["Gray_Hair"] = (0.62, 0.62, 0.63)


@dataclasses.dataclass(frozen=True)
class Face:
    """What is drawn.

    Attributes:
      true: names of its attributes.
      skin, hair, cloth, backdrop: RGB in [0, 1].
      jaw: exponent of the face's lower outline; 2 is an ellipse.
      length: how far down the hair reaches, in head coordinates.
      smile: how far the corners of the mouth are above its middle.
      shape: (eye distance, eye height, nose length, mouth width), each about 1.
      tilt, scale, shift: of the head in the picture: radians, picture heights, (x, y).
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
    """Draws faces into a CelebAMask-HQ folder below `folder`, unless they are there already.

    Args:
      frames: faces in all; the data set divides them.
      height, width: pixels.
      seed: of everything random.
      folder: parent; the folder's own name says what is in it.

    Returns:
      The folder.
    """
    target = pathlib.Path(folder).expanduser() / f"faces_v{_VERSION}_{frames}_{height}x{width}_seed{seed}"
    if target.is_dir():
        return target
    logging.info("Drawing %d embedded faces (not real data) into %s", frames, target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "CelebA-HQ-img").mkdir(parents=True)
    rows = []
    for index in range(frames):
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
    """Draws a face's attributes, and the rest of it to match."""

    def chance(probability):
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
    """Draws one face: image uint8 [H, W, 3]; parts uint8 [H, W], 0 or 1 + index in PARTS of what each centre shows."""
    color, parts = _paint(face, *_head_coordinates(face, height, width))
    # Three more points a pixel smooth the picture's edges; parts stay those of the centre.
    for shift in ((0.3, 0.1), (-0.1, 0.3), (-0.2, -0.3)):
        color = color + _paint(face, *_head_coordinates(face, height, width, shift))[0]
    color = color / 4 * rng.uniform(0.85, 1.1) + rng.normal(0, 0.015, color.shape)
    return np.clip(color * 255, 0, 255).astype(np.uint8), parts


def _head_coordinates(face, height, width, shift=(0.0, 0.0)):
    v, u = np.mgrid[0:height, 0:width]
    x = ((u + 0.5 + shift[0]) - width / 2) / (height * face.scale) - face.shift[0]
    y = ((v + 0.5 + shift[1]) - height * 0.5) / (height * face.scale) - face.shift[1]
    cos, sin = np.cos(face.tilt), np.sin(face.tilt)
    return cos * x + sin * y, cos * y - sin * x


def _paint(face, x, y):
    """RGB [H, W, 3] and parts [H, W] at points of the head's plane."""
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


def _layers(face, x, y):
    """(where, its part or None: the part below stays, RGB), the farthest first."""
    has = face.true.__contains__
    eye_distance, eye_height, nose_length, mouth_width = face.shape
    side = np.abs(x)
    shade = (1 - 0.25 * side**2 - 0.1 * y)[..., None]  # the light comes from the front and above
    skin, dark = face.skin * shade, face.hair * 0.75
    strands = (1 + 0.15 * np.sin(45 * x + 6 * y))[..., None]
    waves = 0.03 * np.sin(16 * y) if has("Wavy_Hair") else 0.0
    power = np.where(y > 0, face.jaw, 2.0)
    head = (side / 0.45) ** power + (np.abs(y) / 0.6) ** power < 1
    crown = _ellipse(x, y, (0, -0.06), (0.54, 0.66))  # head and hair together
    if not has("Bald"):
        behind = (side < 0.52 + waves) & (y > -0.1) & (y < face.length)
        yield crown & (y < 0) | behind, "hair", face.hair * strands * 0.8
    yield (side < 0.2) & (y > 0.3) & (y < 0.95), "neck", skin * 0.85
    if has("Wearing_Necklace"):
        yield (np.abs(y - 0.65 + 0.9 * x**2) < 0.02) & (side < 0.2), "neck_l", np.array([0.9, 0.8, 0.3])
    yield y > 0.78 + 0.25 * np.clip(side - 0.15, 0, None) - 0.1 * (side < 0.15), "cloth", face.cloth * shade
    for name, sign in (("l_ear", -1), ("r_ear", 1)):
        yield _ellipse(x, y, (sign * 0.46, 0), (0.07, 0.13)), name, skin * 0.9
        if has("Wearing_Earrings"):
            yield _ellipse(x, y, (sign * 0.47, 0.17), (0.03, 0.05)), "ear_r", np.array([0.95, 0.85, 0.35])
    yield head, "skin", skin
    if has("Rosy_Cheeks"):
        yield _ellipse(side, y, (0.26, 0.16), (0.1, 0.08)), None, skin * np.array([1.1, 0.8, 0.8])
    if has("Goatee"):
        yield _ellipse(x, y, (0, 0.5), (0.14, 0.16)) & head, None, dark * strands
    # The mouth's middle line is a parabola whose ends rise with the smile.
    half_width = 0.25 * mouth_width
    along = np.clip(side / half_width, 0, 1)
    offset = y - (0.33 - face.smile * (along**2 - 0.5))
    thick = (0.06 if has("Big_Lips") else 0.04) * (1 - along**2)
    gap = (0.035 if has("Mouth_Slightly_Open") else 0.0) * (1 - along**2)
    lips = np.array([0.8, 0.1, 0.2]) if has("Wearing_Lipstick") else 0.4 * face.skin + np.array([0.3, 0.05, 0.05])
    if has("Mustache"):
        yield (np.abs(offset + gap + 0.075) < 0.045) & (side < half_width), None, dark * strands
    within = side < half_width
    yield within & (offset < -gap) & (offset > -gap - thick), "u_lip", lips * 0.9
    yield within & (np.abs(offset) <= gap), "mouth", np.array([0.95, 0.93, 0.9]) if has("Smiling") else lips * 0.35
    yield within & (offset > gap) & (offset < gap + thick), "l_lip", lips
    nose_half = 0.1 if has("Big_Nose") else 0.06
    end = 0.18 * nose_length
    nose = (y > -0.05) & (y < end) & (side < nose_half * (0.35 + 0.65 * (y + 0.05) / (end + 0.05)))
    yield nose, "nose", skin * 0.93
    yield _ellipse(side, y, (nose_half * 0.55, end - 0.02), (0.02, 0.012)), "nose", skin * 0.45
    eye = (0.19 * eye_distance, -0.1)
    if has("Eyeglasses"):
        lens = _ellipse(side, y, eye, (0.15, 0.12))
        frame = lens & ~_ellipse(side, y, eye, (0.125, 0.095)) | (np.abs(y + 0.1) < 0.015) & (side < eye[0] - 0.12)
        yield lens, "eye_g", skin * np.array([0.85, 0.92, 1.0])
        yield frame, "eye_g", np.array([0.08, 0.08, 0.1])
    half = (0.075, (0.025 if has("Narrow_Eyes") else 0.045) * eye_height)
    arch = 0.06 if has("Arched_Eyebrows") else 0.015
    brow = np.abs(y + 0.24 - arch * ((side - eye[0]) / 0.1) ** 2 * 0.5) < (0.03 if has("Bushy_Eyebrows") else 0.014)
    for name, there in (("l", x < 0), ("r", x > 0)):
        open_eye = _ellipse(side, y, eye, half) & there
        yield open_eye, f"{name}_eye", np.array([0.95, 0.95, 0.95])
        yield open_eye & _ellipse(side, y, eye, (0.035, 0.04)), f"{name}_eye", np.array([0.15, 0.12, 0.1])
        yield brow & (np.abs(side - eye[0]) < 0.11) & there, f"{name}_brow", dark
    if not has("Bald"):
        line = -0.2 if has("Bangs") else -0.5 if has("Receding_Hairline") else -0.36
        fringe = line + 0.25 * side**2 + waves
        beside = ~head & (y < max(face.length, 0.0)) & (y < 0.3)
        yield crown & ((y < fringe) | beside & (y < 0.15)), "hair", face.hair * strands
    if has("Wearing_Hat"):
        cap = _ellipse(x, y, (0, -0.3), (0.56, 0.5)) & (y < -0.36)
        brim = (np.abs(y + 0.36) < 0.05) & (side < 0.66)
        yield cap | brim, "hat", face.cloth[::-1] * 0.8 * np.where(brim, 0.7, 1.0)[..., None]

"""Furnished rooms rendered by ray casting, in the `NYUD_MT` layout, with exact labels.

A room is the inside of a box. Furniture consists of boxes that may be rotated about the vertical axis. World
coordinates are in meters, x right, y down and z forward. The camera is at the origin, rotated by yaw and pitch. Labels
come from the geometry at the center ray of each pixel, so segmentation, depth (along the optical axis) and normals
(camera coordinates, toward the camera) are exact.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import cv2
import numpy as np
from absl import logging

from input_pipeline import nyud_mt
from mtl_sparse.runtime import progress

_VERSION = 1  # of the rendered data; increase it when the images or labels change
_CEILING = 22
# Class ids of the NYU 40-class mapping (see nyud_mt.CLASSES; 1 = wall).
_WALL, _FLOOR, _CABINET, _BED, _CHAIR, _SOFA, _TABLE, _DOOR, _WINDOW, _SHELF, _PICTURE = range(1, 12)
_TELEVISION = 25


@dataclasses.dataclass(frozen=True)
class Box:
    """A solid box that is rotated about the vertical axis."""

    center: np.ndarray  # [3], meters
    half: np.ndarray  # half sizes [3], meters
    yaw: float  # radians
    label: int
    color: np.ndarray  # RGB in [0, 1]
    texture: str = "plain"


@dataclasses.dataclass(frozen=True)
class Room:
    """A room with furniture, a lamp and a camera."""

    low: np.ndarray  # corner [3] with the smallest coordinates; its y is the ceiling
    high: np.ndarray  # opposite corner [3]; its y is the floor
    boxes: tuple[Box, ...]
    colors: np.ndarray  # [3, 3] RGB of wall, floor and ceiling
    light: np.ndarray  # position [3] of the lamp
    yaw: float  # of the camera, radians
    pitch: float
    focal: float  # focal length, in image heights


def draw_folder(frames: int, **settings: Any) -> pathlib.Path:
    """Render `frames` rooms, of which a sixth are test samples; for `settings`, see `render_folder`."""
    return render_folder(frames - frames // 6, frames // 6, **settings)


def train_count(frames: int) -> int:
    """Return the number of training images among `frames` rooms of `draw_folder`."""
    rooms = frames - frames // 6
    return rooms - nyud_mt.held_out(rooms)


def render_folder(frames: int, test_frames: int, height: int, width: int, seed: int, folder: str) -> pathlib.Path:
    """Render training and test rooms into an `NYUD_MT` folder, unless it exists.

    The folder is written under a temporary name and renamed when it is complete.

    Args:
      frames: number of samples in gt_sets/train.txt, of which a tenth becomes the validation split.
      test_frames: number of samples in gt_sets/val.txt, which is the test split.
      height: height of the images in pixels.
      width: width of the images in pixels.
      seed: random seed.
      folder: parent folder. The name of the `NYUD_MT` folder in it contains the other arguments.

    Returns:
      The `NYUD_MT` folder.
    """
    name = f"rooms_v{_VERSION}_{frames}+{test_frames}_{height}x{width}_seed{seed}"
    target = pathlib.Path(folder).expanduser() / name
    if target.is_dir():
        return target
    logging.info("Rendering %d embedded rooms (not real data) into %s", frames + test_frames, target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for kind in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (partial / kind).mkdir(parents=True)
    names = [f"{index:05d}" for index in range(frames + test_frames)]
    for index, frame_name in enumerate(progress.track(names, "rendering rooms")):
        room = random_room(np.random.default_rng((seed, index)))
        frame = render(room, height, width, np.random.default_rng((seed, index, 1)))
        cv2.imwrite(
            str(partial / "images" / f"{frame_name}.jpg"), frame["image"][..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]
        )
        cv2.imwrite(str(partial / "segmentation" / f"{frame_name}.png"), frame["segmentation"])
        for kind in ("depth", "normals", "edge"):
            np.save(partial / kind / f"{frame_name}.npy", frame[kind])
    (partial / "gt_sets" / "train.txt").write_text("\n".join(names[:frames]) + "\n")
    (partial / "gt_sets" / "val.txt").write_text("\n".join(names[frames:]) + "\n")
    (partial / "rooms.json").write_text(json.dumps({"version": _VERSION, "seed": seed, "frames": frames}) + "\n")
    partial.rename(target)
    return target


def random_room(rng: np.random.Generator) -> Room:
    """Draw a random room with furniture along its walls and a camera that looks across it."""
    size_x, size_z, room_height = rng.uniform(3.2, 6), rng.uniform(3.5, 6.5), rng.uniform(2.4, 3.0)
    camera_height = rng.uniform(1.2, 1.7)
    camera = np.array([rng.uniform(0.3, 0.7) * size_x, rng.uniform(0.25, 0.6)])  # from the corner
    low = np.array([-camera[0], camera_height - room_height, -camera[1]])
    high = low + np.array([size_x, room_height, size_z])
    base = rng.uniform(0.5, 0.95, 3)
    colors = np.stack(
        [
            0.6 * base + 0.4 * base.mean(),
            np.array([0.55, 0.38, 0.24]) * rng.uniform(0.6, 1.3) + rng.uniform(-0.05, 0.05, 3),
            np.full(3, rng.uniform(0.85, 0.97)),
        ]
    )
    boxes: list[Box] = []
    taken: list[tuple] = []
    for _ in range(rng.integers(5, 10)):
        make = _FURNITURE[rng.integers(len(_FURNITURE))]
        side = rng.integers(3)  # against the far, the left or the right wall
        pieces, half_width, half_depth = make(rng)
        along = size_x if side == 0 else size_z
        if along <= 2 * half_width + 0.2:
            continue
        place = rng.uniform(half_width + 0.1, along - half_width - 0.1)
        if side == 0:
            center, yaw, foot = (low[0] + place, high[2] - half_depth), 0.0, (half_width, half_depth)
        else:
            x = low[0] + half_depth if side == 1 else high[0] - half_depth
            center, foot = (x, low[2] + place), (half_depth, half_width)
            yaw = -np.pi / 2 if side == 1 else np.pi / 2
        flat = half_depth < 0.06  # hangs on the wall and may overlap with low furniture
        area = (center[0] - foot[0], center[0] + foot[0], center[1] - foot[1], center[1] + foot[1], flat)
        if any(_overlap(area, other) for other in taken) or _overlap(area, (-0.6, 0.6, -0.6, 0.6, False)):
            continue
        taken.append(area)
        cos, sin = np.cos(yaw), np.sin(yaw)
        for offset, half, label, color, texture in pieces:
            x, z = offset[0], offset[2]
            position = [center[0] + cos * x + sin * z, high[1] - offset[1], center[1] - sin * x + cos * z]
            boxes.append(Box(np.array(position), np.array(half), yaw, label, np.clip(color, 0, 1), texture))
    light = np.array([rng.uniform(0.3, 0.7) * size_x + low[0], low[1] + 0.25, rng.uniform(0.3, 0.7) * size_z + low[2]])
    return Room(
        low, high, tuple(boxes), np.clip(colors, 0, 1), light,
        yaw=rng.uniform(-0.5, 0.5), pitch=rng.uniform(0.05, 0.3), focal=rng.uniform(0.95, 1.15),
    )  # fmt: skip


def render(room: Room, height: int, width: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Render one sample.

    Args:
      room: the room.
      height: height of the image in pixels.
      width: width of the image in pixels.
      rng: random generator of the image noise.

    Returns:
      "image" uint8 [H, W, 3]; "segmentation" uint8 [H, W]; "depth" float32 [H, W] in meters; "normals" float32
      [H, W, 3], unit vectors; "edge" float32 [H, W], 1 where the surface differs from that of the left or upper
      neighbor; "surface" integers [H, W], an id of the visible plane (not written to disk).
    """
    rays, rotation = _rays(room, height, width)
    hit = _cast(room, np.zeros(3), rays)
    color = _shade(room, hit)
    # Two more rays per pixel smooth the edges of the image. Labels come from the center ray alone.
    for shift in ((0.3, 0.2), (-0.3, -0.2)):
        shifted, _ = _rays(room, height, width, shift)
        color = color + _shade(room, _cast(room, np.zeros(3), shifted))
    color = color / 3 + rng.normal(0, 0.012, color.shape)
    surface = hit["surface"].reshape(height, width)
    edge = np.zeros((height, width), np.float32)
    edge[:, 1:] = surface[:, 1:] != surface[:, :-1]
    edge[1:] = np.maximum(edge[1:], surface[1:] != surface[:-1])
    return {
        "image": np.clip(color * 255, 0, 255).astype(np.uint8).reshape(height, width, 3),
        "segmentation": hit["label"].reshape(height, width).astype(np.uint8),
        "depth": hit["distance"].reshape(height, width).astype(np.float32),
        "normals": (hit["normal"] @ rotation).reshape(height, width, 3).astype(np.float32),
        "edge": edge,
        "surface": surface,
    }


def _rays(room, height, width, shift=(0.0, 0.0)):
    """Return ray directions [H * W, 3] with camera z = 1 (so distances are depths), and the camera rotation [3, 3]."""
    v, u = np.mgrid[0:height, 0:width]
    focal = room.focal * height
    x = (u + 0.5 + shift[0] - width / 2) / focal
    y = (v + 0.5 + shift[1] - height / 2) / focal
    camera = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 3)
    cos, sin = np.cos(room.pitch), np.sin(room.pitch)
    tilt = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    rotation = _turn(room.yaw) @ tilt
    return camera @ rotation.T, rotation


def _turn(yaw):
    """Return the object-to-world rotation [3, 3] about the vertical axis."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def _slabs(origin, direction, low, high):
    """Return the entry and exit distances [N] of rays through an axis-aligned box, and those of each axis [N, 3]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (low - origin) / direction, (high - origin) / direction
    near, far = np.minimum(a, b), np.maximum(a, b)
    # NumPy takes several times as long for near.max(-1), a reduction over three numbers.
    entry = np.maximum(np.maximum(near[:, 0], near[:, 1]), near[:, 2])
    leave = np.minimum(np.minimum(far[:, 0], far[:, 1]), far[:, 2])
    return entry, leave, near, far


def _cast(room, origin, rays):
    """Return the first hit of each ray with the room or its furniture: {"distance": [N], "normal": [N, 3], ...}."""
    count = len(rays)
    index = np.arange(count)
    _, distance, _, far = _slabs(origin, rays, room.low, room.high)
    axis = far.argmin(-1)
    sign = np.sign(rays[index, axis])
    normal = np.zeros((count, 3))
    normal[index, axis] = -sign
    plane = np.where(axis == 1, np.where(sign > 0, 1, 2), 0)  # wall, floor, ceiling
    label = np.array([_WALL, _FLOOR, _CEILING])[plane]
    color = room.colors[plane]
    surface = axis * 2 + (sign > 0)
    point = origin + distance[:, None] * rays
    texture = np.where(plane == 1, _TEXTURES.index("planks"), _TEXTURES.index("plain"))
    local = point.copy()
    for number, box in enumerate(room.boxes):
        turn = _turn(box.yaw)
        ray, start = rays @ turn, (origin - box.center) @ turn
        entry, leave, near, _ = _slabs(start, ray, -box.half, box.half)
        closer = (entry < leave) & (entry > 1e-6) & (entry < distance)
        if not closer.any():
            continue
        where = index[closer]
        face = near[closer].argmax(-1)
        side = np.sign(ray[where, face])
        distance[closer] = entry[closer]
        outward = np.zeros((len(where), 3))
        outward[np.arange(len(where)), face] = -side
        normal[closer] = outward @ turn.T
        label[closer], color[closer] = box.label, box.color
        surface[closer] = 6 * (number + 1) + face * 2 + (side > 0)
        texture[closer] = _TEXTURES.index(box.texture)
        local[closer] = start + entry[closer, None] * ray[closer]
        point[closer] = origin + entry[closer, None] * rays[closer]
    return {
        "distance": distance, "normal": normal, "label": label, "color": color, "surface": surface,
        "point": point, "texture": texture, "local": local,
    }  # fmt: skip


_TEXTURES = ("plain", "planks", "books", "stripes")


def _shade(room, hit):
    """Return Lambertian RGB [N, 3] of hits under one lamp with shadows, and ambient light."""
    x, y, z = hit["local"].T
    pattern = np.select(
        [hit["texture"] == 1, hit["texture"] == 2, hit["texture"] == 3],
        [
            0.85 + 0.15 * (np.floor(x / 0.14) % 2) + 0.05 * np.sin(z * 9 + np.floor(x / 0.14) * 5),
            0.55 + 0.45 * np.abs(np.sin(np.floor(x / 0.06) * 12.9 + np.floor(y / 0.35) * 7.3)),
            0.9 + 0.1 * np.sign(np.sin(x * 25)),
        ],
        1.0 + 0.03 * np.sin(x * 17 + 3 * z) * np.sin(y * 13 + 2 * z),
    )
    to_light = room.light - hit["point"]
    far = np.linalg.norm(to_light, axis=-1)
    facing = np.clip(np.sum(hit["normal"] * to_light, -1) / far, 0, None)
    lit = np.ones(len(far))
    for box in room.boxes:
        turn = _turn(box.yaw)
        entry, leave, _, _ = _slabs((room.light - box.center) @ turn, -to_light @ turn, -box.half, box.half)
        lit[(entry < leave) & (entry > 0) & (entry < 1 - 1e-4)] = 0.0
    light = 0.42 + 0.75 * lit * facing / (1 + 0.06 * far**2)
    return hit["color"] * (pattern * light)[:, None]


def _overlap(a, b):
    """Return whether two floor areas (x low, x high, z low, z high, on the wall) overlap, if of the same kind."""
    if a[4] != b[4]:
        return False
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


# Furniture: rng -> (pieces, half width, half depth). A piece is (offset of its center: x, height above the
# floor, z toward the wall; half sizes; class; RGB; texture), in coordinates whose +z points at the wall.

_Piece = tuple[tuple[float, float, float], tuple[float, float, float], int, np.ndarray, str]
_Furniture = tuple[list[_Piece], float, float]


def _bed(rng: np.random.Generator) -> _Furniture:
    width, length, top = rng.uniform(0.5, 0.8), 1.0, rng.uniform(0.4, 0.55)
    sheet, wood = rng.uniform(0.3, 0.95, 3), np.array([0.4, 0.25, 0.15])
    pieces: list[_Piece] = [
        ((0, top / 2, 0), (width, top / 2, length), _BED, sheet, "stripes"),
        ((0, top + 0.06, length - 0.25), (width * 0.8, 0.06, 0.18), _BED, np.full(3, 0.95), "plain"),
        ((0, 0.5, length - 0.02), (width, 0.5, 0.02), _BED, wood, "plain"),
    ]
    return pieces, width, length


def _sofa(rng: np.random.Generator) -> _Furniture:
    width, color = rng.uniform(0.7, 1.1), rng.uniform(0.1, 0.6, 3)
    pieces: list[_Piece] = [
        ((0, 0.21, 0), (width, 0.21, 0.42), _SOFA, color, "plain"),
        ((0, 0.42, 0.34), (width, 0.42, 0.08), _SOFA, color * 0.9, "plain"),
        ((width - 0.09, 0.3, 0), (0.09, 0.3, 0.42), _SOFA, color * 0.95, "plain"),
        ((0.09 - width, 0.3, 0), (0.09, 0.3, 0.42), _SOFA, color * 0.95, "plain"),
    ]
    return pieces, width, 0.42


def _table(rng: np.random.Generator) -> _Furniture:
    width, depth, top = rng.uniform(0.45, 0.8), rng.uniform(0.3, 0.45), rng.uniform(0.65, 0.78)
    wood = np.array([0.62, 0.43, 0.26]) * rng.uniform(0.7, 1.3)
    pieces: list[_Piece] = [((0, top, 0), (width, 0.03, depth), _TABLE, wood, "planks")]
    for x in (-1, 1):
        for z in (-1, 1):
            leg = (x * (width - 0.04), top / 2, z * (depth - 0.04))
            pieces.append((leg, (0.035, top / 2, 0.035), _TABLE, wood * 0.8, "plain"))
    return pieces, width, depth


def _chair(rng: np.random.Generator) -> _Furniture:
    color = np.array([rng.uniform(0.5, 0.8), rng.uniform(0.1, 0.3), rng.uniform(0.1, 0.3)])
    pieces: list[_Piece] = [
        ((0, 0.44, 0), (0.22, 0.03, 0.22), _CHAIR, color, "plain"),
        ((0, 0.7, 0.2), (0.22, 0.25, 0.025), _CHAIR, color, "stripes"),
    ]
    for x in (-0.18, 0.18):
        for z in (-0.18, 0.18):
            pieces.append(((x, 0.21, z), (0.025, 0.21, 0.025), _CHAIR, color * 0.6, "plain"))
    return pieces, 0.22, 0.22


def _cabinet(rng: np.random.Generator) -> _Furniture:
    width, depth, tall = rng.uniform(0.35, 0.7), rng.uniform(0.2, 0.3), rng.uniform(0.4, 1.0)
    color = np.array([0.7, 0.55, 0.35]) * rng.uniform(0.6, 1.3)
    return [((0, tall, 0), (width, tall, depth), _CABINET, color, "plain")], width, depth


def _bookshelf(rng: np.random.Generator) -> _Furniture:
    width, tall = rng.uniform(0.35, 0.6), rng.uniform(0.8, 1.05)
    color = np.array([rng.uniform(0.5, 0.9), rng.uniform(0.3, 0.6), rng.uniform(0.2, 0.5)])
    return [((0, tall, 0), (width, tall, 0.16), _SHELF, color, "books")], width, 0.16


def _door(rng: np.random.Generator) -> _Furniture:
    color = np.array([0.5, 0.33, 0.2]) * rng.uniform(0.8, 1.6)
    return [((0, 1.0, 0), (0.42, 1.0, 0.03), _DOOR, color, "plain")], 0.42, 0.03


def _window(rng: np.random.Generator) -> _Furniture:
    width, tall = rng.uniform(0.4, 0.7), rng.uniform(0.4, 0.55)
    pieces: list[_Piece] = [
        ((0, 1.5, 0), (width, tall, 0.02), _WINDOW, np.array([0.75, 0.9, 1.0]) * 1.3, "plain"),
        ((0, 1.5, 0), (0.02, tall, 0.03), _WINDOW, np.full(3, 0.95), "plain"),
    ]
    return pieces, width, 0.03


def _picture(rng: np.random.Generator) -> _Furniture:
    width, tall = rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.35)
    pieces: list[_Piece] = [
        ((0, 1.6, 0.01), (width, tall, 0.02), _PICTURE, np.full(3, 0.15), "plain"),
        ((0, 1.6, -0.01), (width - 0.04, tall - 0.04, 0.02), _PICTURE, rng.uniform(0.1, 0.9, 3), "books"),
    ]
    return pieces, width, 0.03


def _television(rng: np.random.Generator) -> _Furniture:
    pieces: list[_Piece] = [
        ((0, 0.25, 0), (0.6, 0.25, 0.2), _CABINET, np.full(3, rng.uniform(0.25, 0.9)), "plain"),
        ((0, 0.85, 0), (0.5, 0.3, 0.03), _TELEVISION, np.full(3, 0.06), "plain"),
    ]
    return pieces, 0.6, 0.2


_FURNITURE = (_bed, _sofa, _table, _chair, _cabinet, _bookshelf, _door, _window, _picture, _television)

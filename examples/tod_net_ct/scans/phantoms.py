"""Seeded abdominal CT phantoms with organ labels, so that every stage of the example runs without a download.

The anatomy is a set of smooth shapes in millimetres, each given by its signed distance and painted in turn, later
shapes over earlier ones. The patient varies with the seed; the grid decides only how finely that patient is seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ORGANS", "Phantom", "abdominal_phantom", "organ_mask"]

ORGANS = {
    "background": 0,
    "liver": 1,
    "tumour": 2,
    "kidney": 3,
    "kidney_tumour": 4,
    "spleen": 5,
    "pancreas": 6,
    "stomach": 7,
    "bowel": 8,
    "gallbladder": 9,
    "vessel": 10,
    "bone": 11,
    "lung": 12,
}
"""Organ ids; body wall, muscle, fat and air are background, and vessels inside an organ belong to the organ."""

_MASKS = {"liver": ("liver", "tumour"), "kidney": ("kidney", "kidney_tumour")}

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Phantom:
    """A patient on a grid.

    Attributes:
        volume_hu: Noise-free CT `(D, H, W)` in HU, float32.
        label: Organ ids `(D, H, W)` as in `ORGANS`, uint8.
    """

    volume_hu: Tensor
    label: Tensor


def organ_mask(label: Tensor, organ: str) -> Tensor:
    """Mask of an organ as the segmentation tasks define it: "liver" and "kidney" include their tumours.

    Args:
        label: Organ ids of any shape.
        organ: A name in `ORGANS`.

    Returns:
        A bool tensor of the same shape.

    Raises:
        ValueError: If the organ is unknown.
    """
    if organ not in ORGANS:
        raise ValueError(f"organ_mask: organ must be one of {', '.join(ORGANS)}, got {organ!r}; pass 'liver'")
    mask = torch.zeros_like(label, dtype=torch.bool)
    for part in _MASKS.get(organ, (organ,)):
        mask |= label == ORGANS[part]
    return mask


def abdominal_phantom(
    seed: int,
    shape: tuple[int, int, int] = (32, 96, 96),
    voxel_mm: tuple[float, float, float] = (5.0, 4.0, 4.0),
) -> Phantom:
    r"""A slab of a random patient's upper abdomen.

    Each shape with signed distance `d` (negative inside) is painted over what is there, with an edge as soft as a
    scanner's point spread of width `w`:

    $$\mathrm{HU} \leftarrow \mathrm{HU} + \frac{\mathrm{HU}_{organ} - \mathrm{HU}}{1 + e^{d / w}}, \qquad
    w = 0.8\,\mathrm{mm} + \tfrac14 \Delta_{xy}$$

    Row 0 is anterior, column 0 is the patient's right, and slices run from the feet to the head. The seed decides
    on build, fat, tilt, the position, size and shape of every organ, lesions, contrast phase and the slab's height.

    Args:
        seed: The patient. Neither the global random state nor the grid changes the anatomy.
        shape: Slices, rows and columns; the grid's centre is the body's.
        voxel_mm: Voxel size `(dz, dy, dx)`; a body is 280 to 375 mm wide and 220 to 280 mm deep.

    Shape:
        `(D, H, W)`.

    Units:
        mm and HU. Liver 46 to 76, its lesions 12 to 45 below or 20 to 40 above it; spleen, muscle, pancreas and
        stomach wall at most 35 from it and mostly less than 15; kidney 20 to 170, aorta 42 to 220 and vena cava
        40 to 150 with the contrast phase; fat about -100, gas -950, bone 120 to 620, all with 4 HU of texture.

    Approximation:
        Shapes are ellipsoids and tubes under one smooth deformation, so that a network finds them easier than real
        organs; a voxel is sampled at its centre, so that thick slices show less partial volume than a scanner's.

    Raises:
        ValueError: If the shape or the voxel size is not three positive numbers.

    Example:
        >>> phantom = abdominal_phantom(0, shape=(4, 32, 32), voxel_mm=(10.0, 12.0, 12.0))
        >>> phantom.volume_hu.shape, bool(organ_mask(phantom.label, "liver").any())
        (torch.Size([4, 32, 32]), True)
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"abdominal_phantom: shape must be three positive numbers, got {shape}; pass (D, H, W)")
    if len(voxel_mm) != 3 or not min(voxel_mm) > 0:
        raise ValueError(
            f"abdominal_phantom: voxel_mm must be three positive numbers, got {voxel_mm}; pass (dz, dy, dx)"
        )
    random = _Random(seed)
    scene = _Scene(shape, voxel_mm, random)
    phase = random.between(0.0, 1.0)  # 0 without contrast medium, 1 at its height
    cavity = _body(scene, random)
    _lungs(scene, random, cavity)
    _bowel(scene, random, cavity)
    _spleen_and_stomach(scene, random, phase)
    _pancreas(scene, random, phase)
    _liver(scene, random, cavity, phase)
    _kidneys(scene, random, phase)
    _spine_and_great_vessels(scene, random, phase)
    scene.hu += 4.0 * random.waves(scene.z, scene.y, scene.x, (9.0, 25.0), 16) * (scene.hu > -200)
    return Phantom(scene.hu, scene.label)


class _Random:
    """Random numbers that depend on the seed alone."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def chance(self, probability: float) -> bool:
        return self.between(0.0, 1.0) < probability

    def near(self, centre: Point, spread_mm: float) -> Point:
        z, y, x = (c + self.between(-spread_mm, spread_mm) for c in centre)
        return z, y, x

    def waves(self, z: Tensor, y: Tensor, x: Tensor, wavelength_mm: tuple[float, float], n: int) -> Tensor:
        """A smooth random field of unit variance: a sum of plane waves, the same on every grid."""
        total = torch.zeros_like(z + y + x)
        for _ in range(n):
            direction = torch.randn(3, generator=self.generator, dtype=torch.float64)
            kz, ky, kx = (2 * math.pi / self.between(*wavelength_mm) * direction / direction.norm()).tolist()
            total += torch.cos(kz * z + ky * y + kx * x + self.between(0, 2 * math.pi))
        return total * math.sqrt(2 / n)


class _Scene:
    """The volume being painted; coordinates are in mm from the body's centre, in the undeformed anatomy."""

    def __init__(self, shape: tuple[int, int, int], voxel_mm: Point, random: _Random) -> None:
        z, y, x = (
            ((torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * step).reshape(
                [-1 if i == axis else 1 for i in range(3)]
            )
            for axis, (n, step) in enumerate(zip(shape, voxel_mm, strict=True))
        )
        tilt = math.radians(random.between(-6, 6))
        z = z + random.between(-25, 25)
        y, x = y * math.cos(tilt) - x * math.sin(tilt), y * math.sin(tilt) + x * math.cos(tilt)
        y, x = y - random.between(-6, 6), x - random.between(-6, 6)
        size = random.between(0.9, 1.06)
        bend = [random.between(2.0, 4.0) * random.waves(z, y, x, (70, 160), 5) for _ in range(3)]
        self.z, self.y, self.x = (c / size + b for c, b in zip((z, y, x), bend, strict=True))
        self.edge_mm = 0.8 + 0.25 * max(voxel_mm[1:])
        self.hu = torch.full_like(self.z, -1000.0)
        self.label = torch.zeros(shape, dtype=torch.uint8)

    def paint(self, distance_mm: Tensor, hu: float | Tensor, organ: str | None = None) -> None:
        self.hu += torch.sigmoid(distance_mm / -self.edge_mm) * (hu - self.hu)
        if organ is not None:
            self.label[distance_mm < 0] = ORGANS[organ]

    def ellipsoid(self, centre: Point, radii: Point, turn_degrees: float = 0.0) -> Tensor:
        """Distance to an ellipsoid, to first order; the turn is in the axial plane."""
        z, y, x = self.z - centre[0], self.y - centre[1], self.x - centre[2]
        if turn_degrees:
            c, s = math.cos(math.radians(turn_degrees)), math.sin(math.radians(turn_degrees))
            y, x = c * y - s * x, s * y + c * x
        z, y, x = z / radii[0], y / radii[1], x / radii[2]
        level = (z * z + y * y + x * x).sqrt()
        slope = ((z / radii[0]).square() + (y / radii[1]).square() + (x / radii[2]).square()).sqrt()
        return level * (level - 1) / slope.clamp(min=1e-6)

    def tube(self, start: Point, end: Point, radius_mm: float) -> Tensor:
        """Distance to a straight tube with round ends."""
        dz, dy, dx = (b - a for a, b in zip(start, end, strict=True))
        z, y, x = self.z - start[0], self.y - start[1], self.x - start[2]
        along = ((z * dz + y * dy + x * dx) / (dz * dz + dy * dy + dx * dx)).clamp(0, 1)
        return ((z - along * dz).square() + (y - along * dy).square() + (x - along * dx).square()).sqrt() - radius_mm


def _join(a: Tensor, b: Tensor, blend_mm: float) -> Tensor:
    """Distance to the union of two shapes whose seam is rounded off."""
    return -blend_mm * torch.logaddexp(-a / blend_mm, -b / blend_mm)


def _body(scene: _Scene, random: _Random) -> Tensor:
    """Skin, subcutaneous fat, muscle, visceral fat, ribs; returns the distance to the cavity inside the muscle."""
    half_x, half_y = random.between(138, 154), random.between(102, 116)  # of the muscle's outside
    fat_mm = random.between(6, 20)
    bulge = 2.0 * random.waves(scene.z, scene.y, scene.x, (80, 160), 4)

    def outline(a: float, b: float) -> Tensor:
        level = ((scene.x / a).abs() ** 2.3 + (scene.y / b).abs() ** 2.3) ** (1 / 2.3)
        return (level - 1) * min(a, b)

    muscle = outline(half_x, half_y) + bulge
    # Fat is thicker at the flanks than in front.
    skin = outline(half_x + fat_mm, half_y + 0.8 * fat_mm) + bulge
    scene.paint(skin, 30.0)
    scene.paint(skin + 2.5, random.between(-112, -96) + 5 * random.waves(scene.z, scene.y, scene.x, (30, 60), 4))
    scene.paint(muscle, random.between(48, 62))
    cavity = muscle + random.between(11, 16)
    scene.paint(cavity, random.between(-108, -92) + 6 * random.waves(scene.z, scene.y, scene.x, (15, 40), 6))

    # Ribs run down and forward inside the wall; each is a slanted ring, cut open in front and ending at the waist.
    around = torch.atan2(scene.x.abs(), scene.y)  # 0 at the back, pi in front
    height = (scene.z + 45 * around + random.between(0, 28)).remainder(28) - 14
    rib = ((muscle + 7).square() + (0.7 * height).square()).sqrt() - 4.5
    rib = torch.maximum(rib, torch.maximum(40 * (around - 2.3), 40 * (0.35 - around)))
    rib = torch.maximum(rib, -40 - scene.z)
    scene.paint(rib, random.between(320, 480), "bone")
    scene.paint(rib + 3, random.between(120, 180))
    return cavity


def _lungs(scene: _Scene, random: _Random, cavity: Tensor) -> None:
    """Lung bases, which reach down along the wall around the dome of the diaphragm, furthest at the back."""
    near_wall = (1 + cavity / 45).clamp(0, 1)  # 1 at the wall, 0 from 45 mm inwards
    diaphragm = random.between(85, 115) - (70 + 0.35 * scene.y) * near_wall.square()
    scene.paint(torch.maximum(cavity + 2, diaphragm - scene.z), random.between(-880, -820), "lung")


def _liver(scene: _Scene, random: _Random, cavity: Tensor, phase: float) -> None:
    """Two lobes with a gallbladder, branching vessels and up to three lesions."""
    hu = random.between(46, 58) + 18 * phase
    scale = random.between(0.88, 1.1)
    right, left = random.near((20, -2, -80), 7), random.near((34, -46, -12), 8)
    right_radii, left_radii = (80 * scale, 74 * scale, 52 * scale), (46 * scale, 30 * scale, 62 * scale)
    lobes = _join(scene.ellipsoid(right, right_radii, 12), scene.ellipsoid(left, left_radii, -8), 9.0)
    liver = lobes + 3.0 * random.waves(scene.z, scene.y, scene.x, (35, 80), 8)
    gallbladder = scene.ellipsoid(random.near((-20, -44, -52), 6), (26, 14, 14))
    liver = torch.maximum(torch.maximum(liver, cavity + 2), -gallbladder)
    scene.paint(gallbladder, random.between(4, 16), "gallbladder")
    scene.paint(liver, hu, "liver")

    def paint_inside(distance_mm: Tensor, value: float, organ: str | None = None) -> None:
        scene.paint(torch.maximum(distance_mm, liver + 1), value, organ)

    hilum = (right[0] - 15, right[1] - 5, right[2] + 38)
    vessel_hu = hu + random.between(12, 20) + 35 * phase
    for _ in range(7):
        tip = random.near((right[0], right[1], right[2]), 55)
        paint_inside(scene.tube(hilum, tip, random.between(2.5, 5.0)), vessel_hu)
    for _ in range(int(random.between(0, 4))):
        centre, radii = (right, right_radii) if random.chance(0.75) else (left, left_radii)
        z, y, x = (c + r * random.between(-0.5, 0.5) for c, r in zip(centre, radii, strict=True))
        radius = random.between(6, 20)
        contrast = -random.between(12, 45) if random.chance(0.8) else random.between(20, 40)
        lesion = scene.ellipsoid((z, y, x), (radius, radius * random.between(0.8, 1.2), radius))
        paint_inside(lesion + 1.5 * random.waves(scene.z, scene.y, scene.x, (12, 30), 4), hu + contrast, "tumour")


def _kidneys(scene: _Scene, random: _Random, phase: float) -> None:
    """Cortex, medulla, sinus fat, and a tumour in about half of the patients."""
    medulla_hu, cortex_hu = 30 + 80 * phase, 34 + 150 * phase
    with_tumour = random.between(-2, 2)  # none between -1 and 1, else the sign is the side
    for side in (-1, 1):
        centre = random.near((-32 if side < 0 else -20, 34, 64 * side), 6)
        size = random.between(0.88, 1.12)
        radii = (56 * size, 31 * size, 27 * size)
        turn = 35 * side
        kidney = scene.ellipsoid(centre, radii, turn) + 1.2 * random.waves(scene.z, scene.y, scene.x, (25, 50), 4)
        scene.paint(kidney, cortex_hu, "kidney")
        pyramids = kidney + 7 + 2.5 * random.waves(scene.z, scene.y, scene.x, (18, 26), 4)
        scene.paint(pyramids, medulla_hu)
        hilum = (centre[0], centre[1] - 8, centre[2] - 17 * side)
        sinus = scene.ellipsoid(hilum, (24 * size, 9 * size, 15 * size), turn)
        scene.paint(torch.maximum(sinus, kidney), -70.0, "background")
        if abs(with_tumour) > 1 and with_tumour * side > 0:
            radius = random.between(9, 26)
            angle = random.between(-0.8, 0.8)
            place = (centre[0] + 30 * random.between(-1, 1), centre[1] + 18 * math.sin(angle), centre[2] + 20 * side)
            tumour = scene.ellipsoid(place, (radius, radius, radius))
            tumour = tumour + 1.5 * random.waves(scene.z, scene.y, scene.x, (15, 35), 4)
            scene.paint(tumour, 32 + random.between(25, 60) * phase, "kidney_tumour")


def _spleen_and_stomach(scene: _Scene, random: _Random, phase: float) -> None:
    """Spleen behind, stomach with wall, contents and gas in front of it."""
    size = random.between(0.85, 1.2)
    spleen = scene.ellipsoid(random.near((38, 30, 100), 6), (48 * size, 42 * size, 25 * size), -20)
    scene.paint(
        spleen + 2 * random.waves(scene.z, scene.y, scene.x, (30, 60), 5), random.between(40, 52) + 30 * phase, "spleen"
    )
    centre = random.near((30, -34, 58), 8)
    radii = (random.between(42, 60), random.between(28, 42), random.between(34, 46))
    stomach = scene.ellipsoid(centre, radii, 25) + 2 * random.waves(scene.z, scene.y, scene.x, (35, 70), 5)
    scene.paint(stomach, random.between(38, 52) + 8 * phase, "stomach")
    lumen = stomach + random.between(4, 8)
    scene.paint(lumen, random.between(120, 220) if random.chance(0.2) else random.between(0, 38))
    # Gas rises: the patient lies on the back.
    level = scene.y - (centre[1] - radii[1] * random.between(0.1, 0.9))
    scene.paint(torch.maximum(lumen, level), -950.0)


def _pancreas(scene: _Scene, random: _Random, phase: float) -> None:
    """Head, body and tail as one bent tube between liver and spleen."""
    head, neck, tail = random.near((-18, -12, -30), 5), random.near((-2, -28, 8), 5), random.near((14, 4, 66), 6)
    radius = random.between(10, 14)
    pancreas = _join(scene.tube(head, neck, 1.2 * radius), scene.tube(neck, tail, radius), 4.0)
    lobules = 2 * random.waves(scene.z, scene.y, scene.x, (12, 25), 5)
    scene.paint(pancreas + lobules, random.between(36, 46) + 25 * phase, "pancreas")


def _bowel(scene: _Scene, random: _Random, cavity: Tensor) -> None:
    """Colon at the flanks and loops of small bowel below the liver, with liquid or gas."""
    for side in (-1, 1):
        colon = scene.tube((-130, 8, 108 * side), (-25, 0, 100 * side), random.between(17, 24))
        _loop(scene, random, torch.maximum(colon, cavity + 2))
    _loop(scene, random, scene.tube((-45, -66, -75), (-25, -70, 80), random.between(15, 20)))
    for _ in range(12):
        start = (random.between(-130, -20), random.between(-75, 5), random.between(-70, 90))
        _loop(scene, random, scene.tube(start, random.near(start, 40), random.between(10, 15)))


def _loop(scene: _Scene, random: _Random, distance_mm: Tensor) -> None:
    scene.paint(distance_mm, random.between(36, 60), "bowel")
    lumen = distance_mm + random.between(2.5, 4.5)
    scene.paint(lumen, random.between(5, 45))
    if random.chance(0.5):
        scene.paint(torch.maximum(lumen, 8 * random.waves(scene.z, scene.y, scene.x, (20, 45), 4)), -950.0)


def _spine_and_great_vessels(scene: _Scene, random: _Random, phase: float) -> None:
    """Muscles of the back, vertebrae with discs, canal and processes; aorta and vena cava before them."""
    muscle_hu = random.between(48, 62)
    for side in (-1, 1):
        scene.paint(scene.ellipsoid((0, 78, 38 * side), (400, 24, 30)), muscle_hu, "background")
        psoas = scene.ellipsoid((-60, 48, 42 * side), (80, 20, 17))
        scene.paint(psoas, muscle_hu, "background")
    step = random.between(31, 36)
    along = (scene.z + random.between(0, step)).remainder(step) / step
    vertebra = scene.ellipsoid((0, 60, 0), (2000, 18, 24))
    trabecular = random.between(150, 230) + 25 * random.waves(scene.z, scene.y, scene.x, (6, 14), 8)
    scene.paint(vertebra, random.between(420, 620), "bone")
    scene.paint(vertebra + 3, trabecular)
    disc = torch.maximum((along - 0.5).abs() * step - 4, vertebra - 1)
    scene.paint(disc, 85.0, "background")
    arch = scene.tube((-500, 88, 0), (500, 88, 0), 13.0)
    process = torch.maximum(scene.ellipsoid((0, 104, 0), (2000, 16, 5)), (along - 0.15).abs() * step - 10)
    wings = torch.maximum(scene.ellipsoid((0, 80, 0), (2000, 6, 42)), (along - 0.05).abs() * step - 8)
    for bone in (arch, process, wings):
        scene.paint(bone, random.between(280, 420), "bone")
    canal = scene.tube((-500, 86, 0), (500, 86, 0), 9.0)
    scene.paint(canal, 35.0, "background")
    aorta = scene.tube(random.near((-500, 30, 14), 4), random.near((500, 34, 14), 4), random.between(9, 13))
    cava = scene.tube(random.near((-500, 28, -20), 4), random.near((500, 22, -26), 4), random.between(9, 14))
    scene.paint(aorta, 42 + random.between(90, 180) * phase, "vessel")
    scene.paint(cava, 40 + random.between(50, 110) * phase, "vessel")

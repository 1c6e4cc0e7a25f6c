"""Photographs that the scikit-image wheel carries, described by hand. Nothing is downloaded.

A row is a picture: what to ask of it, and captions of two lengths. Those marked `held_out` are never calibrated on.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from lance_quant.errors import LanceQuantError
from lance_quant.model.pixels import open_image


@dataclass(frozen=True)
class Photograph:
    """caption: one sentence; detail: a paragraph; questions: (question, answer)."""

    file: str
    caption: str
    detail: str
    questions: tuple[tuple[str, str], ...]
    held_out: bool = False


PHOTOGRAPHS = (
    Photograph(
        "astronaut.png",
        "A smiling astronaut in an orange flight suit sits in front of a flag and a model of a space shuttle.",
        "A portrait of a woman with short brown hair who smiles at the camera. She wears a bright orange flight suit "
        "with round mission patches and holds a black helmet with a clear visor. Behind her hangs a striped flag on "
        "the left, and a model of a white space shuttle on its launch stack stands on the right.",
        (
            ("What colour is the suit that the person wears?", "Orange."),
            ("What can be seen in the background?", "A striped flag on the left and a model of a space shuttle."),
            (
                "Describe the person in this portrait.",
                "A woman with short brown hair, smiling, dressed in an orange astronaut's suit with mission patches; "
                "a dark helmet lies in front of her.",
            ),
        ),
    ),
    Photograph(
        "chelsea.png",
        "A close-up of a ginger tabby cat with green eyes looking slightly to the right.",
        "The face of a ginger tabby cat fills the frame. Its green eyes look past the camera to the right, its nose is "
        "pink, long white whiskers spread to both sides, and dark stripes run over its forehead. The background is a "
        "soft blur of beige and pink.",
        (
            ("Which animal is this?", "A cat."),
            ("What colour are the eyes?", "Green."),
            (
                "Describe the fur.",
                "It is short, ginger and cream, with the darker stripes of a tabby on the forehead and cheeks.",
            ),
        ),
    ),
    Photograph(
        "coffee.png",
        "A cup of espresso on a red saucer with a spoon, on a wooden table.",
        "A red and cream-coloured cup filled with espresso stands on a glossy red saucer. A small metal spoon lies on "
        "the saucer to the right of the cup. The table is of warm brown wood with a visible grain, and the light falls "
        "from the upper left.",
        (
            ("What is in the cup?", "Coffee, most likely an espresso."),
            ("What lies beside the cup on the saucer?", "A small metal spoon."),
            ("What is the table made of?", "Wood, with a warm brown grain."),
        ),
    ),
    Photograph(
        "motorcycle_left.png",
        "A red motorcycle parked in a cluttered garage or workshop.",
        "A red motorcycle with a black seat and chromed engine stands on its side stand in a workshop. Behind it are a "
        "wooden workbench, shelves full of boxes and tools, folded chairs leaning on the wall and a window. The floor "
        "is grey concrete.",
        (
            ("What vehicle is shown and what colour is it?", "A motorcycle; it is red."),
            ("Where was this picture taken?", "In a garage or workshop with shelves and a workbench."),
            ("How many wheels of the motorcycle can be seen?", "Two."),
        ),
    ),
    Photograph(
        "rocket.jpg",
        "A white rocket stands on its launch pad at dusk between lightning towers.",
        "A slender white rocket stands upright on a launch pad under a deep blue evening sky. Tall lattice towers rise "
        "to its left and right, and floodlights shine from the ground, turning the lower part of the scene yellow.",
        (
            ("What stands in the middle of the picture?", "A white rocket on its launch pad."),
            ("What time of day is it?", "Dusk: the sky is dark blue and the floodlights are on."),
            ("What are the tall structures beside it?", "Lattice towers that guard the pad against lightning."),
        ),
    ),
    Photograph(
        "hubble_deep_field.jpg",
        "A deep view of space with hundreds of small galaxies of many shapes and colours on black.",
        "A telescope's view of a tiny patch of sky: against black, hundreds of galaxies appear as spirals, ellipses "
        "and faint smudges, most of them small, in white, yellow, red and blue. A few nearer stars show as bright "
        "points.",
        (
            ("What does this picture show?", "Hundreds of distant galaxies against a black sky."),
            ("Is this a photograph of a city at night?", "No, it is a telescope's picture of deep space."),
        ),
    ),
    Photograph(
        "retina.jpg",
        "The inside of a human eye: an orange disc with branching blood vessels on black.",
        "A round, orange-red picture of the back of an eye on a black background. Thin red vessels branch out from a "
        "bright yellow spot at the left, where the nerve leaves the eye; towards the middle lies a darker area.",
        (
            ("Which organ is this a medical picture of?", "The eye: it shows the retina."),
            ("On which side is the bright spot?", "On the left."),
            ("What are the thin branching lines?", "Blood vessels."),
        ),
    ),
    Photograph(
        "color.png",
        "A colour wheel: all hues around a circle, white in the middle, on black.",
        "A circular colour wheel on a black background. Red is at the top, and going clockwise follow yellow, green, "
        "cyan, blue and magenta. Colours are pure halfway out, turn white towards the centre and dark at the rim.",
        (
            ("What is this diagram called?", "A colour wheel."),
            ("Which colour is in the centre?", "White."),
        ),
    ),
    Photograph(
        "logo.png",
        "A round logo with a snake drawn in two halves, one green and one orange.",
        "A circular emblem on white. A curved white line divides it: the upper half is green with the line drawing of "
        "a snake's head, the lower half is orange with the pattern of its scales.",
        (
            ("Which two colours dominate the logo?", "Green and orange."),
            ("Which animal does the logo hint at?", "A snake."),
        ),
    ),
    Photograph(
        "page.png",
        "A photographed page of printed text with the heading 'Region-based segmentation'.",
        "A slightly shaded photograph of a printed page. The heading reads 'Region-based segmentation'; below it one "
        "paragraph speaks of finding markers of the coins and the background from the histogram of grey values, "
        "followed by the first line of a program.",
        (
            ("What is the heading of this page?", "Region-based segmentation"),
            (
                "What is the paragraph about?",
                "How to find markers of coins and background from the two extreme parts of a histogram of grey values.",
            ),
        ),
    ),
    Photograph(
        "brick.png",
        "A grey wall of narrow bricks laid in a regular pattern, seen straight on.",
        "A black-and-white texture of brickwork. Narrow, upright bricks with pale mortar between them repeat over the "
        "whole picture; their surfaces are rough and slightly uneven.",
        (
            ("What material is this?", "Brick, with mortar between the stones."),
            ("Is the picture in colour?", "No, it is black and white."),
        ),
    ),
    Photograph(
        "gravel.png",
        "A black-and-white close-up of gravel, small sharp stones over the whole picture.",
        "Small angular stones cover the whole frame, light and dark grey, lying in all directions with black shadows "
        "in the gaps between them. There is no single subject.",
        (
            ("What covers the ground here?", "Gravel: small, sharp stones."),
            ("Is there any plant or animal to be seen?", "No, there are only stones."),
        ),
    ),
    Photograph(
        "phantom.png",
        "A test figure of a head scan: nested grey ellipses on black with a bright outline.",
        "A synthetic figure used to test scanners. A bright white outline encloses a grey head shape; inside are two "
        "dark ellipses like ventricles, a large round grey area at the top and several tiny ellipses near the bottom.",
        (
            ("What kind of figure is this?", "A phantom, the test figure of a head for scanners."),
            ("How many large dark ellipses are inside?", "Two."),
        ),
    ),
    Photograph(
        "clock_motion.png",
        "A round grey object blurred by fast motion on a plain background.",
        "A small pale disc in the middle of a plain grey picture, smeared to the left and right as if it or the camera "
        "had moved during the exposure.",
        (
            ("Why is the object blurred?", "Because it or the camera moved during the exposure."),
            ("What colour is the background?", "Grey."),
        ),
    ),
    Photograph(
        "camera.png",
        "A man in a dark coat looks through a film camera on a tripod, in black and white.",
        "A black-and-white photograph of a man in a long dark coat who bends to look through a camera on a tripod. He "
        "stands on a wide lawn; in the hazy distance are low buildings and one tall tower.",
        (
            ("What is the man doing?", "He looks through a camera that stands on a tripod."),
            ("What is the man wearing?", "A long dark coat."),
            ("What can be seen in the distance?", "Buildings in the haze, one of them a tall tower."),
        ),
        held_out=True,
    ),
    Photograph(
        "coins.png",
        "Four rows of old coins on a dark background, in black and white.",
        "Twenty-four old coins lie in four rows of six on a dark, uneven background. They differ in size and in how "
        "worn they are; most show a head in profile.",
        (
            ("What objects are shown?", "Old coins."),
            ("In how many rows are they laid out?", "Four."),
        ),
        held_out=True,
    ),
    Photograph(
        "moon.png",
        "The grey surface of the moon with craters and a few dark peaks.",
        "A grey view of the moon's surface from above. One large round crater is at the upper left, smaller ones are "
        "scattered around, and rough dark hills rise near the bottom.",
        (
            ("What does the picture show?", "The surface of the moon."),
            ("Where is the largest crater?", "At the upper left."),
        ),
        held_out=True,
    ),
    Photograph(
        "horse.png",
        "The black silhouette of a standing horse on white.",
        "A black silhouette of a horse in profile on a plain white background. It stands on four legs with its head to "
        "the right and its tail hanging on the left.",
        (
            ("Which animal is it?", "A horse."),
            ("Which way does its head point?", "To the right."),
        ),
        held_out=True,
    ),
    Photograph(
        "ihc.png",
        "Stained tissue under a microscope: brown glands and small blue cells.",
        "A microscope picture of stained tissue. Large rounded glands are coloured brown with dark walls; between them "
        "lie many small blue nuclei on a pale ground.",
        (
            ("Which two stain colours are visible?", "Brown and blue."),
            ("Was this taken with a telescope or a microscope?", "With a microscope."),
        ),
        held_out=True,
    ),
    Photograph(
        "grass.png",
        "A black-and-white close-up of dry grass and straw.",
        "Blades of grass and bits of straw cross each other in every direction and fill the whole frame, pale over "
        "dark.",
        (("What fills the picture?", "Grass and straw, seen from close up."),),
        held_out=True,
    ),
    Photograph(
        "cell.png",
        "A single bright round cell with a dark rim on a plain grey ground, under a microscope.",
        "A grey microscope picture. Right of the middle floats one round cell, bright and grainy inside, with a dark "
        "halo around it; the rest of the picture is an even, slightly streaked grey.",
        (
            ("How many cells are there?", "One."),
            ("Where in the picture is it?", "Right of the middle."),
        ),
        held_out=True,
    ),
    Photograph(
        "text.png",
        "Handwritten mathematical formulas on ruled paper, photographed at an angle.",
        "Black handwriting on ruled grey paper, seen at an angle: fragments of formulas with integrals, brackets and "
        "letters, partly cut off at the edges.",
        (
            ("Is the text printed or written by hand?", "It is written by hand."),
            ("What kind of text is it?", "Mathematical formulas."),
        ),
        held_out=True,
    ),
)


def photographs(held_out: bool) -> list[Photograph]:
    return [photograph for photograph in PHOTOGRAPHS if photograph.held_out == held_out]


def open_photograph(photograph: Photograph) -> Image.Image:
    """RGB, as it lies in the wheel. Raises LanceQuantError where scikit-image does not carry it."""
    found = find_spec("skimage")
    file = Path(found.submodule_search_locations[0]) / "data" / photograph.file if found else None
    if file is None or not file.is_file():
        raise LanceQuantError(
            f"the photograph {photograph.file} is not in the installed scikit-image: reinstall scikit-image from its "
            f"wheel"
        )
    with Image.open(file) as image:
        return open_image(image)

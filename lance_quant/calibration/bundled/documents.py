"""Charts, tables, receipts, signs and pages of text in Pillow's built-in font: what is asked is what was drawn."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, GRID = (30, 32, 38), (252, 251, 247), (214, 214, 216)
PALETTE = ((66, 112, 182), (216, 96, 62), (98, 164, 94), (240, 184, 62), (138, 98, 176), (88, 176, 186), (196, 84, 132))

# (title, unit, categories); the last third of each table here is held out
SUBJECTS = (
    ("Rainfall by month", "mm", ("January", "March", "May", "July", "September", "November")),
    ("Fruit sold on Saturday", "kg", ("apples", "pears", "plums", "cherries", "grapes")),
    (
        "Visitors of the museum",
        "people",
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ),
    ("Energy by source", "GWh", ("wind", "solar", "hydro", "gas", "nuclear")),
    ("Books read per class", "books", ("class 1", "class 2", "class 3", "class 4")),
    ("Cycling distance of the team", "km", ("Anna", "Bilal", "Chen", "Dora", "Emeka", "Farah")),
    ("Steps in one week", "steps", ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")),
    ("Trees planted in the parks", "trees", ("North Park", "Lake Park", "Old Park", "Hill Park")),
    ("Minutes of delay by line", "min", ("line A", "line B", "line C", "line D", "line E")),
)
TEXTS = (
    (
        "The lighthouse keeper",
        "Every evening at six the keeper climbed the hundred and twelve steps, wiped the salt from the glass and lit "
        "the lamp. In winter the wind shook the door so hard that he tied it with a rope. He wrote the names of the "
        "ships in a green book, one line for each, and on quiet nights he read them again.",
    ),
    (
        "How to repot a plant",
        "Water the plant a day before. Choose a pot two fingers wider than the old one and put stones over the hole. "
        "Lift the plant out, loosen the roots, and fill in fresh soil up to one centimetre below the rim. Keep it out "
        "of the sun for a week and water it sparingly.",
    ),
    (
        "Notice to all residents",
        "The water will be turned off on Tuesday 14 May between 9:00 and 12:30 while the pipes in the cellar are being "
        "replaced. Please close all taps before you leave the house. If you have questions, call the caretaker at "
        "555-0142 or leave a note at flat 3B.",
    ),
    (
        "On measuring time",
        "A day was first divided by shadows, then by water, sand and weights. The pendulum made minutes worth "
        "counting, and quartz made seconds cheap. Today's best clocks would lose less than a second in the age of the "
        "universe, and yet nobody is ever early.",
    ),
    (
        "Bread for beginners",
        "Mix 500 g of flour with 350 ml of water, 10 g of salt and a pinch of yeast. Leave the dough alone for twelve "
        "hours. Fold it four times, let it rest for an hour and bake it in a hot pot: 30 minutes with the lid on, 15 "
        "without. Wait until it is cool before you cut it.",
    ),
    (
        "The night train",
        "Carriage 7 was almost empty. A woman slept under her coat, two students shared a bag of nuts, and the "
        "conductor hummed while he checked the doors. Somewhere after midnight the rain stopped and the windows, one "
        "after another, filled with stars.",
    ),
    (
        "Minutes of the garden club",
        "Present: eleven members. The treasurer reported a balance of 284.50. It was agreed to buy two wheelbarrows "
        "and to move the compost behind the shed. The open day will be on 8 June; Rosa brings the tables, Tom looks "
        "after the tea. Next meeting: 3 July at 19:00.",
    ),
    (
        "Rules of the reading room",
        "Speak softly. Bags and coats stay in the lockers. Old maps may only be used with gloves, and never next to a "
        "drink. Copies are made at desk 2 until 17:45. Whoever finds a note in a book is asked to leave it there.",
    ),
    (
        "Why the sky is blue",
        "Sunlight holds all colours. Air scatters short waves more than long ones, so that blue comes to us from every "
        "direction while red goes almost straight on. In the evening the light has a longer way through the air, "
        "little blue is left, and the sun looks red.",
    ),
)
SIGNS = (
    ("OPEN", "Mon-Fri 8-18, Sat 9-13"),
    ("PLATFORM 4", "Trains to Harbour and Airport"),
    ("CAUTION", "Wet floor - walk slowly"),
    ("TRAIL 12", "Summit 3.5 km - 1 h 40 min"),
    ("NO PARKING", "Delivery only, 6:00-10:00"),
    ("LIBRARY", "Second floor, turn left"),
    ("EXIT B", "Central Square and Museum"),
    ("FRESH FISH", "Today: cod, herring, mussels"),
    ("LANGUAGE SCHOOL", "Room 204 - Spanish for beginners"),
)
GOODS = ("bread", "butter", "coffee", "oranges", "rice", "soap", "honey", "tomatoes", "paper", "milk", "cheese", "tea")
TABLES = (
    ("Departures", ("Time", "Destination", "Gate"), ("Oslo", "Lima", "Cairo", "Seoul", "Quito", "Perth", "Turin")),
    ("Medal table", ("Rank", "Country", "Gold"), ("Norland", "Estia", "Verra", "Kolm", "Santo", "Bria")),
    ("Class results", ("Place", "Name", "Points"), ("Ines", "Jakub", "Kofi", "Lena", "Mateo", "Nadia")),
)


@dataclass(frozen=True)
class Document:
    """image; caption: what it shows; questions: (question, answer)."""

    image: Image.Image
    caption: str
    questions: tuple[tuple[str, str], ...]


def part(table: tuple, held_out: bool) -> tuple:
    """The rows of a table that calibration uses, or those that it leaves out."""
    cut = len(table) - len(table) // 3
    return table[cut:] if held_out else table[:cut]


def font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(8, round(size)))


def _sheet(size: tuple[int, int], colour=PAPER) -> tuple[Image.Image, ImageDraw.ImageDraw, float]:
    image = Image.new("RGB", size, colour)
    return image, ImageDraw.Draw(image), min(size) / 100


def bar_chart(rng: random.Random, size: tuple[int, int], held_out: bool) -> Document:
    title, unit, names, values = _numbers(rng, held_out)
    image, draw, u = _sheet(size)
    left, bottom = 12 * u, size[1] - 14 * u
    draw.text((size[0] / 2, 4 * u), title, INK, font(5.5 * u), anchor="ma")
    top, most = 18 * u, max(values)
    step = _step(most)
    for tick in range(0, most + step, step):
        y = bottom - (bottom - top) * tick / (most + step)
        draw.line((left, y, size[0] - 4 * u, y), fill=GRID, width=max(1, round(0.3 * u)))
        draw.text((left - u, y), str(tick), INK, font(2.8 * u), anchor="rm")
    pitch = (size[0] - 4 * u - left) / len(names)
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        x = left + pitch * (index + 0.5)
        height = (bottom - top) * value / (most + step)
        box = (x - 0.32 * pitch, bottom - height, x + 0.32 * pitch, bottom)
        draw.rectangle(box, fill=PALETTE[index % len(PALETTE)])
        draw.text((x, bottom - height - u), str(value), INK, font(3 * u), anchor="mb")
        draw.text((x, bottom + 2 * u), name, INK, font(min(3.2 * u, 1.7 * pitch / len(name))), anchor="ma")
    draw.text((left, 13 * u), unit, INK, font(3 * u), anchor="lm")
    return Document(image, _told("A bar chart", title, unit, names, values), _asked(title, unit, names, values, "bar"))


def line_chart(rng: random.Random, size: tuple[int, int], held_out: bool) -> Document:
    title, unit, names, values = _numbers(rng, held_out)
    image, draw, u = _sheet(size)
    left, top, right, bottom = 12 * u, 18 * u, size[0] - 8 * u, size[1] - 14 * u
    draw.text((size[0] / 2, 4 * u), title, INK, font(5.5 * u), anchor="ma")
    step = _step(max(values))
    top_value = max(values) + step
    for tick in range(0, top_value, step):
        y = bottom - (bottom - top) * tick / top_value
        draw.line((left, y, right, y), fill=GRID, width=max(1, round(0.3 * u)))
        draw.text((left - u, y), str(tick), INK, font(2.8 * u), anchor="rm")
    xs = [left + (right - left) * (index + 0.3) / len(names) for index in range(len(names))]
    points = [(x, bottom - (bottom - top) * value / top_value) for x, value in zip(xs, values, strict=True)]
    colour = rng.choice(PALETTE)
    draw.line(points, fill=colour, width=max(2, round(0.9 * u)), joint="curve")
    for (x, y), name, value in zip(points, names, values, strict=True):
        draw.ellipse((x - 1.2 * u, y - 1.2 * u, x + 1.2 * u, y + 1.2 * u), fill=colour)
        draw.text((x, y - 2 * u), str(value), INK, font(3 * u), anchor="mb")
        draw.text((x, bottom + 2 * u), name, INK, font(2.6 * u), anchor="ma")
    draw.text((left, 13 * u), unit, INK, font(3 * u), anchor="lm")
    return Document(
        image, _told("A line chart", title, unit, names, values), _asked(title, unit, names, values, "point")
    )


def pie_chart(rng: random.Random, size: tuple[int, int], held_out: bool) -> Document:
    title, _, names, values = _numbers(rng, held_out)
    total = sum(values)
    shares = [round(100 * value / total) for value in values]
    shares[0] += 100 - sum(shares)
    image, draw, u = _sheet(size)
    draw.text((size[0] / 2, 4 * u), title, INK, font(5.5 * u), anchor="ma")
    cx, cy, r, angle = 0.38 * size[0], size[1] / 2 + 5 * u, 32 * u, -90.0
    for index, (name, share) in enumerate(zip(names, shares, strict=True)):
        colour = PALETTE[index % len(PALETTE)]
        draw.pieslice((cx - r, cy - r, cx + r, cy + r), angle, angle + 3.6 * share, fill=colour, outline=PAPER)
        angle += 3.6 * share
        y = cy - r + index * 7 * u
        x = max(cx + r + 4 * u, 0.62 * size[0])
        draw.rectangle((x, y, x + 4 * u, y + 4 * u), fill=colour)
        draw.text((x + 6 * u, y + 2 * u), f"{name} {share} %", INK, font(3.2 * u), anchor="lm")
    return Document(image, _told("A pie chart", title, "%", names, shares), _asked(title, "%", names, shares, "slice"))


def _numbers(rng: random.Random, held_out: bool) -> tuple[str, str, tuple[str, ...], list[int]]:
    title, unit, names = rng.choice(part(SUBJECTS, held_out))
    scale = rng.choice((1, 2, 5, 20))
    return title, unit, names, [scale * value for value in rng.sample(range(5, 60), len(names))]


def _step(most: int) -> int:
    return max(1, 10 ** (len(str(most)) - 1) // (1 if most >= 5 * 10 ** (len(str(most)) - 1) else 2))


def _told(kind: str, title: str, unit: str, names, values) -> str:
    listed = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    return f"{kind} on white paper with the title '{title}' and the values {listed} ({unit}), each in its own colour."


def _asked(title: str, unit: str, names, values, mark: str) -> tuple[tuple[str, str], ...]:
    best, least = names[values.index(max(values))], names[values.index(min(values))]
    first, second = names[0], names[-1]
    difference = abs(values[0] - values[-1])
    listed = ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
    return (
        ("What is the title of the chart?", title),
        ("Which entry has the highest value?", f"{best}, with {max(values)} {unit}."),
        ("Which entry has the lowest value?", f"{least}."),
        (f"What is the value of {second}?", f"{values[-1]} {unit}"),
        (f"How many {mark}s does the chart have?", str(len(names))),
        (f"By how much do {first} and {second} differ?", f"By {difference} {unit}: {values[0]} against {values[-1]}."),
        ("List all values of the chart.", listed),
    )


def page(rng: random.Random, size: tuple[int, int], held_out: bool) -> Document:
    title, text = rng.choice(part(TEXTS, held_out))
    image, draw, u = _sheet(size, rng.choice((PAPER, (250, 244, 228), (236, 240, 246))))
    margin = 9 * u
    draw.text((margin, 8 * u), title, INK, font(6.5 * u))
    draw.line((margin, 18 * u, size[0] - margin, 18 * u), fill=PALETTE[0], width=max(1, round(0.6 * u)))
    body, y = font(4.2 * u), 23 * u
    for line in _lines(draw, text, body, size[0] - 2 * margin):
        draw.text((margin, y), line, INK, body)
        y += 6.2 * u
    sentences = [sentence.strip() for sentence in text.replace("? ", ". ").split(". ")]
    last = sentences[-1].rstrip(".")
    return Document(
        image,
        f"A printed page with the heading '{title}' in large letters above a paragraph of dark text that begins with "
        f"'{' '.join(text.split()[:6])}'.",
        (
            ("What is the heading?", title),
            ("Transcribe the text on the page.", f"{title}\n{text}"),
            ("What does the first sentence say?", sentences[0].rstrip(".") + "."),
            ("What does the last sentence say?", last + "."),
        ),
    )


def _lines(draw: ImageDraw.ImageDraw, text: str, face, width: float) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, face) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]


def sign(rng: random.Random, size: tuple[int, int], held_out: bool) -> Document:
    word, below = rng.choice(part(SIGNS, held_out))
    names = ("blue", "red", "green")
    index = rng.randrange(3)
    colour = (PALETTE[0], (190, 48, 44), (44, 118, 72))[index]
    image, draw, u = _sheet(size, (176, 190, 200))
    draw.rectangle((0, size[1] * 0.78, size[0], size[1]), fill=(120, 126, 120))
    draw.rectangle((size[0] / 2 - 2 * u, size[1] * 0.5, size[0] / 2 + 2 * u, size[1]), fill=(90, 92, 96))
    box = (0.12 * size[0], 0.2 * size[1], 0.88 * size[0], 0.62 * size[1])
    draw.rounded_rectangle(box, radius=4 * u, fill=colour, outline="white", width=max(2, round(u)))
    big = font(min(14 * u, 0.7 * size[0] / (0.62 * len(word))))
    draw.text((size[0] / 2, 0.36 * size[1]), word, "white", big, anchor="mm")
    small = font(min(5 * u, 0.7 * size[0] / (0.5 * len(below))))
    draw.text((size[0] / 2, 0.51 * size[1]), below, "white", small, anchor="mm")
    return Document(
        image,
        f"A {names[index]} sign on a post with the word '{word}' in large white letters and below it '{below}', in "
        "front of a grey sky.",
        (
            ("What does the sign say?", f"{word}. {below}"),
            ("Read the largest word on the sign.", word),
            ("What colour is the sign?", f"It is {names[index]} with white letters."),
        ),
    )


def receipt(rng: random.Random, size: tuple[int, int], held_out: bool) -> Document:
    goods = rng.sample(part(GOODS, held_out), 4)
    prices = [rng.randrange(80, 1200, 5) for _ in goods]
    image, draw, u = _sheet(size, (150, 120, 92))
    left, right = size[0] / 2 - 32 * u, size[0] / 2 + 32 * u
    draw.rectangle((left, 4 * u, right, size[1] - 4 * u), fill=PAPER)
    shop = rng.choice(("CORNER SHOP", "MARKET HALL", "GREEN GROCER"))
    draw.text((size[0] / 2, 10 * u), shop, INK, font(6 * u), anchor="ma")
    day = f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}.2024"
    draw.text((size[0] / 2, 18 * u), day, INK, font(3.6 * u), anchor="ma")
    lines = [*zip(goods, prices, strict=True), ("TOTAL", sum(prices))]
    for index, (name, price) in enumerate(lines):
        y = 28 * u + index * 8 * u
        draw.text((left + 5 * u, y), name, INK, font(4.4 * u))
        draw.text((right - 5 * u, y), f"{price / 100:.2f}", INK, font(4.4 * u), anchor="ra")
    dearest = goods[prices.index(max(prices))]
    items = "\n".join(f"{name} {price / 100:.2f}" for name, price in lines)
    return Document(
        image,
        f"A narrow white receipt of '{shop}' on a brown table. It lists {', '.join(goods)} and a total of "
        f"{sum(prices) / 100:.2f}.",
        (
            ("What is the total on the receipt?", f"{sum(prices) / 100:.2f}"),
            ("Which item was the most expensive?", f"The {dearest}, at {max(prices) / 100:.2f}."),
            ("What is the date on the receipt?", day),
            ("List the items and their prices.", items),
            (f"How much did the {goods[1]} cost?", f"{prices[1] / 100:.2f}"),
        ),
    )


def table(rng: random.Random, size: tuple[int, int], held_out: bool) -> Document:
    title, head, names = rng.choice(part(TABLES, held_out))
    names = rng.sample(names, 5)
    hours = sorted(rng.sample(range(6 * 12, 22 * 12), 5))
    if head[0] == "Time":
        first = [f"{slot // 12:02d}:{slot % 12 * 5:02d}" for slot in hours]
        last = [f"{rng.choice('ABCD')}{rng.randint(1, 30)}" for _ in names]
    else:
        first = [str(place + 1) for place in range(5)]
        last = [str(value) for value in sorted(rng.sample(range(3, 99), 5), reverse=True)]
    image, draw, u = _sheet(size)
    draw.text((size[0] / 2, 5 * u), title, INK, font(6 * u), anchor="ma")
    columns = (0.12 * size[0], 0.38 * size[0], 0.75 * size[0])
    for row, cells in enumerate((head, *zip(first, names, last, strict=True))):
        y = 18 * u + row * 12 * u
        if row == 0:
            draw.rectangle((0.06 * size[0], y - 3 * u, 0.94 * size[0], y + 7 * u), fill=PALETTE[0])
        elif row % 2:
            draw.rectangle((0.06 * size[0], y - 3 * u, 0.94 * size[0], y + 8 * u), fill=(234, 238, 244))
        for x, cell in zip(columns, cells, strict=True):
            draw.text((x, y), cell, "white" if row == 0 else INK, font(4.2 * u))
    pick = rng.randrange(5)
    rows = "\n".join(" | ".join(cells) for cells in (head, *zip(first, names, last, strict=True)))
    return Document(
        image,
        f"A table with the title '{title}', a blue header with the columns {', '.join(head)} and five rows: "
        f"{', '.join(names)}.",
        (
            (f"What is the {head[2].lower()} of {names[pick]}?", last[pick]),
            (f"Which {head[1].lower()} is in the third row?", names[2]),
            ("Write the table as text.", rows),
            ("Which columns does the table have?", ", ".join(head) + "."),
        ),
    )


DOCUMENTS: dict[str, Callable[[random.Random, tuple[int, int], bool], Document]] = {
    "bar": bar_chart,
    "page": page,
    "line": line_chart,
    "receipt": receipt,
    "sign": sign,
    "pie": pie_chart,
    "table": table,
}

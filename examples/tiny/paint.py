"""Drawing: named colours, backgrounds, printed words, and other drawing styles."""

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Rgb = tuple[int, int, int]

COLORS: dict[str, Rgb] = {
    "white": (250, 250, 250),
    "black": (18, 18, 20),
    "gray": (140, 142, 145),
    "red": (214, 36, 40),
    "orange": (248, 146, 30),
    "yellow": (250, 218, 60),
    "green": (62, 160, 66),
    "blue": (44, 98, 214),
    "purple": (132, 60, 172),
    "pink": (246, 160, 196),
    "brown": (124, 78, 46),
}
PRINTED = """GO NO UP ON IN AM PM TV ZOO SUN SEA SKY ICE TEA CAR BUS CAT DOG COW PIG HEN BEE ANT FOX OWL BAT CUP MAP BED
BOX TOY GYM SPA BAR PUB INN NEW OLD BIG HOT FUN RED ONE TWO SIX TEN YES TOP END OFF OUT DAY KEY PEN ART EGG PIE JAM HAM
NUT FIG OAK ELM FLY RUN WIN SIT EAT BUY PAY ASK LAB AIR GAS OIL ZIP WEB BYE STOP EXIT OPEN SALE SHOP CAFE TAXI PARK
BANK BOOK FISH BIRD BEAR LION DUCK FROG WOLF GOAT DEER TREE ROSE LEAF MOON STAR RAIN SNOW WIND FIRE LAKE SAND ROCK
HILL CITY TOWN FARM ROAD STREET BOAT SHIP BIKE TRAM DOOR WALL ROOM HOME SOUP RICE CAKE MILK CORN BEAN PEAR PLUM LIME
MEAT SALT COLD WARM COOL SLOW FAST FREE BEST GOOD NICE LOVE LIFE LUCK WORK PLAY GAME GOAL TEAM BALL GOLF SWIM JUMP
RACE SONG BAND DRUM FILM SHOW NEWS MAIL POST TIME WEEK YEAR NOON EAST WEST LEFT RIGHT NORTH SOUTH KING QUEEN GOLD
BLUE GREEN BLACK WHITE PINK BROWN THREE FOUR FIVE SEVEN EIGHT NINE HELLO THANKS PLEASE WELCOME HAPPY PARTY MUSIC
DANCE HOTEL HOUSE BEACH OCEAN RIVER WATER JUICE BREAD APPLE LEMON MANGO GRAPE PEACH MELON ONION PIZZA PASTA SALAD
SUGAR HONEY CANDY SNACK LUNCH DINNER MENU PRICE MONEY STORE MARKET BAKERY SCHOOL CLASS LIBRARY MUSEUM GARDEN FOREST
DESERT ISLAND CASTLE BRIDGE TOWER TRAIN PLANE ROCKET TRUCK WHEEL STATION AIRPORT TICKET TRAVEL TIGER HORSE SHEEP
ZEBRA MOUSE SNAKE SHARK WHALE RABBIT MONKEY PANDA KITTEN PUPPY FLOWER SPRING SUMMER AUTUMN WINTER MONDAY FRIDAY
SUNDAY JANUARY APRIL JUNE JULY AUGUST DANGER SAFE QUIET CLOSED ENTRY PUSH PULL START FINISH POWER LIGHT PAPER PHOTO
RADIO ROBOT SPACE EARTH WORLD PEACE DREAM SMILE FRIEND FAMILY DOCTOR PILOT CHEF ARTIST"""
WORDS: tuple[str, ...] = (*PRINTED.split(), *(str(n) for n in range(100)))  # all words that can be printed


# ---------------------------------------------------------------- colours of things


def lost_on(glyph: Image.Image) -> tuple[float, ...]:
    pixels = np.asarray(glyph.reduce(4), dtype=np.float32).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 100][:, :3]
    if not len(pixels):
        return (0.0,) * len(COLORS)
    distance = np.linalg.norm(pixels[:, None] - np.array(list(COLORS.values()), dtype=np.float32), axis=-1)
    return tuple((distance < 70).mean(axis=0).tolist())


# hues from 0 to 255, with gaps between them; dark orange is brown, pale red is pink
HUES = {
    "red": (-8, 9),
    "orange": (15, 29),
    "yellow": (33, 45),
    "green": (54, 112),
    "blue": (132, 176),
    "purple": (186, 210),
    "pink": (220, 246),
}


def main_color(glyph: Image.Image) -> str | None:
    """The clearly dominant colour of a glyph."""
    small = glyph.reduce(5)
    pixels = np.asarray(small.convert("RGB").convert("HSV"), dtype=np.int16).reshape(-1, 3)
    pixels = pixels[np.asarray(small.getchannel("A")).reshape(-1) > 128]
    names = [_color_name(*map(int, pixel)) for pixel in pixels]
    counts = Counter(names).most_common(2) + [(None, 0)] * 2
    (name, n), (_, second) = counts[:2]
    return name if n > 0.6 * len(names) and second < 0.25 * len(names) else None


@cache
def _color_name(hue: int, saturation: int, value: int) -> str | None:
    """The colour name of a pixel with channels from 0 to 255; None if it is between two names."""
    if value < 60 or saturation < 30:
        return "black" if value < 60 else "white" if value > 232 else "gray" if value < 190 else None
    turned = hue - 256 if hue >= 248 else hue
    name = next((name for name, (low, high) in HUES.items() if low <= turned <= high), None)
    if name in ("red", "orange") and value < 150:
        return "brown"
    if name == "red" and saturation < 120:
        return "pink" if value > 200 else None
    return name if saturation > (200 if name == "orange" else 70) else None  # pale orange is ambiguous


# ---------------------------------------------------------------- printed words


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(48)


@lru_cache(maxsize=4096)
def _letters(text: str, font_variant: int) -> Image.Image:
    """The mask of a word in 48 px type, cropped. Variants: 0 regular, 1 bold, 2 wide, 3 slanted, 4 wide and bold."""
    mask = Image.new("L", (60 * len(text) + 60, 90))
    ImageDraw.Draw(mask).text((30, 15), text, fill=255, font=_font(), stroke_width=2 if font_variant in (1, 4) else 0)
    if font_variant == 3:
        mask = mask.transform(mask.size, Image.Transform.AFFINE, (1, 0.22, -10, 0, 1, 0), Image.Resampling.BILINEAR)
    mask = mask.crop(mask.getbbox())
    return mask.resize((round(mask.width * 1.3), mask.height)) if font_variant in (2, 4) else mask


FONT_VARIANTS = 5


def render_word(word: str, height: int, color: Rgb, font_variant: int = 0) -> Image.Image:
    """A word as RGBA, `height` pixels high, in Pillow's built-in font."""
    mask = _letters(word, font_variant % FONT_VARIANTS)
    mask = mask.resize((max(1, round(mask.width * height / mask.height)), height), Image.Resampling.BOX)
    image = Image.new("RGBA", mask.size, (*color, 0))
    image.putalpha(mask)
    return image


def contrasting(names: Sequence[str]) -> list[str]:
    """Colours that are readable on all of these colours and on their averages."""
    grounds = [COLORS[name] for name in names]
    middle = [sum(shades) / len(shades) for shades in zip(*grounds, strict=True)]
    return [ink for ink, shade in COLORS.items() if all(distance(shade, ground) > 190 for ground in (*grounds, middle))]


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Distance between two colours. Brightness has the largest weight, because legibility depends on it."""
    return (2.0 * abs(sum(a) - sum(b)) + sum(abs(x - y) for x, y in zip(a, b, strict=True))) / 3


# ---------------------------------------------------------------- backgrounds


def jitter(rng: random.Random, name: str, most: int = 12) -> Rgb:
    """A random variation of a named colour that keeps the name."""
    red, green, blue = (max(0, min(255, c + rng.randint(-most, most))) for c in COLORS[name])
    if name in ("white", "black", "gray"):
        return green, green, green
    return red, green, blue


def paint(rng: random.Random, size: tuple[int, int], kind: str, names: Sequence[str]) -> Image.Image:
    """Paints a background: one colour, plain or textured, or a gradient between two."""
    first = jitter(rng, names[0])
    if kind == "plain":
        return Image.new("RGB", size, first)
    if kind == "gradient":
        ramp = ImageOps.invert(Image.linear_gradient("L")) if rng.random() < 0.5 else Image.linear_gradient("L")
        ramp = ramp.rotate(rng.choice((0, 90))) if rng.random() < 0.8 else Image.radial_gradient("L")
        return Image.composite(
            Image.new("RGB", size, first), Image.new("RGB", size, jitter(rng, names[1])), ramp.resize(size)
        )
    shade = tuple(max(0, min(255, c + (26 if sum(first) < 380 else -26))) for c in first)
    return Image.composite(Image.new("RGB", size, shade), Image.new("RGB", size, first), _texture(rng, size, kind))


TEXTURES = ("noise", "stripes", "dots", "checks", "clouds")


def _texture(rng: random.Random, size: tuple[int, int], kind: str) -> Image.Image:
    """The mask of the second shade of a texture."""
    width, height = size
    if kind in ("noise", "clouds"):
        coarse = rng.randint(6, 14) if kind == "clouds" else 2
        shape = (height // coarse + 1, width // coarse + 1)
        grain = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, shape, dtype=np.uint8)
        return Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC)
    step = rng.randint(10, 26)
    y, x = np.ogrid[:height, :width]
    pattern: npt.NDArray[np.bool_]
    if kind == "stripes":
        across = (x + 0 * y, y + 0 * x, x + y)[rng.randrange(3)]
        pattern = across % step < step // 2
    elif kind == "dots":
        pattern = (x % step - step / 2) ** 2 + (y % step - step / 2) ** 2 < (step * 0.28) ** 2
    else:
        pattern = (x // step + y // step) % 2 == 0
    return Image.fromarray(pattern.astype(np.uint8) * 255)


# ---------------------------------------------------------------- other styles


def stylise(rng: random.Random, glyph: Image.Image) -> Image.Image:
    """Redraws a glyph in another style, RGBA to RGBA. For training only."""
    margin = 6
    image = ImageOps.expand(glyph, margin)  # transparent margin for an outline
    alpha, color = image.getchannel("A"), image.convert("RGB")
    color = _recolor(rng, color)
    if rng.random() < 0.45:
        color = ImageOps.posterize(color.filter(ImageFilter.BoxBlur(1.5)), rng.choice((2, 3)))
    if rng.random() < 0.45:  # lines where the colour changes
        edges = color.convert("L").filter(ImageFilter.FIND_EDGES).filter(ImageFilter.MaxFilter(3))
        edges = ImageChops.multiply(edges.point(lambda v: min(255, 4 * v) if v > 24 else 0), alpha)
        color.paste((20, 20, 24), mask=edges)
    if rng.random() < 0.55:  # a dark outline
        grown = alpha.filter(ImageFilter.MaxFilter(rng.choice((3, 5, 7))))
        if rng.random() < 0.3:  # lines only, without fill
            color = Image.blend(color, Image.new("RGB", color.size, (255, 255, 255)), 0.75)
        color = Image.composite(color, Image.new("RGB", color.size, (20, 20, 24)), alpha)
        alpha = grown
    image = Image.merge("RGBA", (*color.split(), alpha))
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 2.2)))
    if rng.random() < 0.5:
        image = _bend(rng, image)
    return image.crop(image.getchannel("A").point(lambda a: 255 if a > 40 else 0).getbbox())


def _recolor(rng: random.Random, color: Image.Image) -> Image.Image:
    """Jitters brightness, contrast, saturation and hue; rarely converts to gray."""
    lot = rng.random()
    if lot < 0.08:
        return color.convert("L").convert("RGB")
    if lot < 0.4:
        hue, saturation, value = color.convert("HSV").split()
        shift = rng.randint(-12, 12)
        color = Image.merge("HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)).convert("RGB")
    for kind, low, high in (
        (ImageEnhance.Brightness, 0.75, 1.3),
        (ImageEnhance.Contrast, 0.7, 1.4),
        (ImageEnhance.Color, 0.4, 1.7),
    ):
        if rng.random() < 0.5:
            color = kind(color).enhance(rng.uniform(low, high))
    return color


def _bend(rng: random.Random, image: Image.Image) -> Image.Image:
    """Squeezes and shears a glyph."""
    width, height = image.size
    image = image.resize(
        (max(8, round(width * rng.uniform(0.78, 1.0))), max(8, round(height * rng.uniform(0.78, 1.0))))
    )
    shear = rng.uniform(-0.18, 0.18)
    room = round(abs(shear) * image.height) + 1
    image = ImageOps.expand(image, (room, 0, room, 0))
    matrix = (1, shear, -shear * image.height / 2, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

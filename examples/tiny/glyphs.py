"""Renders the glyphs of the drawn world into packs: `python -m examples.tiny.glyphs`.

The glyphs are the fully-qualified single-code-point emoji of five groups in Unicode's list, except clock faces. A pack
is a zip, or a folder of the same structure, with index.json and <style>/<code>.png files of at most 112 x 112 px.
"""

import io
import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

from llava.errors import ConfigError, ImageError, LlavaError

SIDE = 112  # longer side of a glyph in a pack, in pixels
GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
PEOPLE = ("Smileys & Emotion", "People & Body")
CLOCK_FACES = range(0x1F550, 0x1F568)  # 24 glyphs that differ only in the position of the hands
FEW = (  # the glyphs that the tests use
    *("dog", "cat", "hot dog", "lion", "penguin", "owl", "tropical fish", "butterfly", "red apple", "banana", "carrot"),
    *(
        "pizza",
        "beer mug",
        "rose",
        "cactus",
        "bus",
        "sailboat",
        "house",
        "guitar",
        "soccer ball",
        "umbrella",
        "scissors",
    ),
    *("key", "dress"),
)
NOTO_SIZE = 109  # pixels; the only bitmap size in Noto Color Emoji
LINE = re.compile(r"(?P<codes>[0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (?P<name>.+)")

Render = Callable[["Entry"], Image.Image | None]  # None if the source lacks the glyph


@dataclass(frozen=True)
class Entry:
    """One thing in the world."""

    code: str  # code point in lower-case hexadecimal
    name: str  # Unicode's short name
    group: str
    subgroup: str

    @property
    def char(self) -> str:
        return chr(int(self.code, 16))


class Glyphs:
    """The pictures of one or more packs, each opened on first access."""

    def __init__(self, entries: list[Entry], sources: dict[tuple[str, str], Callable[[], bytes]]):
        self.entries = entries
        self.styles = list(dict.fromkeys(style for style, _ in sources))
        self._sources = sources
        self._images: dict[tuple[str, str], Image.Image] = {}

    @classmethod
    def load(cls, *files: Path) -> "Glyphs":
        """Joins packs: all their pictures, and their entries in order of first appearance. Raises ConfigError."""
        entries: dict[str, Entry] = {}
        sources: dict[tuple[str, str], Callable[[], bytes]] = {}
        for file in files:
            members = _members(file)
            if "index.json" not in members:
                raise ConfigError(
                    f"{file}: not a pack of glyphs, index.json is missing; make one with examples.tiny.glyphs"
                )
            for item in json.loads(members["index.json"]()):
                entries.setdefault(item["code"], Entry(**item))
            for name, read in members.items():
                style, _, code = name.removesuffix(".png").rpartition("/")
                if name.endswith(".png") and style:
                    sources[style, code] = read
        return cls(list(entries.values()), sources)

    def has(self, entry: Entry, style: str) -> bool:
        return (style, entry.code) in self._sources

    def image(self, entry: Entry, style: str) -> Image.Image:
        """The glyph as RGBA, cropped to its visible pixels. Shared, so do not modify it. Raises ImageError."""
        key = (style, entry.code)
        if key not in self._images:
            if key not in self._sources:
                raise ImageError(
                    f"no picture of {entry.name} in style {style}; available styles: {', '.join(self.styles)}"
                )
            self._images[key] = Image.open(io.BytesIO(self._sources[key]())).convert("RGBA")
        return self._images[key]

    def only(self, styles: Iterable[str]) -> "Glyphs":
        """The same glyphs, restricted to these styles."""
        wanted = set(styles)
        return Glyphs(self.entries, {key: read for key, read in self._sources.items() if key[0] in wanted})

    def first(self, n: int | None) -> "Glyphs":
        """Keeps n entries, spread evenly over the list; None keeps all."""
        if n is None or n >= len(self.entries):
            return self
        kept = [self.entries[i * len(self.entries) // n] for i in range(n)]
        codes = {entry.code for entry in kept}
        return Glyphs(kept, {key: read for key, read in self._sources.items() if key[1] in codes})


def _members(file: Path) -> dict[str, Callable[[], bytes]]:
    """Maps each name in a zip or folder to a function that reads it. The members of a zip are kept in memory."""
    if file.is_dir():
        return {path.relative_to(file).as_posix(): path.read_bytes for path in sorted(file.rglob("*.*"))}
    if not zipfile.is_zipfile(file):
        raise ConfigError(f"{file}: expected a pack of glyphs, a zip or a folder; make one with examples.tiny.glyphs")
    with zipfile.ZipFile(file) as pack:
        return {name: partial(bytes, pack.read(name)) for name in pack.namelist()}


def read_names(file: Path, groups: Iterable[str] = GROUPS) -> list[Entry]:
    """The entries of Unicode's emoji-test.txt that are in the world, in file order."""
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; install Debian's unicode-data, or give emoji-test.txt with --names")
    group = subgroup = ""
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif group in groups and (match := LINE.match(line)):
            codes = match["codes"].removesuffix(" FE0F").split()
            if len(codes) == 1 and int(codes[0], 16) not in CLOCK_FACES:
                entries.append(Entry(codes[0].lower(), match["name"], group, subgroup))
    return entries


def noto(file: Path) -> Render:
    """Renders glyphs of the bitmap (CBDT) version of the font Noto Color Emoji."""
    if not file.is_file():
        raise ConfigError(
            f"{file} does not exist; install Debian's fonts-noto-color-emoji, or give the font with --noto"
        )
    font = ImageFont.truetype(str(file), NOTO_SIZE, layout_engine=ImageFont.Layout.BASIC)

    def picture(char: str) -> Image.Image:
        image = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(image).text((8, 8), char, font=font, embedded_color=True)
        return image

    unknown = picture("\U0010fffd").tobytes()

    def render(entry: Entry) -> Image.Image | None:
        image = picture(entry.char)
        return None if image.tobytes() == unknown else image

    return render


def svgs(source: Path, folder: str) -> Render:
    """Renders SVG files named by code point, from an npm package: a .tgz, or the folder it unpacks to.

    folder: the folder of the SVG files inside the package.
    """
    if not (program := shutil.which("rsvg-convert")):
        raise ConfigError("rsvg-convert, which renders SVG, is not installed; install Debian's librsvg2-bin")
    files = dict(_svg_files(source, folder))
    if not files:
        raise ConfigError(f"{source}: expected a folder or .tgz with SVG files in {folder or 'it'}")

    def render(entry: Entry) -> Image.Image | None:
        data = files.get(entry.code) or files.get(f"{entry.code}-fe0f")
        if data is None:
            return None
        command = [program, "--width", str(2 * SIDE), "--height", str(2 * SIDE), "--keep-aspect-ratio"]
        return Image.open(io.BytesIO(subprocess.run(command, input=data, check=True, stdout=subprocess.PIPE).stdout))

    return render


def _svg_files(source: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        for path in sorted((source / folder).glob("*.svg")):
            yield path.stem.lower(), path.read_bytes()
    elif source.is_file():
        with tarfile.open(source) as package:
            for member in package:
                path = Path(member.name)
                if path.suffix == ".svg" and path.parent == Path("package") / folder:
                    yield path.stem.lower(), package.extractfile(member).read()  # type: ignore[union-attr]


def fit(image: Image.Image) -> Image.Image:
    """Crops to the visible pixels and resizes the longer side to SIDE pixels."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    image = image.crop(box)
    scale = SIDE / max(image.size)
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )


def write_pack(file: Path, entries: list[Entry], styles: dict[str, Render]) -> dict[str, int]:
    """Renders a pack and returns the number of glyphs per style. The file appears only when it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    counts = dict.fromkeys(styles, 0)
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as pack:  # PNG is already compressed
        _add(pack, "index.json", json.dumps([asdict(entry) for entry in entries], indent=0).encode())
        for style, render in styles.items():
            with ThreadPoolExecutor() as threads:
                for entry, image in zip(entries, threads.map(render, entries), strict=True):
                    if image is not None:
                        _add(pack, f"{style}/{entry.code}.png", png(fit(image)))
                        counts[style] += 1
    unfinished.replace(file)
    return counts


def write_few(folder: Path, glyphs: Glyphs) -> None:
    """Writes the entries named in FEW as a folder, with pictures reduced to 255 colours to save space."""
    entries = [entry for entry in glyphs.entries if entry.name in FEW]
    for style in glyphs.styles:
        (folder / style).mkdir(parents=True, exist_ok=True)
        for entry in entries:
            image = glyphs.image(entry, style).quantize(255, Image.Quantize.FASTOCTREE)
            (folder / style / f"{entry.code}.png").write_bytes(png(image))
    index = json.dumps([asdict(entry) for entry in entries], indent=1, ensure_ascii=False)
    (folder / "index.json").write_text(index + "\n", encoding="utf-8")


def _add(pack: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Adds a member with a fixed date, so that the same sources give the same bytes."""
    pack.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main(
    names: Annotated[Path, typer.Option(help="Unicode's emoji-test.txt")] = Path(
        "/usr/share/unicode/emoji/emoji-test.txt"
    ),
    noto_font: Annotated[Path, typer.Option("--noto", help="NotoColorEmoji.ttf, the bitmap version")] = Path(
        "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    ),
    twemoji: Annotated[Path, typer.Option(help="npm package @twemoji/svg, folder or .tgz")] = Path(
        "node_modules/@twemoji/svg"
    ),
    openmoji: Annotated[Path | None, typer.Option(help="npm package openmoji, folder or .tgz; optional")] = None,
    people: Annotated[bool, typer.Option(help="include smileys and people")] = False,
    few: Annotated[Path | None, typer.Option(help="folder to write the glyphs for the tests to")] = None,
    out: Annotated[Path, typer.Option(help="folder for glyphs.zip and openmoji.zip")] = Path("build/tiny"),
) -> None:
    """Render the glyphs into packs."""
    try:
        entries = read_names(names, GROUPS + PEOPLE if people else GROUPS)
        packs = {"glyphs.zip": {"noto": noto(noto_font), "twemoji": svgs(twemoji, "")}}
        if openmoji:  # in a separate pack, so that this style stays unseen until scoring
            packs["openmoji.zip"] = {"openmoji": svgs(openmoji, "color/svg")}
        for file, styles in packs.items():
            counts = write_pack(out / file, entries, styles)
            megabytes = (out / file).stat().st_size / 1e6
            for style, n in counts.items():
                typer.echo(f"{out / file}: {style} {n} of {len(entries)} glyphs")
            typer.echo(f"{out / file}: {megabytes:.1f} MB")
        if few:
            write_few(few, Glyphs.load(out / "glyphs.zip"))
    except LlavaError as error:
        typer.echo(f"glyphs: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)

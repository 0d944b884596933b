"""Image files, bytes and PIL images are read, or refused in one line that says what was found."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava.config import PictureOptions
from llava.errors import ConfigError, ImageError
from llava.preprocess.image import read_picture


def stripes(width: int = 3, height: int = 2) -> Image.Image:
    """A 16-bit picture whose pixels all differ."""
    return Image.fromarray((np.arange(width * height) * 2570).reshape(height, width).astype(np.uint16))


def broken(folder: Path) -> dict[str, Any]:
    """Pictures that cannot be read, by what the message says about them."""
    (folder / "empty.png").touch()
    (folder / "words.png").write_text("a thousand of them")
    os.mkfifo(folder / "pipe.png")
    return {
        "empty.png: is empty": folder / "empty.png",
        "words.png: is not an image in a known format": str(folder / "words.png"),
        "pipe.png: is not a regular file": folder / "pipe.png",
        f"{folder}: is a folder": folder,
        "none.png: no such image file": folder / "none.png",
        "picture: is empty": b"",
        "picture: is not an image in a known format": b"words",
        "picture: has no pixels": Image.new("RGB", (0, 4)),
        r"picture: found ndarray.*PIL.Image.fromarray\(array\)": np.zeros((2, 2, 3), np.float32),
        r"picture: found Tensor.*uint8": torch.zeros(2, 2, 3, dtype=torch.uint8),
        "picture: found int": 7,
    }


def test_what_is_not_a_picture_is_named_without_an_address(tmp_path: Path) -> None:
    for message, source in broken(tmp_path).items():
        with pytest.raises(ImageError, match=message) as caught:
            read_picture(source)
        assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("named", [True, False])
def test_a_loss_starts_with_the_name_of_the_file(named: bool, tmp_path: Path) -> None:
    file = tmp_path / "logo.png"
    Image.new("RGBA", (4, 4)).save(file)
    (loss,) = read_picture(file if named else file.read_bytes()).losses
    assert loss.startswith(f"{file}: 100% of its pixels" if named else "picture: 100% of its pixels")
    assert "--transparency white" in loss


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied_after_wide_values_are_scaled(orientation: int) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stripes().save(file, "PNG", exif=exif)
    plain = np.asarray(read_picture(io.BytesIO(file.getvalue())).image)[..., 0]
    assert plain.tolist() == [[0, 10, 20], [30, 40, 50]]
    turned = {2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1], 5: plain.T, 6: np.rot90(plain, -1),
              7: plain[::-1, ::-1].T, 8: np.rot90(plain)}.get(orientation, plain)  # fmt: skip
    upright = read_picture(io.BytesIO(file.getvalue()), PictureOptions(exif=True)).image
    assert np.array_equal(np.asarray(upright)[..., 0], turned)


@pytest.mark.parametrize("values", [{"transparency": "pink"}, {"transparency": None}, {"exif": 1}])
def test_wrong_picture_options_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        PictureOptions(**values)

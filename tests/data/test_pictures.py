"""Picture stores: folders, zips and tars, unsafe names, and damaged archives."""

import io
import tarfile
from pathlib import Path

import pytest

from llava.data.pictures import open_pictures
from llava.data.samples import Samples
from llava.errors import DataError
from tests.data.published import SETS, SEVERAL, names_of, picture, store, write_folder, write_json, write_tar, write_zip


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "shards"])
@pytest.mark.parametrize("name", SETS)
def test_every_store_returns_its_pictures(kind: str, name: str, tmp_path: Path) -> None:
    data = [*SETS[name], *SEVERAL]
    files = {name: picture(name) for name in names_of(data)}
    samples = Samples([write_json(tmp_path / "data.json", data)], store(kind, tmp_path, files))
    assert {name: samples.picture(name) for sample in samples for name in sample.images} == files
    assert samples.picture(f"./{next(iter(files))}") == next(iter(files.values()))


def test_the_last_of_equal_tar_members_counts_and_long_names_work(tmp_path: Path) -> None:
    long = "/".join(["folder" * 10] * 4) + "/ü.jpg"
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": b"old", long: b"long"})
    with tarfile.open(tar, "a") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"new"))
    assert open_pictures(tar).read("a.jpg") == b"new"
    assert open_pictures(tar).read(long) == b"long"


def test_a_name_in_two_tars_is_refused(tmp_path: Path) -> None:
    for shard in ("0.tar", "1.tar"):
        write_tar(tmp_path / shard, {"a.jpg": b"x"})
    with pytest.raises(DataError, match=r"a\.jpg is in .*0\.tar and in .*1\.tar"):
        open_pictures(tmp_path)


def test_a_folder_with_a_tar_and_subfolders_is_a_folder_of_pictures(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train2017/a.jpg": b"a"})
    write_tar(tmp_path / "train2017.tar", {"b.jpg": b"b"})
    assert open_pictures(tmp_path).read("train2017/a.jpg") == b"a"


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "/etc/passwd", "", "..", "a\\..\\b.jpg", "a\0.jpg"])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_names_that_lead_outside_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"secret")
    with pytest.raises(DataError, match="not a valid picture name; expected a relative path"):
        open_pictures(store(kind, tmp_path, {"b.jpg": b"b"})).read(name)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_missing_picture_error_lists_existing_names(kind: str, tmp_path: Path) -> None:
    pictures = open_pictures(store(kind, tmp_path, {"train2014/COCO_train2014_000000033471.jpg": b"x"}))
    with pytest.raises(DataError, match=r"no such picture .*train2014/.*COCO_train2014_000000033471\.jpg"):
        pictures.read("coco/train2017/000000033471.jpg")


def test_unreadable_archives_are_refused(tmp_path: Path) -> None:
    files = {"a.jpg": picture("a.jpg"), "b.jpg": picture("b.jpg")}
    whole = write_tar(tmp_path / "a.tar", files).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:900])
    (tmp_path / "cut.zip").write_bytes(write_zip(tmp_path / "a.zip", files).read_bytes()[:-30])
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.tar", "a.jpg")
    for name in ("cut.tar", "cut.zip", "a.tar.gz"):
        with pytest.raises(DataError, match=r"not a readable archive .*uncompressed tar"):
            open_pictures(tmp_path / name)
    with pytest.raises(DataError, match="does not exist; expected a folder of pictures"):
        open_pictures(tmp_path / "absent")


def test_an_archive_that_changed_after_indexing_is_an_error(tmp_path: Path) -> None:
    for path in (
        write_zip(tmp_path / "a.zip", {"a.jpg": b"a" * 99}),
        write_tar(tmp_path / "a.tar", {"a.jpg": b"a" * 99}),
    ):
        pictures = open_pictures(path)
        path.write_bytes(path.read_bytes()[:520] if path.suffix == ".tar" else b"x" * 300)
        with pytest.raises(DataError, match=r"a\.jpg: cannot be read .*download the archive again"):
            pictures.read("a.jpg")


@pytest.mark.parametrize(
    "root", ["/", "images", "../{tmp}/images", "link", "link/../images", "far/../images", "{tmp_path}/images"]
)
def test_an_absolute_name_is_read_from_every_folder_that_contains_it(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, {"images/sub/a.jpg": b"inside", "b.jpg": b"outside"})
    (tmp_path / "link").symlink_to("images")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "images").symlink_to(tmp_path / "images")
    (tmp_path / "far").symlink_to("elsewhere/deep")  # the folder above it is not tmp_path
    monkeypatch.chdir(tmp_path)
    pictures = open_pictures(Path(root.format(tmp=tmp_path.name, tmp_path=tmp_path)))
    assert pictures.read(f"{tmp_path}/images/sub/a.jpg") == b"inside"
    if root != "/":
        for name in (f"{tmp_path}/b.jpg", f"{tmp_path}/images/../b.jpg"):
            with pytest.raises(DataError, match="not a valid picture name"):
                pictures.read(name)

"""Samples in the layouts of LLaVA, ShareGPT and OpenAI are read alike; what is not read is refused."""

import base64
import json
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llava.data.check import check
from llava.data.layouts import UnsupportedError, parse, to_llava
from llava.data.repair import find_faults, repair
from llava.data.samples import Samples
from llava.errors import DataError, ImageError
from llava.preprocess.conversation import Turn
from tests.command import run
from tests.data.published import GOOD, expected, picture, talk, webdataset, write_folder, write_json, write_tar

Json = dict[str, Any]
PAIR = talk("<image>\n<image>\nq", "a")
PNG = "data:image/png;base64," + base64.b64encode(picture("a.png")).decode()


def chat(*contents: Any, system: str | None = None) -> list[Json]:
    roles = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *roles] if system else roles


def asked(*parts: Any) -> Json:
    return {"messages": chat(list(parts), "a")}


def url(source: Any) -> Json:
    return {"type": "image_url", "image_url": {"url": source}}


INDEXED: Json = {"index": 0, "text": None, "type": "image"}  # as Hugging Face's tables fill parts
TEXT = {"type": "text", "text": "q"}
ONE: Json = {"image": "a.png", "conversations": GOOD}
TWO: Json = {"image": ["a.png", "b.png"], "conversations": PAIR}
PLAIN: Json = {"conversations": talk("q", "a")}
READ: dict[str, tuple[Json, Json]] = {  # a sample, and the same sample in LLaVA's layout
    "images with one name": ({"images": ["a.png"], "conversations": GOOD}, ONE),
    "images as text": ({"images": "a.png", "conversations": GOOD}, ONE),
    "images with two names": ({"images": ["a.png", "b.png"], "conversations": PAIR}, TWO),
    "image and images that agree": ({"image": "a.png", "images": ["a.png"], "conversations": GOOD}, ONE),
    "image beside empty images": ({"image": "a.png", "images": [], "conversations": GOOD}, ONE),
    "null beside images": ({"image": None, "images": ["a.png"], "conversations": GOOD}, ONE),
    "messages": ({"messages": chat("<image>\nq", "a"), "images": ["a.png"]}, ONE),
    "messages under conversations": ({"conversations": chat("q", "a")}, PLAIN),
    "turns under messages": ({"messages": talk("q", "a")}, PLAIN),
    "a null id": (PLAIN | {"id": None}, PLAIN | {"id": "0"}),
    "equal lists": ({"messages": talk("q", "a"), "conversations": talk("q", "a")}, PLAIN),
    "an empty second list": ({"messages": [], "conversations": talk("q", "a")}, PLAIN),
    "roles of ShareGPT": (
        {"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]},
        PLAIN,
    ),
    "assistant in from": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "assistant", "value": "a"}]},
        PLAIN,
    ),
    "text parts": (asked(TEXT), PLAIN),
    "parts as strings": ({"messages": chat(["q"], "a")}, PLAIN),
    "image_url": (asked(url("a.png"), TEXT), ONE),
    "image_url as text": (asked({"type": "image_url", "image_url": "a.png"}, TEXT), ONE),
    "image_url with detail": (asked({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, TEXT), ONE),
    "input_image": (asked({"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "q"}), ONE),
    "two equal sources": (asked(url("a.png") | {"image": "a.png"}, TEXT), ONE),
    "settings of a part": (asked({"type": "image", "image": "a.png", "max_pixels": 9, "resized_height": 2}, TEXT), ONE),
    "image": (asked({"type": "image", "image": "a.png"}, TEXT), ONE),
    "two images": (asked(url("a.png"), url("b.png"), TEXT), TWO),
    "the picture last": (asked(TEXT, url("a.png")), ONE | {"conversations": talk("q\n<image>", "a")}),
    "marks in the text": (
        asked(url("a.png"), {"type": "text", "text": "see <image> here"}),
        ONE | {"conversations": talk("see <image> here", "a")},
    ),
    "an image part without a name": (asked({"type": "image"}, TEXT) | {"images": ["a.png"]}, ONE),
    "null keys of a table": (
        {
            "messages": chat([{"type": "image", "text": None, "image": None}, TEXT | {"image": None}], "a"),
            "images": ["a.png"],
        },
        ONE,
    ),
    "a table with indices": (
        {"messages": chat([INDEXED, {"index": None, **TEXT}], [{"index": None, **TEXT, "text": "a"}])}
        | {"images": ["a.png"]},
        ONE,
    ),
    "the picture last, with an index": (
        {"messages": chat([{"index": None, **TEXT}, INDEXED], "a"), "images": ["a.png"]},
        ONE | {"conversations": talk("q\n<image>", "a")},
    ),
    "an index and no pictures": (asked(INDEXED, TEXT), {"conversations": GOOD}),
    "indices in another order": (
        asked(INDEXED | {"index": 1}, INDEXED, TEXT) | {"images": ["b.png", "a.png"]},
        TWO,
    ),
    "a file URL": (asked(url("file:///data/my%20pictures/a.png"), TEXT), ONE | {"image": "/data/my pictures/a.png"}),
    "a data URL": (asked(url(PNG), TEXT), ONE | {"image": PNG}),
    "media that are missing": (PLAIN | {"video": None, "audio": [], "videos": "", "image_path": float("nan")}, PLAIN),
    "keys that describe a picture": (
        ONE | {"image_id": 7, "image_size": [3, 4], "num_images": 1, "width": 3, "image_url": "https://x.org/a.png"},
        ONE,
    ),
    **{
        f"with a picture, {key}": (ONE | {key: content}, ONE)
        for key, content in (
            ("image_path", "a.png"),
            ("image_files", ["a.png"]),
            ("image_info", {"width": 1}),
            ("image_metadata", {"format": "PNG", "name": "a.png"}),
            ("image_split", "train"),
            ("image_set", "train2017"),
            ("image_class", "dog"),
            ("image_text", "STOP"),
            ("image_author", "x"),
            ("imageDims", [1, 2]),
            ("image_id", 7),
        )
    },
    **{
        f"without a picture, {key} {content!r}": (PLAIN | {key: content}, PLAIN)
        for key, content in (
            *(
                (key, empty)
                for key in ("image", "images", "img_path")
                for empty in ("", [""], [None], float("nan"), [])
            ),
            ("videos", [None]),
            ("photo", {"bytes": None, "path": None}),
            ("tools", "[]"),
            ("image_id", -1),
            ("category", "movies"),
            ("topic", "music"),
            ("voice", "active"),
            ("music_genre", "jazz"),
            ("source", "http://x.org/y.jpg"),
        )
    },
    "other keys": (PLAIN | {"model": "gpt-4", "data_source": "clips", "score": 0.5, "media_type": "text"}, PLAIN),
    "the weight of a question": ({"conversations": [talk("q")[0] | {"weight": 0}, *talk("q", "a")[1:]]}, PLAIN),
    "a neutral weight": ({"messages": [*chat("q"), {"role": "assistant", "content": "a", "weight": 1}]}, PLAIN),
    **{
        html: ({"conversations": talk(html, "a")}, {"conversations": talk(html, "a")})
        for html in ("What is <video> in HTML?", "<video>\n<source>\n</video>", "<audio>no sound, see a.txt</audio>")
    },
}


@pytest.mark.parametrize("name", READ)
def test_every_layout_is_read_like_the_same_sample_in_llavas_layout(name: str) -> None:
    value, same = READ[name]
    assert parse({"id": "x"} | value, "data.json, sample 0", "0") == expected([{"id": "x"} | same])[0]


@pytest.mark.parametrize("name", READ)
def test_a_sample_written_in_llavas_layout_is_read_as_the_same_sample(name: str) -> None:
    value = {"id": "x"} | READ[name][0]
    sample = parse(value, "", "")
    written = to_llava(value, sample)
    assert written is not None
    assert not {"messages", "images"} & set(written)
    assert parse(written, "", "") == sample


@pytest.mark.parametrize(
    "value",
    [
        {"messages": chat("q", "a", system="Be brief.")},
        {"system": "Be brief.", "messages": chat("q", "a")},
        {"system": "Be brief.", "conversations": [{"from": "system", "value": "Be brief."}, *talk("q", "a")]},
    ],
)
def test_a_system_message_is_read_from_its_key_or_the_first_turn(value: Json) -> None:
    sample = parse(value, "", "0")
    assert (sample.system, sample.turns) == ("Be brief.", (Turn("user", "q"), Turn("assistant", "a")))
    written = to_llava(value, sample)
    assert written is not None
    assert written["conversations"][0] == {"from": "system", "value": "Be brief."}
    assert parse(written, "", "0") == sample


def part(kind: str, content: Any = "x") -> Json:
    return asked({"type": kind, kind: content}, TEXT)


UNSUPPORTED: dict[str, tuple[Json, str]] = {  # a sample, and what the error names
    **{
        key: (PLAIN | {key: f"0.{suffix}"}, f'the key "{key}"')
        for key, suffix in (
            ("video", "mp4"),
            ("audio", "wav"),
            ("video_path", "x"),
            ("img", "png"),
            ("image_path", "png"),
            ("photo", "x"),
            ("imageFile", "x"),
            ("IMAGE", "x"),
            ("speech_file", "x"),
            ("source", "mp4"),
            ("document", "jpg"),
            ("image_id", "1"),
        )
    },
    **{
        key: (PLAIN | {key: ["0", "1"]}, f'the key "{key}"')
        for key in ("videos", "audios", "media", "frames", "pictures")
    },
    "another path beside a picture": (ONE | {"image_path": "b.png"}, 'the key "image_path"'),
    "more pictures": (ONE | {"image_set": ["a.png", "b.png"]}, 'the key "image_set"'),
    "a picture in an object": (ONE | {"image_info": {"image": "b.png"}}, 'the key "image_info.image"'),
    "a name and no name": (ONE | {"image": ["a.png", ""]}, "image is ['a.png', '']"),
    "a file named by a topic": (PLAIN | {"voice": "0017"}, 'the key "voice"'),
    "modalities": (PLAIN | {"modalities": ["text", "image"]}, 'the key "modalities"'),
    "video beside a picture": (ONE | {"video": "0.mp4"}, 'the key "video"'),
    "has_image": (PLAIN | {"has_image": True}, 'the key "has_image"'),
    "type": (PLAIN | {"type": "video"}, 'the key "type"'),
    "nested": (PLAIN | {"meta": {"video": "0"}}, 'the key "meta.video"'),
    "bytes": (PLAIN | {"content": {"data": "data:image/png;base64,iVBO"}}, 'the key "content.data"'),
    "audio in a turn": (
        {"messages": [*chat("q"), {"role": "assistant", "content": None, "audio": {"id": "x"}}]},
        "audio",
    ),
    "images in a turn": (
        {"messages": [{"role": "user", "content": "q", "images": ["a.png"]}, *chat("q", "a")[1:]]},
        "images",
    ),
    "video part": (part("video"), "'type': 'video'"),
    "video_url part": (part("video_url", {"url": "x"}), "'type': 'video_url'"),
    "input_audio part": (part("input_audio", {"data": "x"}), "'type': 'input_audio'"),
    "file part": (part("file", {"file_id": "x"}), "'type': 'file'"),
    "image by id": (asked({"type": "input_image", "file_id": "x"}, TEXT), "contains the picture"),
    "http part": (asked(url("https://x.org/a.png"), TEXT), "nothing is downloaded"),
    "http name": (ONE | {"image": "HTTP://x.org/a.png"}, "nothing is downloaded"),
    "bare base64": (ONE | {"image": "iVBO" * 300}, "data:image/png;base64"),
    **{
        mark: ({"conversations": talk(f"{mark}\nq", "a")}, f"the mark {mark}")
        for mark in (
            "<video>",
            "<audio>",
            "<speech>",
            "<img>",
            "<Image>",
            "<image_1>",
            "<|image_1|>",
            "<|video_pad|>",
            "<ImageHere>",
        )
    },
    **{
        enclosed: (
            {"conversations": talk(f"{enclosed}\nWhat?", "a")},
            enclosed[enclosed.index("<") :].partition(">")[0] + ">",
        )
        for enclosed in (
            "Picture 1: <img>a.png</img>",
            "<img>https://x.org/demo</img>",
            "Audio 1: <audio>sub/my clip.flac</audio>",
            "See <Image> a.jfif </Image>",
        )
    },
    "a mark at the end": ({"conversations": talk("q <video> ", "a")}, "the mark <video>"),
    "image and images": (
        {"image": "a.png", "images": ["b.png"], "conversations": GOOD},
        "image and images name different",
    ),
    "images and parts": (asked(url("a.png"), TEXT) | {"images": ["b.png"]}, "name different pictures"),
    "parts with and without names": (
        asked(url("a.png"), {"type": "image"}) | {"images": ["a.png"]},
        "some image parts",
    ),
    **{
        f"indices {indices}": (
            asked(*(INDEXED | {"index": index} for index in indices), TEXT) | {"images": ["a.png", "b.png"]},
            f'"index" of its image parts is {indices}; expected each picture of images once, from 0 to 1',
        )
        for indices in ([0], [0, 0], [1, 2], [None, 0], ["0", "1"], [[], 0])
    },
    "two lists": ({"messages": chat("q", "a"), "conversations": talk("q", "b")}, "conversations and messages differ"),
    "two system messages": ({"system": "A", "messages": chat("q", "a", system="B")}, "different system messages"),
    "a late system message": ({"messages": [*chat("q", "a"), {"role": "system", "content": "B"}]}, "before all other"),
    **{
        role: ({"conversations": [*talk("q"), {"from": role, "value": "f()"}]}, f"turn 2 is from '{role}'")
        for role in ("tool", "function_call", "observation", "function", "narrator", "Human")
    },
    "a tool message": (
        {"messages": [*chat("q"), {"role": "tool", "content": "1", "tool_call_id": "x"}]},
        "from 'tool'",
    ),
    "tool calls": ({"messages": [*chat("q"), {"role": "assistant", "content": None, "tool_calls": [1]}]}, "tool_calls"),
    "tools": (PLAIN | {"tools": "[{}]"}, '"tools"'),
    "preferences": (PLAIN | {"chosen": GOOD[1], "rejected": GOOD[1]}, '"chosen"'),
    "a weight": ({"conversations": [*talk("q"), {"from": "gpt", "value": "a", "weight": 0}]}, '"weight" is 0'),
    "query and response": ({"query": "q", "response": "a"}, '"query", "response"'),
    "instruction": ({"instruction": "q", "output": "a", "images": ["a.png"]}, '"instruction", "output"'),
    "text": ({"text": "q"}, '"text"'),
    "turns as lists": ({"conversations": [["q", "a"]]}, "turn 1 is ['q', 'a']"),
    "turns as a dictionary": ({"conversations": {"q": "a"}}, "conversations is {'q': 'a'}"),
    "keys of another layout": ({"conversations": [{"speaker": "human", "text": "q"}]}, "turn 1 is {'speaker'"),
    "a number as text": ({"conversations": [*talk("q"), {"from": "gpt", "value": 3}]}, "turn 2 is"),
    "text in an image part": (asked({"type": "image", "image": "a.png", "text": "q"}), "the key \"text\" is 'q'"),
    "text in a nameless image part": (asked({"type": "image", "text": "q"}) | {"images": ["a.png"]}, 'the key "text"'),
    "a picture in a text part": (asked(TEXT | {"image": "a.png"}), "the key \"image\" is 'a.png'"),
    "a path in a text part": (asked(TEXT | {"path": "a.png"}), "the key \"path\" is 'a.png'"),
    "a video in an image part": (asked({"type": "image", "image": "a.png", "video": "0"}, TEXT), 'the key "video"'),
    "two sources in a part": (asked(url("a.png") | {"image": "b.png"}, TEXT), "image_url and image differ"),
    "a path as an object": (asked({"type": "image", "image": {"path": "a.png"}}) | {"images": ["b.png"]}, "'path'"),
    "objects in a turn": (
        {"messages": [{"role": "user", "content": "q", "attachments": [{"path": "a.png"}]}, *chat("q", "a")[1:]]},
        'the key "attachments.path"',
    ),
    **{
        repr(content): (PLAIN | {"files": content}, f'the key "files{inner}"')
        for content, inner in (
            ([{"path": "a.png"}], ".path"),
            ([["a.png"]], ""),
            ([{"data": [{"video": "0"}]}], ".data.video"),
            ("https://x.org/a.jpg?width=3", ""),
            ("a.jfif", ""),
            ("a.mp4#t=3", ""),
        )
    },
    "a text part without text": (asked({"type": "text", "value": "q"}), "contains the part"),
    "pictures as objects": (ONE | {"image": {"bytes": "x", "path": "a.png"}}, "image is {'bytes'"),
    "image as a number": (ONE | {"image": 3}, "image is 3"),
    "system as a list": (PLAIN | {"system": ["Be brief."]}, "system is ['Be brief.']"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_read_is_refused_with_file_id_and_key(name: str) -> None:
    value, named = UNSUPPORTED[name]
    with pytest.raises(UnsupportedError) as caught:
        parse({"id": "x7"} | value, "data.json, sample 3", "3")
    assert str(caught.value).startswith("data.json, sample 3 (id x7)")
    assert named in str(caught.value)


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one part replaced, removed or renamed."""
    odd = [None, True, 0, 1.5, float("nan"), "", "x", "a.png", [], {}, [[]], {"a": {}}, ["q"], "<image>", [None]]
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], *([mutated(rng, value[i])] if rng.random() < 0.9 else []), *value[i + 1 :]]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        other = rng.choice(
            [key, key, key, "role", "from", "content", "value", "image", "images", "video", "type", "system"]
        )
        return {**{k: v for k, v in value.items() if k != key}, other: mutated(rng, value[key])}
    return rng.choice(odd)


def test_no_sample_ends_in_a_traceback_and_every_sample_that_is_read_can_be_written() -> None:
    rng = random.Random(0)
    samples = [value for value, _ in (*READ.values(), *UNSUPPORTED.values())]
    n_read = 0
    for _ in range(5000):
        value = rng.choice(samples)
        for _ in range(rng.randint(1, 3)):
            value = mutated(rng, value)
        try:
            sample = parse(value, "data.json, sample 0", "0")
        except DataError as error:
            assert str(error).startswith("data.json, sample 0")  # noqa: PT017
            continue
        n_read += 1
        find_faults(sample)
        repair(sample)
        written = to_llava(value, sample)
        assert written is not None
        assert parse(written, "", "0") == sample
    assert n_read > 300


@pytest.mark.parametrize("depth", [100, 900, 20_000])
def test_a_deeply_nested_sample_is_refused_or_read(depth: int) -> None:
    nested: Any = "x"
    for _ in range(depth):
        nested = {"a": nested}
    for value in (nested, {"conversations": [nested]}, PLAIN | {"meta": nested}, asked(nested)):
        with suppress(DataError):
            parse(value, "", "0")


def test_many_tags_and_many_boxes_are_read_quickly() -> None:
    started = time.perf_counter()
    parse({"conversations": talk("q <img> x " * 20_000, "a")}, "", "0")
    for _ in range(100):
        parse(ONE | {"boxes": [[0.1, 0.2, 0.3, 0.4]] * 1000}, "", "0")
    assert time.perf_counter() - started < 3


def test_a_check_reports_what_is_not_read_and_its_copy_keeps_it(tmp_path: Path) -> None:
    data = [PLAIN, *({"id": name} | value for name, (value, _) in UNSUPPORTED.items())]
    report = check(write_json(tmp_path / "data.json", data), fix=tmp_path / "copy.json", workers=0)
    assert report.problems == {"unsupported": len(UNSUPPORTED)}
    assert [(finding.sample, finding.id) for finding in report.findings] == list(enumerate(UNSUPPORTED, 1))
    for finding, (_, named) in zip(report.findings, UNSUPPORTED.values(), strict=True):
        assert named in finding.text[:160]
    assert (report.text_only, report.unread) == (1, len(UNSUPPORTED))
    assert not report.resolved
    assert report.fixed is not None
    assert (report.fixed.left, report.fixed.dropped, report.fixed.repaired) == (len(UNSUPPORTED), 0, 0)
    assert json.loads((tmp_path / "copy.json").read_text()) == data


def test_the_text_of_a_report_names_keys_that_come_after_many_samples_with_another_key(tmp_path: Path) -> None:
    data = [PLAIN | {"id": i, "video": f"{i}.mp4"} for i in range(50)]  # ids from 0, so that 0 is not taken for no id
    data += [PLAIN | {"id": 50, "audio": "50.wav"}, PLAIN | {"id": 51, "tools": [1]}]
    done = run("data", "check", write_json(tmp_path / "data.json", data))
    text = " ".join(done.stdout.split())
    assert done.returncode == 1
    for named in ('0 (id 0): the key "video"', '50 (id 50): the key "audio"', '51 (id 51): the key "tools"'):
        assert named in text
    assert text.count('the key "video"') == 3


def test_a_repaired_copy_keeps_pictures_and_all_other_keys(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", {name: picture(name) for name in ("a.png", "b.png")})
    data: list[Json] = [
        {"id": 0, "images": ["a.png"], "messages": chat("q", "a"), "meta": 1},  # no mark
        asked(url("a.png"), TEXT) | {"messages": [*asked(url("a.png"), TEXT)["messages"], *chat("r")]},  # no answer
        {"image": "a.png", "conversations": [turn | {"name": "n"} for turn in talk("q", "a")]},  # no mark
        {
            "image": "a.png",
            "conversations": [turn | {"name": "n"} for turn in talk("<image>\nq", "a", "r")],
        },  # no answer
        {"system": "Be brief.", "conversations": talk("q", "a", "r")},  # no answer
    ]
    file = write_json(tmp_path / "data.json", data)
    report = check(file, tmp_path / "images", fix=tmp_path / "copy.json", workers=0)
    assert report.problems == {"missing_placeholder": 2, "trailing_question": 3}
    assert report.fixed is not None
    assert [change.action for change in report.fixed.changes] == [
        "repaired",
        "repaired",
        "repaired",
        "left",
        "repaired",
    ]
    assert json.loads((tmp_path / "copy.json").read_text()) == [
        {"id": 0, "image": "a.png", "conversations": GOOD, "meta": 1},
        {"id": "1", "image": "a.png", "conversations": GOOD},
        {"id": "2", "image": "a.png", "conversations": [turn | {"name": "n"} for turn in GOOD]},
        data[3],
        {"id": "4", "conversations": [{"from": "system", "value": "Be brief."}, *talk("q", "a")]},
    ]


def test_lengths_count_the_words_and_pictures_of_every_layout(tmp_path: Path) -> None:
    data = [asked(url("a.png"), {"type": "text", "text": "two words"}), {"messages": chat("q", "b c")}, {"video": "x"}]
    assert Samples([write_json(tmp_path / "data.json", data)], None).lengths == [4, -3, -1]


def test_other_media_in_a_tar_are_refused(tmp_path: Path) -> None:
    files = webdataset([PLAIN, ONE]) | {"000000.mp4": b"x"}
    samples = Samples([write_tar(tmp_path / "data.tar", files)], None)
    with pytest.raises(UnsupportedError, match=r"000000\.mp4"):
        samples[0]
    assert samples[1].images == ("000001.jpg",)


def test_pictures_in_data_urls_are_read_and_checked(tmp_path: Path) -> None:
    cut = PNG[: len(PNG) - 400]
    data = [asked(url(source), TEXT) for source in (PNG, cut, "data:image/png,plain", "data:image/png;base64,@")]
    file = write_json(tmp_path / "data.json", data)
    samples = Samples([file], None)
    assert samples.picture(samples[0].images[0]) == picture("a.png")
    with pytest.raises(ImageError, match="expected data:image/png;base64"):
        samples.picture(samples[2].images[0])
    report = check(file, workers=0)
    assert [finding.sample for finding in report.findings if finding.kind == "broken_picture"] == [1, 2, 3]
    assert report.sources == {"data: URLs": 4}
    assert max(len(finding.text) for finding in report.findings) < 400


def test_an_absolute_path_is_read_if_it_leads_into_the_folder(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", {"sub/a.png": b"inside"})
    (tmp_path / "b.png").write_bytes(b"outside")
    samples = Samples([write_json(tmp_path / "data.json", [asked(url(f"file://{images}/sub/a.png"), TEXT)])], images)
    assert samples.picture(samples[0].images[0]) == b"inside"
    for name in (f"{tmp_path}/b.png", f"{images}/../b.png"):
        with pytest.raises(DataError, match="not a valid picture name"):
            samples.picture(name)


def test_a_mark_in_a_text_before_the_picture_does_not_place_it() -> None:
    sample = parse(asked({"type": "text", "text": "the word <image>"}, url("a.png")), "", "0")
    assert sample.turns[0].text == "the word \\<image>\n<image>"
    assert not find_faults(sample)

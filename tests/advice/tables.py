"""Advice about one question to each of many images: the table, and what an interrupted run left."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from llava import answers
from tests.advice.table import Run, Steps, World, advice, say


def each(w: World, *words: object) -> Run:
    return ("ask", *words, "--model", w.llava, "--max-new-tokens", 1)


def folder(w: World) -> Path:
    (w / "photos").mkdir()
    shutil.copy(w.picture, w / "photos" / "a.png")
    return w / "photos"


@advice("to ask about each image in it, add --csv OUT.csv")
def a_folder_without_a_table(w: World) -> Steps:
    photos = folder(w)
    yield each(w, photos, "What?")
    yield each(w, photos, "What?", "--csv", "OUT.csv")


@advice("found --csv and --jsonl; choose one of them")
def two_tables(w: World) -> Steps:
    photos = folder(w)
    yield each(w, photos, "What?", "--csv", w / "a.csv", "--jsonl", w / "a.jsonl")
    yield each(w, photos, "What?", "--jsonl", w / "a.jsonl")


@advice("--{} is {}; choose a name that ends in .{}")
def a_table_of_another_type(w: World) -> Steps:
    photos = folder(w)
    yield each(w, photos, "What?", "--csv", w / "a.xlsx")
    yield each(w, photos, "What?", "--csv", w / "a.csv")


@advice("{} needs images to ask about; put image files or folders before the question")
def a_table_without_images(w: World) -> Steps:
    yield each(w, "What?", "--csv", w / "a.csv")
    yield each(w, folder(w), "What?", "--csv", w / "a.csv")


@advice("- is one image from standard input; with {}, give image files or folders")
def a_table_of_standard_input(w: World) -> Steps:
    yield each(w, "-", "What?", "--csv", w / "a.csv")
    yield each(w, w.picture, "What?", "--csv", w / "a.csv")


@advice("; give the folders in which the images are")
def a_folder_of_folders(w: World) -> Steps:
    photos = folder(w)
    yield each(w, w.tmp, "What?", "--csv", w / "a.csv")
    yield each(w, photos, "What?", "--csv", w / "a.csv")


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Ctrl-C after the first answer."""
    add = answers.Journal.add

    def stop(*args: Any) -> None:
        add(*args)
        raise KeyboardInterrupt

    with mock.patch.object(answers.Journal, "add", stop):
        yield


def interrupted(w: World) -> Run:
    """A command that was interrupted after its first answer."""
    command = each(w, folder(w), "What?", "--csv", w / "a.csv")
    with interrupts():
        assert not say(command).well
    return command


@advice("{}: has the answers so far; run the same command again to continue")
def a_table_that_is_interrupted(w: World) -> Steps:
    with interrupts():
        yield each(w, folder(w), "What?", "--csv", w / "a.csv")
    assert (w / "a.csv.partial").is_file()


OTHER_RUN = "run the other command again to complete it, remove the file, or choose another name for the table"


@advice(OTHER_RUN)
def a_table_of_another_question(w: World) -> Steps:
    command = interrupted(w)
    yield each(w, w / "photos", "Why?", "--csv", w / "a.csv")
    yield command


@advice(OTHER_RUN)
def a_table_of_another_question_that_is_removed(w: World) -> Steps:
    interrupted(w)
    yield each(w, w / "photos", "Why?", "--csv", w / "a.csv")
    (w / "a.csv.partial").unlink()


@advice(OTHER_RUN)
def a_table_of_another_question_with_its_own_name(w: World) -> Steps:
    interrupted(w)
    yield each(w, w / "photos", "Why?", "--csv", w / "a.csv")
    yield each(w, w / "photos", "Why?", "--csv", w / "b.csv")


@advice("is not from an interrupted run; remove the file, or choose another name for the table")
def a_journal_of_someone_else(w: World) -> Steps:
    photos = folder(w)
    (w / "a.csv.partial").write_text("mine")
    yield each(w, photos, "What?", "--csv", w / "a.csv")
    yield each(w, photos, "What?", "--csv", w / "b.csv")


@advice("{}: cannot be read ({}); remove it, or choose another name for the table")
def a_folder_in_place_of_a_journal(w: World) -> Steps:
    photos = folder(w)
    (w / "a.csv.partial").mkdir()
    yield each(w, photos, "What?", "--csv", w / "a.csv")
    (w / "a.csv.partial").rmdir()


@advice("the answers so far are in {}; fix the cause and run the same command again")
def a_disk_that_fills_during_a_table(w: World) -> Steps:
    with mock.patch.object(answers.os, "fsync", side_effect=OSError(28, "No space left on device")):
        yield each(w, folder(w), "What?", "--csv", w / "a.csv")
    assert not (w / "a.csv").exists()
    assert (w / "a.csv.partial").is_file()

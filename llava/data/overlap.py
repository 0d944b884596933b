"""`llava data overlap`: the pictures and questions that training data has in common with a benchmark."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llava.data.benchmark import Benchmark, read_benchmark
from llava.data.overlap_report import InCommon, Overlap, PicturePair, QuestionPair, Questions, Side
from llava.data.picture_hash import DEFAULT_DISTANCE, Hashes, near, picture_hash
from llava.data.pictures import is_data_url
from llava.data.pool import Progress, run_in_chunks
from llava.data.questions import is_generic, normalized, questions_of
from llava.data.samples import Samples
from llava.errors import ConfigError, DataError, ImageError, counted

Bars = Callable[[str, str], AbstractContextManager[Progress]]  # what is done, and its unit -> a progress bar
_MAX_DISTANCE = 64  # bits; different pictures differ in 78 or more, see picture_hash.py
_PROGRESS = 1000  # samples


@dataclass(frozen=True, kw_only=True)
class OverlapOptions:
    """What `find_overlap` compares."""

    images: Path | None = None  # location of the pictures of the training data
    bench_images: Path | None = None  # location of the benchmark's pictures; None if the benchmark contains them
    distance: int = DEFAULT_DISTANCE  # bits in which the hashes of the same picture may differ
    workers: int | None = None  # processes that read pictures (0: this one; None: one per CPU)

    def __post_init__(self) -> None:
        if not 0 <= self.distance <= _MAX_DISTANCE:
            raise ConfigError(f"distance is {self.distance}; expected a number of bits from 0 to {_MAX_DISTANCE}")


@dataclass
class _Training:
    """What the training data has, by sample."""

    samples: Samples
    n_questions: int = 0
    n_unread: int = 0  # malformed or unsupported samples
    asked: dict[str, list[int]] = field(default_factory=dict)  # normalized question of the benchmark -> samples
    shown: dict[str, list[int]] = field(default_factory=dict)  # name of a picture -> samples


def find_overlap(
    train: Path,
    bench: Path,
    options: OverlapOptions,
    bars: Bars = lambda what, unit: nullcontext(lambda done, total: None),
) -> Overlap:
    """Compares the training data `train` with a benchmark. Raises DataError if one of them cannot be read."""
    benchmark = read_benchmark(bench, options.bench_images)
    samples = Samples([train], options.images)
    with bars("questions", "samples") as progress:
        training = _read(samples, benchmark, progress)
    pictures, sides = _common_pictures(training, benchmark, options, bars)
    questions = _common_questions(training, benchmark)
    return Overlap(
        train=str(train),
        bench=str(bench),
        distance=options.distance,
        samples=len(samples),
        unread_samples=training.n_unread,
        bench_files=dict(benchmark.files),
        bench_answers=benchmark.n_answers,
        bench_unread=benchmark.n_unread,
        bench_left_out=benchmark.n_left_out,
        sides=sides,
        pictures=pictures,
        questions=questions,
    )


def _read(samples: Samples, benchmark: Benchmark, progress: Progress) -> _Training:
    found, first_error = _Training(samples), ""
    for i in range(len(samples)):
        if i % _PROGRESS == 0:
            progress(i, len(samples))
        try:
            sample = samples[i]
        except DataError as error:
            first_error = first_error or str(error)
            found.n_unread += 1
            continue
        for name in dict.fromkeys(sample.images):
            found.shown.setdefault(name, []).append(i)
        asked = [key for text in questions_of(sample) if (key := normalized(text))]
        found.n_questions += len(asked)
        for key in dict.fromkeys(asked):
            if key in benchmark.questions:
                found.asked.setdefault(key, []).append(i)
    progress(len(samples), len(samples))
    if found.n_unread == len(samples):
        raise DataError(f"none of {counted(len(samples), 'sample')} can be read; the first: {first_error}")
    return found


def _common_questions(training: _Training, benchmark: Benchmark) -> Questions:
    generic = {key for key in benchmark.questions if is_generic(key)}
    asked = {key: training.asked[key] for key in benchmark.questions if key in training.asked}
    own = [QuestionPair(benchmark.questions[key], at) for key, at in asked.items() if key not in generic]
    return Questions(
        train=training.n_questions,
        common=InCommon(len(own), len(benchmark.questions) - len(generic)),
        generic=InCommon(len(asked) - len(own), len(generic)),
        pairs=own,
    )


# ------------------------------------------------------------------------------------------------------------ pictures


@dataclass
class _Hashed:
    """The pictures of one side that can be compared."""

    hashes: Hashes
    names: list[str]  # of each hash


@dataclass
class _Hasher:
    """Hashes pictures by index. Instances can be sent to worker processes."""

    source: Samples | Benchmark
    names: Sequence[str]

    def __call__(self, indices: range) -> list[Hashes | str | None]:
        """Returns a hash for each picture, None for a plain one, or why it cannot be read."""
        return [self._hash(self.names[i]) for i in indices]

    def _hash(self, name: str) -> Hashes | str | None:
        try:
            return picture_hash(self.source.picture(name))
        except DataError as error:
            return str(error)
        except ImageError as error:
            return f"{name:.200}: {str(error).removeprefix('picture: ')}"


def _common_pictures(
    training: _Training, benchmark: Benchmark, options: OverlapOptions, bars: Bars
) -> tuple[list[PicturePair], dict[str, Side]]:
    here = [name for name in training.shown if training.samples.has_pictures or is_data_url(name)]
    there = benchmark.pictures
    nowhere = {"train": len(training.shown) - len(here), "bench": benchmark.n_nowhere}
    if not here or not there:  # nothing to compare with
        counts = {"train": len(here), "bench": len(there)}
        return [], {side: Side(counts[side], 0, nowhere[side]) for side in counts}
    with bars("benchmark", "pictures") as progress:
        bench, bench_side = _hash_all(_Hasher(benchmark, there), nowhere["bench"], options, progress)
    with bars("training", "pictures") as progress:
        train, train_side = _hash_all(_Hasher(training.samples, here), nowhere["train"], options, progress)
    pairs = [
        PicturePair(bench.names[i], train.names[j], distance, training.shown[train.names[j]])
        for i, j, distance in near(bench.hashes, train.hashes, options.distance)
    ]
    order = {name: i for i, name in enumerate(there)}
    pairs.sort(key=lambda pair: (order[pair.bench], pair.distance))
    return pairs, {"train": train_side, "bench": bench_side}


def _hash_all(hasher: _Hasher, nowhere: int, options: OverlapOptions, progress: Progress) -> tuple[_Hashed, Side]:
    """Raises DataError if not a single picture can be read."""
    n = len(hasher.names)
    hashes, kept, plain = np.zeros((n, 4), np.uint64), list[str](), list[str]()
    unreadable: dict[str, str] = {}
    names = iter(hasher.names)
    for chunk in run_in_chunks(hasher, n, options.workers, progress):
        for found in chunk:
            name = next(names)
            if isinstance(found, str):
                unreadable[name] = found
            elif found is None:
                plain.append(name)
            else:
                hashes[len(kept)] = found
                kept.append(name)
    if len(unreadable) == n:
        raise DataError(f"none of {counted(n, 'picture')} can be read; the first: {next(iter(unreadable.values()))}")
    return _Hashed(hashes[: len(kept)], kept), Side(n, len(kept), nowhere, plain, unreadable)

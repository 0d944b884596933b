"""What a step computes: budgets, chunks, prefix hits, preemption, priorities and pictures. No model is needed."""

import pytest
import torch

from llava.engine.block_manager import BlockManager
from llava.engine.detokenize import Detokenizer
from llava.engine.feature_cache import FeatureCache
from llava.engine.sampling_params import SamplingParams
from llava.engine.scheduler import Scheduler, Step, feature_key
from llava.engine.sequence import PlacedImage, Sequence


def scheduler(pages: int = 100, size: int = 4, **options: int) -> Scheduler:
    return Scheduler(BlockManager(pages, size), FeatureCache(10**6), **{"max_batch": 8, "chunk_tokens": 32, **options})


def sequence(
    id: int, n: int, *, order: int | None = None, images: tuple[PlacedImage, ...] = (), first: int = 0
) -> Sequence:
    return Sequence(
        id=id,
        request=id,
        params=SamplingParams(),
        adapter=None,
        order=id if order is None else order,
        seed=0,
        max_new_tokens=100,
        stop_ids=frozenset(),
        detokenizer=Detokenizer(str),
        tokens=[first + i for i in range(n)],
        n_prompt=n,
        images=list(images),
    )


def picture(start: int, end: int, name: bytes = b"1", views: int = 1) -> PlacedImage:
    return PlacedImage(start=start, end=end, digest=name * 32, pixels=torch.zeros(views, 3, 2, 2), grid=None)


def sizes(step: Step) -> dict[int, int]:
    return {id: one.n_tokens for id, one in step.scheduled.items()}


def compute(one: Scheduler, step: Step) -> None:
    """Pretends that the step has been computed and that each complete sequence got another token."""
    for scheduled in step.scheduled.values():
        member = scheduled.sequence
        for image in member.images_in(member.computed, member.computed + scheduled.n_tokens):
            if one.features.acquire(feature_key(member, image), member.id) is None:
                one.features.add(feature_key(member, image), torch.zeros(image.end - image.start, 2), member.id)
        one.commit(scheduled)
        if not member.n_pending:
            member.append(7)
    one.blocks.check(one.tables())


def launch(one: Scheduler) -> dict[int, int]:
    """Pretends that a step without pictures has been launched, so that each complete sequence has a token in flight."""
    step = one.schedule()
    for scheduled in step.scheduled.values():
        one.commit(scheduled)
        if not scheduled.sequence.n_pending:
            scheduled.sequence.expect_token()
    one.blocks.check(one.tables())
    return sizes(step)


def run(one: Scheduler, **options: int) -> dict[int, int]:
    step = one.schedule(**options)
    compute(one, step)
    return sizes(step)


def test_a_step_mixes_replies_and_chunks_of_prompts_within_its_budget() -> None:
    one = scheduler(chunk_tokens=10, max_batch=3)
    for id, n in ((1, 4), (2, 25), (3, 3), (4, 1)):
        one.add(sequence(id, n, first=100 * id))
    assert run(one) == {1: 4, 2: 6}
    assert run(one) == {1: 1, 2: 9}
    assert run(one) == {1: 1, 2: 9}
    assert run(one) == {1: 1, 2: 1, 3: 3}  # 4 waits, as three are running
    assert run(one) == {1: 1, 2: 1, 3: 1}
    one.remove(next(member for member in one.running if member.id == 2))
    assert run(one) == {1: 1, 3: 1, 4: 1}


def test_a_prompt_that_is_cached_computes_at_least_one_token() -> None:
    one = scheduler(chunk_tokens=100)
    one.add(sequence(1, 16))
    assert run(one) == {1: 16}
    one.add(sequence(2, 16))
    assert run(one) == {1: 1, 2: 4}
    assert one.prefix_hit_tokens == 12
    one.add(sequence(3, 17))
    assert run(one) == {1: 1, 2: 1, 3: 1}


def test_requests_with_the_same_beginning_wait_for_the_first_of_them() -> None:
    one = scheduler(chunk_tokens=100)
    for id in (1, 2, 3):
        one.add(sequence(id, 18))
    one.add(sequence(4, 6, first=50))
    assert run(one) == {1: 18, 4: 6}
    assert run(one) == {1: 1, 4: 1, 2: 2, 3: 2}
    assert len({member.block_table[0] for member in one.running}) == 2


def test_the_last_request_is_preempted_when_pages_run_out_and_continues_later() -> None:
    one = scheduler(pages=6, chunk_tokens=100)
    for id in (1, 2):
        one.add(sequence(id, 8, first=100 * id))
    assert run(one) == {1: 8, 2: 8}
    for _ in range(4):
        assert run(one) == {1: 1, 2: 1}
    assert run(one) == {1: 1}
    assert [member.id for member in one.waiting] == [2]
    assert one.waiting[0].computed == 0
    one.remove(one.running[0])
    step = run(one)
    assert sum(step.values()) + one.running[0].n_reused * 4 == 13  # the prompt and its reply so far


def test_a_lower_priority_number_goes_first_and_takes_the_pages_of_others() -> None:
    one = scheduler(pages=4, chunk_tokens=100, max_batch=1)
    one.add(sequence(1, 8, order=10))
    one.add(sequence(2, 8, order=20, first=100))
    assert run(one) == {1: 8}
    one.add(sequence(3, 8, order=-5, first=200))
    assert run(one) == {3: 8}
    assert [member.id for member in one.waiting] == [1, 2]


def test_a_chunk_stops_before_a_picture_that_exceeds_the_budget_of_views() -> None:
    one = scheduler(chunk_tokens=100)
    one.add(sequence(1, 20, images=(picture(2, 6, b"1", 2), picture(9, 13, b"2", 2)), first=100))
    one.add(sequence(2, 20, images=(picture(3, 7, b"3"),), first=200))
    assert run(one, view_budget=2) == {1: 9, 2: 3}
    assert run(one, view_budget=3) == {1: 11, 2: 17}


def test_one_picture_is_encoded_whatever_the_budget_is() -> None:
    one = scheduler(chunk_tokens=100)
    one.add(sequence(1, 20, images=(picture(0, 6, b"1", 5),)))
    one.add(sequence(2, 20, images=(picture(0, 6, b"2", 5),), first=100))
    assert run(one, view_budget=0) == {1: 20}
    assert [member.id for member in one.waiting] == [2]
    assert run(one, view_budget=0) == {1: 1, 2: 20}


def test_a_picture_is_encoded_once_and_kept_while_it_is_needed() -> None:
    one = scheduler(chunk_tokens=10)
    for id in (1, 2):
        one.add(sequence(id, 20, images=(picture(4, 18),), first=100 * id))
    step = one.schedule()
    assert (step.n_views, len(step.to_encode)) == (1, 1)
    compute(one, step)
    assert one.features.n_referenced == 1
    while any(member.n_generated == 0 for member in [*one.running, *one.waiting]):
        compute(one, one.schedule())
    assert one.features.n_referenced == 0
    assert one.features.hits >= 1


def test_an_interrupted_step_starts_over_with_an_empty_cache() -> None:
    one = scheduler(chunk_tokens=100)
    members = [sequence(id, 10, first=100 * id) for id in (1, 2)]
    for member in members:
        one.add(member)
    run(one)
    one.schedule()
    one.restart(members)
    one.blocks.check([])
    assert one.blocks.n_used == 0
    assert run(one) == {1: 11, 2: 11}


def test_a_sequence_is_scheduled_with_its_token_in_flight_unless_it_needs_the_token() -> None:
    one = scheduler(chunk_tokens=100)
    members = [sequence(id, 4, first=100 * id) for id in (1, 2, 3, 4)]
    members[1].params = SamplingParams(presence_penalty=1.0)
    members[2].params = SamplingParams(logit_bias={7: 1.0}, temperature=1.0)
    members[3].max_new_tokens = 1
    for member in members:
        one.add(member)
    assert launch(one) == {1: 4, 2: 4, 3: 4, 4: 4}
    assert launch(one) == {1: 1, 3: 1}
    members[1].append(7)
    assert launch(one) == {1: 1, 2: 1, 3: 1}


def test_a_page_is_registered_when_all_of_its_tokens_are_known() -> None:
    one = scheduler(size=4, chunk_tokens=100)
    member = sequence(1, 6)
    one.add(member)
    for _ in range(3):
        launch(one)  # the prompt, then the tokens 6 and 7 of 8, which are in flight
    assert (member.computed, member.n_known, member.n_registered) == (8, 6, 1)
    for id in (7, 8):
        member.append(id)
        one.register(member)
    assert (member.tokens[:8], member.n_in_flight, member.n_registered) == ([0, 1, 2, 3, 4, 5, 7, 8], 1, 2)
    assert len(one.blocks.match(member.keys(4, 8))) == 2


def test_a_preempted_sequence_drops_its_tokens_in_flight_and_its_pool_slot() -> None:
    one = scheduler(chunk_tokens=100, max_batch=2)
    members = [sequence(id, 4, first=100 * id) for id in (1, 2)]
    for member in members:
        one.add(member)
    launch(one)
    assert sorted(member.pool_slot for member in members) == [0, 1]
    epoch = members[1].epoch
    one.preempt(members[1])
    assert (members[1].total, members[1].n_in_flight, members[1].pool_slot) == (4, 0, -1)
    assert members[1].epoch > epoch
    assert launch(one) == {1: 1, 2: 4}
    assert sorted(member.pool_slot for member in members) == [0, 1]


def test_may_preempt_says_so_before_pages_run_out_or_a_more_urgent_request_comes() -> None:
    one = scheduler(pages=5, chunk_tokens=100, max_batch=2)
    for id in (1, 2):
        one.add(sequence(id, 7, order=10 * id, first=100 * id))
    assert not one.may_preempt()
    launch(one)  # four pages, one of which has room for a token in each sequence
    assert not one.may_preempt()
    launch(one)
    assert one.may_preempt()  # two more are needed
    one.preempt(one.running[-1])
    assert not one.may_preempt()
    one.add(sequence(3, 4, order=5, first=300))
    assert one.may_preempt()


@pytest.mark.parametrize("seed", range(10))
def test_every_request_finishes_whatever_the_sizes_are(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    one = scheduler(pages=pick(12, 30), size=pick(1, 5), chunk_tokens=pick(1, 40), max_batch=pick(1, 5))
    limit = one.blocks.n_pages * one.blocks.page_size
    lengths = {id: min(limit, pick(2, 40)) for id in range(20)}
    for id, n in lengths.items():
        one.add(sequence(id, pick(1, n - 1), order=pick(0, 30), first=100 * pick(0, 2)))
    for _ in range(5000):
        compute(one, one.schedule())
        for member in list(one.running):
            if member.total > lengths[member.id]:
                one.remove(member)
        if not one.running and not one.waiting:
            break
    assert not one.running
    assert not one.waiting
    assert one.blocks.n_used == 0

"""The shared ring: both ends, what a guest may do to it, and that nobody sleeps indefinitely."""

from __future__ import annotations

import mmap
import random
import struct
from collections import Counter

import pytest

from xen_disk_py.blkif import X86_32, X86_64, encode_response
from xen_disk_py.errors import GuestMisbehaved
from xen_disk_py.ring import BackRing, FrontRing, slots_in

M = 0xFFFF_FFFF
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = 0, 4, 8, 12
STRIDES = [pytest.param(112, id="64-bit"), pytest.param(108, id="x86_32")]
STARTS = [0, 1, 2**31 - 5, 2**32 - 1, 2**32 - 17, 2**32 - 40]


def nothing():
    """Stand for a fence where there is one thread only."""


def get(shared, field):
    return struct.unpack_from("<I", shared, field)[0]


def put(shared, field, value):
    struct.pack_into("<I", shared, field, value & M)


def ends(start=0, stride=112, pages=1, fence=nothing):
    shared = bytearray(pages * 4096)
    front = FrontRing(memoryview(shared), stride, fence, start)
    return shared, front, BackRing(memoryview(shared), stride, fence)


def request(number, stride=112):
    return struct.pack("<Q", number) * (stride // 8) + b"\0" * (stride % 8)


def number_in(slot):
    return struct.unpack_from("<Q", slot)[0]


def cut(slots, stride=112):
    assert len(slots) % stride == 0
    return [slots[at : at + stride] for at in range(0, len(slots), stride)]


class TestSize:
    @pytest.mark.parametrize("abi", [X86_64, X86_32])
    @pytest.mark.parametrize(("order", "slots"), [(0, 32), (1, 64), (2, 128), (3, 256), (4, 512)])
    def test_slots_are_those_of_ring_h(self, abi, order, slots):
        assert slots == slots_in(4096 << order, abi.slot_size)
        assert slots == ends(stride=abi.slot_size, pages=1 << order)[1].slots
        assert slots == ends(stride=abi.slot_size, pages=1 << order)[2].slots

    def test_slots_are_the_greatest_power_of_two_behind_the_header(self):
        dice = random.Random(1)
        for _ in range(500):
            stride = dice.randint(1, 300)
            size = 64 + dice.randint(stride, 70000)
            slots = slots_in(size, stride)

            assert 0 == slots & (slots - 1)
            assert 64 + slots * stride <= size < 64 + 2 * slots * stride


class Blocked(Exception):
    """Both sides sleep, and neither will be woken."""


class Model:
    """Both ends with random habits, in one thread.

    Each fence is a place where the other side may run, so that every order of what one
    side writes and the other looks at comes up. An event that is sent is never lost; that
    one is sent when it must be is what is shown here.
    """

    def __init__(self, seed, start, stride, order, total):
        self.dice = random.Random(seed)
        self.shared = bytearray(4096 << order)
        self.stride = stride
        view = memoryview(self.shared)
        self.front = FrontRing(view, stride, lambda: self.meanwhile("back"), start)
        self.back = BackRing(view, stride, lambda: self.meanwhile("front"))
        self.busy = set()  # the sides that are in the middle of something
        self.asleep = {"front": False, "back": False}
        self.event = {"front": False, "back": False}
        self.slept = Counter()
        self.total = total
        self.asked = self.published = self.answered = 0
        self.in_hand = []
        self.unpublished = False
        self.order_served = []

    def run(self):
        while self.answered < self.total:
            ready = [side for side in ("front", "back") if self.awake(side)]
            if not ready:
                raise Blocked
            self.step(self.dice.choice(ready))

    def awake(self, side):
        if self.asleep[side] and self.event[side]:
            self.asleep[side] = False
        if not self.asleep[side]:
            self.event[side] = False
        return not self.asleep[side]

    def meanwhile(self, other):
        while other not in self.busy and self.awake(other) and self.dice.random() < 0.5:
            self.step(other)

    def step(self, side):
        self.busy.add(side)
        getattr(self, side + "_step")()
        self.busy.discard(side)

    def sleep(self, side, end):
        self.meanwhile("front" if side == "back" else "back")
        if not end.arm():
            self.asleep[side] = True
            self.slept[side] += 1

    def front_step(self):
        front, dice = self.front, self.dice
        choice = dice.randrange(4)
        if choice < 2:
            most = dice.choice((1, 3, front.slots))
            for _ in range(dice.randint(0, min(most, front.free, self.total - self.asked))):
                front.put(request(self.asked, self.stride))
                self.asked += 1
        if choice == 1 and self.asked > self.published:
            self.published = self.asked
            if front.push():
                self.event["back"] = True
        elif choice == 2:
            self.reap()
        elif choice == 3 and self.published == self.asked > self.answered and not self.reap():
            self.sleep("front", front)

    def reap(self):
        slots = self.front.take()
        for slot in slots:
            assert encode_response(self.answered, 0, 0) == slot[:12]
            self.answered += 1
        return slots

    def back_step(self):
        back, dice = self.back, self.dice
        choice = dice.randrange(4)
        if choice == 0:
            self.take()
        elif choice == 1:
            for _ in range(dice.randint(0, len(self.in_hand))):
                number = self.in_hand.pop(0)
                self.unpublished = True
                back.respond(encode_response(number, 0, 0))
        elif choice == 2 and self.unpublished:
            self.unpublished = False
            if back.push():
                self.event["front"] = True
        elif choice == 3 and not (self.in_hand or self.unpublished or self.take()):
            self.sleep("back", back)

    def take(self):
        slots = cut(self.back.take(self.dice.choice((1, 3, M))), self.stride)
        for slot in slots:
            assert request(number_in(slot), self.stride) == slot
            self.order_served.append(number_in(slot))
            self.in_hand.append(number_in(slot))
        return slots


class TestBothEnds:
    @pytest.mark.parametrize("stride", STRIDES)
    @pytest.mark.parametrize("start", STARTS)
    @pytest.mark.parametrize("order", [0, 1])
    def test_each_request_is_answered_once_in_order_and_nobody_sleeps_indefinitely(
        self, start, stride, order
    ):
        slept = Counter()
        for seed in range(4):
            model = Model(seed, start, stride, order, total=600)
            model.run()

            assert list(range(600)) == model.order_served
            assert 600 == model.answered
            assert model.front.slots == model.front.free
            slept += model.slept
        assert min(slept["front"], slept["back"]) > 10  # or nothing was shown

    def test_a_full_ring_wraps_many_times(self):
        shared, front, back = ends(start=2**32 - 100)
        for lap in range(10):
            for number in range(32):
                front.put(request(lap * 32 + number))
            assert 0 == front.free
            front.push()
            slots = cut(back.take())
            assert [lap * 32 + number for number in range(32)] == list(map(number_in, slots))
            for slot in slots:
                back.respond(encode_response(number_in(slot), 0, 0))
            back.push()
            answers = [number_in(slot) for slot in front.take()]
            assert [lap * 32 + number for number in range(32)] == answers
        assert (2**32 - 100 + 320) & M == get(shared, RSP_PROD)

    def test_what_is_put_shows_only_when_it_is_pushed(self):
        _, front, back = ends()
        front.put(request(1))
        assert b"" == back.take()
        front.push()
        assert 112 == len(back.take())
        back.respond(encode_response(1, 0, 0))
        assert [] == front.take()
        back.push()
        assert 1 == len(front.take())

    @pytest.mark.parametrize("stride", STRIDES)
    def test_no_more_are_taken_than_are_wanted_and_the_others_wait_on(self, stride):
        _, front, back = ends(start=2**32 - 9, stride=stride)
        for number in range(20):
            front.put(request(number, stride))
        front.push()
        taken = []
        for most in (1, 7, 0, 4, 100, 1):
            slots = cut(back.take(most), stride)
            assert len(slots) <= most
            taken += map(number_in, slots)
            assert (len(taken) < 20) is back.has_requests

        assert list(range(20)) == taken

    def test_until_an_answer_is_published_its_slot_keeps_the_request(self):
        shared, front, back = ends()
        for number in range(3):
            front.put(request(number))
        front.push()
        back.take()
        before = bytes(shared)
        for count in (1, 2, 3):
            back.respond(encode_response(7, 0, 0))
            assert count == len(back.unpublished)
        assert before == bytes(shared)
        back.push()
        assert not back.unpublished
        assert [encode_response(7, 0, 0)] * 3 == [slot[:12] for slot in front.take()]

    def test_one_who_is_awake_is_not_notified(self):
        _, front, back = ends()
        assert not back.arm()
        notified = []
        for number in range(20):
            front.put(request(number))
            notified.append(front.push())

        assert [True] + [False] * 19 == notified

    def test_arming_tells_of_what_came_meanwhile(self):
        _, front, back = ends()
        assert not front.arm()
        assert not back.arm()
        front.put(request(1))
        front.push()
        assert back.arm()
        back.take()
        assert not back.arm()
        back.respond(encode_response(1, 0, 0))
        back.push()
        assert front.arm()
        front.take()
        assert not front.arm()


class TestNotification:
    """Whoever publishes notifies exactly if the index asked for is among what is published."""

    @staticmethod
    def back_at(old, event):
        shared = bytearray(4096)
        put(shared, RSP_PROD, old)
        put(shared, RSP_EVENT, event)
        return BackRing(memoryview(shared), 112, nothing)

    @staticmethod
    def front_at(old, event):
        shared, front, _ = ends(start=old)
        put(shared, REQ_EVENT, event)
        return front

    @staticmethod
    def publish(end, count):
        for _ in range(count):
            (end.respond if isinstance(end, BackRing) else end.put)(b"x" * 12)
        return end.push()

    @pytest.mark.parametrize("end_at", ["back_at", "front_at"])
    @pytest.mark.parametrize(
        ("old", "new", "event", "notify"),
        [
            (4, 5, 8, False),  # a signed comparison would say yes
            (4, 5, 5, True),
            (4, 5, 4, False),
            (4, 5, 6, False),
            (4, 8, 8, True),
            (4, 8, 4, False),
            (4, 4, 4, False),
            (4, 4, 5, False),
            (M, M + 1, 0, True),
            (M, M + 1, M, False),
            (M - 1, M + 4, 3, True),
            (M - 1, M + 4, 4, False),
            (0, 1, M, False),
            (0, 1, 2**31, False),
            (0, 1, 2**31 + 1, False),
        ],
    )
    def test_known_cases(self, end_at, old, new, event, notify):
        assert notify is self.publish(getattr(self, end_at)(old, event), new - old)

    @pytest.mark.parametrize("end_at", ["back_at", "front_at"])
    def test_any_case(self, end_at):
        dice = random.Random(6)
        said = set()
        for _ in range(1000):
            old = dice.choice((0, 2**31, 2**32, dice.getrandbits(32))) + dice.randint(-40, 40)
            old, count = old & M, dice.randint(0, 32)
            event = (
                (old + dice.randint(-40, 40)) & M if dice.random() < 0.9 else dice.getrandbits(32)
            )
            expected = event in {(old + step) & M for step in range(1, count + 1)}

            assert expected is self.publish(getattr(self, end_at)(old, event), count)
            said.add(expected)
        assert {True, False} == said


class TestResuming:
    """A ring on which a process was killed, and what that had noted."""

    @staticmethod
    def left(start, stride, *, taken, answered, waiting, told):
        """Make a ring of requests 0, 1, ... whose rsp_prod is as it was left; and the front end.

        Args:
            start: the index of the first request.
            stride: bytes of a slot.
            taken: requests that have been on the ring.
            answered: of these, those that were answered and told, before the note.
            waiting: those that were taken and not answered, in the note.
            told: whether rsp_prod followed the note.
        """
        shared, front, before = ends(start, stride)
        for number in range(taken):
            front.put(request(number, stride))
        front.push()
        before.take(answered)
        for number in range(answered):
            before.respond(encode_response(number, 0, 0))
        before.push()
        noted = [encode_response(100 + number, 0, 0) for number in range(3)]
        if told:
            before.take(3 + waiting)
            for response in noted:
                before.respond(response)
            before.push()
        front.take()
        return shared, front, noted

    @pytest.mark.parametrize("stride", STRIDES)
    @pytest.mark.parametrize("start", STARTS)
    @pytest.mark.parametrize("told", [False, True])
    @pytest.mark.parametrize("waiting", [0, 4, 25])
    def test_the_responses_are_told_once_and_the_next_requests_follow(
        self, start, stride, told, waiting
    ):
        shared, front, noted = self.left(
            start, stride, taken=32, answered=2, waiting=waiting, told=told
        )
        for _ in range(2):  # one that is killed at once changes nothing
            back = BackRing(memoryview(shared), stride, nothing)
            assert back.resume((start + 2) & M, noted, waiting)
            assert start + 5 & M == get(shared, RSP_PROD) == back.published
            assert not back.unpublished
        told_now = [] if told else [100, 101, 102]
        assert told_now == [number_in(slot) for slot in front.take()]
        rest = list(map(number_in, cut(back.take(), stride)))
        assert list(range(5 + waiting, 32)) == rest
        for number in range(waiting + len(rest)):
            back.respond(encode_response(200 + number, 0, 0))
        back.push()
        assert [200 + number for number in range(27)] == [number_in(slot) for slot in front.take()]
        assert not back.has_requests

    @pytest.mark.parametrize("start", STARTS)
    def test_without_responses_only_what_waits_is_behind(self, start):
        shared, _, _ = self.left(start, 112, taken=10, answered=2, waiting=0, told=False)
        before = bytes(shared)
        back = BackRing(memoryview(shared), 112, nothing)
        assert back.resume((start + 2) & M, [], 3)
        assert before == bytes(shared)
        assert list(range(5, 10)) == list(map(number_in, cut(back.take())))

    @pytest.mark.parametrize("start", STARTS)
    @pytest.mark.parametrize("away", [-32, -1, 1, 2, 4, 5, 32, 2**31])
    def test_another_ring_is_untouched(self, start, away):
        """Its responses went neither to where the note begins nor to where it ends."""
        shared, _, noted = self.left(start, 112, taken=10, answered=2, waiting=0, told=False)
        before = bytes(shared)
        back = BackRing(memoryview(shared), 112, nothing)
        assert not back.resume((start + 2 - away) & M, noted, 4)
        assert before == bytes(shared)
        assert not back.unpublished
        assert list(range(2, 10)) == list(map(number_in, cut(back.take())))

    @pytest.mark.parametrize("waiting", [9, 600, 2**32 - 1])
    def test_more_that_wait_than_were_asked_for_are_refused(self, waiting):
        shared, _, noted = self.left(0, 112, taken=10, answered=2, waiting=0, told=False)
        back = BackRing(memoryview(shared), 112, nothing)
        assert back.resume(2, noted, waiting)
        with pytest.raises(GuestMisbehaved):
            back.take()

    def test_responses_are_there_before_they_are_told(self):
        def fence():
            seen.append((get(shared, RSP_PROD), number_in(shared[64 + 4 * 112 :])))

        seen = []
        shared, _, noted = self.left(0, 112, taken=10, answered=2, waiting=0, told=False)
        BackRing(memoryview(shared), 112, fence).resume(2, noted, 0)
        assert [(2, 102), (5, 102)] == seen


class TestHostileFrontend:
    @pytest.mark.parametrize("start", STARTS)
    @pytest.mark.parametrize("pages", [1, 16])
    def test_as_many_requests_as_slots_are_legal(self, start, pages):
        shared, front, back = ends(start=start, pages=pages)
        put(shared, REQ_PROD, start + front.slots)

        assert front.slots * 112 == len(back.take())

    @pytest.mark.parametrize("start", STARTS)
    @pytest.mark.parametrize("ahead", [33, 34, 64, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
    def test_more_are_refused_and_nothing_is_taken_or_written(self, start, ahead):
        shared, _, back = ends(start=start)
        put(shared, REQ_PROD, start + ahead)
        before = bytes(shared)
        for _ in range(3):  # it stays refused
            with pytest.raises(GuestMisbehaved, match="request index"):
                back.take()
        assert before == bytes(shared)
        assert f"took {start}, answered {start}" in repr(back)

    def test_an_index_is_legal_exactly_if_the_unanswered_fit(self):
        dice = random.Random(7)
        verdicts = set()
        for _ in range(1000):
            start = dice.choice(STARTS)
            shared, _, back = ends(start=start)
            taken = dice.randint(0, 32)
            put(shared, REQ_PROD, start + taken)
            back.take()
            answered = dice.randint(0, taken)
            for _ in range(answered):
                back.respond(b"\0" * 12)
            if dice.random() < 0.5:
                back.push()
            ahead = dice.choice((dice.randint(-70, 70), dice.getrandbits(32)))
            put(shared, REQ_PROD, start + answered + ahead)
            waiting = (answered + ahead - taken) & M
            legal = waiting <= 32 - (taken - answered)

            verdicts.add((legal, waiting > 0))
            if legal:
                assert waiting * 112 == len(back.take())
            else:
                with pytest.raises(GuestMisbehaved):
                    back.take()
        assert {(True, True), (True, False), (False, True)} == verdicts

    def test_an_index_that_goes_back_is_refused_while_a_request_is_not_answered(self):
        shared, _, back = ends()
        put(shared, REQ_PROD, 3)
        back.take()
        back.respond(b"\0" * 12)
        for produced in (2, 1, 0):
            put(shared, REQ_PROD, produced)
            with pytest.raises(GuestMisbehaved):
                back.take(64)
        put(shared, REQ_PROD, 33)
        assert 30 * 112 == len(back.take())

    def test_a_slot_is_a_private_copy(self):
        shared, front, back = ends()
        for number in range(5):
            front.put(request(number))
        front.push()
        slots = back.take()
        shared[64:] = b"\xff" * (4096 - 64)

        assert b"".join(map(request, range(5))) == slots

    @pytest.mark.parametrize("stride", STRIDES)
    def test_a_slot_is_read_once_and_no_other_is(self, stride):
        class Watched:
            """Shared bytes that note each look at a slot."""

            def __init__(self, data):
                self.view = memoryview(data)
                self.reads = []

            def __len__(self):
                return len(self.view)

            def __getitem__(self, where):
                if where != slice(None, 16):
                    self.reads.append((where.start, where.stop))
                    return bytes(self.view[where])
                return self.view[where]

        shared = bytearray(4096)
        front = FrontRing(memoryview(shared), stride, nothing, 2**32 - 3)
        watched = Watched(shared)
        back = BackRing(watched, stride, nothing)
        for number in range(7):
            front.put(request(number, stride))
        front.push()
        back.take()
        back.take()
        back.arm()

        end = 64 + 32 * stride
        assert [(end - 3 * stride, end), (64, 64 + 4 * stride)] == watched.reads

    @pytest.mark.parametrize("stride", STRIDES)
    def test_the_backend_writes_its_two_indices_and_twelve_bytes_per_answer_only(self, stride):
        dice = random.Random(stride)
        shared = bytearray(b"\xa5" * 4096)
        put(shared, REQ_PROD, 2**32 - 20)
        put(shared, RSP_PROD, 2**32 - 20)
        back = BackRing(memoryview(shared), stride, nothing)
        before = bytearray(shared)
        unanswered = answered = 0
        for _ in range(300):
            more = dice.randint(0, 32 - unanswered)
            put(shared, REQ_PROD, get(shared, REQ_PROD) + more)
            before[:4] = shared[:4]
            assert more * stride == len(back.take())
            unanswered += more
            for _ in range(dice.randint(0, unanswered)):
                response = encode_response(dice.getrandbits(64), dice.getrandbits(8), -1)
                at = 64 + (2**32 - 20 + answered & 31) * stride
                before[at : at + 12] = response
                back.respond(response)
                answered += 1
                unanswered -= 1
            back.push()
            back.arm()
            put(before, RSP_PROD, 2**32 - 20 + answered)
            put(before, REQ_EVENT, get(shared, REQ_PROD) + 1)

            assert before == shared
        assert answered > 200

    def test_the_backend_starts_where_the_ring_stands_and_initialises_nothing(self):
        shared = bytearray(random.Random(8).randbytes(4096))
        put(shared, RSP_PROD, 2**32 - 1)
        put(shared, REQ_PROD, 1)
        before = bytes(shared)
        back = BackRing(memoryview(shared), 112, nothing)

        assert before == bytes(shared)
        assert before[64 + 31 * 112 : 64 + 32 * 112] + before[64 : 64 + 112] == back.take()


class TestFences:
    """What the other side may see at each fence."""

    def test_a_request_is_copied_after_the_index_that_covers_it_is_read(self):
        def fence():
            shared[64 : 64 + 112] = request(2)

        shared, front, _ = ends()
        back = BackRing(memoryview(shared), 112, fence)
        front.put(request(1))
        front.push()

        assert request(2) == back.take()

    def test_a_response_is_copied_after_the_index_that_covers_it_is_read(self):
        def fence():
            if get(shared, RSP_PROD):
                shared[64 : 64 + 12] = encode_response(2, 0, 0)

        shared, front, back = ends(fence=fence)
        front.put(request(1))
        front.push()
        back.respond(encode_response(1, 0, 0))
        back.push()

        assert 2 == number_in(front.take()[0])

    def test_answers_are_written_before_their_index_and_the_event_index_is_read_after_it(self):
        def fence():
            seen.append((get(shared, RSP_PROD), number_in(shared[64:])))
            put(shared, RSP_EVENT, len(seen) - 1)  # 1 only from the second fence on

        seen = []
        shared, _, _ = ends()
        back = BackRing(memoryview(shared), 112, fence)
        back.respond(encode_response(77, 0, 0))

        assert back.push()
        assert [(0, 77), (1, 77)] == seen

    def test_requests_are_written_before_their_index_and_the_event_index_is_read_after_it(self):
        def fence():
            seen.append((get(shared, REQ_PROD), number_in(shared[64:])))
            put(shared, REQ_EVENT, len(seen) - 1)

        seen = []
        shared, front, _ = ends(fence=fence)
        front.put(request(77))

        assert front.push()
        assert [(0, 77), (1, 77)] == seen

    @pytest.mark.parametrize(("end", "event", "index"), [(1, 12, 8), (2, 4, 0)])
    def test_the_event_index_is_written_before_the_last_look(self, end, event, index):
        def fence():
            written.append(get(rings[0], event))
            put(rings[0], index, 1)

        written = []
        rings = ends(fence=fence)
        put(rings[0], event, 99)

        assert rings[end].arm()
        assert [1] == written


class TestFrontend:
    @pytest.mark.parametrize("start", STARTS)
    def test_it_initialises_the_four_indices(self, start):
        shared = bytearray(b"\xa5" * 4096)
        FrontRing(memoryview(shared), 112, nothing, start)
        expected = struct.pack("<4I", start, (start + 1) & M, start, (start + 1) & M)

        assert expected + b"\xa5" * (4096 - 16) == bytes(shared)

    def test_a_full_ring_takes_no_request(self):
        shared, front, back = ends(start=2**32 - 3)
        for number in range(32):
            assert 32 - number == front.free
            front.put(request(number))
        before = bytes(shared)
        with pytest.raises(IndexError, match="full"):
            front.put(request(32))
        assert before == bytes(shared)
        front.push()
        back.take()
        back.respond(encode_response(0, 0, 0))
        back.push()
        front.take()
        assert 1 == front.free

    @pytest.mark.parametrize("start", STARTS)
    @pytest.mark.parametrize("claimed", [4, 33, 2**31, 2**32 - 1])
    def test_more_answers_than_requests_are_no_answers(self, start, claimed):
        shared, front, _ = ends(start=start)
        for number in range(5):
            front.put(request(number))
            if number == 2:
                front.push()  # what is only put cannot have been answered
        put(shared, RSP_PROD, start + claimed)
        with pytest.raises(RuntimeError, match="more responses"):
            front.take()


class TestHandles:
    def test_they_show_how_far_they_are(self):
        _, front, back = ends(start=7)
        front.put(request(1))
        front.push()
        back.take()
        back.respond(encode_response(1, 0, 0))
        back.push()
        front.put(request(2))
        front.take()

        assert "<FrontRing of 32: put 9, answered 8>" == repr(front)
        assert "<BackRing of 32: took 8, answered 8>" == repr(back)

    def test_once_closed_the_pages_can_be_unmapped(self):
        with mmap.mmap(-1, 4096) as pages, memoryview(pages) as view:
            front = FrontRing(view, 112, nothing)
            back = BackRing(view, 112, nothing)
            front.put(request(1))
            front.push()
            back.take()
            back.respond(encode_response(1, 0, 0))
            front.close()
            back.close()
            view.release()

            pages.close()  # would raise BufferError

"""The block protocol's messages: layouts, what is refused, and the keys in xenstore.

The offsets stand here as numbers, so that nothing of the implementation vouches for itself.
"""

from __future__ import annotations

import random
import re
import struct

import pytest

from xen_disk_py.blkif import (
    ARM,
    DISCARD,
    EOPNOTSUPP,
    ERROR,
    FLUSH,
    INDIRECT,
    MAX_INDIRECT_SEGMENTS,
    MAX_QUEUES,
    OKAY,
    READ,
    RESPONSE_SIZE,
    WRITE,
    WRITE_BARRIER,
    X86_32,
    X86_64,
    Connection,
    Discard,
    Features,
    Indirect,
    Malformed,
    Response,
    Ring,
    Transfer,
    abi_named,
    decode_response,
    encode_response,
    encode_segments,
    resolve,
)
from xen_disk_py.errors import GuestMisbehaved

WIDE = {"id": 8, "sector": 16, "segments": 24, "discard": 24, "handle": 24, "grefs": 28}
NARROW = {"id": 4, "sector": 12, "segments": 20, "discard": 20, "handle": 20, "grefs": 24}
LAYOUTS = [
    pytest.param(X86_64, WIDE, 112, id="x86_64"),
    pytest.param(ARM, WIDE, 112, id="arm"),
    pytest.param(X86_32, NARROW, 108, id="x86_32"),
]
ABIS = [pytest.param(abi, id=abi.name) for abi in (X86_64, X86_32, ARM)]
every_layout = pytest.mark.parametrize(("abi", "at", "size"), LAYOUTS)
every_abi = pytest.mark.parametrize("abi", ABIS)


def slot_with(at, size, operation, second=0, wide=0, id_=0, sector=0):
    """Lay out what all requests share, in a slot full of what was there before."""
    slot = bytearray(random.Random(size).randbytes(size))
    struct.pack_into("<B", slot, 0, operation)
    struct.pack_into("<B", slot, 1, second)
    struct.pack_into("<H", slot, 2, wide)
    struct.pack_into("<Q", slot, at["id"], id_)
    struct.pack_into("<Q", slot, at["sector"], sector)
    return slot


def put_segments(slot, offset, segments):
    for index, (gref, first, last) in enumerate(segments):
        struct.pack_into("<I", slot, offset + 8 * index, gref)
        struct.pack_into("<B", slot, offset + 8 * index + 4, first)
        struct.pack_into("<B", slot, offset + 8 * index + 5, last)


def some_segments(dice, count):
    """Make legal segments; now and then all of whole pages, as guests mostly do."""
    if dice.random() < 0.3:
        return [(dice.getrandbits(32), 0, 7) for _ in range(count)]
    return [(dice.getrandbits(32), *sorted(dice.choices(range(8), k=2))) for _ in range(count)]


def transfer_of(id_, operation, sector, segments):
    return Transfer(
        id_,
        operation,
        sector,
        sum(last - first + 1 for _, first, last in segments),
        tuple(gref for gref, _, _ in segments),
        tuple(first for _, first, _ in segments),
        tuple(last for _, _, last in segments),
    )


def some_request(dice):
    id_, sector = dice.getrandbits(64), dice.getrandbits(64)
    kind = dice.randrange(4)
    if kind == 0:
        segments = some_segments(dice, dice.randint(1, 11))
        return transfer_of(id_, dice.choice((READ, WRITE)), sector, segments)
    if kind == 1:
        return transfer_of(
            id_,
            dice.choice((FLUSH, WRITE_BARRIER)),
            sector,
            some_segments(dice, dice.randint(0, 11)),
        )
    if kind == 2:
        segments = dice.choice((1, 512, 513, 4096, dice.randint(1, 4096)))
        grefs = tuple(dice.getrandbits(32) for _ in range(-(-segments // 512)))
        return Indirect(id_, dice.choice((READ, WRITE)), sector, segments, grefs)
    return Discard(id_, DISCARD, sector, dice.getrandbits(64), dice.random() < 0.5)


def assert_transfer_is_sound(transfer):
    assert len(transfer.grefs) == len(transfer.firsts) == len(transfer.lasts)
    assert all(0 <= first <= last <= 7 for first, last in zip(transfer.firsts, transfer.lasts))
    lengths = [last - first + 1 for first, last in zip(transfer.firsts, transfer.lasts)]
    assert sum(lengths) == transfer.sectors


class TestNumbers:
    def test_operations_and_statuses_are_those_of_blkif_h(self):
        assert (0, 1, 2, 3, 5, 6) == (READ, WRITE, WRITE_BARRIER, FLUSH, DISCARD, INDIRECT)
        assert (0, -1, -2) == (OKAY, ERROR, EOPNOTSUPP)

    @every_layout
    def test_a_slot_has_the_size_of_the_largest_request(self, abi, at, size):
        assert size == abi.slot_size
        assert size == at["segments"] + 11 * 8

    @every_abi
    def test_an_abi_shows_its_name(self, abi):
        assert f"<Abi {abi.name}>" == repr(abi)


class TestDecoding:
    @every_layout
    @pytest.mark.parametrize("operation", [READ, WRITE, WRITE_BARRIER, FLUSH])
    def test_a_transfer_is_read_from_where_blkif_h_puts_it(self, abi, at, size, operation):
        dice = random.Random(operation)
        for count in [*range(1, 12)] * 3:
            id_, sector = dice.getrandbits(64), dice.getrandbits(64)
            segments = some_segments(dice, count)
            slot = slot_with(at, size, operation, count, 0xBEEF, id_, sector)
            put_segments(slot, at["segments"], segments)

            assert transfer_of(id_, operation, sector, segments) == abi.decode(bytes(slot))

    @every_layout
    @pytest.mark.parametrize("segments", [1, 11, 12, 256, 511, 512, 513, 1024, 4095, 4096])
    @pytest.mark.parametrize("operation", [READ, WRITE])
    def test_an_indirect_request_is_read_with_the_pages_it_needs(
        self, abi, at, size, segments, operation
    ):
        slot = slot_with(at, size, INDIRECT, operation, segments, 2**64 - 1, 2**63)
        struct.pack_into("<H", slot, at["handle"], 51712)
        struct.pack_into("<8I", slot, at["grefs"], 11, 12, 13, 14, 15, 16, 17, 18)
        grefs = (11, 12, 13, 14, 15, 16, 17, 18)[: (segments + 511) // 512]

        assert Indirect(2**64 - 1, operation, 2**63, segments, grefs) == abi.decode(bytes(slot))

    @every_layout
    @pytest.mark.parametrize("flag", [0, 1, 2, 3, 255])
    def test_a_discard_is_read_and_its_first_flag_means_secure(self, abi, at, size, flag):
        slot = slot_with(at, size, DISCARD, flag, 0, 7, 2**64 - 8)
        struct.pack_into("<Q", slot, at["discard"], 2**64 - 1)

        expected = Discard(7, DISCARD, 2**64 - 8, 2**64 - 1, flag % 2 == 1)
        assert expected == abi.decode(bytes(slot))

    @every_layout
    @pytest.mark.parametrize("operation", [FLUSH, WRITE_BARRIER])
    def test_a_flush_or_barrier_needs_no_segment(self, abi, at, size, operation):
        slot = slot_with(at, size, operation, 0, 0, 5, 6)

        assert Transfer(5, operation, 6, 0, (), (), ()) == abi.decode(bytes(slot))

    @every_layout
    def test_the_heads_of_a_run_of_slots(self, abi, at, size):
        dice = random.Random(size)
        slots, expected = b"", []
        for _ in range(9):
            head = [dice.getrandbits(bits) for bits in (8, 8, 16, 64, 64)]
            slot = slot_with(at, size, *head)
            (descriptor,) = struct.unpack_from("<Q", slot, at["segments"])
            (page,) = struct.unpack_from("<I", slot, at["grefs"])
            assert page == descriptor >> 32
            slots += slot
            expected.append((*head, descriptor))

        assert expected == list(abi.heads(slots))
        assert at["segments"] == abi.segments_at

    @every_layout
    def test_what_stands_in_segments_that_are_not_used_does_not_matter(self, abi, at, size):
        slot = slot_with(at, size, READ, 1, 0, 1, 2)
        slot[at["segments"] :] = b"\xff" * (size - at["segments"])
        put_segments(slot, at["segments"], [(9, 3, 3)])

        assert Transfer(1, READ, 2, 1, (9,), (3,), (3,)) == abi.decode(bytes(slot))

    @every_abi
    def test_what_a_frontend_encodes_decodes_to_the_same(self, abi):
        dice = random.Random(abi.name)
        for _ in range(500):
            request = some_request(dice)
            slot = abi.encode(request, handle=dice.getrandbits(16))

            assert abi.slot_size == len(slot)
            assert request == abi.decode(slot)


class TestEncoding:
    @every_layout
    def test_a_transfer_stands_where_blkif_h_puts_it(self, abi, at, size):
        segments = [(0xDEADBEEF, 0, 7), (2, 3, 4)]
        request = transfer_of(0x1122334455667788, WRITE, 0x99AABBCCDDEEFF00, segments)
        expected = bytearray(size)
        struct.pack_into("<BBH", expected, 0, 1, 2, 51712)
        struct.pack_into("<Q", expected, at["id"], 0x1122334455667788)
        struct.pack_into("<Q", expected, at["sector"], 0x99AABBCCDDEEFF00)
        put_segments(expected, at["segments"], segments)

        assert bytes(expected) == abi.encode(request, handle=51712)

    @every_layout
    def test_an_indirect_request_stands_where_blkif_h_puts_it(self, abi, at, size):
        expected = bytearray(size)
        struct.pack_into("<BBH", expected, 0, 6, 1, 513)
        struct.pack_into("<Q", expected, at["id"], 3)
        struct.pack_into("<Q", expected, at["sector"], 4)
        struct.pack_into("<H", expected, at["handle"], 51712)
        struct.pack_into("<2I", expected, at["grefs"], 70, 71)

        request = Indirect(3, WRITE, 4, 513, (70, 71))
        assert bytes(expected) == abi.encode(request, handle=51712)

    @every_layout
    def test_a_discard_stands_where_blkif_h_puts_it(self, abi, at, size):
        expected = bytearray(size)
        struct.pack_into("<BBH", expected, 0, 5, 1, 51712)
        struct.pack_into("<Q", expected, at["id"], 3)
        struct.pack_into("<Q", expected, at["sector"], 4)
        struct.pack_into("<Q", expected, at["discard"], 5)

        request = Discard(3, DISCARD, 4, 5, secure=True)
        assert bytes(expected) == abi.encode(request, handle=51712)

    def test_a_segment_takes_eight_bytes(self):
        expected = bytes([4, 3, 2, 1, 5, 6, 0, 0, 255, 255, 255, 255, 0, 7, 0, 0])

        assert expected == encode_segments([(0x01020304, 5, 6), (0xFFFFFFFF, 0, 7)])


class TestMalformed:
    """Each is answered with its own id and the operation that the frontend looks for."""

    @staticmethod
    def refusal(abi, at, size, operation, second, wide=1, limit=256, segments=((1, 0, 7),)):
        id_ = random.Random(operation << 8 | second).getrandbits(64)
        slot = slot_with(at, size, operation, second, wide, id_, 0)
        put_segments(slot, at["segments"], segments)
        request = abi.decode(bytes(slot), limit)
        assert isinstance(request, Malformed)
        assert id_ == request.id
        assert request.reason
        return request.operation, request.status

    @every_layout
    @pytest.mark.parametrize("operation", [READ, WRITE, WRITE_BARRIER, FLUSH])
    @pytest.mark.parametrize("count", [12, 13, 128, 255])
    def test_more_than_eleven_segments(self, abi, at, size, operation, count):
        assert (operation, ERROR) == self.refusal(abi, at, size, operation, count)

    @every_layout
    @pytest.mark.parametrize("operation", [READ, WRITE])
    def test_a_read_or_write_of_nothing(self, abi, at, size, operation):
        assert (operation, ERROR) == self.refusal(abi, at, size, operation, 0)

    @every_layout
    @pytest.mark.parametrize("operation", [READ, WRITE, WRITE_BARRIER, FLUSH])
    @pytest.mark.parametrize("bad", [(1, 0), (7, 6), (0, 8), (8, 8), (0, 255), (255, 255), (9, 3)])
    def test_a_segment_outside_its_page_wherever_it_stands(self, abi, at, size, operation, bad):
        for count in (1, 2, 11):
            for place in range(count):
                segments = [(1, 0, 7)] * count
                segments[place] = (1, *bad)
                refusal = self.refusal(abi, at, size, operation, count, segments=segments)
                assert (operation, ERROR) == refusal

    @every_layout
    def test_an_operation_that_is_not_offered_is_not_supported(self, abi, at, size):
        for operation in (4, *range(7, 256)):
            assert (operation, EOPNOTSUPP) == self.refusal(abi, at, size, operation, 1)

    @every_layout
    @pytest.mark.parametrize("inner", [2, 3, 5, 6, 255])
    def test_an_indirect_request_that_neither_reads_nor_writes(self, abi, at, size, inner):
        assert (inner, ERROR) == self.refusal(abi, at, size, INDIRECT, inner)

    @every_layout
    @pytest.mark.parametrize("inner", [READ, WRITE])
    @pytest.mark.parametrize(
        ("segments", "limit"), [(0, 256), (257, 256), (65535, 256), (4097, 4096), (2, 1)]
    )
    def test_more_indirect_segments_than_offered_or_none(
        self, abi, at, size, inner, segments, limit
    ):
        refusal = self.refusal(abi, at, size, INDIRECT, inner, segments, limit)
        assert (inner, ERROR) == refusal

    @every_layout
    def test_an_indirect_request_where_none_is_offered(self, abi, at, size):
        refusal = self.refusal(abi, at, size, INDIRECT, READ, 1, limit=0)
        assert (INDIRECT, EOPNOTSUPP) == refusal

    @every_layout
    @pytest.mark.parametrize("limit", [0, 256, 4096])
    def test_random_bytes_never_raise_and_what_passes_is_sound(self, abi, at, size, limit):
        dice = random.Random(limit)
        kinds = set()
        for _ in range(2000):
            slot = bytearray(dice.randbytes(size))
            if dice.random() < 0.9:  # near enough to be looked at more closely
                slot[0] = dice.randrange(8)
                slot[1] = dice.randrange(14)
                slot[3] = dice.randrange(2)
            for segment in range(at["segments"], size, 8):
                if dice.random() < 0.8:
                    slot[segment + 4] %= 4
                    slot[segment + 5] = 4 + slot[segment + 5] % 4
            request = abi.decode(bytes(slot), limit)

            kinds.add(type(request))
            assert struct.unpack_from("<Q", slot, at["id"]) == (request.id,)
            assert 0 <= request.operation <= 255
            if isinstance(request, Transfer):
                assert len(request.grefs) <= 11
                assert request.grefs or request.operation in (FLUSH, WRITE_BARRIER)
                assert_transfer_is_sound(request)
            elif isinstance(request, Indirect):
                assert 1 <= request.segments <= limit
                assert len(request.grefs) == (request.segments + 511) // 512
            elif isinstance(request, Malformed):
                assert request.status in (ERROR, EOPNOTSUPP)
        assert {Transfer, Discard, Malformed} | ({Indirect} if limit else set()) == kinds


class TestIndirectPages:
    @pytest.mark.parametrize("count", [1, 2, 11, 12, 256, 511, 512, 513, 1024, 4095, 4096])
    def test_segments_are_read_in_order_across_pages(self, count):
        dice = random.Random(count)
        for segments in (
            [(n, 0, 7) for n in range(count)],
            [(dice.getrandbits(32), *sorted(dice.choices(range(8), k=2))) for _ in range(count)],
        ):
            pages = bytearray(-(-count // 512) * 4096)
            put_segments(pages, 0, segments)
            request = Indirect(2**64 - 1, WRITE, 77, count, (0,) * (len(pages) // 4096))

            expected = transfer_of(2**64 - 1, WRITE, 77, segments)
            assert expected == resolve(request, bytes(pages))
            assert expected == resolve(request, encode_segments(segments))

    @pytest.mark.parametrize("count", [1, 512, 513, MAX_INDIRECT_SEGMENTS])
    @pytest.mark.parametrize("bad", [(1, 0), (0, 8), (255, 255)])
    def test_one_segment_outside_its_page_refuses_the_request(self, count, bad):
        for place in {0, count // 2, count - 1}:
            segments = [(1, 0, 7)] * count
            segments[place] = (1, *bad)
            request = Indirect(9, READ, 0, count, (0,) * 8)

            refusal = resolve(request, encode_segments(segments))

            assert isinstance(refusal, Malformed)
            assert (9, READ, ERROR) == refusal[:3]

    def test_random_pages_never_raise_and_what_passes_is_sound(self):
        dice = random.Random(4)
        passed = 0
        for _ in range(300):
            count = dice.choice((1, 1, 2, 3, dice.randint(1, 4096)))
            resolved = resolve(Indirect(1, READ, 0, count, ()), dice.randbytes(8 * count))
            if isinstance(resolved, Transfer):
                passed += 1
                assert_transfer_is_sound(resolved)
            # most random segments are out of their page; make sure that not all were
            small = bytes(byte % 8 for byte in dice.randbytes(8 * 2))
            resolved = resolve(Indirect(1, READ, 0, 2, ()), small)
            if isinstance(resolved, Transfer):
                passed += 1
                assert_transfer_is_sound(resolved)
        assert passed > 50


class TestResponses:
    @pytest.mark.parametrize("status", [OKAY, ERROR, EOPNOTSUPP])
    def test_it_takes_twelve_bytes_of_which_none_is_stale(self, status):
        expected = bytearray(12)
        struct.pack_into("<Q", expected, 0, 0x1122334455667788)
        struct.pack_into("<B", expected, 8, READ)
        struct.pack_into("<h", expected, 10, status)

        assert bytes(expected) == encode_response(0x1122334455667788, READ, status)
        assert 12 == RESPONSE_SIZE

    def test_what_is_encoded_decodes_to_the_same_from_a_slot(self):
        dice = random.Random(1)
        for _ in range(200):
            answer = Response(
                dice.getrandbits(64), dice.getrandbits(8), dice.randint(-32768, 32767)
            )
            slot = encode_response(*answer) + dice.randbytes(100)

            assert answer == decode_response(slot)


class TestProtocolName:
    @pytest.mark.parametrize("machine", ["x86_64", "i686", "aarch64", "armv7l", "riscv64"])
    @every_abi
    def test_a_name_says_it_whatever_the_machine(self, machine, abi):
        assert abi is abi_named(abi.name, machine)

    @pytest.mark.parametrize(
        ("machine", "abi"),
        [
            ("x86_64", X86_32),
            ("i686", X86_32),
            ("AMD64", X86_32),
            ("aarch64", ARM),
            ("aarch64_be", ARM),
            ("armv7l", ARM),
            ("arm64", ARM),
        ],
    )
    def test_without_a_name_it_is_what_linux_takes_it_for(self, machine, abi):
        assert abi is abi_named(None, machine)

    @pytest.mark.parametrize(
        "name", ["", "native", "X86_64-ABI", "x86_64-abi ", "x" * 4096, "\x1b[2J"]
    )
    def test_an_unknown_name_is_refused_in_a_short_and_harmless_line(self, name):
        with pytest.raises(GuestMisbehaved, match="unknown protocol") as caught:
            abi_named(name, "x86_64")
        assert len(str(caught.value)) < 300
        assert str(caught.value).isprintable()


def some_features(dice):
    sector_size = dice.choice((512, 4096))
    indirect = dice.choice((0, 256, 4096))
    return Features(
        sectors=dice.getrandbits(dice.randint(0, 50)),
        sector_size=sector_size,
        physical_sector_size=sector_size << dice.randrange(4),
        read_only=dice.random() < 0.5,
        cdrom=dice.random() < 0.5,
        flush=dice.random() < 0.5,
        barrier=dice.random() < 0.5,
        discard=dice.random() < 0.5,
        secure_discard=dice.random() < 0.5,
        discard_granularity=512 << dice.randrange(8),
        persistent=dice.random() < 0.5,
        max_indirect_segments=indirect,
        max_ring_page_order=dice.randint(0, 4),
        max_queues=dice.randint(1, 8),
    )


class TestFeatures:
    def test_the_keys_are_those_of_blkif_h(self):
        features = Features(
            sectors=2**40,
            read_only=True,
            discard=True,
            discard_granularity=65536,
            max_ring_page_order=4,
            max_queues=8,
        )

        assert {
            "sectors": "1099511627776",
            "sector-size": "512",
            "physical-sector-size": "4096",
            "info": "4",
            "feature-flush-cache": "1",
            "feature-barrier": "1",
            "feature-persistent": "1",
            "feature-discard": "1",
            "max-ring-page-order": "4",
            "max-ring-pages": "16",
            "multi-queue-max-queues": "8",
            "feature-max-indirect-segments": "256",
            "discard-granularity": "65536",
            "discard-alignment": "0",
            "discard-secure": "0",
        } == features.to_keys()

    @pytest.mark.parametrize(
        ("read_only", "cdrom", "info"),
        [(False, False, "0"), (True, False, "4"), (False, True, "3"), (True, True, "7")],
    )
    def test_a_cdrom_can_be_taken_out(self, read_only, cdrom, info):
        assert info == Features(8, read_only=read_only, cdrom=cdrom).to_keys()["info"]

    def test_a_secure_discard_is_offered_beside_the_other(self):
        keys = Features(8, discard=True, secure_discard=True).to_keys()

        assert ("1", "1") == (keys["feature-discard"], keys["discard-secure"])

    def test_what_is_not_offered_has_no_key(self):
        keys = Features(8, discard=False, max_indirect_segments=0).to_keys()

        assert "feature-max-indirect-segments" not in keys
        assert [] == [name for name in keys if name.startswith("discard")]

    def test_keys_read_back_as_what_they_were_made_of(self):
        dice = random.Random(2)
        for _ in range(500):
            features = some_features(dice)
            keys = features.to_keys()
            again = Features.from_keys(keys)

            assert keys == again.to_keys()
            granularity = features.discard_granularity if features.discard else again.sector_size
            assert granularity == again.discard_granularity
            assert (features.discard and features.secure_discard) is again.secure_discard
            for name in (
                "sectors",
                "sector_size",
                "read_only",
                "cdrom",
                "flush",
                "barrier",
                "discard",
                "persistent",
                "max_indirect_segments",
                "max_ring_page_order",
                "max_queues",
            ):
                assert getattr(features, name) == getattr(again, name), name

    def test_the_physical_sector_size_divides_the_disk_or_is_the_sector_size(self):
        dice = random.Random(3)
        for _ in range(500):
            features = some_features(dice)
            keys = features.to_keys()
            physical = int(keys["physical-sector-size"])

            divides = features.sectors * 512 % physical == 0
            assert divides or physical == features.sector_size
            assert features.sector_size <= physical <= features.physical_sector_size
            larger = physical * 2
            if larger <= features.physical_sector_size:  # it is no smaller than need be
                assert features.sectors * 512 % larger

    @pytest.mark.parametrize(
        ("sectors", "physical"),
        [(8, 4096), (9, 512), (10, 1024), (12, 2048), (16, 4096), (0, 4096)],
    )
    def test_an_odd_number_of_sectors_makes_the_physical_sector_smaller(self, sectors, physical):
        assert str(physical) == Features(sectors).to_keys()["physical-sector-size"]

    def test_without_keys_nothing_is_offered(self):
        expected = Features(
            sectors=0,
            sector_size=512,
            physical_sector_size=512,
            read_only=False,
            flush=False,
            barrier=False,
            discard=False,
            discard_granularity=512,
            persistent=False,
            max_indirect_segments=0,
            max_ring_page_order=0,
        )
        assert expected == Features.from_keys({})

    def test_sizes_default_to_the_sector_size(self):
        features = Features.from_keys({"sectors": "8", "sector-size": "4096"})

        assert (4096, 4096) == (features.physical_sector_size, features.discard_granularity)


NONSENSE = [
    "",
    " ",
    "-1",
    "+1",
    " 1",
    "1 ",
    "1\n",
    "1\0",
    "0x10",
    "1e3",
    "1.0",
    "1_0",
    "nan",
    "١",  # a digit, but none of ours
    "²",
    "4294967296",
    "99999999999",
    "00000000001",
    "9" * 5000,
    "\\xff",
    "\x1b[2J",
]


def is_number(text, limit, least=0):
    return bool(re.fullmatch("[0-9]{1,10}", text, re.ASCII)) and least <= int(text) <= limit


VALID = {"ring-ref": "8", "event-channel": "15"}


class TestConnection:
    @staticmethod
    def read(keys, order=4, queues=MAX_QUEUES):
        return Connection.from_keys(keys.get, order, queues)

    @pytest.mark.parametrize("queues", range(1, 9))
    @pytest.mark.parametrize("pages", [1, 2, 4, 8, 16])
    @pytest.mark.parametrize("protocol", [None, "x86_64-abi"])
    @pytest.mark.parametrize("persistent", [False, True])
    def test_keys_read_back_as_what_they_were_made_of(self, queues, pages, protocol, persistent):
        dice = random.Random(pages)
        rings = tuple(
            Ring(tuple(dice.getrandbits(32) for _ in range(pages)), dice.getrandbits(32))
            for _ in range(queues)
        )
        connection = Connection(rings, protocol, persistent)

        assert connection == self.read(connection.to_keys())

    def test_a_ring_of_one_page_is_written_as_linux_does(self):
        assert {
            "event-channel": "15",
            "feature-persistent": "1",
            "protocol": "x86_64-abi",
            "ring-ref": "8",
        } == Connection((Ring((8,), 15),), "x86_64-abi", persistent=True).to_keys()

    def test_a_ring_of_several_pages_is_written_as_linux_does(self):
        assert {
            "event-channel": "15",
            "feature-persistent": "0",
            "ring-page-order": "1",
            "ring-ref0": "8",
            "ring-ref1": "9",
        } == Connection((Ring((8, 9), 15),)).to_keys()

    def test_several_rings_are_written_as_linux_does(self):
        assert {
            "feature-persistent": "0",
            "multi-queue-num-queues": "2",
            "queue-0/event-channel": "15",
            "queue-0/ring-ref": "8",
            "queue-1/event-channel": "16",
            "queue-1/ring-ref": "9",
        } == Connection((Ring((8,), 15), Ring((9,), 16))).to_keys()
        keys = Connection((Ring((8, 9), 15), Ring((10, 11), 16))).to_keys()
        assert ("1", "11") == (keys["ring-page-order"], keys["queue-1/ring-ref1"])

    def test_a_single_queue_stands_in_the_directory_itself(self):
        keys = {**VALID, "queue-0/ring-ref": "9", "queue-0/event-channel": "16"}
        for queues in ({}, {"multi-queue-num-queues": "1"}):
            assert Connection((Ring((8,), 15),)) == self.read({**keys, **queues})

    @pytest.mark.parametrize("offered", range(1, 9))
    @pytest.mark.parametrize("asked", range(10))
    def test_no_more_queues_than_offered(self, offered, asked):
        rings = tuple(Ring((index,), index) for index in range(max(1, asked)))
        keys = {**Connection(rings).to_keys(), "multi-queue-num-queues": str(asked)}
        if 1 <= asked <= offered:
            assert rings == self.read(keys, queues=offered).rings
        else:
            with pytest.raises(GuestMisbehaved, match="multi-queue-num-queues"):
                self.read(keys, queues=offered)

    def test_a_missing_key_of_any_queue_is_named(self):
        keys = Connection(tuple(Ring((index,), index) for index in range(8))).to_keys()
        for index in range(8):
            for name in (f"queue-{index}/ring-ref", f"queue-{index}/event-channel"):
                rest = {key: value for key, value in keys.items() if key != name}
                with pytest.raises(GuestMisbehaved, match=f"{name} is missing"):
                    self.read(rest)

    @pytest.mark.parametrize(
        "keys",
        [
            {"ring-ref": "8"},
            {"ring-ref0": "8"},
            {"ring-ref": "8", "ring-page-order": "0"},
            {"ring-ref0": "8", "ring-page-order": "0"},
        ],
    )
    def test_either_spelling_of_a_ring_of_one_page_is_read(self, keys):
        assert Connection((Ring((8,), 15),)) == self.read({**keys, "event-channel": "15"})

    def test_the_largest_numbers_are_in_range(self):
        keys = {"ring-ref": "4294967295", "event-channel": "4294967295"}

        assert Connection((Ring((2**32 - 1,), 2**32 - 1),)) == self.read(keys)

    @pytest.mark.parametrize("missing", ["ring-ref", "event-channel"])
    def test_a_missing_key_is_named(self, missing):
        keys = {name: value for name, value in VALID.items() if name != missing}
        with pytest.raises(GuestMisbehaved, match=f"{missing} is missing"):
            self.read(keys)

    @pytest.mark.parametrize("order", [1, 2, 3, 4])
    def test_a_missing_page_of_the_ring_is_named(self, order):
        keys = Connection((Ring(tuple(range(1 << order)), 15),)).to_keys()
        for index in range(1 << order):
            rest = {name: value for name, value in keys.items() if name != f"ring-ref{index}"}
            with pytest.raises(GuestMisbehaved, match=f"ring-ref{index} is missing"):
                self.read(rest)

    @pytest.mark.parametrize("offered", range(5))
    @pytest.mark.parametrize("asked", range(8))
    def test_no_ring_larger_than_offered(self, offered, asked):
        keys = {f"ring-ref{index}": str(index) for index in range(1 << asked)}
        keys.update({"event-channel": "1", "ring-page-order": str(asked)})
        if asked <= offered:
            assert tuple(range(1 << asked)) == self.read(keys, offered).rings[0].refs
        else:
            with pytest.raises(GuestMisbehaved, match="ring-page-order"):
                self.read(keys, offered)

    @pytest.mark.parametrize("text", NONSENSE)
    @pytest.mark.parametrize(
        "key",
        [
            "ring-ref",
            "ring-page-order",
            "event-channel",
            "feature-persistent",
            "multi-queue-num-queues",
        ],
    )
    def test_a_value_that_is_no_number_in_range_is_refused_in_a_short_line(self, key, text):
        with pytest.raises(GuestMisbehaved, match=key) as caught:
            self.read({**VALID, key: text})
        assert len(str(caught.value)) < 400
        assert str(caught.value).isprintable()

    def test_any_text_gives_values_in_range_or_is_refused(self):
        dice = random.Random(5)
        texts = [*NONSENSE, None, None, "0", "1", "2", "4", "5", "15", "4294967295", "007"]
        texts += ["".join(chr(dice.randrange(0x20, 0x7F)) for _ in range(3)) for _ in range(20)]
        accepted = 0
        for _ in range(3000):
            queues = dice.choice(("1", "2", "3"))
            places = [f"queue-{n}/" for n in range(int(queues))] if queues != "1" else [""]
            keys = {f"{place}ring-ref{index}": "7" for place in places for index in range(16)}
            keys.update({f"{place}event-channel": "3" for place in places})
            keys.update({"ring-page-order": dice.choice("01234"), "multi-queue-num-queues": queues})
            if dice.random() < 0.5:
                for place in places:
                    del keys[f"{place}ring-ref0"]
                    keys[f"{place}ring-ref"] = "7"
            for name in dice.sample([*sorted(keys), "protocol", "feature-persistent"], 2):
                keys[name] = dice.choice(texts)

            order = "0" if keys["ring-page-order"] is None else keys["ring-page-order"]
            wanted = keys["multi-queue-num-queues"]
            wanted = "1" if wanted is None else wanted
            legal = is_number(order, 4) and is_number(wanted, 8, least=1)
            rings = []
            if legal:
                many = int(wanted) > 1
                for place in [f"queue-{n}/" for n in range(int(wanted))] if many else [""]:
                    count = 1 << int(order)
                    one = count == 1 and keys.get(f"{place}ring-ref0") is None
                    names = [f"{place}ring-ref{'' if one else n}" for n in range(count)]
                    texts_of = [keys.get(name) or "" for name in (*names, f"{place}event-channel")]
                    legal = legal and all(is_number(text, 2**32 - 1) for text in texts_of)
                    rings.append(texts_of)
                persistent = keys.get("feature-persistent")
                legal = legal and (persistent is None or is_number(persistent, 1))
            if not legal:
                with pytest.raises(GuestMisbehaved):
                    self.read(keys)
                continue
            accepted += 1
            assert Connection(
                tuple(Ring(tuple(map(int, refs)), int(port)) for *refs, port in rings),
                keys.get("protocol"),
                keys.get("feature-persistent") in ("1", "01", "001"),
            ) == self.read(keys)
        assert accepted > 300

    @pytest.mark.parametrize("queues", ["1", "8"])
    def test_only_the_announced_keys_are_read(self, queues):
        asked = set()

        def read(name):
            asked.add(name)
            return {"ring-page-order": "4", "multi-queue-num-queues": queues}.get(name, "1")

        Connection.from_keys(read, 4, 8)

        places = [f"queue-{n}/" for n in range(8)] if queues == "8" else [""]
        refs = {f"{place}ring-ref{index}" for place in places for index in range(16)}
        others = {"ring-page-order", "multi-queue-num-queues", "protocol", "feature-persistent"}
        assert refs | {f"{place}event-channel" for place in places} | others == asked

"""Distinct 32-byte sectors, against counts made by hand."""

import numpy as np
import pytest

from ptxcpu import Module, Sectors

COPY = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out, .param .u64 in, .param .u32 stride) {
  .reg .b32 %i, %n, %s, %v; .reg .b64 %a;
  mov.u32 %i, %ctaid.x; mov.u32 %n, %ntid.x; mul.lo.u32 %i, %i, %n; mov.u32 %n, %tid.x; add.u32 %i, %i, %n;
  ld.param.u32 %s, [stride]; mul.lo.u32 %n, %i, %s;
  ld.param.u64 %a, [in]; mad.wide.u32 %a, %n, 4, %a; LOAD
  ld.param.u64 %a, [out]; mad.wide.u32 %a, %i, 4, %a; STORE
  ret;
}
"""
PLAIN = COPY.replace("LOAD", "ld.global.b32 %v, [%a];").replace("STORE", "st.global.b32 [%a], %v;")
STENCIL = COPY.replace(
    "LOAD",
    "ld.global.b32 %v, [%a]; ld.global.b32 %s, [%a+4]; add.u32 %v, %v, %s; "
    "ld.global.b32 %s, [%a+8]; add.u32 %v, %v, %s;",
).replace("STORE", "st.global.b32 [%a], %v;")
ATOMIC = COPY.replace("LOAD", "ld.global.b32 %v, [%a];").replace("STORE", "red.global.add.u32 [%a], %v;")


def words(count: int, offset: int = 0) -> np.ndarray:
    """Zeros that start `offset` words after a multiple of 32 bytes."""
    raw = np.zeros(count + 16, np.uint32)
    first = (-raw.ctypes.data % 32) // 4 + offset
    return raw[first : first + count]


def sectors(ptx: str, out: np.ndarray, source: np.ndarray, stride: int = 1, **options) -> dict[str, Sectors]:
    stats = Module(ptx).launch("k", 4, 64, [out, source, stride], count_sectors=True, **options)
    return stats.sectors


@pytest.mark.parametrize("workers", [1, 4])
def test_a_copy_touches_every_sector_once(workers):
    found = sectors(PLAIN, words(256), words(256), workers=workers)
    assert found == {"0": Sectors(stores=32, block_stores=32), "1": Sectors(loads=32, block_loads=32)}


@pytest.mark.parametrize("workers", [1, 4])
def test_a_halo_is_loaded_again_by_the_next_block(workers):
    # 66 words a block: 8 sectors and 2 words of the next one; the launch as a whole reads 258 words.
    found = sectors(STENCIL, words(256), words(258), workers=workers)
    assert found["1"] == Sectors(loads=33, block_loads=4 * 9)


def test_a_strided_read_pays_for_whole_sectors():
    assert sectors(PLAIN, words(256), words(4 * 256), stride=4)["1"] == Sectors(loads=128, block_loads=128)
    assert sectors(PLAIN, words(256), words(16 * 256), stride=16)["1"] == Sectors(loads=256, block_loads=256)
    assert sectors(PLAIN, words(256), words(1), stride=0)["1"] == Sectors(loads=1, block_loads=4)


def test_an_unaligned_start_costs_one_sector_more_in_every_block():
    found = sectors(PLAIN, words(256, offset=1), words(256, offset=5))
    assert found == {"0": Sectors(stores=33, block_stores=4 * 9), "1": Sectors(loads=33, block_loads=4 * 9)}


def test_atomics_load_and_store():
    assert sectors(ATOMIC, words(256), words(256))["0"] == Sectors(32, 32, 32, 32)


def test_names_totals_and_the_default():
    module, arrays = Module(PLAIN), [words(256), words(256), 1]
    named = module.launch("k", 4, 64, arrays, count_sectors=True, names=["to", "from"])
    assert set(named.sectors) == {"to", "from"}
    assert named.total_sectors == Sectors(32, 32, 32, 32)
    assert module.launch("k", 4, 64, arrays).sectors == {}

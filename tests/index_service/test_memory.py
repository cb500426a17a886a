"""What there is of memory is read right on every kind of system, and estimates are not below what FAISS takes."""

import subprocess
import sys
from pathlib import Path

import faiss
import pytest
from small_indexes import unit_vectors

from index_service.memory import (
    CgroupMemory,
    available_bytes,
    build_bytes,
    cgroup_folders,
    index_bytes,
    load_bytes,
    memory_available,
    refuse_beyond,
    tower_bytes,
)
from towers.errors import TooLittleMemoryError

GIB = 2**30
MEMINFO = "MemTotal:       8388608 kB\nMemFree:        1048576 kB\nMemAvailable:   4194304 kB\nBuffers: 8 kB\n"
NO_LIMIT_V1 = CgroupMemory("9223372036854771712\n", f"{GIB}\n", "")
NO_LIMIT_V2 = CgroupMemory("max\n", f"{GIB}\n", "")


def test_the_folders_of_version_2_are_all_levels():
    assert cgroup_folders("0::/kubepods/burstable/pod1\n") == [
        *("kubepods/burstable/pod1", "kubepods/burstable", "kubepods", "."),
        *("unified/kubepods/burstable/pod1", "unified/kubepods/burstable", "unified/kubepods", "unified"),
    ]


def test_the_folders_of_version_1_are_those_of_its_memory_controller():
    text = "9:name=systemd:/x\n8:pids:/x\n4:cpu,memory:/docker/a:b\n1:cpuset:/x\nnonsense\n"
    assert cgroup_folders(text) == ["memory/docker/a:b", "memory/docker", "memory"]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], 4 * GIB),
        ([NO_LIMIT_V1, NO_LIMIT_V2], 4 * GIB),
        ([CgroupMemory(f"{2 * GIB}\n", f"{GIB}\n", "anon 5\n")], GIB),
        ([CgroupMemory(f"{2 * GIB}", f"{GIB}", f"inactive_file {GIB // 2}\nactive_file {GIB // 4}\n")], 7 * GIB // 4),
        ([CgroupMemory(f"{2 * GIB}", f"{GIB}", f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n")], 3 * GIB // 2),
        ([NO_LIMIT_V2, CgroupMemory(f"{2 * GIB}", f"{GIB}", ""), CgroupMemory(f"{8 * GIB}", "0", "")], GIB),
        ([CgroupMemory(f"{GIB}", f"{2 * GIB}", "")], 0),
        ([CgroupMemory("", "", "")], 4 * GIB),
    ],
)
def test_the_least_that_is_left_counts(groups, expected):
    assert available_bytes(MEMINFO, groups) == expected


def test_where_nothing_says_how_much_there_is_nothing_is_refused():
    assert available_bytes("", [NO_LIMIT_V2]) is None
    refuse_beyond(10**15, None, "a load")


def test_reads_the_files_of_the_innermost_limit(tmp_path: Path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "sys/fs/cgroup/outer/inner/memory.current": "5\n",
        "sys/fs/cgroup/outer/memory.max": f"{3 * GIB}\n",
        "sys/fs/cgroup/outer/memory.current": f"{2 * GIB}\n",
        "sys/fs/cgroup/outer/memory.stat": f"inactive_file {GIB}\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory_available(tmp_path) == 2 * GIB
    (tmp_path / "sys/fs/cgroup/outer/memory.max").write_text("max\n")
    assert memory_available(tmp_path) == 4 * GIB


def test_a_container_on_version_1_sees_its_own_group_as_the_root(tmp_path: Path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/docker/0123\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB // 2}\n",
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 4}\ntotal_active_file 0\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory_available(tmp_path) == 3 * GIB // 4


def test_this_machine_says_something():
    available = memory_available()
    assert available is not None
    assert 0 < available < 2**50


@pytest.mark.parametrize(
    "index_type", ["Flat", "IVF64,SQ8", "IVF64,SQfp16", "IVF64,Flat", "IVF64,PQ16x4fs", "PQ8", "HNSW32,Flat"]
)
def test_an_index_is_not_larger_than_estimated(index_type):
    num_items, dim = 5000, 32
    index = faiss.index_factory(dim, index_type, faiss.METRIC_INNER_PRODUCT)
    vectors = unit_vectors(num_items, dim)
    if isinstance(index, faiss.IndexPQ):
        index.do_polysemous_training = False  # Seconds, and not a byte.
    index.train(vectors)
    index.add(vectors)
    size = faiss.serialize_index(index).nbytes
    fixed = 64 * 1024 + (256 * dim * 4 if "PQ" in index_type else 0)
    assert size - fixed <= index_bytes(index_type, num_items, dim) <= 1.5 * size


def test_estimates_grow_with_what_they_are_of():
    small = build_bytes(1_000_000, 64, "IVF4000,SQ8", 100_000_000, 2, 10_000_000)
    assert small > 500_000 * 64 * 4
    for larger in (
        build_bytes(2_000_000, 64, "IVF4000,SQ8", 100_000_000, 2, 10_000_000),
        build_bytes(1_000_000, 128, "IVF4000,SQ8", 100_000_000, 2, 10_000_000),
        build_bytes(1_000_000, 64, "HNSW32,Flat", 100_000_000, 2, 10_000_000),
        build_bytes(1_000_000, 64, "IVF4000,SQ8", 200_000_000, 2, 10_000_000),
        build_bytes(1_000_000, 64, "IVF4000,SQ8", 100_000_000, 1, 10_000_000),
        build_bytes(1_000_000, 64, "IVF4000,SQ8", 100_000_000, 2, 20_000_000),
    ):
        assert larger > small
    assert load_bytes(GIB, 0) > GIB
    assert load_bytes(GIB, GIB) > 2 * GIB
    assert tower_bytes(GIB, GIB) > tower_bytes(GIB, 0) > GIB


def test_a_refusal_names_both_figures_and_the_fix():
    refuse_beyond(2 * GIB, 2 * GIB, "loading checkpoint 7")
    with pytest.raises(TooLittleMemoryError) as caught:
        refuse_beyond(3 * GIB, 2 * GIB, "loading checkpoint 7")
    assert str(caught.value) == (
        "loading checkpoint 7 needs about 3,072 MiB of memory and 2,048 MiB are available; "
        "give the shard more memory, or spread the catalogue over more shards: twotower stage --num-shards"
    )


def test_memory_that_is_freed_goes_back_to_the_system():
    code = """
import numpy, pyarrow
import subprocess
import sys
from pathlib import Path
from index_service.memory import return_freed_memory, trim
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
return_freed_memory()
before = resident()
for _ in range(3):
    blocks = [numpy.ones(2**20, dtype=numpy.float64) for _ in range(8)] + [b"x" * 2**23 for _ in range(8)]
    blocks += [pyarrow.allocate_buffer(2**23) for _ in range(8)] + [b"y" * 1000 for _ in range(50_000)]
    held = resident() - before
    del blocks
    trim()
print(held > 2**27, resident() - before < 2**23)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True True\n"

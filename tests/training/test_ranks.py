"""Who this process is, read from what launchers set."""

from __future__ import annotations

import logging
import os
import re
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from processes import be_rank, free_port, on_ranks

from underpaint.errors import ConfigError, DataError, UnderpaintError
from underpaint.training import ranks as module
from underpaint.training.ranks import Ranks

VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in list(os.environ):
        if name in VARIABLES or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def test_a_plain_process_is_a_world_of_one():
    names = [*VARIABLES, "DS_ACCELERATOR"]
    before = {name: os.environ.get(name) for name in names}
    with Ranks() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.is_main) == (0, 1, 0, True)
        ranks.barrier()
        assert ranks.broadcast_object({"a": 1}) == {"a": 1}
        assert ranks.all_gather_object("x") == ["x"]
        assert ranks.any_true(True)
        assert not ranks.any_true(False)
        assert ranks.all_reduce_sum(torch.tensor([2.0])).item() == 2.0
        with pytest.raises(UnderpaintError, match="already initialised"):
            Ranks().__enter__()
    assert not torch.distributed.is_initialized()
    assert {name: os.environ.get(name) for name in names} == before


def test_it_can_be_entered_again_and_deepspeed_is_quiet(capfd):
    for _ in range(2):
        with Ranks("cpu") as ranks:
            assert not ranks.any_true(False)
    assert logging.getLogger("DeepSpeed").getEffectiveLevel() == logging.WARNING
    assert capfd.readouterr().out == ""


def test_a_plain_process_leaves_its_group_after_an_error_on_a_gpu_too(monkeypatch):
    # NCCL warns of groups that a process ends with; it waits for other ranks only where there are any.
    ranks = Ranks("cpu")
    with pytest.raises(KeyboardInterrupt), ranks:
        deepspeed = ranks._import_deepspeed()
        monkeypatch.setattr(ranks, "_import_deepspeed", lambda: deepspeed)
        ranks.device = torch.device("cuda")
        raise KeyboardInterrupt
    assert not torch.distributed.is_initialized()


def test_torchrun():
    place, add = module._place(
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "9"}
    )
    assert (place.rank, place.world_size, place.local_rank) == (5, 8, 1)
    assert add == {}


def test_srun():
    place, add = module._place(
        {
            "SLURM_PROCID": "9",
            "SLURM_STEP_NUM_TASKS": "16",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NODELIST": "gpu[03-05,9],login1",
            "SLURM_JOB_ID": "1234567",
        }
    )
    assert (place.rank, place.world_size, place.local_rank) == (9, 16, 1)
    assert add == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "34567"}


def test_a_batch_script_without_srun_is_a_plain_process():
    place, _ = module._place({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"})
    assert place.world_size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[001-100]", "n001"), ("n[7,9]-ib", "n7-ib"), ("a-b[2-3],c", "a-b2")],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert module._first_host(nodes) == first


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is missing"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 processes"),
    ],
)
def test_half_set_variables_are_refused(environ, message):
    with pytest.raises(ConfigError, match=message):
        module._place(environ)


def test_an_absent_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"engine\.device is 'cuda'.*use 'auto' or 'cpu'"):
        Ranks("cuda")
    assert Ranks("auto").device.type == "cpu"


def test_each_rank_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert module._pick_device("auto", 3) == torch.device("cuda", 3)
    assert module._pick_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(ConfigError, match="start 4 processes per node"):
        module._pick_device("auto", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert module._pick_device("cuda", 3) == torch.device("cuda", 0)


def enter_and_leave(rank, port, folder):
    be_rank(rank, 2, port)
    try:
        with Ranks("cpu", timeout=60) as ranks:
            ranks.barrier()
            if ranks.is_main:
                raise DataError("The disk is full.")
            ranks.barrier()
    except UnderpaintError as error:
        (folder / str(rank)).write_text(str(error))


@pytest.mark.slow
def test_who_waits_for_a_rank_that_has_ended_says_so_in_a_sentence(tmp_path):
    torch.multiprocessing.start_processes(enter_and_leave, args=(free_port(), tmp_path), nprocs=2, start_method="spawn")
    assert (tmp_path / "0").read_text() == "The disk is full."
    said = (tmp_path / "1").read_text()
    assert re.fullmatch(r"Rank 1 of 2 lost the connection to another \(.*peer.*\); look for what .* wrote\.", said)


def let_go_late(ranks: Ranks) -> None:
    """Leave while a thread of Gloo is at work, in a group that the process holds to its end as DeepSpeed does."""
    sys.modules[__name__].__dict__["held"] = dist.group.WORLD
    dist.all_reduce(torch.zeros(1), async_op=True).get_future().then(lambda _: time.sleep(0.1))


@pytest.mark.slow
def test_a_rank_ends_well_while_gloo_lets_go_of_its_last_tensors(tmp_path):
    # Threads that ask for the interpreter after its end are ended by it, in C++ that cannot be: SIGABRT.
    on_ranks(tmp_path, 2, let_go_late)

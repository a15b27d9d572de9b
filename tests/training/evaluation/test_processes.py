"""Two processes count together what one process counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from beit_fast.training.evaluation import ClassificationAccuracy, FeatureTable, SegmentationAccuracy

from ...support.checkout import ROOT

PROGRAM = """
import sys, torch, torch.distributed as dist
from beit_fast.training.evaluation import ClassificationAccuracy, FeatureTable, SegmentationAccuracy
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
share = slice(0, 5) if rank == 0 else slice(5, 8)
classes, pixels = ClassificationAccuracy(6), SegmentationAccuracy(3)
classes.update(data["scores"][share], data["labels"][share])
pixels.update(data["predicted"][share], data["annotated"][share])
own = range(8)[share]
table = FeatureTable.gather([data["scores"][list(own)[::-1]]], data["labels"][list(own)[::-1]].tolist(), own[::-1], 6)
empty = FeatureTable.gather([], [], [], 6) if rank else FeatureTable.gather([torch.ones(1, 6)], [3], [0], 6)
torch.save([classes.compute(), pixels.compute(), tuple(table), tuple(empty)], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")
def test_two_processes_give_the_metrics_and_features_of_one(tmp_path: Path):
    data = {
        "scores": torch.randn(8, 6),
        "labels": torch.randint(6, (8,)),
        "predicted": torch.randint(3, (8, 4, 4)),
        "annotated": torch.randint(3, (8, 4, 4)),
    }
    torch.save(data, tmp_path / "data.pt")
    command = [sys.executable, "-c", PROGRAM]
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT) for rank in range(2)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    classes, pixels = ClassificationAccuracy(6), SegmentationAccuracy(3)
    classes.update(data["scores"], data["labels"])
    pixels.update(data["predicted"], data["annotated"])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found[:2] == [classes.compute(), pixels.compute()]
        assert torch.equal(found[2][0], data["scores"])
        assert torch.equal(found[2][1], data["labels"])
        assert torch.equal(found[3][0], torch.ones(1, 6))
        assert found[3][1].tolist() == [3]


def test_one_process_gathers_in_the_order_of_the_data_set():
    table = FeatureTable.gather([torch.tensor([[1.0]]), torch.tensor([[2.0]])], [5, 6], [9, 4], 1)
    assert table.features.flatten().tolist() == [2.0, 1.0]
    assert table.labels.tolist() == [6, 5]

"""What of a machine changes the last bits of a run."""

import pytest
import torch

from distill_jobs.run_folder import Machine


def test_another_model_of_gpu_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["NVIDIA A100-SXM4-80GB", "NVIDIA H200"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: next(names))
    first, second = (Machine.here(2, torch.device("cuda", 0)) for _ in range(2))
    assert first.differences(second) == ["device: NVIDIA A100-SXM4-80GB, now NVIDIA H200"]
    assert Machine.here(2, torch.device("cpu")).device == "cpu"

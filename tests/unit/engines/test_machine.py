"""What a machine is called: as different as the kernels that engines choose on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import machine


def with_cpu(monkeypatch: pytest.MonkeyPatch, **fields: str) -> str:
    monkeypatch.setattr(machine, "_cpuinfo", lambda field: fields.get(field.replace(" ", "_"), ""))
    monkeypatch.setattr(machine, "cores", lambda: 2)
    return machine.machine_name()


@pytest.mark.parametrize("unit", ["avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "amx_fp16"])
def test_a_unit_that_a_virtual_machine_hides_makes_another_machine(
    monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    name, flags = "Intel(R) Xeon(R) Processor", "fpu sse2 avx2"
    assert with_cpu(monkeypatch, model_name=name, flags=flags) == f"{name} avx2, 2 cores"
    assert unit in with_cpu(monkeypatch, model_name=name, flags=f"{flags} {unit}").split(",")[0].split()


def test_the_order_of_flags_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {with_cpu(monkeypatch, flags=flags) for flags in ("avx2 amx_int8 avx512f", "amx_int8 avx512f avx2")}
    assert len(names) == 1


def test_arm_has_units_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "asimd bf16, 2 cores" in with_cpu(monkeypatch, Features="fp asimd bf16")


def test_a_system_that_tells_nothing_still_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_cpu(monkeypatch).endswith(" generic, 2 cores")


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        pytest.param("0::/\n", {"cpu.max": "150000 100000\n"}, 2, id="a container"),
        pytest.param(
            "0::/pod/one\n", {"pod/cpu.max": "300000 100000", "pod/one/cpu.max": "max 100000"}, 3, id="above"
        ),
        pytest.param("0::/not/seen\n", {"cpu.max": "100000 100000"}, 1, id="another namespace"),
        pytest.param(
            "4:memory:/\n1:cpu,cpuacct:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            4,
            id="v1",
        ),
        pytest.param(
            "1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, id="v1, no limit"
        ),
        pytest.param("0::/\n", {"cpu.max": "9900000 100000"}, 8, id="a limit above what there is"),
        pytest.param("0::/\n", {"cpu.max": "nonsense"}, 8, id="unreadable"),
        pytest.param("", {}, 8, id="no groups"),
    ],
)
def test_threads_are_no_more_than_a_cpu_limit_pays_for(
    groups: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_seen", lambda: 8)
    assert machine.cores() == cores
    assert machine.limited_threads() == (cores if cores < 8 else 0)

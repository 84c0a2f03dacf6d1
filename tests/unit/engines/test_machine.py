"""What a machine is called: as different as the kernels that engines choose on it."""

from __future__ import annotations

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

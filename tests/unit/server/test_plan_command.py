"""``python -m server plan``: what it prints, and the one sentence for what it cannot plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from server.cli import app
from tests.support.planned import bench_file


def plan(bundle: Path, cost: Path, *args: str, **given: str) -> Result:
    flags = {"--rate": "100", "--p99": "0.2", "--requests": "1000", "--file-ms": "1", "--rungs": "1,2,4", **given}
    words = ["plan", "--bundle", str(bundle), "--cost", str(cost), *(w for pair in flags.items() for w in pair)]
    return CliRunner().invoke(app, [*words, *args], env={"COLUMNS": "200"})


def parsed(ended: Result) -> dict[str, Any]:
    assert ended.exit_code == 0, ended.output
    return dict(json.loads(ended.stdout.splitlines()[-1]))


@pytest.fixture
def cost(toy_bundle: Path, tmp_path: Path) -> Path:
    return bench_file(toy_bundle, tmp_path)


def test_it_answers_in_a_table_a_sentence_and_a_line_of_json(toy_bundle: Path, cost: Path) -> None:
    ended = plan(toy_bundle, cost)
    made = parsed(ended)
    assert f"{made['workers']} workers keep a p99 of 0.2 s." in ended.stdout
    assert "Left out: the network" in ended.stdout
    assert made["models"]["toy-digits"]["engine"] == "fake 1 float32"
    assert next(each["workers"] for each in made["forecasts"] if each["kept"]) == made["workers"]
    assert (made["rate"], made["images_per_s"], made["p99_s"], made["requests"]) == (100, 100, 0.2, 1000)


def test_the_same_question_has_the_same_answer_and_another_seed_another(toy_bundle: Path, cost: Path) -> None:
    first, again, other = (
        parsed(plan(toy_bundle, cost, **{"--seed": seed}))["forecasts"] for seed in ("1", "1", "2")
    )
    assert first == again != other


def test_a_mix_is_drawn(toy_bundle: Path, cost: Path) -> None:
    made = parsed(
        plan(
            toy_bundle,
            cost,
            "--task",
            "text_to_image=8,edit=2",
            "--steps",
            "4=3,8",
            "-n",
            "1=9,4=1",
            "--workers",
            "3",
        )
    )
    assert made["tasks"] == {"text_to_image": 8, "edit": 2}
    assert made["steps"] == {"4": 3, "8": 1}
    assert made["images_per_s"] == pytest.approx(100 * 1.3)
    assert [each["workers"] for each in made["forecasts"]] == [3]


def test_settings_of_the_server_bear_on_it(toy_bundle: Path, cost: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_MAX_ROWS", "10")
    made = parsed(plan(toy_bundle, cost, "--workers", "1", "--max-queue-s", "0.05"))
    assert made["max_rows"] == 10
    assert made["forecasts"][0]["refused"] > 0
    assert made["workers"] is None


def test_it_plans_for_the_rungs_of_the_workers(toy_bundle: Path, cost: Path) -> None:
    few, most = (parsed(plan(toy_bundle, cost, **{"--rungs": rungs})) for rungs in ("1,2", "1,2,4"))
    assert few["models"]["toy-digits"]["rungs"] == [1, 2]
    assert few["workers"] > most["workers"]


WRONG = [
    ({"--rate": "0"}, "--rate must be above 0"),
    ({"--p99": "nan"}, "--p99 must be above 0"),
    ({"--p99": "0.001"}, "even alone"),
    ({"--rungs": "1,2,8"}, "has no costs of 8 rows: bench with --rungs 1,2,8, or give this plan and the workers"),
    ({"--task": "paint"}, "--task 'paint' is no list"),
    ({"--steps": "4=0"}, "--steps '4=0' is no list"),
    ({"--steps": "4,4"}, "--steps '4,4' is no list"),
    ({"--steps": "3"}, "steps must be one this model was distilled for"),
    ({"--size": "wide"}, "--size 'wide' is no list"),
    ({"--size": "96x64"}, "has no size 96x64; it has 64x64"),
    ({"-n": "11"}, "-n '11' is no list"),
    ({"--strength": "2"}, "--strength must be above 0 and at most 1"),
    ({"--task": "invert"}, "needs a model with an encoder"),
    ({"--max-queue-s": "0"}, "max_queue_s (HALFSTEP_MAX_QUEUE_S) is wrong"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_cannot_be_planned_is_one_sentence(
    toy_bundle: Path, cost: Path, given: dict[str, str], message: str
) -> None:
    ended = plan(toy_bundle, cost, **given)
    assert ended.exit_code == 1
    assert message in ended.output
    assert ended.output.strip().count("\n") == 0


def test_costs_of_another_model_or_no_bench_are_refused(toy_bundle: Path, poison_bundle: Path, cost: Path) -> None:
    assert "No --cost file is of the model toy-poison; there is toy-digits." in plan(poison_bundle, cost).output
    cost.write_text("{}", encoding="utf-8")
    assert "is not what python -m engines bench prints" in plan(toy_bundle, cost).output
    assert "cannot be read" in plan(toy_bundle, cost.with_name("missing")).output


def test_without_a_file_this_machine_is_measured_once_and_then_remembered(toy_bundle: Path, tmp_path: Path) -> None:
    words = ["plan", "--bundle", str(toy_bundle), "--rate", "1", "--p99", "100", "--requests", "100"]
    words += ["--cache-dir", str(tmp_path), "--backend", "onnxruntime", "--rungs", "1,2"]
    sources = [
        parsed(CliRunner().invoke(app, words, env={"COLUMNS": "200"}))["models"]["toy-digits"]["costs"]
        for _ in range(2)
    ]
    assert sources == ["measured now", f"kept in {tmp_path}"]

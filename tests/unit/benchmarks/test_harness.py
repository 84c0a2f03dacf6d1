"""The benchmarks run, print a JSON line that parses, and their page holds what they found. No figure is judged."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch

from engines.bundle import Bundle
from engines.open import open_pipeline
from tests.benchmarks import http_overhead, streams, throughput
from tests.benchmarks.contenders import (
    EAGER,
    EAGER_BF16,
    OPENVINO,
    OPENVINO_BF16,
    OPENVINO_INT8,
    ORT,
    PIPELINE,
    PIPELINE_BF16,
    TORCH,
)
from tests.benchmarks.page import page
from tests.benchmarks.random_bundle import TINY_UNET, RandomOptions, make_random_bundle, random_student
from tests.benchmarks.results import Overhead, Provenance, Ratio, Results, Row, Throughput

OPTIONS = RandomOptions(steps=(throughput.STEPS,), unet=TINY_UNET)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_random_bundle(tmp_path_factory.mktemp("bundle") / "random", OPTIONS)


@pytest.fixture(scope="module")
def measured(bundle: Bundle) -> Throughput:
    printed, threads = io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network only waits for its threads
    with contextlib.redirect_stdout(printed):
        throughput.report(throughput.measure(bundle, bundle, OPTIONS, (1, 3), rounds=1))
    torch.set_num_threads(threads)
    return Throughput.model_validate_json(printed.getvalue().splitlines()[-1])


@pytest.fixture
def result() -> Throughput:
    """As if measured, every contender as fast as every other."""
    everyone = (PIPELINE, EAGER, TORCH, ORT, OPENVINO, PIPELINE_BF16, EAGER_BF16, OPENVINO_BF16, OPENVINO_INT8)
    return Throughput(
        provenance=Provenance(machine="", versions={}, seed=0, command="go", date="", others_cpu=0.0),
        parameters=1,
        latent=(1, 8, 8),
        steps=4,
        rounds=1,
        rows=tuple(row(name, batch, 9.0) for name in everyone for batch in (1, 3)),
        ratios=tuple(
            Ratio(contender=name, over=over, batch=batch, ratio=1.0)
            for batch in (1, 3)
            for name, over in throughput.RATIOS
        ),
    )


def row(contender: str, batch: int, images_per_s: float) -> Row:
    return Row(
        contender=contender,
        batch=batch,
        ms_per_step=1.0,
        fastest_ms=1.0,
        slowest_ms=1.0,
        images_per_s=images_per_s,
        max_abs_difference=0.0,
    )


def overhead(origin: Provenance, name: str = "digits", overhead_ms: float = 4.0) -> Overhead:
    return Overhead(
        provenance=origin,
        bundle=name,
        engine="an engine",
        rounds=1,
        bare_p50_ms=40.0,
        http_p50_ms=50.0,
        http_apart_p50_ms=48.0,
        overhead_p50_ms=overhead_ms,
        raw_images_per_s=100.0,
        http_images_per_s=90.0,
        http_over_raw=0.9,
        http_over_raw_apart=0.95,
        raw_cpu_over_server_cpu=0.97,
    )


@pytest.mark.long
def test_every_contender_samples_the_same_student(measured: Throughput) -> None:
    exactly, roughly = (
        {PIPELINE, EAGER, TORCH, ORT, OPENVINO},
        {PIPELINE_BF16, EAGER_BF16, OPENVINO_BF16, OPENVINO_INT8},
    )
    assert set(measured.contenders()) == exactly | roughly
    assert measured.batches() == (1, 3)
    exact = [row for row in measured.rows if row.contender in exactly]
    assert max(row.max_abs_difference for row in exact) < 1e-3
    assert max(row.max_abs_difference for row in measured.rows) < 0.5


@pytest.mark.long
def test_streams_share_a_batch_and_the_page_has_each_setting(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "SETTINGS", ((1, 1), (2, 2)))
    found = streams.measure((bundle,), (2,), rounds=1, seed=0)
    assert [(s.streams, s.threads, s.batch) for s in found.settings] == [(1, 1, 2), (2, 2, 2)]
    written = page(Results(streams=found))
    assert "| float32, 1 stream, 1 thread |" in written
    assert "| float32, 2 streams, 2 threads |" in written
    assert "First run at batch 2, float32:" in written


def test_the_page_says_what_was_met_missed_and_not_measured(result: Throughput) -> None:
    origin = result.provenance
    written = page(Results(throughput=result, random=overhead(origin, "random"), digits=overhead(origin)))
    assert "| p50 through HTTP, alone, over the bare chain, client apart | ≤ 1.15 | 1.20 | **missed** |" in written
    assert "| digits: p50 overhead of HTTP over the bare chain, alone | ≤ 5 ms | 4.00 ms | met |" in written
    assert "random_bundle runs/benchmarks/random && " in written
    assert all(name in written for name in result.contenders())
    assert "Not measured: streams, goodput, goodput_separate." in written


def test_a_busy_machine_is_named(result: Throughput) -> None:
    busy = result.provenance.model_copy(update={"others_cpu": 0.5})
    written = page(Results(throughput=result, random=overhead(busy)))
    assert written.count("Not a quiet machine") == 1
    assert "| p50 through HTTP, alone, over the bare chain, client apart | ≤ 1.15 | 1.20 | not judged |" in written
    assert "each at its best batch | ≥ 2 |" in written.split("not judged", 1)[0]


def test_the_client_is_counted_apart() -> None:
    wall_s, client_s = 10.0, 2.0
    images = http_overhead.CONCURRENT * 4
    rate = http_overhead.without_client(images / wall_s, client_s)
    assert rate == pytest.approx(images / (wall_s - client_s / http_overhead.cores()))


@pytest.mark.long
def test_a_random_bundle_draws_and_is_drawn_from_its_seed(bundle: Bundle) -> None:
    weights, again = (random_student(OPTIONS, throughput.STEPS).state_dict() for _ in range(2))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert weights["time_embedding.cond_proj.weight"].abs().min() > 0
    pipeline = open_pipeline(bundle.path, rungs=(1, 2), warm=False)
    images = pipeline.generate(["a three", "3"], 2.0, [1, 1])
    assert images.shape == (2, 32, 32, 3)
    assert (images[0] == images[1]).all()


def test_best_is_the_row_of_most_images_per_second() -> None:
    rows = [row(EAGER, batch, rate) for batch, rate in ((1, 5.0), (2, 9.0), (4, 8.0))]
    origin = Provenance(machine="", versions={}, seed=0, command="", date="", others_cpu=0.0)
    found = Throughput(
        provenance=origin, parameters=1, latent=(1, 8, 8), steps=4, rounds=1, rows=tuple(rows), ratios=()
    )
    assert found.best(EAGER).batch == 2

"""What the command line prints: tables of costs, throughput and differences."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from engines.bench import BenchResult
from engines.compare import Difference
from engines.cost import CostTable
from engines.manifest import BundleManifest


def cost_table(engine: str, costs: CostTable) -> Table:
    """Milliseconds of a call, graphs and sizes down, batch sizes across."""
    rungs = list(next(iter(costs.ms.values())))
    table = Table(title=f"{engine}: ms per call, median, by batch size")
    table.add_column("graph")
    for rung in rungs:
        table.add_column(str(rung), justify="right")
    for call, row in costs.ms.items():
        table.add_row(call, *(f"{row[rung]:.3g}" for rung in rungs))
    return table


def fraction_table(result: BenchResult) -> Table:
    """Per cent of the measured matrix product that calls reach, of the graphs with any arithmetic."""
    table = Table(
        title=f"% of {result.ceiling_gflop_s:.0f} GFLOP/s, the same engine's matrix product, by batch size"
    )
    table.add_column("graph")
    table.add_column("GFLOP a row", justify="right")
    for rung in next(iter(result.ms.values())):
        table.add_column(str(rung), justify="right")
    for call, row in result.fraction.items():
        if flop := result.flop[call]:
            table.add_row(call, f"{1e-9 * flop:.3g}", *(f"{100 * reached:.3g}" for reached in row.values()))
    return table


def throughput_table(result: BenchResult) -> Table:
    """Images per second of each student at its best batch size."""
    memory = f"{result.host_memory_mb:.0f} MB resident"
    if result.device_memory_mb is not None:
        memory += f", {result.device_memory_mb:.0f} MB of the GPU's"
    table = Table(title=f"condition, steps and decode; {memory}")
    for heading in ("size", "steps", "sampler", "batch", "images/s"):
        table.add_column(heading, justify="right")
    for row in result.throughput:
        table.add_row(row.size, str(row.steps), row.sampler, str(row.batch), f"{row.images_per_s:.3g}")
    whole = result.generate
    steps = f"{whole.steps}, timed whole"
    table.add_row(whole.size, steps, whole.sampler, str(whole.batch), f"{whole.images_per_s:.3g}")
    return table


def difference_table(differences: Sequence[Difference], tolerance: float) -> Table:
    """One line per graph and engine; the last column is the verdict."""
    table = Table(title=f"against ONNX Runtime float32, tolerance {tolerance:g}")
    for heading in ("graph", "engine", "max error", "mean error", "rows bit-equal", "within"):
        table.add_column(heading)
    for d in differences:
        rows = "yes" if d.rows_equal else f"NO: {d.row_error:.2g}"
        verdicts = (rows, "yes" if d.within(tolerance) else "NO")
        table.add_row(d.call, d.engine, f"{d.max_abs_error:.2g}", f"{d.mean_abs_error:.2g}", *verdicts)
    return table


def parity_table(manifest: BundleManifest) -> Table:
    """How far each int8 graph is from what it was made from."""
    table = Table(title=f"{manifest.name}: int8 against the float32 graph, on calls kept from calibration")
    for heading in ("graph", "max error", "mean error", "rows"):
        table.add_column(heading, justify="right")
    for name, spec in manifest.graphs.items():
        if spec.dtype == "int8":
            of = spec.parity
            table.add_row(name, f"{of.max_abs_error:.2g}", f"{of.mean_abs_error:.2g}", str(of.rows))
    return table

"""Bits of weights against answers: shared values and integer grids, plain and packed.

For 8 to 2 bits a weight, ``codebook`` and ``quantize:activations=none`` (which has
grids of 8, 4 and 2 bits) are applied to a model without any training: bytes of the
plain file and of the package, CPU seconds of the pass, and how often the top class is
that of fp32 (with a 95 % interval), or the mean cosine of an output of vectors. Data
are given as on the command line; the first samples calibrate, all others measure.

    python tools/bench levels --model m.onnx --data 'd.npz:x=images/255' --plot out.svg
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from onnxshrink import Model, runtime
from onnxshrink.base import Memory
from onnxshrink.engine import make_context
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples, Splits

BATCH = 32
GRIDS = {8: "int8", 4: "int4", 2: "int2"}
COLOURS = {"codebook": "#1f5fa8", "grid": "#c2571a"}


@dataclass(frozen=True)
class Row:
    """One form of a model.

    Attributes:
        method: ``codebook`` or ``grid``.
        what: Bits, or the pipeline.
        plain: Bytes of the file.
        package: Bytes of the package.
        score: Agreement of the top class, or mean cosine.
        low: Lower end of its 95 % interval; NaN where there is none.
        high: Upper end.
        seconds: CPU seconds of the passes.
    """

    method: str
    what: str
    plain: int
    package: int
    score: float
    low: float
    high: float
    seconds: float


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and draw."""
    parser = argparse.ArgumentParser(prog="levels", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", help="output to compare; by default the first")
    parser.add_argument("--cosine", action="store_true", help="it is vectors")
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 6, 5, 4, 3, 2])
    parser.add_argument("--more", nargs="*", default=[], help="other pipelines")
    parser.add_argument("--codebook", default="", help="options of codebook")
    parser.add_argument("--grid", default="", help="options of quantize")
    parser.add_argument("--grids", type=int, nargs="*", default=list(GRIDS))
    parser.add_argument("--calibrate", type=int, default=128, help="samples; 0: none")
    parser.add_argument("--measure", type=int, default=2000, help="samples at most")
    parser.add_argument("--rows", type=Path, help="JSON lines to add rows to")
    parser.add_argument("--plot", type=Path, help="SVG to write")
    options = parser.parse_args(arguments)
    model = Model.load(options.model)
    samples = Samples.from_path(options.data).bind(model.inputs)
    many = min(len(samples), options.calibrate + options.measure)
    held = samples.take(slice(options.calibrate, many))
    splits = Splits(calibration=samples.take(slice(0, options.calibrate)))
    if not options.calibrate:
        splits = Splits.build(model, None)
    name = options.output or model.outputs[0].name
    wanted = _answers(model, held, name)
    folded = model.copy()
    memory = Memory()
    _apply(folded, "fold", splits, model, memory)
    size = options.model.stat().st_size
    table = Table(
        "form", "plain", "package", "cosine" if options.cosine else "agrees", "time"
    )
    rows = []
    for method, what, text in _forms(options):
        made = folded.copy()
        began = time.process_time()
        _apply(made, text, splits, model, memory)
        spent = time.process_time() - began
        found = _answers(made, held, name)
        score, low, high = _score(wanted, found, options.cosine)
        plain, package = _sizes(made)
        row = Row(method, what, plain, package, score, low, high, spent)
        rows.append(row)
        if options.rows:
            with options.rows.open("a") as file:
                line = {"model": options.model.stem, "before": size, **asdict(row)}
                file.write(json.dumps(line) + "\n")
        span = "" if math.isnan(low) else f" ({low:.1%} to {high:.1%})"
        table.add_row(
            f"{method} {what}",
            f"{plain:,} B, {size / plain:.1f}x",
            f"{package:,} B, {size / package:.1f}x",
            (f"{score:.4f}" if options.cosine else f"{score:.1%}") + span,
            f"{spent:.1f} s",
        )
        print(*(f"{method} {what}", plain, package, f"{score:.4f}"), flush=True)
    title = f"{options.model.stem}: {size:,} bytes, {len(held):,} samples"
    Console(width=110).print(title, table)
    if options.plot:
        options.plot.write_text(draw(title, size, rows, cosine=options.cosine))


def _forms(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    more = f",{options.codebook}" if options.codebook else ""
    found = [
        ("codebook", f"{bits} bits", f"codebook:bits={bits}{more}")
        for bits in options.bits
    ]
    more = f",{options.grid}" if options.grid else ""
    found += [
        (
            "grid",
            f"{bits} bits",
            f"quantize:activations=none,weights={GRIDS[bits]}{more}",
        )
        for bits in options.grids
    ]
    return [*found, *(("codebook", text, text) for text in options.more)]


def _apply(
    model: Model, text: str, splits: Splits, reference: Model, memory: Memory
) -> None:
    for one in Pipeline.parse(text).passes:
        model.require_opset(one.opset)
        ctx = make_context(splits, reference, threads=1, memory=memory)
        one.apply(model, ctx)


def _answers(model: Model, samples: Samples, name: str) -> np.ndarray:
    session = runtime.session(model, threads=1)
    parts = [
        session.run(batch, [name])[name].astype(np.float64)
        for batch in samples.batches(BATCH)
    ]
    return np.concatenate([part.reshape(len(part), -1) for part in parts])


def _score(
    wanted: np.ndarray, found: np.ndarray, cosine: bool
) -> tuple[float, float, float]:
    if cosine:
        lengths = np.linalg.norm(wanted, axis=1) * np.linalg.norm(found, axis=1)
        return (
            float(((wanted * found).sum(axis=1) / lengths).mean()),
            math.nan,
            math.nan,
        )
    same = wanted.argmax(axis=1) == found.argmax(axis=1)
    return float(same.mean()), *wilson(int(same.sum()), len(same))


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    half *= z / (1 + z * z / count)
    return middle - half, middle + half


def _sizes(model: Model) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for name in ("m.onnx", "m.onnxz"):
            model.save(Path(folder) / name)
            sizes.append((Path(folder) / name).stat().st_size)
    return sizes[0], sizes[1]


def draw(title: str, size: int, rows: Sequence[Row], *, cosine: bool) -> str:
    """Return an SVG: score over share of bytes; packages are dashed."""
    left, top, width, height = 60, 30, 520, 300
    shares = [getattr(r, kind) / size for r in rows for kind in ("plain", "package")]
    low, high = math.log2(min(shares)) - 0.1, math.log2(max(shares)) + 0.1
    least = math.floor(10 * max(0.0, min(row.score for row in rows))) / 10
    least = min(least, 0.9)

    def x(share: float) -> float:
        return left + width * (math.log2(share) - low) / (high - low)

    def y(score: float) -> float:
        return top + height * (1 - (max(score, least) - least) / (1 - least))

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 400" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="600" height="400" fill="#ffffff"/>',
        f'<text x="{left}" y="18">{title}</text>',
    ]
    for step in range(6):
        score = least + (1 - least) * step / 5
        parts.append(
            f'<path d="M{left} {y(score):.1f}h{width}" stroke="#dddddd"/>'
            f'<text x="{left - 6}" y="{y(score) + 4:.1f}" text-anchor="end">'
            f"{score:.2f}</text>"
        )
    for power in range(math.ceil(low), math.floor(high) + 1):
        parts.append(
            f'<path d="M{x(2.0**power):.1f} {top}v{height}" stroke="#dddddd"/>'
            f'<text x="{x(2.0**power):.1f}" y="{top + height + 16}" '
            f'text-anchor="middle">1/{2**-power}</text>'
        )
    legend = 0
    for method, colour in COLOURS.items():
        mine = sorted(
            (r for r in rows if r.method == method and r.what.endswith("bits")),
            key=lambda row: row.plain,
        )
        for kind in ("plain", "package") if mine else ():
            dash = "" if kind == "plain" else ' stroke-dasharray="5 4"'
            points = [(x(getattr(r, kind) / size), y(r.score)) for r in mine]
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}"{dash}/>'
            )
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>'
                for a, b in points
            ]
            at = left + 10 + 130 * legend
            parts.append(
                f'<path d="M{at} {top + height + 40}h24" stroke="{colour}"{dash}/>'
                f'<text x="{at + 30}" y="{top + height + 44}">{method}, {kind}</text>'
            )
            legend += 1
    what = "cosine" if cosine else "same top class"
    parts.append(
        f'<text x="{left + width}" y="{top + height + 62}" text-anchor="end">'
        f"{what}, over the share of fp32's bytes</text></svg>"
    )
    return "\n".join(parts) + "\n"

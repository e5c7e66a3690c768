"""The table of a validation."""

from __future__ import annotations

import math

import rich.console
import rich.table
import rich.text

from onnxcompress.validation.agreement import OutputAgreement
from onnxcompress.validation.placement import ProviderRow
from onnxcompress.validation.result import Result
from onnxcompress.validation.verdict import Verdict, percent

_STYLE = {Verdict.PASS: "bold green", Verdict.FAIL: "bold red", Verdict.INCONCLUSIVE: "bold yellow"}


def show(result: Result, console: rich.console.Console) -> None:
    """Print `result`: figures, outputs, then the verdict, which comes last so that it is what one sees."""
    table = rich.table.Table(box=None, pad_edge=False, show_edge=False)
    for heading in ("", "original", "compressed", ""):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    size = result.size
    table.add_row("size", _bytes(size.original), _bytes(size.compressed), f"{size.ratio:.3f} x")
    if result.score is not None:
        score = result.score
        note = f"{'rise' if score.relative else 'drop'} {_share(score.drop, score.relative)}"
        if score.bound is not None:
            note += f", at most {_share(score.bound, score.relative)} ({percent(score.confidence)})"
        table.add_row(score.metric, f"{score.original:.5g}", f"{score.compressed:.5g}", note)
    if result.latency is not None:
        timing = result.latency
        note = f"{timing.ratio:.2f} x as fast"
        if timing.ratio_low is not None:
            note += f" ({timing.ratio_low:.2f} to {timing.ratio_high:.2f})"
        note += f", batch {timing.batch}, {timing.threads} thread{'s' if timing.threads > 1 else ''}"
        table.add_row("latency", _seconds(timing.original_p50), _seconds(timing.compressed_p50), note)
    if result.footprints is not None:
        first, second = result.footprints
        table.add_row("load", _seconds(first.load), _seconds(second.load), "in a new process")
        if first.peak is not None and second.peak is not None:
            table.add_row("memory", _bytes(first.peak), _bytes(second.peak), "its own, at most")
    for output in result.agreement:
        table.add_row(rich.text.Text(f"output {output.name}"), "", "", rich.text.Text(agreement_text(output)))
    for row in result.providers:
        table.add_row(f"provider {row.provider}", "", "", rich.text.Text(provider_text(row)))
    console.print(table)
    for reason in result.reasons:
        console.print(rich.text.Text(f"  {reason}"))
    console.print(rich.text.Text(result.verdict.value, style=_STYLE[result.verdict]))


def provider_text(row: ProviderRow) -> str:
    """One provider in one line: what ran where, what was left, how near, how good, how fast."""
    if not row.ran:
        return "did not run (the reason is below)"
    shares = row.macs or {}
    parts = [
        f"{name}: {count} nodes" + (f", {shares[name]:.1%} of MACs" if name in shares else "")
        for name, count in row.nodes.items()
    ]
    said = [f"ran ({'; '.join(parts)})" if parts else "ran"]
    said += [f"not taken: {'; '.join(map(str, row.fell_back[:3]))}"] if row.fell_back else []
    if row.score is not None:
        said.append(f"{row.score.metric} {row.score.compressed:.5g}")
    if row.latency_p50 is not None:
        said.append(f"{_seconds(row.latency_p50)} a call of {row.batch}")
    if row.memory is not None:
        said.append(f"{_bytes(row.memory)} of memory")
    if row.device_memory is not None:
        said.append(f"{_bytes(row.device_memory)} of device memory")
    return "; ".join([*said, *(f"{output.name}: {agreement_text(output)}" for output in row.agreement)])


def agreement_text(output: OutputAgreement) -> str:
    """One output in one line."""
    if output.mismatched:
        return f"does not fit: {output.mismatch}"
    if output.bit_equal:
        return f"equal bit for bit ({output.elements:,} values)"
    if output.elements and output.elements == output.nonfinite_original:
        return f"nothing to compare: all {output.elements:,} values of the original are NaN or Inf"
    if output.cosine is None:
        return f"{output.equal:.2%} of {output.elements:,} values equal"
    parts = [f"cosine {_near_one(output.cosine)}"]
    if output.sqnr_db is not None and math.isfinite(output.sqnr_db):
        parts.append(f"SQNR {output.sqnr_db:.1f} dB")
    if output.max_abs is not None:
        parts.append(f"max abs {output.max_abs:.3g}")
    if output.mean_relative is not None:
        parts.append(f"mean rel {output.mean_relative:.2g}")
    if output.kind != "float":
        parts.append(f"{output.equal:.2%} equal")
    if output.top1 is not None:
        parts.append(f"top-1 {output.top1:.2%}")
    if output.top5 is not None:
        parts.append(f"top-5 {output.top5:.2%}")
    if output.kl is not None:
        parts.append(f"KL {output.kl:.2g}")
    if output.nonfinite_compressed:
        parts.append(f"NaN/Inf {output.nonfinite_compressed:,}")
    if output.worst:
        parts.append(f"worst at {output.worst[0].index}")
    return ", ".join(parts)


def _near_one(value: float) -> str:
    return "1" if value == 1 else f"{value:.6f}" if value < 0.999999 else f"1 - {1 - value:.1e}"


def _share(value: float, relative: bool) -> str:
    return f"{value:.2%}" if relative else f"{value:.4g}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _bytes(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"

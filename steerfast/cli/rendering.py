"""Tables for a terminal: profiles, demonstrations, evaluations, timings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table

from steerfast.evaluation.description import edit, gate_figures, layer_ranges, layers, positions, reading, thresholds

if TYPE_CHECKING:
    from rich.console import Console

    from steerfast.evaluation.report import ReportTable
    from steerfast.profile import SteeringProfile

_SENSORS = 6  # layers shown
_RATES = {"hit_rate": "hit", "false_positive_rate": "FPR"}
_WORDS = {"", "sets", "gate", "system", "fired", "op", "implementation", "rows", "self-test"}  # others hold numbers


def new_table(*columns: str, no_wrap: bool = False, **options: Any) -> Table:
    """Return an empty table; columns of numbers are justified right."""
    table = Table(title_justify="left", **options)
    for column in columns:
        table.add_column(column, justify="left" if column in _WORDS else "right", no_wrap=no_wrap and bool(column))
    return table


def _range(figure: Sequence[float], form: str) -> str:
    value, low, high = (format(number, form) for number in figure)
    return f"{value} ({low}-{high})"


def header(profile: SteeringProfile) -> Table:
    """Return a table of the profile's parts and provenance, a line each."""
    model, gate = profile.model, profile.gate
    shape = "hard" if gate.sharpness == 0 else f"soft (sharpness {gate.sharpness:g})"
    steered, also = layer_ranges(profile.steered_layers), ", ".join(sorted(profile.candidates))
    sensor = "each steered layer" if profile.sensor == "own" else f"layer {profile.sensor}"
    if "frontier" in profile.fitted:
        stages = {"strength": _strength(profile.fitted["frontier"])}
    else:
        stages = {"calibrated": _calibrated(profile.calibration), "tuned": _tuned(profile.tuned)}
    lines = {
        "model": f"{model.name} ({model.architecture}, {model.num_layers} layers of {model.hidden_size})",
        "gate": "always open" if gate.kind == "always" else f"{gate.kind}, {reading(gate)}, {shape}",
        **({"sensor": sensor} if profile.deciding_layers else {}),
        **({"thresholds": thresholds(profile)} if profile.points else {}),
        "edit": f"{edit(profile)}, layers {steered}, {positions(profile)}",
        "vector": profile.vector_kind + (f" (also {also})" if also else ""),
        "fitted": _fitted(profile.fitted),
        **({"learned": _learned(profile.fitted["learned"])} if "learned" in profile.fitted else {}),
        **stages,
    }
    table = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        table.add_row(f"[bold]{name}", escape(" ".join(text.split())))  # a name may hold line breaks
    for accepted in profile.fitted.get("accepted", ()):
        table.add_row("[bold yellow]accepted", escape(" ".join(accepted["mismatch"].split())))
    for warning in profile.calibration.get("warnings", ()):
        table.add_row("[bold yellow]warning", escape(" ".join(warning.split())))
    return table


def layer_table(profile: SteeringProfile) -> Table:
    """Return figures and threshold of every layer where a gate decides, and its edit; fits 80 columns."""
    gated, measured = bool(profile.deciding_layers), bool(gate_figures(profile))
    words = ["AUC", *(f"{word} %" for word in _RATES.values())] if measured else []
    gates = ["gate", *words, "thresh-\nold"] if gated else words
    ends = ("strength", "|v|", "row\nnorm")
    table = new_table("layer", *gates, *ends, box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    for layer in layers(profile):
        cells = [str(layer["layer"])]
        if gated:
            cells.append("sensor" if layer["sensor"] else "own" if layer["gate"] else "")
        if measured:
            figures = layer["calibration"]
            cells += [f"{figures['auc'][0]:.3f}", *(f"{100 * figures[key][0]:.1f}" for key in _RATES)]
        if gated:
            cells.append(f"{layer['threshold']:.4f}")
        cells.append(f"{layer['strength']:g}" if layer["strength"] else "")
        cells += [f"{layer[key]:.3g}" if layer[key] else "" for key in ("vector_norm", "residual_norm")]
        table.add_row(*cells, style="bold" if layer["sensor"] or layer["strength"] else "")
    return table


def gate_table(profile: SteeringProfile) -> Table:
    """Return the calibration's figures of the deciding gates, with 95 % intervals."""
    columns = ("layer", "sets", "prompts", "AUC", "hit rate", "false positives", "threshold")
    table = new_table(*columns, title="gates that decide, with 95 % intervals")
    for layer in profile.deciding_layers:
        figures = gate_figures(profile)[layer]
        table.add_row(
            str(layer),
            "calibration",
            f"{figures['n_harmful']} + {figures['n_harmless']}",
            _range(figures["auc"], ".3f"),
            *(_range(figures[key], ".1%") for key in _RATES),
            f"{float(profile.threshold[layer]):.4f}",
        )
    return table


def undecided_table(profile: SteeringProfile) -> Table | None:
    """Return the abstain band of the deciding gates and the shares of the calibration in it; None without a band."""
    if profile.abstain is None or not profile.deciding_layers:
        return None
    found = gate_figures(profile)
    columns = ("layer", "above", "up to", "sets", "harmful", "harmless")
    table = new_table(*columns, title="scores that are undecided, with 95 % intervals")
    for layer in profile.deciding_layers:
        ends = [f"{float(tensor[layer]):.4f}" for tensor in (profile.abstain, profile.threshold)]
        shares = [found[layer].get(f"{label}_undecided") for label in ("harmful", "harmless")] if found else []
        cells = ["" if one is None else _range(one, ".1%") for one in shares]
        table.add_row(str(layer), *ends, "calibration" if found else "", *cells)
    return table


def calibration_tables(profile: SteeringProfile) -> Iterator[Table | None]:
    """Yield what a calibration found: the layers it compared, the deciding gates, and their figures by source."""
    if tried := profile.calibration.get("sensors"):
        table = new_table("", *(str(layer) for layer, _ in tried[:_SENSORS]), title="layers as a sensor, best first")
        table.add_row("quality", *(f"{quality:.4f}" for _, quality in tried[:_SENSORS]))
        yield table
    yield gate_table(profile)
    yield undecided_table(profile)
    yield from by_source_tables(profile)


def by_source_tables(profile: SteeringProfile) -> Iterator[Table]:
    """Yield the calibration's figures by source of each deciding layer."""
    from steerfast.evaluation.report import of_sources

    for layer, found in profile.calibration.get("by_source", {}).items():
        yield report_table(of_sources({"": found["rows"]}, f"layer {layer} on its calibration, by source"))


def frontier_table(profile: SteeringProfile) -> Table:
    """Return what a behaviour gains and the text loses at each strength."""
    found = profile.fitted["frontier"]
    title = f"{profile.fitted['behaviour']}: answers to {found['prompts']} prompts, {found['max_new_tokens']} tokens"
    table = new_table("strength", "shift", "perplexity", "repeated", "fluent", "", title=escape(title))
    low, high = found["range"] or (1.0, 0.0)
    for point in found["points"]:
        strength = point["strength"]
        mark = "recommended" if strength == found["strength"] else "in range" if low <= strength <= high else ""
        shares = (f"{point[name]:.0%}" for name in ("repetition", "fluent"))
        table.add_row(f"{strength:g}", f"{point['shift']:.2f}", f"{point['perplexity']:.1f}", *shares, mark)
    return table


def _strength(frontier: Mapping[str, Any]) -> str:
    if frontier["range"] is None:
        return str(frontier["problem"])
    return "{:g} in total, of {:g} to {:g}".format(frontier["strength"], *frontier["range"])


def _set(described: Mapping[str, Any] | None) -> str:
    described = described or {}
    return f"{described.get('count', '?')} of {described.get('name') or 'an unnamed set'}"


def _fitted(fitted: Mapping[str, Any]) -> str:
    if not fitted:
        return "no record"
    if "pairs" in fitted:
        read = "the mean of answers" if fitted["read"] == "answer" else "last rows"
        return f"{fitted['behaviour']} by {fitted['method']} of {_set(fitted['pairs'])}, {read}"
    sibling = f", aligned model {fitted['aligned_model']}" if fitted.get("aligned_model") else ""
    sets = f"harmful {_set(fitted.get('harmful'))}, harmless {_set(fitted.get('harmless'))}"
    return f"directions by {fitted.get('direction', '?')}{sibling}; {sets}"


def _learned(learned: Mapping[str, Any]) -> str:
    said = "a given refusal"
    if learned.get("aligned_model"):
        said = f"{learned.get('answers', '?')} answers by {learned['aligned_model']}"
    return f"layer {learned.get('layer', '?')}, {said}; harmful {_set(learned)}"


def _calibrated(calibration: Mapping[str, Any]) -> str:
    if not calibration:
        return "no"
    rate = calibration.get("max_false_positive_rate")
    how = "midpoint thresholds" if rate is None else f"at most {rate:.2%} false positives"
    if (abstains := calibration.get("abstain_rate")) is not None:
        how += f", {abstains:.2%} with the undecided"
    sets = (f"{name.replace('_', ' ')} {_set(data)}" for name, data in calibration.get("sets", {}).items())
    return f"{how}; {', '.join(sets)}"


def _tuned(tuned: Mapping[str, Any]) -> str:
    if not tuned or "problem" in tuned:
        return tuned.get("problem", "no")
    shares = {
        "refused": "refusal",
        "refused strictly": "refusal_strict",
        "fluent": "fluent",
        "harmless unchanged": "harmless_unchanged",
    }
    found = [f"{tuned[key]:.1%} {name}" for name, key in shares.items() if key in tuned]
    return ", ".join(found) + f"; {tuned.get('tried', '?')} settings tried"


# -- demo, bench, eval -------------------------------------------------------------------------------


def demo_report(result: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what a terminal shows of a result of `steerfast.evaluation.demo.run_demo`."""
    harmful, harmless, gate, latency = (result[key] for key in ("harmful", "harmless", "gate", "latency"))
    for example in result["examples"]:
        pair = Table.grid(Column(ratio=1), Column(ratio=1), expand=True, padding=(0, 2))
        pair.add_row("[bold]unsteered", "[bold]steered")
        pair.add_row(escape(example["unsteered"]), escape(example["steered"]))
        title = f"{example['label']}: {escape(' '.join(example['prompt'].split())[:90])}"
        yield Panel(pair, title=title, title_align="left")
    title = f"{result['model']}, greedy, {result['max_new_tokens']} tokens"
    table = new_table("", "unsteered", "steered", title=title)
    percent, figure = "{:.1%}".format, "{:.3f}".format
    rows: tuple[tuple[str, Any, Any, Any], ...] = (
        (f"[bold]{harmful['n']} harmful prompts", None, None, None),
        ("  refused, by keywords", harmful["refusal_unsteered"], harmful["refusal_steered"], percent),
        ("  refused, strictly", harmful["refusal_unsteered_strict"], harmful["refusal_steered_strict"], percent),
        ("  fluent", harmful["fluent_unsteered"], harmful["fluent_steered"], percent),
        (f"[bold]{harmless['n']} harmless prompts", None, None, None),
        ("  refused, by keywords", harmless["refusal_unsteered"], harmless["refusal_steered"], percent),
        ("  answer unchanged, token for token", None, harmless["unchanged"], percent),
        ("[bold]gate", None, None, None),
        ("  AUC", None, gate["auc"], figure),
        ("  opens for harmful", None, gate["hit_rate"], percent),
        ("  opens for harmless", None, gate["false_positive_rate"], percent),
        ("[bold]latency, one sequence", None, None, None),
        ("  ms per token", latency["unsteered_ms_per_token"], latency["steered_ms_per_token"], "{:.1f}".format),
        (f"  ratio, median of {latency['pairs']} alternating pairs", None, latency["ratio"], figure),
    )
    for name, before, after, write in rows:
        table.add_row(name, *("" if value is None else write(value) for value in (before, after)))
    yield table


def latency_report(result: Mapping[str, Any], console: Console) -> None:
    """Print a result of `steerfast.evaluation.latency.run_latency`."""
    for _, case in itertools.groupby(result["results"], key=lambda r: (r["batch"], r["prompt"])):
        console.print(latency_table(list(case)))
    console.print(
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, torch {result['torch']}, transformers "
        f"{result['transformers']}. Ratios to stock are medians over rounds; control is a second stock model.",
        markup=False,
    )
    for name, reason in result["left_out"].items():
        console.print(f"{name} left out: {reason}", markup=False)


def latency_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the systems of one batch size and prompt length."""
    first = lines[0]
    floor = "" if first["floor_ms"] is None else f"; no step below {first['floor_ms']:.3g} ms"
    title = escape(f"{first['model']}, {first['mode']}, batch {first['batch']}, prompt {first['prompt']}{floor}")
    columns = ("first token, ms", "ratio", "token, ms", "p99", "ratio", "tokens/s")
    table = new_table("system", *columns, title=title, no_wrap=True)
    for line in lines:
        ratios = line["ttft_ratio_to_stock"], line["ratio_to_stock"]
        prefill, step = ("" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        table.add_row(
            line["system"] + (f" ({line['profiles']})" if line["profiles"] > 1 else ""),
            f"{line['ttft_ms']:.2f}",
            prefill,
            f"{line['tpot_ms']:.2f}",
            f"{line['p99_ms']:.2f}",
            step,
            f"{line['tokens_per_s']:.1f}",
        )
    return table


def serving_report(lines: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the last lines of `steerfast.evaluation.serving.measure_serving`, one per system."""
    summaries = [line for line in lines if "measured" in line]
    first = summaries[0]
    load = f"{first['requests']} requests of {first['prompt']} + {first['output']} tokens a round"
    title = escape(f"{first['model']}, {load}, {first['concurrency']} at a time")
    columns = ("first token, ms", "ratio", "later token, ms", "ratio, least-largest", "p99", "tokens/s", "ratio")
    table = new_table("system", *columns, title=title, no_wrap=True)
    for line in summaries:
        ratio = {name: line.get(f"{name}_ratio") for name in ("ttft_ms", "tpot_ms", "tokens_per_s")}
        middle = {name: "" if found is None else f"{found[0]:.3f}" for name, found in ratio.items()}
        if (found := ratio["tpot_ms"]) is not None:
            middle["tpot_ms"] += f" {found[1]:.3f}-{found[2]:.3f}"
        table.add_row(
            line["system"],
            f"{line['ttft_ms']:.2f}",
            middle["ttft_ms"],
            f"{line['tpot_ms']:.2f}",
            middle["tpot_ms"],
            f"{line['p99_itl_ms']:.2f}",
            f"{line['tokens_per_s']:.1f}",
            middle["tokens_per_s"],
        )
    console.print(table)
    console.print(
        f"{first['device']}, vLLM {first['vllm_version']}, torch {first['torch']}. Medians of "
        f"{first['measured']} rounds; ratios to stock in the same round. control is a second stock server.",
        markup=False,
    )


def report_table(found: ReportTable) -> Table:
    """Return a table of a report for a terminal, intervals in brackets."""
    heads = [f"{group}\n{name}" if any(group for group, _ in found.columns) else name for group, name in found.columns]
    table = new_table("", *map(escape, heads), title=escape(found.title))
    for column in table.columns:
        column.overflow = "fold"  # a name is shown whole
    for row in found.rows:
        cells = [f"{cell.text} ({cell.interval})" if cell.interval else cell.text for cell in row.cells]
        table.add_row(escape(row.name), *map(escape, cells))
    return table


def gate_figures_report(report: Mapping[str, Any], console: Console) -> None:
    """Print a result of `steerfast.evaluation.gates.gate_report`."""
    from steerfast.evaluation.report import gate_tables

    for table in gate_tables(report):
        console.print(report_table(table))
    console.print(
        "Fires with Wilson intervals, AUC with DeLong's, over prompts, of 95 %. AUC is against the harmless sources, "
        "each with the same weight.",
        markup=False,
    )
    if (found := report.get("baseline")) is not None:
        steps = "; ".join(
            f"{step}: {found[step]['prompts']} prompts of {found[step]['sources']} sources"
            for step in ("fit", "calibrate")
        )
        limit = found["max_false_positive_rate"]
        console.print(
            f"words: TF-IDF and logistic regression of the corpus, {limit:.2%} false positives ({steps})", markup=False
        )


def evaluation_report(result: Mapping[str, Any], console: Console) -> None:
    """Print the summary and the tasks of an evaluation, a column for each system."""
    from steerfast.evaluation.report import tables

    for found in tables(result):
        if found.name not in ("systems", "tasks"):
            continue
        title = f"{result['model']}, greedy" if found.name == "systems" else found.title
        table = new_table("", *(escape(row.name) for row in found.rows), title=escape(title), no_wrap=True)
        for number, (group, name) in enumerate(found.columns):
            if group and (number == 0 or found.columns[number - 1][0] != group):
                table.add_row(f"[bold]{escape(group)}")
            label = f"  {name}" if name else group
            table.add_row(escape(label), *(row.cells[number].text for row in found.rows))
        console.print(table)
    for name, why in result["left_out"].items():
        console.print(f"{name} left out: {why}", markup=False)
    for name, one in result["sets"].items():
        for users in one["also_fitted_by"]:
            console.print(f"{name}: {users}; its figures flatter", markup=False)

"""Check the bars on the lines of ops.py, launch.py, serve_graph.py, gpu_serving.py and `steerfast bench-serve`.

    python benchmarks/bars.py                             the results in benchmarks/results
    python benchmarks/bars.py --results DIR

For each device: the times of others over the steered op's; then each bar, the worst value against it, and where. Times
are `graph_us` where both sides have it (short calls on CUDA), else `us`. A bar without a measurement is printed as
such. Exit status 1 if a bar does not hold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from cases import FUSED, STEER

Line = dict[str, Any]
Value = tuple[float, str]


def where(line: Line) -> str:
    return f"{line['rows']} rows, H {line['hidden']}, {line.get('cache', '')}"


def ratio(line: Line, other: Line) -> float:
    clock = "graph_us" if line.get("graph_us") and other.get("graph_us") else "us"
    return line[clock] / other[clock]


class Results:
    """The timed lines of one device."""

    def __init__(
        self, ops: list[Line], launches: list[Line], steps: list[Line], serving: list[Line] | None = None
    ) -> None:
        self.ops, self.launches, self.serving = ops, launches, serving or []
        self.steps = {self.step(line, line["system"]): line for line in steps}
        self.by_case = {(self.case(line), line["provider"]): line for line in ops}

    @staticmethod
    def case(line: Line, **other: Any) -> tuple[Any, ...]:
        changed = {**line, **other}
        return tuple(changed[key] for key in ("op", "rows", "hidden", "dtype", "active", "profiles", "cache"))

    def of(self, op: str, provider: str, **wanted: Any) -> Iterator[Line]:
        for line in self.ops:
            if (line["op"], line["provider"]) == (op, provider) and all(line[k] == v for k, v in wanted.items()):
                yield line

    def against(self, lines: Iterator[Line], provider: str, **other: Any) -> Iterator[Value]:
        """Yield the time of each line over that of `provider` in the same case, or in the case changed by `other`."""
        for line in lines:
            base = self.by_case.get((self.case(line, **other), provider))
            if base is not None:
                yield ratio(line, base), where(line)

    def bandwidth(self) -> Iterator[Value]:
        for line in self.of(FUSED, "steerfast", active=1.0, profiles=1, hidden=4096):
            if line["rows"] >= 8192:
                yield line["pct_copy"] / 100, where(line)

    def inactive(self) -> Iterator[Value]:
        for active, profiles in ((0.0, 1), (1.0, 0)):
            lines = (ln for ln in self.of(STEER, "steerfast", active=active, profiles=profiles) if ln["rows"] <= 256)
            yield from self.against(lines, "empty")

    def others(self) -> Iterator[tuple[str, list[float]]]:
        """Yield providers, and their times over those of the fused op with all rows steered, ascending: H 4096."""
        for provider in ("norm", "norm+add", "separate", "torch.compile"):
            lines = self.of(FUSED, provider, active=1.0, profiles=1, hidden=4096)
            if found := sorted(value for value, _ in self.against(lines, "steerfast")):
                yield provider, found

    def few(self) -> Iterator[Value]:
        """Yield the speed-up over separate passes."""
        lines = (ln for ln in self.of(FUSED, "steerfast", active=1.0, profiles=1) if ln["rows"] <= 64)
        yield from ((1 / value, at) for value, at in self.against(lines, "separate"))

    def launch(self) -> Iterator[Value]:
        """Yield the host time of an eager launch over that of torch.add."""
        adds = {(ln["rows"], ln["hidden"]): ln["us"] for ln in self.launches if ln["provider"] == "torch.add"}
        for line in self.launches:
            if (line["op"], line["provider"]) == (FUSED, "unchecked") and (line["rows"], line["hidden"]) in adds:
                yield line["us"] / adds[line["rows"], line["hidden"]], where(line)

    @staticmethod
    def step(line: Line, system: str) -> tuple[Any, ...]:
        return system, line["batch"], line["context"], line["weights"]

    def replays(self, system: str, value: Callable[[Line], float | None], most: int = 1 << 30) -> Iterator[Value]:
        """Yield `value` of the lines of a system, to batches of `most`."""
        for line in self.steps.values():
            if line["system"] == system and line["batch"] <= most and (found := value(line)) is not None:
                yield found, f"batch {line['batch']}, context {line['context']}, {line['weights']}"

    def edited_layer(self, line: Line) -> float | None:
        """Return the microseconds of a layer that is edited but has no sensor; None: not measured."""
        one = self.steps.get(self.step(line, "open-one"))
        return one and (line["more_us"] - one["more_us"]) / (line["declared"] - one["declared"])

    def over_one_profile(self, line: Line) -> float | None:
        one = self.steps.get(self.step(line, "open-all"))
        return one and line["us"] / one["us"]

    def served(self, system: str, key: str = "ratio", over: str = "") -> Iterator[Value]:
        """Yield `key` of a system's lines of gpu_serving.py; `over`: divided by that of another system."""
        by_case = {(line["system"], line["batch"]): line for line in self.serving if "ratio" in line}
        for (name, batch), line in by_case.items():
            if name != system or (over and (over, batch) not in by_case):
                continue
            yield line[key] / (by_case[over, batch][key] if over else 1), f"{system}, batch {batch}"

    def clients(self, system: str, place: int = 0) -> Iterator[Value]:
        """Yield the ratio of a system's time per token in `steerfast bench-serve`: its median, or its least (1)."""
        for line in self.serving:
            if line["system"] == system and "tpot_ms_ratio" in line:
                yield line["tpot_ms_ratio"][place], line["model"]


def bars(results: Results, cuda: bool) -> Iterator[tuple[str, str, list[Value], float]]:
    """Yield name, comparison, measured values and limit of each bar of a device."""
    steered = results.of(FUSED, "steerfast", active=1.0, profiles=1)
    many = results.of(FUSED, "steerfast", profiles=256)
    if not cuda:
        yield "fused op over separate passes, 1 to 64 rows, times faster", ">=", list(results.few()), 1.5
        yield "idle server over stock, least of the rounds", "<=", list(results.clients("idle", 1)), 1.0
        yield "steered server over stock", "<=", list(results.clients("open")), 1.02
        return
    yield "share of the copy bandwidth, 8192 rows and more, H 4096", ">=", list(results.bandwidth()), 0.9
    unsteered = results.against(steered, "steerfast-unsteered")
    yield "fused op over itself without slots, every row count", "<=", list(unsteered), 1.05
    yield "256 profiles over one", "<=", list(results.against(many, "steerfast", profiles=1)), 1.05
    yield "steer_ without an active row over an empty kernel, to 256 rows", "<=", list(results.inactive()), 1.2
    yield "host time of an eager launch over torch.add", "<=", list(results.launch()), 2.5
    replays = results.replays
    yield "unsteered step over the bandwidth floor", "<=", list(replays("stock", lambda ln: ln["of_floor"])), 1.25
    yield "captured sensor layer, to batch 64, us", "<=", list(replays("open-one", lambda ln: ln["more_us"], 64)), 3.0
    yield "captured edited layer, to batch 64, us", "<=", list(replays("open-all", results.edited_layer, 64)), 2.0
    idle = replays("directory", lambda ln: ln["more_us"] / ln["declared"])
    yield "idle declared layer, us", "<=", list(idle), 1.3
    yield "all layers steered over no plugin", "<=", list(replays("open-all", lambda ln: ln["ratio"])), 1.012
    yield "64 profiles over one", "<=", list(replays("profiles-64", results.over_one_profile)), 1.01
    yield "idle engine over stock, least of the rounds", "<=", list(results.served("idle", "least")), 1.0
    yield "engine with one layer, unsteered, over stock", "<=", list(results.served("one-layer:off")), 1.003
    yield "engine with one layer, steered, over stock", "<=", list(results.served("one-layer:one")), 1.005
    yield "engine with all layers steered over stock", "<=", list(results.served("all-layers:all")), 1.015
    many = results.served("all-layers:64", over="all-layers:all")
    yield "engine with 64 profiles over one", "<=", list(many), 1.01
    directory = [*results.served("directory:off"), *results.served("directory:one")]
    yield "engine that may load profiles over stock", "<=", directory, 1.01


def read(path: Path, key: str = "us") -> list[Line]:
    """Return the lines of a file that have `key`: not those of errors."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if key in line]


def main() -> int:
    parser = argparse.ArgumentParser(description="Which of the project's bars hold.")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    directory = parser.parse_args().results
    missed = 0
    names = {
        path.stem.removeprefix(kind)
        for kind in ("ops-", "serve-graph-", "serving-")
        for path in directory.glob(f"{kind}*.jsonl")
    }
    for device in sorted(names):
        own = (read(directory / f"{kind}-{device}.jsonl") for kind in ("ops", "launch", "serve-graph"))
        results = Results(*own, serving=read(directory / f"serving-{device}.jsonl", "system"))
        print(device)
        for provider, found in results.others():
            middle = f"median {median(found):.2f}, {len(found)} cases"
            print(f"  {provider} over the steered fused op: {found[0]:.2f} to {found[-1]:.2f}, {middle}")
        for name, comparison, values, limit in bars(results, device != "cpu"):
            if not values:
                print(f"  not measured  {name}: {comparison} {limit}")
                continue
            worst, at = (max if comparison == "<=" else min)(values)
            holds = worst <= limit if comparison == "<=" else worst >= limit
            passed = sum(v <= limit if comparison == "<=" else v >= limit for v, _ in values)
            missed += not holds
            verdict, where_worst = "holds" if holds else "MISSED", f"worst {worst:.3f} ({at})"
            share = f"{passed} of {len(values)} cases"
            print(f"  {verdict:12}  {name}: {comparison} {limit}; {where_worst}, {share}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""vLLM engines without the plugin, with it idle and with it steering: are they right, and what does steering cost?

    python benchmarks/gpu_serving.py check             a small made-up model against transformers
    python benchmarks/gpu_serving.py bench --json      Llama-3.1-8B's shape, random weights: decode time by system
    python benchmarks/gpu_serving.py check --tiny      a smaller one, on a CPU too

Needs vLLM beside steerfast, and no download. docs/gpu-serving.md explains the lines; bars.py checks those of `bench`.
Each engine runs in a process of its own (`worker`), which takes lines of JSON and answers each with one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from report import Report, parser

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TINY = {
    **SMALL,
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "head_dim": 32,
}
GRAPHS = [1, 2, 4, 8, 16, 32, 64, 128, 256]  # captured batch sizes
PROFILES = 64
NO_PLUGIN = {"VLLM_PLUGINS": ""}


# -- one engine ------------------------------------------------------------------------------------------------------


def worker() -> None:
    """Run an engine: the first line has "model", "options", "steering", each later one an "op"."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints goes to the log
    start = time.perf_counter()
    given = json.loads(sys.stdin.readline())
    from vllm import LLM

    options = dict(given["options"])
    if given["steering"] is not None:
        options["additional_config"] = {"steerfast": given["steering"]}
    llm = LLM(given["model"], skip_tokenizer_init=True, disable_log_stats=False, **options)
    config = llm.llm_engine.vllm_config
    ready = {
        "start_s": round(time.perf_counter() - start, 1),
        "v2": bool(config.use_v2_model_runner),
        "graphs": str(config.compilation_config.cudagraph_mode),
        "async": bool(config.scheduler_config.async_scheduling),
    }
    out.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"decode": decode, "generate": generate, "preemptions": preemptions}[asked.pop("op")](llm, **asked)
        except Exception as error:  # reported, so that the other engines go on
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        out.write(json.dumps(answer) + "\n")


def run(llm: Any, prompts: list[list[int]], extras: list[Any], tokens: int, **more: Any) -> list[Any]:
    from vllm import SamplingParams

    common = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False, **more}
    parameters = [SamplingParams(extra_args=extra, **common) for extra in extras]
    outputs: list[Any] = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return outputs


def decode(llm: Any, prompts: list[list[int]], extras: list[Any], short: int, long: int) -> dict[str, float]:
    """Return milliseconds per decoded step: the difference of two answers' times, with the prompts in the cache."""
    run(llm, prompts, extras, 2)
    seconds = []
    for tokens in (short, long):
        start = time.perf_counter()
        run(llm, prompts, extras, tokens)
        seconds.append(time.perf_counter() - start)
    return {"ms": 1000 * (seconds[1] - seconds[0]) / (long - short)}


def generate(llm: Any, prompts: list[list[int]], extras: list[Any], tokens: int) -> list[dict[str, Any]]:
    answers = []
    for output in run(llm, prompts, extras, tokens, logprobs=1):
        (found,) = output.outputs
        chosen = zip(found.logprobs, found.token_ids, strict=True)
        answers.append(
            {
                "token_ids": list(found.token_ids),
                "logprobs": [at[token].logprob for at, token in chosen],
                "steering": getattr(output, "steering", None),
            }
        )
    return answers


def preemptions(llm: Any) -> int:
    return sum(int(each.value) for each in llm.get_metrics() if each.name == "vllm:num_preemptions")


class Engine:
    """The client of a worker process."""

    def __init__(
        self, name: str, given: Given, model: str, options: dict[str, Any], steering: Any = None, **environ: str
    ):
        self.name, self.steering, self._log = name, steering, given.folder / f"{name}.log"
        settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **environ}
        if not given.cuda:
            settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an engine in one process starts twice as fast
        kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        with self._log.open("w") as printed:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "worker"], env={**kept, **settings}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed,
            )  # fmt: skip
        self._send({"model": model, "options": options, "steering": steering})

    def _send(self, asked: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended: {self._log.read_text()[-1500:]}")
        return json.loads(line)

    def ask(self, op: str, **asked: Any) -> Any:
        """Return the worker's answer.

        Raises:
            RuntimeError: it ended, or says that the call failed.
        """
        self._send({"op": op, **asked})
        answer = self.read()
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def started(engines: Sequence[Engine], report: Report) -> list[Engine]:
    """Return the engines that started, all at the same time, with a line about each."""
    states: dict[str, Any] = {}

    def wait(engine: Engine) -> None:
        try:
            states[engine.name] = engine.read()
        except Exception as error:
            states[engine.name] = error

    threads = [threading.Thread(target=wait, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = []
    for engine in engines:
        state = states[engine.name]
        if isinstance(state, Exception):
            report.error({"engine": engine.name}, state)
        else:
            report.line({"engine": engine.name, **state})
            good.append(engine)
    return good


# -- profiles --------------------------------------------------------------------------------------------------------


def made(
    config: dict[str, Any], layers: Iterable[int], seed: int, *, state: str, size: float = 1.0, **fields: Any
) -> Any:
    """Return a made-up profile. Its gate decides at the first layer and is open or shut, or it is always open."""
    from transformers import LlamaConfig

    from steerfast.evaluation.latency import random_profile
    from steerfast.profile import Gate
    from steerfast.vllm.config import identity_of

    chosen = list(layers)
    profile = random_profile(identity_of(LlamaConfig(**config)), chosen, is_open=state == "open", seed=seed)
    sensor: Any = {"sensor": chosen[0]}
    if state == "always":
        sensor = {"sensor": "own", "gate": Gate("always")}
    return replace(profile, vector=size * profile.vector, positions="response", **{**sensor, **fields})


def saved(folder: Path, profiles: dict[str, Any]) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: str(folder / f"{name}.safetensors") for name in profiles}
    for name, file in files.items():
        profiles[name].save(file)
    return files


# -- is it right -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """The options of the command line."""

    device: str
    folder: Path
    tiny: bool
    margin: float
    batches: list[int]
    prompt: int
    tokens: int
    rounds: int
    seconds: float

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Answer:
    """What transformers answers; margins: of each token, in log probability, to the runner-up."""

    token_ids: list[int]
    margins: list[float]
    fired: bool | None
    scores: list[float]


class Truth:
    """A small random model in transformers, and profiles whose gates part some prompts."""

    TOKENS = 24

    def __init__(self, given: Given) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        from steerfast.profile import Gate

        self.config, self.device = (TINY if given.tiny else SMALL), given.device
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**self.config, initializer_range=0.06))
        self.model: Any = model.to(torch.bfloat16 if given.cuda else torch.float32)
        self.path = str(given.folder / "small")
        self.model.save_pretrained(self.path)
        self.model = self.model.to(given.device).eval()
        draw = random.Random(1)
        lengths = [5, 16, 33, 64, 100, 150, 201, 300] * 2
        self.prompts = [[draw.randrange(3, self.config["vocab_size"]) for _ in range(length)] for length in lengths]
        mean = Gate("prompt", "cosine", 0.0, "mean", None)
        self.profiles = {
            "gated": self._parting(made(self.config, [3, 4, 5], 1, state="shut", size=6.0)),
            "mean": self._parting(made(self.config, [2, 4], 2, state="shut", size=6.0, gate=mean)),
            "always": made(self.config, [1, 6], 3, state="always", size=6.0),
            "short": made(self.config, [2, 5], 4, state="always", size=6.0, answer_tokens=6),
        }
        plan = ["off", "gated", "mean", "always", "short", "off", "gated", "mean"]
        self.names = [*plan, *plan[1:], "gated"]
        self.answers = [self._answer(*each) for each in zip(self.prompts, self.names, strict=True)]
        del self.model
        if given.cuda:
            torch.cuda.empty_cache()

    def _parting(self, profile: Any) -> Any:
        """Put the threshold into the widest gap between the middle scores of the prompts."""
        import steerfast

        scores = []
        for ids in self.prompts:
            with steerfast.steer(self.model, profile) as steering, torch.inference_mode():
                self.model(torch.tensor([ids], device=self.device))
            scores.append(float(steering.scores[:, 0].max()))
        scores.sort()
        _, middle = max((b - a, (a + b) / 2) for a, b in itertools.pairwise(scores[2:-2]))
        return replace(profile, threshold=torch.full_like(profile.threshold, middle))

    def _answer(self, ids: list[int], name: str) -> Answer:
        import steerfast

        profile = self.profiles.get(name)
        prompt = torch.tensor([ids], device=self.device)
        steered: Any = contextlib.nullcontext() if profile is None else steerfast.steer(self.model, profile)
        with steered as steering, torch.inference_mode():
            found = self.model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, output_logits=True,
                max_new_tokens=self.TOKENS, min_new_tokens=self.TOKENS, return_dict_in_generate=True,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            fired = None if profile is None else bool(steering.fired[0])
            scores = steering.scores[:, 0].tolist() if profile is not None and profile.gate_layers else []
        best = torch.cat(found.logits).float().log_softmax(1).topk(2, dim=1).values
        return Answer(found.sequences[0, len(ids) :].tolist(), (best[:, 0] - best[:, 1]).tolist(), fired, scores)

    def compare(self, answers: list[dict[str, Any]], margin: float) -> dict[str, Any]:
        """Return how many answers are equal, and how many differ where transformers was sure by `margin`."""
        equal = wrong = 0
        error = 0.0
        for found, expected in zip(answers, self.answers, strict=True):
            pairs = zip(found["token_ids"], expected.token_ids, strict=True)
            differs = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
            equal += differs is None
            wrong += differs is not None and expected.margins[differs] > margin
            if expected.fired is not None:
                wrong += found["steering"]["fired"] != expected.fired
                scores = zip(found["steering"]["scores"], expected.scores, strict=True)
                error = max([error, *(abs(a - b) for a, b in scores)])
        return {"requests": len(answers), "equal_to_transformers": equal, "wrong": wrong, "worst_score_error": error}


def check(given: Given, report: Report) -> None:
    truth = Truth(given)
    steering = {"profiles": saved(given.folder / "check", truth.profiles)}
    options: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 256}
    if given.cuda:
        options |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}
    else:
        options |= {"dtype": "float32", "enforce_eager": True, "block_size": 32}
    few = {**options, "num_gpu_blocks_override": 80 if given.cuda else 40}
    engines = [
        Engine("stock", given, truth.path, options, **NO_PLUGIN),
        Engine("default", given, truth.path, options, steering),
        Engine("few-blocks", given, truth.path, few, steering),  # requests are preempted
    ]
    if given.cuda:  # "default" is model runner V2 with CUDA graphs
        engines.append(Engine("v1", given, truth.path, options, steering, VLLM_USE_V2_MODEL_RUNNER="0"))
        engines.append(Engine("eager", given, truth.path, {**options, "enforce_eager": True}, steering))
    unsteered: dict[str, list[dict[str, Any]]] = {}
    for engine in started(engines, report):
        try:
            unsteered[engine.name] = check_engine(engine, truth, given, report)
        except Exception as error:
            report.error({"engine": engine.name}, error)
        engine.close()
    for name, answers in unsteered.items():
        pairs = list(zip(answers, unsteered.get("stock", []), strict=False))
        equal = {key: sum(a[key] == b[key] for a, b in pairs) for key in ("token_ids", "logprobs")}
        report.line({"unsteered": name, "of": len(pairs), **{f"equal_{key}": n for key, n in equal.items()}})


def check_engine(engine: Engine, truth: Truth, given: Given, report: Report) -> list[dict[str, Any]]:
    """Compare the steered answers of an engine, twice: the second time it has a cache. Return its unsteered answers."""
    asked = {"prompts": truth.prompts, "tokens": truth.TOKENS}
    if engine.steering is None:
        answers: list[dict[str, Any]] = engine.ask("generate", extras=[None] * len(truth.prompts), **asked)
        return answers
    for repeat in range(2):
        found = engine.ask("generate", extras=[{"steering": name} for name in truth.names], **asked)
        line = {"engine": engine.name, "repeat": repeat, **truth.compare(found, given.margin)}
        report.line(line)
        report.failed |= line["wrong"] > 0
    if engine.name == "few-blocks":
        count = engine.ask("preemptions")
        report.line({"engine": engine.name, "preemptions": count})
        report.failed |= count == 0
    answers = engine.ask("generate", extras=[{"steering": "off"}] * len(truth.prompts), **asked)
    return answers


# -- what it costs ---------------------------------------------------------------------------------------------------


def bench(given: Given, report: Report) -> None:
    config = LLAMA_8B if given.cuda and not given.tiny else {**LLAMA_8B, **(TINY if given.tiny else SMALL)}
    layers, path = config["num_hidden_layers"], given.folder / "shape"
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    every = range(1, layers)
    profiles = {
        "one": made(config, [layers // 2], 2, state="open"),
        "all": made(config, every, 3, state="open"),
        "shut": made(config, every, 1, state="shut"),
        **{f"p{number}": made(config, every, 10 + number, state="open") for number in range(PROFILES)},
    }
    files = saved(given.folder / "bench", profiles)
    one = {"profiles": {"one": files["one"]}}
    everywhere = {"profiles": files, "slots": len(files) + 8}
    options: dict[str, Any] = {"load_format": "dummy", "max_model_len": 1024, "max_num_seqs": 256}
    if given.cuda:
        options |= {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": (24 if not given.tiny else 1) << 30}
        options |= {"max_num_batched_tokens": 8192, "compilation_config": {"cudagraph_capture_sizes": GRAPHS}}
    else:
        options |= {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_num_seqs": 8}
    # A wave is what fits on one GPU; each has a stock engine for its ratios.
    waves = [
        {"idle": None, "one-layer": one},
        {"all-layers": everywhere, "directory": {**one, "directory": str(given.folder / "bench")}},
    ]
    for number, wave in enumerate(waves):
        engines = [Engine("stock", given, str(path), options, **NO_PLUGIN)]
        engines += [Engine(name, given, str(path), options, steering) for name, steering in wave.items()]
        good = started(engines, report)
        for batch in given.batches:
            time_batch({"wave": number, "batch": batch}, good, given, config["vocab_size"], report)
        for engine in engines:
            engine.close()


def systems(engine: Engine) -> dict[str, list[Any]]:
    """Return the systems of an engine, each with what its requests say in turn."""
    if engine.steering is None:
        return {engine.name: [None]}
    names = ["off", "one"] + (["shut", "all"] if engine.name == "all-layers" else [])
    found: dict[str, list[Any]] = {f"{engine.name}:{name}": [{"steering": name}] for name in names}
    if engine.name == "all-layers":
        found[f"all-layers:{PROFILES}"] = [{"steering": f"p{number}"} for number in range(PROFILES)]
    return found


def time_batch(case: dict[str, Any], engines: Sequence[Engine], given: Given, vocabulary: int, report: Report) -> None:
    """Time decoded steps of all systems in turns, and write a line for each."""
    draw = random.Random(case["batch"])
    prompts = [[draw.randrange(3, vocabulary) for _ in range(given.prompt)] for _ in range(case["batch"])]
    cases = [(name, engine, extras) for engine in engines for name, extras in systems(engine).items()]
    times: dict[str, dict[int, float]] = {name: {} for name, _, _ in cases}
    start = time.perf_counter()
    for turn in range(given.rounds):
        if turn and time.perf_counter() - start > given.seconds:
            break
        for name, engine, extras in cases if turn % 2 == 0 else cases[::-1]:
            asked = {"prompts": prompts, "extras": [extras[n % len(extras)] for n in range(len(prompts))]}
            try:
                times[name][turn] = engine.ask("decode", **asked, short=8, long=8 + given.tokens)["ms"]
            except Exception as error:
                report.error({**case, "system": name}, error)
    for name, own in times.items():
        if not own:
            continue
        ratios = [ms / times["stock"][turn] for turn, ms in own.items() if turn in times.get("stock", {})]
        middle = statistics.median(own.values())
        line = {"ms": round(middle, 4), "tokens_per_s": round(1000 * case["batch"] / middle, 1), "rounds": len(own)}
        if ratios:
            line |= {"ratio": round(statistics.median(ratios), 4), "least": round(min(ratios), 4)}
            line["largest"] = round(max(ratios), 4)
        report.line({**case, "system": name, "prompt": given.prompt, **line})


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        worker()
        return 0
    options = parser("Whether vLLM's answers under steering are right on this device, and what a decoded step costs.")
    options.add_argument("what", choices=["check", "bench"])
    options.add_argument("--tiny", action="store_true", help="a tiny model, for a trial")
    options.add_argument("--folder", type=Path, help="for models and logs, kept (default: a new one, removed)")
    options.add_argument("--margin", type=float, help="log probabilities apart that must not turn (0.15, CPU 0.001)")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    options.add_argument("--prompt", type=int, default=512, help="tokens of each prompt (default 512)")
    options.add_argument("--tokens", type=int, default=96, help="tokens that are timed (default 96)")
    options.add_argument("--rounds", type=int, default=6, help="of each batch size (default 6)")
    options.add_argument("--seconds", type=float, default=25, help="after which none of these begins (default 25)")
    asked = vars(options.parse_args())
    what, place, threads = asked.pop("what"), asked.pop("json"), asked.pop("threads")
    torch.set_num_threads(threads)
    if asked["margin"] is None:
        asked["margin"] = 0.15 if asked["device"] == "cuda" else 1e-3
    report = Report("serving" if what == "bench" else "gpu-check", asked["device"], place)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked["folder"] or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        {"check": check, "bench": bench}[what](Given(**{**asked, "folder": folder}), report)
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())

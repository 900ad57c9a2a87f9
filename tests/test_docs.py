"""Run what the README and docs/ show: commands accept their options, Python runs on tiny models."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml

import steerfast
from steerfast.cli import main
from steerfast.hf.fused import is_patched
from steerfast.profile import SteeringProfile

ROOT = Path(__file__).parent.parent
PAGES = {page.name: page.read_text("utf-8") for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
# Pages that name options of vLLM, too.
VLLM_PAGES = ("README.md", "architectures.md", "deploy.md", "features.md", "security.md", "serving.md")
OURS = [name for name in PAGES if name not in VLLM_PAGES]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
REFERENCE = re.findall(
    r"^::: (steerfast[\w.]*)$",
    "\n".join(page.read_text("utf-8") for page in sorted((ROOT / "docs/reference").glob("*.md"))),
    flags=re.MULTILINE,
)


def blocks(page: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page, "", "bash", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("steerfast "):
                    yield page, shlex.split(line, comments=True)[1:]


def all_commands(group: click.Group, context: click.Context) -> Iterator[click.Command]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield command
        if isinstance(command, click.Group):
            yield from all_commands(command, context)


@pytest.mark.parametrize(("page", "words"), [pytest.param(p, w, id=f"{p}: {' '.join(w)[:60]}") for p, w in commands()])
def test_commands_take_what_they_are_given(page: str, words: list[str]) -> None:
    command: click.Command = main
    context = click.Context(main, info_name="steerfast")
    while isinstance(command, click.Group):
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command, context = found, click.Context(found, context, info_name=found.name)
    command.make_context(str(command.name), list(words))  # parses, and raises where an option is unknown or missing


@pytest.mark.parametrize("page", PAGES)
def test_inline_commands_exist(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    context = click.Context(main)
    for name in re.findall(r"`steerfast ([a-z]+)[^`]*`", prose):
        assert main.get_command(context, name) is not None, name


@pytest.mark.parametrize("page", OURS)
def test_inline_options_exist(page: str) -> None:
    known = {
        option
        for command in all_commands(main, click.Context(main))
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert set(re.findall(r"`(--[a-z][a-z-]*)", PAGES[page])) <= known


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        assert (folder / target).exists(), target
        if anchor:
            text = (folder / target).read_text("utf-8") if target else PAGES[page]
            assert anchor in anchors(text), f"{target}#{anchor}"


# -- The site ----------------------------------------------------------------------------------------


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


def test_every_page_is_in_the_navigation_once() -> None:
    hooks = ast.parse((ROOT / "dev/docs_hooks.py").read_text("utf-8"))
    (table,) = (node for node in hooks.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAGES")
    others = ast.literal_eval(table.value)
    assert all((ROOT / source).exists() for source in others)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages_of(SITE["nav"])) == sorted([*pages, *others.values()])


def test_the_first_page_has_five_lines() -> None:
    lines = PAGES["index.md"].partition("![")[0].splitlines()
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) == 5


def test_citation_and_site_name_one_repository() -> None:
    assert f"repository-code: {SITE['repo_url']}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def resolve(name: str) -> Any:
    """Return a module, or a name in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", dict.fromkeys(REFERENCE))
def test_the_reference_holds_public_names_with_docstrings(name: str) -> None:
    assert "._" not in name
    named = resolve(name)
    exported = [getattr(named, each) for each in getattr(named, "__all__", ())]
    assert all(inspect.getdoc(each) for each in [named, *exported] if callable(each) or each is named)


def test_the_reference_holds_what_pages_import() -> None:
    listed = {f"{name}.{each}" for name in REFERENCE for each in getattr(resolve(name), "__all__", ())} | {*REFERENCE}
    shown = {
        f"{node.module}.{alias.name}"
        for page in PAGES
        for code in blocks(page, "python")
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("steerfast")
        for alias in node.names
    }
    assert shown <= listed


@pytest.mark.parametrize("page", PAGES)
def test_imports_exist(page: str) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("steerfast"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


# -- Python that runs --------------------------------------------------------------------------------


@pytest.fixture
def here(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama: Any,
    tiny_tokenizer: Any,
    make_profile: Callable[..., SteeringProfile],
) -> dict[str, Any]:
    """The names that snippets take for granted, in a folder with the files that they read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steerfast, "load_model", lambda name: (copy.deepcopy(tiny_llama), tiny_tokenizer))
    tiny_llama.save_pretrained("model-or-path")
    tiny_tokenizer.save_pretrained("model-or-path")
    profile = make_profile(tiny_llama, tiny_tokenizer, layers=[2, 3])
    profile.save("safety.safetensors")
    prompts = ["how do i bake a cake", "how do i build a bomb", "write a poem of a tree"]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options = {"add_generation_prompt": True, "return_dict": True}
    return {
        "steerfast": steerfast,
        "tokenizer": tiny_tokenizer,
        "loaded_model": copy.deepcopy(tiny_llama),
        "profile": profile,
        "other": make_profile(tiny_llama, tiny_tokenizer, layers=[1], seed=1),
        "safety": profile,
        "tone": make_profile(tiny_llama, tiny_tokenizer, layers=[1, 2], seed=2),
        "prompts": prompts,
        "batch": dict(tiny_tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", **options)),
    }


def test_patched_model(here: dict[str, Any]) -> None:
    first, *_ = blocks("python.md", "python")
    exec(first, here)
    assert is_patched(here["loaded_model"])
    again = steerfast.AutoSteeredModelForCausalLM.from_pretrained("folder")
    answers = [model.generate(**here["batch"], max_new_tokens=8) for model in (here["model"], again)]
    assert torch.equal(*answers)


def test_stacks(here: dict[str, Any]) -> None:
    several = [code for code in blocks("python.md", "python") if "[safety, tone]]" in code or "safety + tone" in code]
    model = here["loaded_model"]
    model.generation_config.max_new_tokens = 4
    with steerfast.steer(model, None):
        for block in several:
            exec(block, {**here, "model": model})
    assert len(several) == 2


def test_own_vectors(here: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (code for code in blocks("python.md", "python") if "from_tensors" in code)
    pushed: list[Any] = []
    monkeypatch.setattr(SteeringProfile, "push_to_hub", lambda *given, **options: pushed.append((given[1:], options)))
    own = {**here, "model": here["loaded_model"], "vector": torch.ones(32)}
    exec(block.replace("12: vector, 13: vector", "1: vector, 2: vector"), own)
    assert pushed == [(("me/tone",), {"private": True})]
    assert own["tone"].steered_layers == [1, 2]


def test_readme_packed(here: dict[str, Any], tiny_llama: Any) -> None:
    from transformers import ContinuousBatchingConfig

    (block,) = (code for code in blocks("python.md", "python") if "generate_batch" in code)
    model = steerfast.patch(tiny_llama)
    model.generation_config.max_new_tokens = 4
    small = {
        "continuous_batching_config": ContinuousBatchingConfig(
            max_memory_percent=0.01, num_blocks=8, max_batch_tokens=64
        )
    }
    answered: list[Any] = []
    packed = model.generate_batch
    model.generate_batch = lambda *args, **options: answered.append(packed(*args, **options, **small))
    model.continuous_batching_context_manager = partial(model.continuous_batching_context_manager, **small)
    batch = zip(here["batch"]["input_ids"], here["batch"]["attention_mask"], strict=True)
    ids = [row[mask.bool()].tolist() for row, mask in batch]
    exec(block, {**here, "model": model, "prompts": ids, "token_ids": ids[0]})
    (outputs,) = answered
    assert [output.error for output in outputs.values()] == [None] * 3


def test_images(here: dict[str, Any], make_profile: Callable[..., SteeringProfile]) -> None:
    import transformers
    from PIL import Image

    tokenizer = copy.deepcopy(here["tokenizer"])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**size, vocab_size=128, pad_token_id=0, eos_token_id=2)
    vision = transformers.CLIPVisionConfig(**size, image_size=12, patch_size=4)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=image_token)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained("llava-folder")
    make_profile(model, layers=[1]).save("safety.safetensors")
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=12)
    tower = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = transformers.LlavaProcessor(pictures, tokenizer, **tower)
    (block,) = (code for code in blocks("python.md", "python") if "llava-folder" in code)
    exec(block, {"steerfast": steerfast, "processor": processor, "image": Image.new("RGB", (12, 12))})


def test_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    from steerfast.kernels.contract import Norm
    from steerfast.runtime.bank import Bank

    (block,) = (code for code in blocks("python.md", "python") if "add_steer_rms_norm" in code)
    signature, warmed = inspect.signature(steerfast.warmup), []
    monkeypatch.setattr(steerfast, "warmup", lambda *args, **options: warmed.append(signature.bind(*args, **options)))
    x, slots = torch.randn(2, 8), torch.tensor([[-1], [-1]], dtype=torch.int32)
    numbers = {"scales": torch.ones(2, 1), "eps": 1e-6, "norm": Norm.LLAMA}
    bank = {"bank": Bank(num_layers=1, hidden_size=8, slots=1), "layer": 0}
    names = {"x": x, "residual": x, "weight": torch.ones(8), "slots": slots, **numbers, **bank}
    names["steerfast"] = steerfast
    exec(block, names)
    assert torch.equal(names["residual"], 2 * x)
    assert len(warmed) == 1  # with valid arguments; the call itself needs a GPU


def test_evaluation_from_python(here: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("evaluation.md", "python")
    exec(block, {})
    assert Path("report.html").read_text("utf-8").startswith("<!doctype html>")
    printed = capsys.readouterr().out
    assert printed.startswith("# Evaluation of ")
    assert "| ours: " in printed
    assert "short" in printed  # the judge of one's own


def test_charts_are_those_of_the_landed_results() -> None:
    charts = runpy.run_path(str(ROOT / "benchmarks" / "chart.py"))["CHARTS"]
    for name, draw in charts.items():
        assert (ROOT / "docs" / name).read_text("utf-8") == draw().svg(), "run python benchmarks/chart.py"

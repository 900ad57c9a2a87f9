"""Harmful questions about pictures: the loader of MM-Harmful Bench, and a tiny random LLaVA that answers them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import steerfast
from steerfast.errors import ArchitectureError, PromptError, SteerfastError
from steerfast.evaluation import multimodal
from steerfast.evaluation.multimodal import evaluate_images, image_answers, load_image_model, load_images
from steerfast.evaluation.report import markdown
from steerfast.evaluation.systems import System, as_it_is, self_reminder
from steerfast.hf.structure import identify
from steerfast.judging.judges import RuleJudge
from steerfast.text.prompts import describe_set

DATA = Path(__file__).parents[1] / "data" / "mm_harmful_bench"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}<end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# -- questions and pictures --------------------------------------------------------------------------


def bench(folder: Path, questions: list[dict[str, Any]], pictures: list[str], name: str = "questions.jsonl") -> Path:
    """A folder laid out as the benchmark; all pictures are the same."""
    (folder / "images").mkdir(parents=True)
    (folder / name).write_text("\n".join(map(json.dumps, questions)))
    for picture in pictures:
        shutil.copy(DATA / "80.png", folder / picture)
    return folder


def test_the_benchmark() -> None:
    images, missing = load_images(DATA)
    listed = json.loads((DATA / "questions.json").read_text())
    assert (images.name, images.kind, images.duplicates, missing) == ("mm_harmful_bench", "harmful", 0, [])
    assert images.prompts == [one["question"] for one in listed]
    assert [Path(item.image) for item in images.items] == [DATA / one["image"] for one in listed]
    assert images.digest == describe_set(images.prompts)["sha256"]
    assert load_images(DATA / "questions.json")[0].items == images.items


def test_pictures_are_found_by_name_index_or_place(tmp_path: Path) -> None:
    questions: list[dict[str, Any]] = [
        {"question": "a", "index": 7},
        {"question": "b"},
        {"question": "c", "image": "eight.png", "category": "theft"},
        {"question": "d", "image": "images/9.png"},
        {"question": "e", "index": 70},
        {"question": "a", "index": 7},
        {"question": "a", "image": "1"},
    ]
    folder = bench(tmp_path / "own", questions, ["images/7.png", "1.png", "images/eight.png", "images/9.png"])
    images, missing = load_images(folder)
    found = [(item.prompt, str(Path(item.image).relative_to(folder)), item.style) for item in images.items]
    assert found == [
        ("a", "images/7.png", ""),
        ("b", "1.png", ""),
        ("c", "images/eight.png", "theft"),
        ("d", "images/9.png", ""),
        ("a", "1.png", ""),  # another picture makes it another question
    ]
    assert (images.name, images.duplicates, missing) == ("own", 1, ["e"])
    assert [item.prompt for item in load_images(folder, limit=2, seed=1)[0].items] != []
    assert len(load_images(folder, limit=2)[0].items) == 2


def test_what_is_no_benchmark(tmp_path: Path) -> None:
    with pytest.raises(
        PromptError, match=r"images: expected a folder or a file of questions at .*nowhere', found none"
    ):
        load_images(tmp_path / "nowhere")
    with pytest.raises(PromptError, match=r"expected one \.json, \.jsonl, \.csv file in .*, found none"):
        load_images(tmp_path)
    folder = bench(tmp_path / "a", [{"question": "q"}], ["images/5.png"])
    with pytest.raises(PromptError, match=r"images: expected pictures in .*a' or its folder images, found none"):
        load_images(folder)
    (folder / "more.csv").write_text("prompt\nq\n")
    with pytest.raises(PromptError, match=r"found more.csv, questions.jsonl"):
        load_images(folder)
    broken = bench(tmp_path / "b", [{"question": "q"}], [])
    (broken / "images" / "0.png").write_bytes((DATA / "80.png").read_bytes()[:100])
    with pytest.raises(PromptError, match=r"images: cannot read the picture .*0.png'"):
        load_images(broken)
    with pytest.raises(PromptError, match="limit: expected at least 1, got 0"):
        load_images(DATA, limit=0)


# -- a model that reads them -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=12),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@pytest.fixture
def llava(processor: Any) -> Any:
    text = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        initializer_range=0.25, pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(1)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=token)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "language_model" not in name and "lm_head" not in name and "norm" not in name:
            weight.data.copy_(0.25 * torch.randn(weight.shape, generator=generator))
    model.lm_head.weight.data[token] = 0
    return model


@pytest.fixture(scope="module")
def questions() -> Any:
    return load_images(DATA)[0]


def alone(model: Any, processor: Any, item: Any, prompt: str | None = None, length: int = 6) -> list[int]:
    """The oracle: one question, its text written out by hand, not padded."""
    text = f"<user> <image> {item.prompt if prompt is None else prompt} <end> <assistant>"
    batch = processor(text=[text], images=[Image.open(item.image).convert("RGB")], return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=length, do_sample=False)[0, batch["input_ids"].shape[1] :].tolist()
    return output[: output.index(2)] if 2 in output else output


def test_answers_are_those_of_each_question_alone(llava: Any, processor: Any, questions: Any) -> None:
    expected = [alone(llava, processor, item) for item in questions.items]
    assert expected[0] != expected[1]
    for batch_size in (1, 2):
        found = image_answers(llava, processor, questions.items, max_new_tokens=6, batch_size=batch_size)
        assert found == (expected, [])


def test_the_picture_counts(llava: Any, processor: Any, questions: Any) -> None:
    first, second = questions.items
    swapped = [type(first)(first.prompt, image=second.image), type(first)(second.prompt, image=first.image)]
    assert image_answers(llava, processor, swapped, max_new_tokens=6) == (
        [alone(llava, processor, item) for item in swapped], []
    )  # fmt: skip


def test_steered_answers_and_what_fired(
    llava: Any, processor: Any, questions: Any, make_profile: Callable[..., Any]
) -> None:
    profile = make_profile(llava, processor.tokenizer, layers=[1, 2], sensor=1)
    with steerfast.steer(llava, profile) as steering:
        image_answers(llava, processor, questions.items, max_new_tokens=1, steering=steering)
        profile.threshold[:] = float(steering.scores.mean())  # between the two
    plain = image_answers(llava, processor, questions.items, max_new_tokens=6)[0]
    with steerfast.steer(llava, profile) as steering:
        answers, fired = image_answers(llava, processor, questions.items, max_new_tokens=6, steering=steering)
        assert answers == [alone(llava, processor, item) for item in questions.items]
    assert sorted(fired) == [False, True]
    assert [one == other for one, other in zip(answers, plain, strict=True)] == [not opened for opened in fired]


def test_a_defence_words_the_prompt_and_the_picture_stays_with_the_user(processor: Any, questions: Any) -> None:
    seen: dict[str, Any] = {}

    def spy(**given: Any) -> Any:
        seen.update(given)
        return "inputs"

    for name in ("tokenizer", "apply_chat_template"):
        setattr(spy, name, getattr(processor, name))
    assert multimodal._inputs(spy, questions.items[:1], self_reminder) == "inputs"
    system, user = (message["content"] for message in self_reminder(questions.items[0].prompt))
    assert seen["text"] == [f"<system> {system} <end> <user> <image> {user} <end> <assistant>"]
    assert len(seen["images"]) == 1


def test_what_knows_no_chat_or_no_pictures(llava: Any, processor: Any, questions: Any, tmp_path: Path) -> None:
    silent = copy.copy(processor)
    silent.chat_template = None
    with pytest.raises(
        ArchitectureError, match=r"processor: expected one with .*, got LlavaProcessor without chat_templ"
    ):
        image_answers(llava, silent, questions.items)
    with pytest.raises(ArchitectureError, match="without tokenizer"):
        image_answers(llava, processor.tokenizer.__class__(tokenizer_object=processor.tokenizer._tokenizer), [])
    with pytest.raises(ArchitectureError, match=r"model: cannot load .*nowhere' as one that reads images"):
        load_image_model(str(tmp_path / "nowhere"))


def test_a_checkpoint_loads_and_answers_the_same(llava: Any, processor: Any, questions: Any, tmp_path: Path) -> None:
    llava.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, loaded = load_image_model(str(tmp_path), device="cpu")
    expected = image_answers(llava, processor, questions.items, max_new_tokens=6)
    assert image_answers(model, loaded, questions.items, max_new_tokens=6) == expected


# -- the evaluation ----------------------------------------------------------------------------------


@pytest.fixture
def systems(llava: Any, processor: Any, make_profile: Callable[..., Any]) -> list[System]:
    profile = make_profile(llava, processor.tokenizer, threshold=-2.0, layers=[1, 2], sensor=1)
    return [
        System("unsteered", "as it is"),
        System("self-reminder", "two reminders", self_reminder),
        System("ours", "steered", profile=profile),
        System("sibling", "other weights", model="somewhere"),
    ]


def test_an_evaluation(llava: Any, processor: Any, systems: list[System], questions: Any, tmp_path: Path) -> None:
    expected = {
        "unsteered": image_answers(llava, processor, questions.items, max_new_tokens=6)[0],
        "self-reminder": image_answers(llava, processor, questions.items, max_new_tokens=6, defence=self_reminder)[0],
    }
    with steerfast.steer(llava, systems[2].profile):
        expected["ours"] = image_answers(llava, processor, questions.items, max_new_tokens=6, defence=as_it_is)[0]
    texts = {
        name: [processor.tokenizer.decode(one, skip_special_tokens=True).strip() for one in found]
        for name, found in expected.items()
    }
    refusals = {texts["ours"][0], texts["ours"][1], texts["unsteered"][1]}
    judges = [RuleJudge("known", refusals.__contains__), RuleJudge("all", bool)]
    result = evaluate_images(llava, processor, systems, questions, judges, max_new_tokens=6, batch_size=1)
    assert result["systems"]["ours"]["asr"] == {"mm_harmful_bench": 0.0}
    assert result["systems"]["unsteered"]["asr"] == {"mm_harmful_bench": 0.5}
    assert result["systems"]["unsteered"]["asr_by_judge"]["all"] == {"mm_harmful_bench": 0.0}
    assert result["systems"]["ours"]["fire_rate"] == {"mm_harmful_bench": 1.0}
    low, high = result["systems"]["ours"]["intervals"]["asr"]["mm_harmful_bench"]
    assert (low, high) == (0.0, pytest.approx(0.6576, abs=1e-4))  # Wilson's, of none in two
    assert result["systems"]["ours"]["against_unsteered"]["asr"]["mm_harmful_bench"][0] == -0.5
    answers = {name: [one["answers"][name]["text"] for one in result["examples"]] for name in expected}
    assert {name: sorted(found) for name, found in answers.items()} == {n: sorted(f) for n, f in texts.items()}
    assert list(result["left_out"]) == ["sibling"]
    assert result["model"] == identify(llava).name
    assert result["model"] in markdown(json.loads(json.dumps(result)))


def test_an_evaluation_goes_on_where_it_was_interrupted(
    llava: Any, processor: Any, systems: list[System], questions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges = [RuleJudge("any", bool)]
    asked: list[str] = []
    answer = multimodal.image_answers

    def count(model: Any, processor: Any, items: Any, **options: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.extend(item.prompt for item in items)
        return answer(model, processor, items, **options)

    def run(resume: Path | None) -> dict[str, Any]:
        return evaluate_images(
            llava, processor, systems, questions, judges, max_new_tokens=4, batch_size=1, resume=resume, progress=False
        )

    expected = run(None)
    monkeypatch.setattr(multimodal, "image_answers", count)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "pieces")
    assert len((tmp_path / "pieces").read_text().splitlines()) == 3
    asked = ["of six"]
    monkeypatch.setattr(
        multimodal, "image_answers", lambda *given, **options: asked.append("") or answer(*given, **options)
    )
    assert run(tmp_path / "pieces") == expected
    assert len(asked) == 4
    assert run(tmp_path / "pieces") == expected
    assert len(asked) == 4


def test_other_weights_of_the_same_name_are_asked_again(
    llava: Any, processor: Any, systems: list[System], questions: Any, tmp_path: Path
) -> None:
    def run(resume: Path | None) -> dict[str, Any]:
        return evaluate_images(
            llava, processor, systems[:1], questions, [RuleJudge("any", bool)], max_new_tokens=6, resume=resume
        )

    first = run(tmp_path / "pieces")
    llava.lm_head.weight.data[5:9] += 1.0
    second = run(tmp_path / "pieces")
    assert len((tmp_path / "pieces").read_text().splitlines()) == 2
    assert second == run(None) != first


def test_questions_that_made_a_profile(
    llava: Any, processor: Any, systems: list[System], questions: Any, make_profile: Callable[..., Any]
) -> None:
    made = make_profile(llava, processor.tokenizer, fitted={"harmful": describe_set(questions.prompts, "own")})
    given = (llava, processor, [systems[0], System("ours", "", profile=made)], questions, [RuleJudge("any", bool)])
    with pytest.raises(PromptError, match=r"got 'mm_harmful_bench': 2 of 2 prompts fitted the profile of 'ours'"):
        evaluate_images(*given, max_new_tokens=2)
    marked = evaluate_images(*given, max_new_tokens=2, force=True)["sets"]["mm_harmful_bench"]["also_fitted_by"]
    assert marked == ["2 of 2 prompts fitted the profile of 'ours'"]


def test_a_steered_model_is_not_taken_for_the_unsteered_one(
    llava: Any, processor: Any, systems: list[System], questions: Any
) -> None:
    with steerfast.steer(llava, systems[2].profile), pytest.raises(SteerfastError, match="expected an unsteered one"):
        evaluate_images(llava, processor, systems, questions, [RuleJudge("any", bool)])

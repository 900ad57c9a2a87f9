"""Models that read images: LLaVA and Qwen2-VL, tiny and random, with their real processors and real images.

The oracle is that of model_cases: plain hooks that decide in float64 at the prompt's last token, and every sequence run
alone, in full, with its pictures and without a KV cache.
"""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_cases import ARCHITECTURES, BASE, CLOSE, FUSED, MakeProfile, Oracle, greedy
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import steerfast
from steerfast import AutoSteeredModelForImageTextToText
from steerfast.errors import ArchitectureError
from steerfast.hf.auto import PROFILE_FILE
from steerfast.hf.fused import is_patched
from steerfast.hf.structure import find_decoder, identify
from steerfast.profile import Gate, SteeringProfile

NAMES = ["Llava", "LlavaNext", "Qwen2VL", "Qwen2_5_VL"]
DATA = Path(__file__).parents[1] / "data" / "mm_harmful_bench"
BENCH = json.loads((DATA / "questions.json").read_text())
LAYERS = 4
Prompt = tuple[list[int], str]  # the indices of its pictures, and a text
_TOKENS = ["<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
_TEXT = {**BASE, "max_position_embeddings": 128}
_CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
         "image_size": 12, "patch_size": 4}  # fmt: skip
_QWEN_TEXT = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_QWEN_VISION = {"depth": LAYERS, "num_heads": 2, "patch_size": 4}


# ---- models, processors and prompts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(_TOKENS, special_tokens=True)
    assert len(tokenizer) <= _TEXT["vocab_size"]
    return tokenizer


def image_token(name: str) -> str:
    return "<image>" if "Llava" in name else "<|image_pad|>"


def make_config(name: str, tokenizer: Any, text: Any = None) -> Any:
    tokens = {"image_token_id": tokenizer.convert_tokens_to_ids(image_token(name))}
    if "Llava" in name:
        tokens = {"image_token_index": tokens["image_token_id"]}
        text = transformers.LlamaConfig(**_TEXT) if text is None else text
        vision: Any = transformers.CLIPVisionConfig(**{**_CLIP, "image_size": 8 if name == "LlavaNext" else 12})
        pinpoints = {"image_grid_pinpoints": [[8, 16], [16, 8]]} if name == "LlavaNext" else {}
        kind = getattr(transformers, f"{name}Config")
        return kind(text_config=text, vision_config=vision, **pinpoints, **tokens)
    for token in ("video_pad", "vision_start", "vision_end"):
        key = f"{token.removesuffix('_pad')}_token_id"
        tokens[key] = tokenizer.convert_tokens_to_ids(f"<|{token}|>")
    if name == "Qwen2VL":
        vision = {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32}
    else:
        vision = {**_QWEN_VISION, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24,
                  "window_size": 16, "fullatt_block_indexes": [1, 3]}  # fmt: skip
    return getattr(transformers, f"{name}Config")(text_config=_QWEN_TEXT, vision_config=vision, **tokens)


def make_model(name: str, tokenizer: Any, text: Any = None) -> Any:
    """The same weights every time: pictures count as much as words, and no answer holds an image token."""
    torch.manual_seed(1)
    config = make_config(name, tokenizer, text)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    assert type(model).__name__ == f"{name}ForConditionalGeneration"
    generator = torch.Generator().manual_seed(2)
    for path, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in path or "ln_q" in path:
            weight.data.copy_(1 + 0.2 * noise if path.endswith("weight") else 0.2 * noise)
        elif "language_model" not in path and "lm_head" not in path:
            weight.data.copy_(0.25 * noise)
    for token in _TOKENS:
        model.lm_head.weight.data[tokenizer.convert_tokens_to_ids(token)] = 0
    return model


def make_processor(name: str, tokenizer: Any) -> Any:
    if name == "Llava":
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=12)
    elif name == "LlavaNext":
        images = transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 8}, crop_size=8, image_grid_pinpoints=[[8, 16], [16, 8]]
        )
    else:
        images = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 256}, patch_size=4)
    kind: Any = getattr(transformers, f"{name}Processor")
    if "Llava" in name:
        tower = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return kind(images, tokenizer, **tower)

    class WithoutVideos(kind):  # the processor of videos needs torchvision
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    return WithoutVideos(images, tokenizer)


@dataclass
class Case:
    """A model, what it reads, and the oracle's view of it."""

    name: str
    model: Any
    processor: Any

    def batch(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        """Left-padded inputs."""
        picture = "<image> " if "Llava" in self.name else "<|vision_start|><|image_pad|><|vision_end|>"
        texts = [f"<user> {len(pictures) * picture}{text}" for pictures, text in prompts]
        pictures = [Image.open(DATA / BENCH[i]["image"]) for indices, _ in prompts for i in indices]
        return dict(self.processor(images=pictures or None, text=texts, padding=True, return_tensors="pt"))

    def alone(self, prompt: Prompt) -> tuple[list[int], dict[str, Tensor]]:
        """Token ids of one prompt, and the inputs that are its pictures."""
        batch = self.batch([prompt])
        ids = batch.pop("input_ids")[0].tolist()
        return ids, {key: batch[key] for key in ("pixel_values", "image_sizes", "image_grid_thw") if key in batch}

    def oracle(self, profile: SteeringProfile, pictures: dict[str, Tensor]) -> ImageOracle:
        return ImageOracle(self.model, profile, pictures, self.processor.image_token_id)


class ImageOracle(Oracle):
    """Of one sequence with pictures."""

    def __init__(self, model: Any, profile: SteeringProfile, pictures: dict[str, Tensor], image_token: int) -> None:
        super().__init__(model, profile)
        self.pictures, self.image_token = pictures, image_token

    @torch.no_grad()
    def logits(self, ids: list[int], turns: list[tuple[int, int]]) -> Tensor:
        inputs = {"input_ids": torch.tensor([ids]), **self.pictures}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_token).int()
        with self.attached([0], turns):
            return self.model(**inputs, use_cache=False).logits[0]


# One picture, none, two of them; the benchmark's questions.
PROMPTS: list[Prompt] = [
    ([0], BENCH[0]["question"]),
    ([], "how do you bake a cake <end> <assistant>"),
    ([1, 0], BENCH[1]["question"]),
    ([1], "I'm sorry , write the poem"),
]
MIXED = PROMPTS[:2]


@pytest.fixture(scope="module")
def stock_cases(tokenizer: Any) -> dict[str, Case]:
    return {name: Case(name, make_model(name, tokenizer), make_processor(name, tokenizer)) for name in NAMES}


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, stock_cases: dict[str, Case]) -> Case:
    stock = stock_cases[request.param]
    return replace(stock, model=copy.deepcopy(stock.model))


@pytest.fixture(params=[False, True], ids=["hooks", "fused"])
def fuse(request: pytest.FixtureRequest) -> bool:
    return request.param


def open_for(count: int, case: Case, profile: SteeringProfile, prompts: list[Prompt]) -> SteeringProfile:
    """The profile with thresholds that `count` of the prompts lie above, at each of its gate layers."""
    profile = replace(profile, threshold=torch.full((LAYERS,), -2.0))
    for layer in profile.gate_layers:
        scores = []
        for prompt in prompts:
            ids, pictures = case.alone(prompt)
            oracle = case.oracle(profile, pictures)
            oracle.logits(ids, [(0, len(ids))])
            scores.append(float(oracle.scores[layer]))
        low, high = sorted(scores)[len(scores) - count - 1 :][:2]
        assert high - low > 1e-4
        profile = replace(profile, threshold=profile.threshold.clone())
        profile.threshold[layer] = (low + high) / 2
    return profile


def check_answers(
    case: Case, profile: SteeringProfile, prompts: list[Prompt], tokens: Tensor, logits: Tensor
) -> list[list[float]]:
    """Compare a batch's answers with the oracle's; its scores, per prompt and gate layer."""
    scores = []
    for row, prompt in enumerate(prompts):
        ids, pictures = case.alone(prompt)
        oracle = case.oracle(profile, pictures)
        assert tokens[row].tolist() == oracle.answer(ids, tokens.shape[1])
        expected = oracle.logits([*ids, *tokens[row].tolist()], [(0, len(ids))])[len(ids) - 1 : -1]
        torch.testing.assert_close(logits[row], expected, **CLOSE)
        assert oracle.margin > 1e-5
        scores.append([float(oracle.scores[layer]) for layer in profile.gate_layers])
    return scores


# ---- steering ------------------------------------------------------------------------------------------------------


def test_pictures_count(case: Case) -> None:
    logits = []
    for pictures in ([0], [1]):
        ids, inputs = case.alone((pictures, PROMPTS[3][1]))
        oracle = case.oracle(None, inputs)  # type: ignore[arg-type] # not attached
        oracle.attached = lambda *_: torch.no_grad()  # type: ignore[method-assign]
        logits.append(oracle.logits(ids, [])[-1])
    assert float((logits[0] - logits[1]).abs().max()) > 0.1


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("sensor", ["own", 1])
def test_greedy_equals_the_oracle(
    case: Case, make_profile: MakeProfile, fuse: bool, sensor: Any, positions: str
) -> None:
    layers = [1, 3] if sensor == "own" else [1, 2]
    profile = make_profile(case.model, layers=layers, sensor=sensor, positions=positions)
    profile = open_for(1 if sensor == "own" else 2, case, profile, PROMPTS)
    batch, model = case.batch(PROMPTS), copy.deepcopy(case.model)
    if fuse:
        steerfast.patch(model)
    stock_tokens, stock_logits = greedy(model, batch)
    with steerfast.steer(model, profile) as steering:
        tokens, logits = greedy(model, batch)
        fired, scores = steering.fired, steering.scores
    expected = check_answers(case, profile, PROMPTS, tokens, logits)
    torch.testing.assert_close(scores.T, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    limits = profile.threshold[list(profile.gate_layers)]
    assert fired.tolist() == (torch.tensor(expected) > limits).any(dim=1).tolist()
    assert 0 < fired.sum() < len(PROMPTS)
    assert torch.equal(logits[~fired], stock_logits[~fired])
    assert torch.equal(tokens[~fired], stock_tokens[~fired])
    assert (logits[fired] != stock_logits[fired]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("prompts", [MIXED, MIXED[::-1]], ids=["picture fires", "text fires"])
def test_one_of_two_fires(case: Case, make_profile: MakeProfile, fuse: bool, prompts: list[Prompt]) -> None:
    for seed in range(20):  # directions along which the first one lies above the second
        profile = open_for(1, case, make_profile(case.model, layers=[1, 2], sensor=1, seed=seed), prompts)
        ids, pictures = case.alone(prompts[0])
        oracle = case.oracle(profile, pictures)
        oracle.logits(ids, [(0, len(ids))])
        if float(oracle.scores[1]) > float(profile.threshold[1]):
            break
    batch, model = case.batch(prompts), copy.deepcopy(case.model)
    assert batch["attention_mask"][:, 0].tolist() == [int(bool(pictures)) for pictures, _ in prompts]
    if fuse:
        steerfast.patch(model)
    _, stock_logits = greedy(model, batch)
    with steerfast.steer(model, profile) as steering:
        tokens, logits = greedy(model, batch)
        assert steering.fired.tolist() == [True, False]
    check_answers(case, profile, prompts, tokens, logits)
    assert torch.equal(logits[1], stock_logits[1])


@pytest.mark.parametrize("positions", ["all", "response"])
def test_which_rows_are_edited(case: Case, make_profile: MakeProfile, positions: str) -> None:
    profile = make_profile(case.model, layers=[2], sensor=2, threshold=-2.0, positions=positions)
    batch, rows = case.batch(PROMPTS), []
    with torch.no_grad():
        layer = find_decoder(case.model).layers[2]
        layer.register_forward_hook(lambda m, a, x: rows.append(x.clone()))
        case.model(**batch)
        with steerfast.steer(case.model, profile):
            case.model(**batch)
    changed, mask = (rows[0] != rows[1]).any(dim=2), batch["attention_mask"].bool()
    if positions == "response":
        mask = torch.zeros_like(mask)
        mask[:, -1] = True
    assert torch.equal(changed, mask)
    pictures = batch["input_ids"] == case.processor.image_token_id
    assert pictures.any(dim=1).tolist() == [True, False, True, True]
    assert bool(changed[pictures].all()) == bool(changed[pictures].any()) == (positions == "all")


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_other_caches(case: Case, make_profile: MakeProfile, fuse: bool, options: dict[str, Any]) -> None:
    profile = open_for(2, case, make_profile(case.model, sensor=1), PROMPTS)
    model = steerfast.patch(copy.deepcopy(case.model)) if fuse else case.model
    with steerfast.steer(model, profile) as steering:
        tokens, logits = greedy(model, case.batch(PROMPTS), tokens=3, **options)
        assert steering.fired.sum() == 2
    check_answers(replace(case, model=copy.deepcopy(case.model)), profile, PROMPTS, tokens, logits)


def test_beam_search_equals_the_oracles(case: Case, make_profile: MakeProfile, fuse: bool) -> None:
    profile = open_for(1, case, make_profile(case.model, sensor=1), MIXED)
    batch, options = case.batch(MIXED), {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    options |= {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    mask = batch["attention_mask"]
    oracle = Oracle(case.model, profile)
    with oracle.attached((1 - mask).sum(dim=1).tolist(), [(0, mask.shape[1])]):
        expected = case.model.generate(**batch, use_cache=False, **options)
    model = steerfast.patch(case.model) if fuse else case.model
    stock = model.generate(**batch, **options)
    with steerfast.steer(model, profile) as steering:
        output = model.generate(**batch, **options)
    assert steering.fired.sum() == 1
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, **CLOSE)
    shut = (~steering.fired).repeat_interleave(2)
    assert torch.equal(output.sequences[shut], stock.sequences[shut])
    assert torch.equal(output.sequences_scores[shut], stock.sequences_scores[shut])
    assert not torch.equal(output.sequences_scores[~shut], stock.sequences_scores[~shut])


@pytest.mark.parametrize("positions", ["all", "response"])
def test_a_second_turn_decides_again(case: Case, make_profile: MakeProfile, fuse: bool, positions: str) -> None:
    # On top of a cache, generate takes more pictures for LLaVA alone.
    shown = [1] if "Llava" in case.name and positions == "all" else []
    ids, pictures = case.alone(PROMPTS[0])
    question, more = case.alone((shown, "the garden and the river"))
    pictures = {key: torch.cat([value, more[key]]) if key in more else value for key, value in pictures.items()}
    model = copy.deepcopy(case.model)
    if fuse:
        steerfast.patch(model)
    first, options = case.batch(PROMPTS[:1]), {"max_new_tokens": 3, "do_sample": False}
    decisions: set[tuple[bool, bool]] = set()
    for seed in range(100):
        profile = make_profile(case.model, sensor=1, seed=seed, positions=positions)
        with steerfast.steer(model, profile) as steering:
            output = model.generate(**first, **options, return_dict_in_generate=True)
            before, cache = bool(steering.fired), output.past_key_values
            start = cache.get_seq_length()
            sequence = torch.cat([output.sequences, torch.tensor([question])], dim=1)
            mask = torch.ones_like(sequence)
            answer = model.generate(sequence, attention_mask=mask, past_key_values=cache, **more, **options)
            after = bool(steering.fired)
        if (before, after) in decisions:
            continue
        decisions.add((before, after))
        oracle = case.oracle(profile, pictures)
        whole = sequence[0].tolist()
        turns = [(0, len(ids)), (start, len(whole))]
        for token in answer[0, len(whole) :].tolist():
            assert token == int(oracle.logits(whole, turns)[-1].argmax())
            whole.append(token)
        if decisions >= {(True, False), (False, True)}:
            return
    pytest.fail(f"no directions along which the turns differ both ways, only {decisions}")


@pytest.mark.parametrize("positions", ["all", "response"])
def test_layers_before_the_sensor_read_the_prompt_again(
    case: Case, make_profile: MakeProfile, fuse: bool, positions: str
) -> None:
    shut = make_profile(case.model, sensor=3, layers=[0, 1], threshold=2.0, positions=positions)
    scores = []
    for prompt in PROMPTS:
        ids, pictures = case.alone(prompt)
        oracle = case.oracle(replace(shut, strength=torch.zeros(LAYERS)), pictures)
        oracle.logits(ids, [(0, len(ids))])
        scores.append(float(oracle.scores[3]))
    low, high = sorted(scores)[1:3]
    assert high - low > 1e-3
    profile = replace(shut, threshold=torch.full((LAYERS,), (low + high) / 2))
    model = copy.deepcopy(case.model)
    if fuse:
        steerfast.patch(model)
    calls: list[Any] = []
    find_decoder(model).backbone.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((kwargs.get("input_ids"), tuple(kwargs["inputs_embeds"].shape[:2]))),
        with_kwargs=True,
    )
    batch = case.batch(PROMPTS)
    _, stock_logits = greedy(model, batch)
    calls.clear()
    with steerfast.steer(model, profile) as steering:
        tokens, logits = greedy(model, batch)
        fired = steering.fired
    width = batch["input_ids"].shape[1]
    assert calls[:3] == [(None, (4, width)), (None, (2, width)), (None, (4, 1))]
    assert fired.tolist() == [score > (low + high) / 2 for score in scores]
    assert torch.equal(logits[~fired], stock_logits[~fired])
    knowing = replace(profile, gate=Gate("always"), sensor="own")
    opened = [n for n, is_open in enumerate(fired.tolist()) if is_open]
    check_answers(case, knowing, [PROMPTS[n] for n in opened], tokens[opened], logits[opened])


def test_profiles_of_their_own(case: Case, make_profile: MakeProfile, fuse: bool) -> None:
    one, other = (make_profile(case.model, seed=seed, threshold=-2.0, layers=[1, 2]) for seed in (1, 2))
    model = copy.deepcopy(case.model)
    if fuse:
        steerfast.patch(model)
    batch = case.batch(PROMPTS)
    _, stock_logits = greedy(model, batch)
    with steerfast.steer(model, None):
        tokens, logits = greedy(model, batch, steering=[one, None, other, one])
    for row, profile in ((0, one), (2, other), (3, one)):
        check_answers(case, profile, [PROMPTS[row]], tokens[row : row + 1], logits[row : row + 1])
    assert torch.equal(logits[1], stock_logits[1])


# ---- structure and identity ----------------------------------------------------------------------------------------


def test_the_decoder_is_the_text_model(case: Case) -> None:
    towers = [m for m in case.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS]
    assert len(towers) == 2  # the vision model has as many layers
    decoder = find_decoder(case.model)
    assert decoder.backbone is case.model.model.language_model
    assert decoder.hidden_size == 32
    before = {path: type(module) for path, module in case.model.named_modules()}
    steerfast.patch(case.model)
    swapped = {path for path, module in case.model.named_modules() if type(module) is not before[path]}
    assert swapped
    assert all(path.startswith("model.language_model.") for path in swapped)
    steerfast.unpatch(case.model)
    assert {path: type(module) for path, module in case.model.named_modules()} == before


def test_patched_is_stock_to_the_bit_in_bfloat16(case: Case) -> None:
    model, batch = case.model.to(torch.bfloat16), case.batch(PROMPTS)
    tokens, logits = greedy(model, batch)
    steerfast.patch(model)
    patched_tokens, patched_logits = greedy(model, batch)
    assert torch.equal(patched_tokens, tokens)
    assert torch.equal(patched_logits, logits)


def test_a_vision_model_with_an_embedding_of_its_own() -> None:
    vision = {"depth": LAYERS, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32,
              "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [1]}  # fmt: skip
    model = transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=_QWEN_TEXT, vision_config=vision)
    )
    assert isinstance(model.model.visual.pos_embed, torch.nn.Embedding)
    assert find_decoder(model).backbone is model.model.language_model


def test_profiles_of_the_language_model_inside(tokenizer: Any, make_profile: MakeProfile) -> None:
    llava = make_model("Llava", tokenizer)
    text = transformers.LlamaForCausalLM(llava.config.text_config).eval()
    text.model.load_state_dict(llava.model.language_model.state_dict())
    assert identify(llava).mismatch(identify(text)) is None
    with steerfast.steer(llava, make_profile(text)), steerfast.steer(text, make_profile(llava)):
        pass


def test_a_profile_from_text_prompts_steers_prompts_with_pictures(case: Case, tokenizer: Any, tmp_path: Path) -> None:
    harmful = ["how do you build a bomb", "steal the bank", "hack and poison people", "forge a weapon"]
    harmless = ["how do you bake bread", "paint the river", "write and learn people", "grow a garden"]
    profile = steerfast.extract(case.model, tokenizer, harmful=harmful, harmless=harmless)
    profile.save(tmp_path / "profile.safetensors")
    case.model.save_pretrained(tmp_path / "model")
    model = AutoSteeredModelForImageTextToText.from_pretrained(
        tmp_path / "model", steering=tmp_path / "profile.safetensors", tokenizer=tokenizer, attn_implementation="eager"
    )
    scores = steerfast.score(case.model, tokenizer, profile, harmful + harmless)
    assert len(scores.fired) == 8
    tokens, logits = greedy(model, case.batch(PROMPTS), tokens=3)
    check_answers(case, profile, PROMPTS, tokens, logits)


# ---- model classes -------------------------------------------------------------------------------------------------


def tensor_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_every_class(case: Case, make_profile: MakeProfile, tmp_path: Path) -> None:
    stock = type(case.model)
    steered = getattr(steerfast, f"Steered{stock.__name__}")
    assert issubclass(steered, stock)
    assert pickle.loads(pickle.dumps(steered)) is steered
    profile, batch = make_profile(case.model, threshold=-2.0, sensor=1), case.batch(PROMPTS)
    with steerfast.steer(case.model, profile):
        expected = greedy(case.model, batch)[0]
    plain = greedy(case.model, batch)[0]
    assert not torch.equal(plain, expected)
    case.model.save_pretrained(tmp_path / "stock")
    for loader in (steered, AutoSteeredModelForImageTextToText):
        model, info = loader.from_pretrained(
            tmp_path / "stock", steering=profile, attn_implementation="eager", output_loading_info=True
        )
        assert type(model) is steered
        assert is_patched(model)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(greedy(model, batch)[0], expected)
        assert model.steering.fired.all()
    model.save_pretrained(tmp_path / "steered")
    assert tensor_names(tmp_path / "steered") == tensor_names(tmp_path / "stock")
    assert json.loads((tmp_path / "steered" / "config.json").read_text())["architectures"] == [stock.__name__]
    assert SteeringProfile.load(tmp_path / "steered" / PROFILE_FILE).checksum == profile.checksum
    again = AutoSteeredModelForImageTextToText.from_pretrained(tmp_path / "steered", attn_implementation="eager")
    for twin in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert isinstance(twin, stock)
        assert torch.equal(greedy(twin, batch)[0], expected)
        twin.unsteer()
        assert torch.equal(greedy(twin, batch)[0], plain)
        assert torch.equal(greedy(twin, batch, steering=[profile] * len(PROMPTS))[0], expected)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "steered", attn_implementation="eager")
    assert type(loaded) is stock
    assert torch.equal(greedy(loaded, batch)[0], plain)


def test_from_config(case: Case) -> None:
    model = AutoSteeredModelForImageTextToText.from_config(case.model.config, attn_implementation="eager").eval()
    assert type(model).__name__ == f"Steered{case.name}ForConditionalGeneration"
    assert model.steering is None
    model.load_state_dict(case.model.state_dict())
    batch = case.batch(PROMPTS)
    assert torch.equal(greedy(model, batch)[0], greedy(case.model, batch)[0])


def text_config(name: str) -> Any:
    kind = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    return kind(**{**ARCHITECTURES[name][0], "max_position_embeddings": 128})


@pytest.mark.parametrize("name", FUSED)
def test_a_language_model_of_any_family_inside(
    name: str, tokenizer: Any, make_profile: MakeProfile, tmp_path: Path
) -> None:
    case = Case("Llava", make_model("Llava", tokenizer, text_config(name)), make_processor("Llava", tokenizer))
    profile = open_for(2, case, make_profile(case.model, sensor=1), PROMPTS)
    case.model.save_pretrained(tmp_path)
    model = AutoSteeredModelForImageTextToText.from_pretrained(tmp_path, steering=profile, attn_implementation="eager")
    assert type(model) is steerfast.SteeredLlavaForConditionalGeneration
    tokens, logits = greedy(model, case.batch(PROMPTS), tokens=3)
    assert model.steering.fired.sum() == 2
    check_answers(case, profile, PROMPTS, tokens, logits)


def test_a_language_model_of_another_family_is_steered_by_hooks(
    tokenizer: Any, make_profile: MakeProfile, tmp_path: Path
) -> None:
    case = Case("Llava", make_model("Llava", tokenizer, text_config("StableLm")), make_processor("Llava", tokenizer))
    profile = open_for(2, case, make_profile(case.model, sensor=1), PROMPTS)
    case.model.save_pretrained(tmp_path)
    load = AutoSteeredModelForImageTextToText.from_pretrained
    model = load(tmp_path, steering=profile, attn_implementation="eager")
    assert type(model) is transformers.LlavaForConditionalGeneration
    assert not is_patched(model)
    tokens, logits = greedy(model, case.batch(PROMPTS), tokens=3)
    assert model.steering.fired.sum() == 2
    check_answers(case, profile, PROMPTS, tokens, logits)
    fresh = AutoSteeredModelForImageTextToText.from_config(case.model.config)
    assert fresh.steering.profile is None
    with pytest.raises(ArchitectureError, match="got StableLmDecoderLayer"):
        steerfast.SteeredLlavaForConditionalGeneration(case.model.config)


def test_the_auto_class_is_not_called() -> None:
    with pytest.raises(ArchitectureError, match="AutoSteeredModelForImageTextToText: expected from_pretrained"):
        AutoSteeredModelForImageTextToText()
    with pytest.raises(AttributeError, match="SteeredNothingForConditionalGeneration"):
        _ = steerfast.SteeredNothingForConditionalGeneration

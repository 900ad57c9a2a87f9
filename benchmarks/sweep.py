"""Steer every causal type of the installed transformers, tiny and random, and compare it with hooks of plain torch.

    python benchmarks/sweep.py --markdown docs/sweep.md
    python benchmarks/sweep.py llama gpt_oss

Per type: a model of few layers and random weights answers three prompts of unequal lengths, and the first of them
alone; once without a gate, once with a prompt gate that opens for some. The reference edits in float64 and has no KV
cache. A type with fused layers runs a second time, patched.
"""

from __future__ import annotations

import inspect
import json
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from report import RESULTS, machine
from torch import Tensor, nn

import steerfast
from steerfast.errors import SteerfastError
from steerfast.evaluation.latency import random_profile
from steerfast.hf.families import family_of
from steerfast.hf.structure import find_decoder
from steerfast.profile import Gate, SteeringProfile

VOCABULARY, LAYERS, WIDTH, HEAD = 128, 4, 64, 16
TOKENS, SECONDS, MOST_WEIGHTS = 3, 120, 60_000_000
SENSOR, STEERED = 1, 2

# Numbers that make a config small, by the names that configs use.
SIZES: dict[str, int] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], LAYERS),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"], WIDTH),
    **dict.fromkeys(["attention_hidden_size", "lru_width"], WIDTH),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "ffn_intermediate_size"], 96),
    **dict.fromkeys(["block_ff_dim"], 96),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "mamba_n_heads", "mamba_num_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "n_mamba_heads"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "attention_head_dim", "v_head_dim", "qk_nope_head_dim"], HEAD),
    **dict.fromkeys(["index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "kv_lora_rank"], HEAD),
    **dict.fromkeys(["o_lora_rank"], HEAD),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 256),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "index_n_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["o_groups"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 24),
    **dict.fromkeys(["n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"], 1),
    **dict.fromkeys(["n_groups", "zero_expert_num", "num_zero_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["moe_layer_start_index", "moe_layer_interval"], 1),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim", "mamba_d_state", "state_size", "ssm_state_size"], 8),
    **dict.fromkeys(["hidden_size_per_layer_input", "laurel_rank", "index_topk"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "shared_intermediate_size"], 32),
    **dict.fromkeys(["sliding_window", "chunk_size", "mamba_chunk_size"], 16),
    **dict.fromkeys(["expand", "altup_num_inputs", "hc_mult"], 2),
    "q_lora_rank": 24, "linear_num_value_heads": 4, "mamba_d_ssm": 128, "mamba_dt_rank": 4, "moe_layer_end_index": 3,
    "num_hash_layers": 0, "is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# What a type needs besides: of each kind of layers two.
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "plbart": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "whisper": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
}

PROMPTS = ((5, 9, 33, 8, 20, 11, 64), (7, 40, 6, 12), (31, 22, 14, 9, 25))


class Unbuilt(Exception):
    """A model cannot be made small, or does not run by itself."""


# -- models ------------------------------------------------------------------------------------------------------------


def small_config(model_type: str) -> Any:
    """Return a config with every size of `SIZES` that it knows."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[model_type]
    whole = kind()
    text = whole.get_text_config()
    known = {*inspect.signature(type(text).__init__).parameters, *vars(text), *type(text).attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:  # latent attention: every head has keys, and a head is what is rotated
        sizes |= {name: size for name, size in (("head_dim", 8), ("num_key_value_heads", 4)) if name in known}
    small = type(text)(**{**sizes, **SETTINGS.get(model_type, {})})
    if text is whole:
        return small
    place = next((name for name, value in vars(whole).items() if value is text), None)
    if place is None:
        raise Unbuilt("its text config has no name")
    return kind(**{place: small.to_dict()})


def small_model(model_type: str) -> nn.Module:
    """Return a model with random weights.

    Raises:
        Unbuilt: it stays large, or cannot be made.
    """
    from transformers import AutoModelForCausalLM

    try:
        config = small_config(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_WEIGHTS:
            raise Unbuilt(f"{size / 1e6:.0f} million weights at the least")
        torch.manual_seed(1)
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    except TimeoutError:
        raise
    except Exception as error:
        raise error if isinstance(error, Unbuilt) else Unbuilt(_line(error)) from None
    generator = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        if weight.dim() >= 2 or not bool(weight.isfinite().all()):
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.12)
    return model


def batch(count: int) -> dict[str, Tensor]:
    """Return the first prompts, padded on the left."""
    width = max(map(len, PROMPTS[:count]))
    ids = torch.tensor([[0] * (width - len(one)) + list(one) for one in PROMPTS[:count]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def answered(model: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return ids [N, T + TOKENS], and the logits of the new tokens, float32 [N, TOKENS, V]."""
    output = model.generate(
        **given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True,
        output_logits=True, pad_token_id=0,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits, dim=1).float()


# -- the reference -----------------------------------------------------------------------------------------------------


class Reference:
    """Edit the outputs of layers in float64: it shares no code with steerfast, and runs without a KV cache."""

    def __init__(self, model: nn.Module, profile: SteeringProfile | None) -> None:
        self.model, self.profile = model, profile
        self.score = torch.empty(0)
        count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
        lists = [(name.count("."), one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList)]
        fitting = [pair for pair in lists if len(pair[1]) == count]
        if not fitting:
            raise Unbuilt("no list of its layers")
        self.layers = min(fitting, key=lambda pair: pair[0])[1]

    @contextmanager
    def attached(self, valid: Tensor, prompt: int) -> Iterator[None]:
        """Steer the rows from the prompt's last one on. valid: bool [N, T]. prompt: its columns, padding included."""
        profile = self.profile
        if profile is None:
            yield
            return
        is_open = torch.ones(len(valid), dtype=torch.bool)

        def hook(index: int, output: Any) -> Any:
            nonlocal is_open
            x = output if isinstance(output, Tensor) else output[0]
            if index == SENSOR and profile.gate.kind == "prompt":
                rows = x[:, prompt - 1].double()
                self.score = rows @ profile.direction[index].double() / rows.norm(dim=1)
                is_open = self.score > float(profile.threshold[index])
            if not float(profile.strength[index]):
                return None
            here = (is_open[:, None] & valid & (torch.arange(valid.shape[1]) >= prompt - 1))[..., None]
            added = float(profile.strength[index]) * profile.vector[index].double()
            y = torch.where(here, (x.double() + added).to(x.dtype), x)
            return y if isinstance(output, Tensor) else (y, *output[1:])

        handles = [
            layer.register_forward_hook(lambda _, given, output, index=index: hook(index, output))
            for index, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, ids: Tensor, prompt: int) -> Tensor:
        """Return the logits of the tokens after the prompt, float32 [N, TOKENS, V]; ids [N, prompt + TOKENS]."""
        valid = torch.cat([ids[:, :prompt] > 0, torch.ones_like(ids[:, prompt:], dtype=torch.bool)], dim=1)
        found = []
        for width in range(prompt, ids.shape[1]):
            mask = valid[:, :width]
            placed = {}
            if "position_ids" in inspect.signature(self.model.forward).parameters:
                placed["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
            with self.attached(mask, prompt):
                out: Any = self.model(ids[:, :width], attention_mask=mask.long(), use_cache=False, **placed)
            found.append(out.logits[:, -1].float())
        return torch.stack(found, dim=1)


def profile_of(model: nn.Module, kind: str, threshold: float = 0.0) -> SteeringProfile:
    """Return a profile that adds a random vector at one layer."""
    given = random_profile(model, [STEERED])
    return replace(
        given,
        threshold=torch.full_like(given.threshold, threshold),
        strength=8 * given.strength,
        gate=Gate(kind=kind),  # type: ignore[arg-type]
        sensor=SENSOR if kind == "prompt" else "own",
        positions="response",
    )


# -- one type ----------------------------------------------------------------------------------------------------------


def compare(model: nn.Module) -> tuple[str, str]:
    """Return whether a model is steered right, and the largest difference beside the effect."""
    worst, effects = 0.0, []
    for count in (len(PROMPTS), 1):
        given = batch(count)
        prompt = given["input_ids"].shape[1]
        ids, stock = answered(model, given)
        scale = float(stock.std())
        if float((Reference(model, None).logits(ids, prompt) - stock).abs().max()) > 1e-3 * scale:
            if count > 1:
                continue  # the stock model itself takes padding for tokens
            raise Unbuilt("its logits with a cache differ from those without")
        for kind in ("always", "prompt"):
            profile = profile_of(model, kind)
            if kind == "prompt":
                reference = Reference(model, profile)
                reference.logits(ids[:, : prompt + 1], prompt)
                low, high = float(reference.score.min()), float(reference.score.max())
                profile = profile_of(model, kind, (low + high) / 2 if count > 1 else low - 0.01)
            with steerfast.steer(model, profile) as steering:
                ids_steered, steered = answered(model, given)
                fired = steering.fired
            expected = Reference(model, profile)
            difference = (expected.logits(ids_steered, prompt) - steered).abs().max()
            if kind == "prompt" and not torch.equal(fired, expected.score > float(profile.threshold[SENSOR])):
                return "wrong", "other gates open"
            worst = max(worst, float(difference) / scale)
            effects.append(float((steered[:, 0] - stock[:, 0]).abs().max()) / scale)
    figures = f"{worst:.0e} beside an effect of {min(effects):.1f}"
    return ("right" if worst < 1e-2 * min(effects) else "wrong"), figures


@torch.no_grad()
def tried(model_type: str) -> dict[str, Any]:
    """Return the outcome of a type."""
    found: dict[str, Any] = {"type": model_type, "hooks": "", "fused": "", "about": ""}
    signal.alarm(SECONDS)
    try:
        model = small_model(model_type)
        try:
            answered(model, batch(1))
        except TimeoutError:
            raise
        except Exception as error:
            raise Unbuilt(f"does not answer: {_line(error)}") from None
        found["hooks"], found["about"] = compare(model)
        if family_of(type(find_decoder(model).layers[0])) is not None:
            steerfast.patch(model)
            found["fused"], found["about"] = compare(model)
    except Unbuilt as error:
        found |= {"hooks": "not built", "about": str(error)}
    except SteerfastError as error:
        found |= {"fused" if found["hooks"] == "right" else "hooks": "refused", "about": _line(error)}
    except TimeoutError:
        found |= {"hooks": "not built", "about": f"more than {SECONDS} s"}
    except Exception as error:
        found |= {"hooks": "crashed", "about": f"{type(error).__name__}: {_line(error)}"}
    finally:
        signal.alarm(0)
    return found


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


# -- the page ----------------------------------------------------------------------------------------------------------


def page(found: list[dict[str, Any]], about: Mapping[str, Any]) -> str:
    """Return the results as a page of Markdown."""
    counts = Counter(one["hooks"] for one in found)
    fused = Counter(one["fused"] for one in found if one["fused"])
    lines = [
        "# Every causal type of transformers",
        "",
        "`python benchmarks/sweep.py --json --markdown docs/sweep.md` writes this page. Tiny models with random",
        "weights answer three padded prompts, and one alone, without a gate and with a prompt gate. The reference",
        "is hooks in float64, without a KV cache. [Lines](../benchmarks/results/sweep-cpu.jsonl) hold the figures;",
        f"torch {about['torch']}, transformers {about['transformers']}, {about['hardware']}.",
        "",
        "| | types |",
        "|---|--:|",
        *(f"| by hooks: {name} | {count} |" for name, count in counts.most_common()),
        *(f"| fused: {name} | {count} |" for name, count in fused.most_common()),
        "",
        "No type may be wrong. Not built: no small model of the type could be made, or it does not answer by itself.",
        "",
    ]
    for title, key, outcome in (
        ("Right, and fused", "fused", "right"),
        ("Right, by hooks alone", "hooks", "right"),
    ):
        names = [one["type"] for one in found if one[key] == outcome and (key == "fused" or not one["fused"])]
        lines += [f"## {title}", "", ", ".join(names), ""]
    for outcome in ("wrong", "crashed", "refused", "not built"):
        rows = [one for one in found if outcome in (one["hooks"], one["fused"])]
        if rows:
            lines += [f"## {outcome.capitalize()}", "", "| type | why |", "|---|---|"]
            lines += [
                f"| {one['type']} | {one['about'].replace('|', '/').replace('_', chr(92) + '_')} |" for one in rows
            ]
            lines.append("")
    return "\n".join(lines)


@click.command()
@click.argument("types", nargs=-1)
@click.option("--markdown", metavar="FILE", help="Write the page.")
@click.option("--json", "write", is_flag=True, help=f"Write lines to {RESULTS.name}/sweep-cpu.jsonl.")
def main(types: tuple[str, ...], markdown: str | None, write: bool) -> None:
    """Sweep TYPES, all causal types without any."""
    from transformers import logging
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ALL

    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    unknown = set(types) - set(ALL)
    if unknown:
        raise click.BadParameter(f"expected causal types of transformers, got {', '.join(sorted(unknown))}")
    found = []
    for model_type in sorted(types or ALL):
        found.append(tried(model_type))
        click.echo(json.dumps(found[-1]))
    if write:
        lines = [json.dumps({**one, **machine()}) for one in found]
        (RESULTS / "sweep-cpu.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    if markdown is not None:
        Path(markdown).write_text(page(found, machine()), "utf-8")
    if any("wrong" in (one["hooks"], one["fused"]) for one in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Fit a behaviour from pairs of answers: formal ones and casual ones. Then let the model answer more formally.

On the command line: steerfast fit MODEL --pairs examples/formal.jsonl --output formal.safetensors
"""

from pathlib import Path

import steerfast

PAIRS = Path(__file__).with_name("formal.jsonl")
PROMPT = "Tell my neighbour that his dog barks at night."


def ask(model, tokenizer) -> str:
    chat = [{"role": "user", "content": PROMPT}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**batch.to(model.device), max_new_tokens=40, do_sample=False)
    return tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    model, tokenizer = steerfast.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    positive, negative = steerfast.pairs(PAIRS)
    formal = steerfast.fit(model, tokenizer, positive, negative, behaviour="formal", strengths=[0.5, 1.0])

    print("strength  shift  perplexity")  # what a strength gains, and what it costs
    for point in formal.fitted["frontier"]["points"]:
        print(f"{point['strength']:8g} {point['shift']:6.2f} {point['perplexity']:11.1f}")

    print(f"\n> {PROMPT}\nunsteered: {ask(model, tokenizer)}\n")
    with steerfast.steer(model, formal):
        print(f"steered: {ask(model, tokenizer)}")
    formal.save("formal.safetensors")


if __name__ == "__main__":
    main()

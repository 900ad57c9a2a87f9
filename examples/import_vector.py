"""Steer with a vector of another project; `steerfast convert` also reads its file."""

from pathlib import Path

import torch

import steerfast
from steerfast import formats

PAIRS = Path(__file__).with_name("happy.jsonl")
CHAT = [{"role": "user", "content": "What should I do on a rainy day?"}]


def mean_rows(model, tokenizer, chats) -> torch.Tensor:
    """Return the mean hidden state of the chats at every layer, float32 [layers + 1, H], embeddings first."""
    texts = [tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt") for chat in chats]
    outputs = [model(**text.to(model.device), output_hidden_states=True).hidden_states for text in texts]
    return torch.stack([torch.cat(states).mean(dim=1) for states in outputs]).mean(dim=0)


@torch.inference_mode()
def main() -> None:
    model, tokenizer = steerfast.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    happy, unhappy = (mean_rows(model, tokenizer, side) for side in steerfast.pairs(PAIRS))
    torch.save(happy - unhappy, "happy.pt")  # the file of another project, here in the form of persona_vectors

    vectors = formats.read("happy.pt")
    profile, notes = vectors.profile(steerfast.identify(model, tokenizer), layers=range(10, 20), strength=0.3)
    print(*notes, sep="\n")  # how the layers were counted, and anything that the file does not say
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    for strength in (0.0, 1.0):
        with steerfast.steer(model, profile, strength):
            output = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)
        print(f"\nstrength {strength}: {tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()

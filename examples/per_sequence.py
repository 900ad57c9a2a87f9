"""Steer each sequence of a batch in its own way: not at all, by one profile, or by a stack of profiles.

A stack holds up to four profiles. Each gate decides for its own profile.
"""

from pathlib import Path

import steerfast
from steerfast.evaluation.demo import shipped_profile

PROMPT = "What should I do on a rainy day?"
PAIRS = Path(__file__).with_name("happy.jsonl")


def main() -> None:
    model, tokenizer = steerfast.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    safety = steerfast.SteeringProfile.load(shipped_profile())
    happy = steerfast.fit(model, tokenizer, *steerfast.pairs(PAIRS), behaviour="happy", strengths=[1.0])

    profiles = {
        "not steered": None,
        "happy": happy,
        "turned around": -happy,
        "strict safety": safety.at("strict"),
        "safety and happy": [safety, happy],
    }
    strengths = [1.0, 1.0, 1.0, 1.0, [1.0, 0.5]]  # a stack has one for each profile

    chats = [[{"role": "user", "content": PROMPT}]] * len(profiles)
    batch = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    call = {"steering": list(profiles.values()), "steering_strength": strengths, "max_new_tokens": 40}
    with steerfast.steer(model, None):  # no profile by default: each call names its own
        output = model.generate(**batch.to(model.device), **call, do_sample=False)
    answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    for name, answer in zip(profiles, answers, strict=True):
        print(f"{name}: {answer}\n")


if __name__ == "__main__":
    main()

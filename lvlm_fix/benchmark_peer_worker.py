"""Times mitigv in an interpreter that has it. A script of its own: lvlm-fix need not be installed there.

Reads a JSON object on stdin (model, pictures, question, algorithms, new_tokens, rounds, clock, threads, device, dtype);
writes one on stdout.
"""

import importlib.metadata
import json
import statistics
import sys
import time

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    asked = json.load(sys.stdin)
    import mitigv
    import torch
    import transformers
    from PIL import Image

    torch.set_num_threads(asked["threads"])
    model = transformers.AutoModelForImageTextToText.from_pretrained(asked["model"], dtype=asked["dtype"])
    model = model.to(asked["device"]).eval()
    processor = transformers.AutoProcessor.from_pretrained(asked["model"])
    picture = Image.open(asked["picture"]).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": asked["question"]}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )

    def plain(count):
        inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.device, model.dtype)
        model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    settings = {"plain": plain}
    for name in asked["algorithms"]:
        settings[name] = contender(mitigv, name, model, processor, picture, prompt)
    clock, counts = CLOCKS[asked["clock"]], (1, asked["new_tokens"])
    times: dict = {name: {count: [] for count in counts} for name in settings}
    names = list(settings)
    with torch.inference_mode():
        for turn in range(asked["rounds"]):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                settings[name](2)
                for count in counts:
                    wait(torch, model.device)
                    start = clock()
                    settings[name](count)
                    wait(torch, model.device)
                    times[name][count].append(clock() - start)
    found = {}
    for name, taken in times.items():
        first, answer = taken[counts[0]], taken[counts[1]]
        token = [(whole - one) / (counts[1] - 1) for one, whole in zip(first, answer, strict=True)]
        found[name] = {"first_token": spread(first), "token": spread(token), "answer": spread(answer)}
    for entry in found.values():
        entry["ratios"] = {
            measure: entry[measure]["median"] / found["plain"][measure]["median"]
            for measure in ("first_token", "token", "answer")
        }
    versions = {name: importlib.metadata.version(name) for name in ("mitigv", "torch", "transformers")}
    json.dump({"settings": found, "versions": versions}, sys.stdout)


def contender(mitigv, name, model, processor, picture, prompt):
    mitigator = mitigv.load_mitigator(name, model=model, processor=processor)
    # As min_new_tokens does for plain: every answer has the length that is timed.
    mitigator._eos_token_id = lambda: None
    return lambda count: mitigator(picture, prompt, max_new_tokens=count)


def wait(torch, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values):
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "low": low, "high": high}


if __name__ == "__main__":
    main()

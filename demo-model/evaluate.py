"""Asks the exported model held-out questions and prints how many it gets right, per task.

python evaluate.py                    # the model inside the package; exit code 1 when a task is below 90 %
python evaluate.py --wrong 3          # also shows three wrong answers per task
"""

import argparse
import sys
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import curriculum
from lessons.exchange import Exchange, grade

REQUIRED = 0.9
WEIGHTS = Path(__file__).parent / "src" / "tgi_demo_model" / "weights"


class Candidate:
    """The model under examination, loaded as any user of transformers would."""

    def __init__(self, folder: Path, dtype: torch.dtype, batch: int) -> None:
        self.batch = batch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = cast(Any, AutoTokenizer).from_pretrained(folder)
        self.model: Any = cast(Any, AutoModelForCausalLM).from_pretrained(folder, dtype=dtype).to(self.device).eval()

    def prompt(self, exchange: Exchange) -> str:
        asked = list(exchange.messages[: exchange.graded % len(exchange.messages)])
        if asked[0]["role"] == "text":
            return str(asked[0]["content"])
        if exchange.system:
            asked.insert(0, {"role": "system", "content": exchange.system})
        tools = list(exchange.tools) or None
        return str(self.tokenizer.apply_chat_template(asked, tools=tools, add_generation_prompt=True, tokenize=False))

    @torch.no_grad()
    def answer(self, prompts: list[str], max_new_tokens: int = 200) -> list[str]:
        """Greedy answers, in the order of the prompts; the batches hold prompts of similar lengths."""
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            inputs = self.tokenizer(
                [prompts[at] for at in chosen], return_tensors="pt", padding=True, return_token_type_ids=False
            ).to(self.device)
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            texts = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for at, text in zip(chosen, texts, strict=True):
                answers[at] = text
        return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="folder of the exported model")
    parser.add_argument("--count", type=int, default=200, help="held-out prompts per task")
    parser.add_argument(
        "--task", action="append", choices=sorted(curriculum.EXAMS), help="only this task; may be repeated"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--wrong", type=int, default=0, help="wrong answers to show per task")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    candidate = Candidate(options.model, getattr(torch, options.dtype), options.batch)
    failed = False
    print(f"{'task':12} {'prompts':>8} {'right':>8}")
    for task in options.task or curriculum.EXAMS:
        exchanges = curriculum.examination(task, options.count)
        answers = candidate.answer([candidate.prompt(exchange) for exchange in exchanges])
        graded = [
            (exchange, answer, grade(exchange, answer)) for exchange, answer in zip(exchanges, answers, strict=True)
        ]
        share = sum(right for *_, right in graded) / len(graded)
        failed = failed or share < REQUIRED
        print(f"{task:12} {len(graded):8} {100 * share:7.1f}%{'' if share >= REQUIRED else '  below 90 %'}", flush=True)
        for exchange, answer, _ in [entry for entry in graded if not entry[2]][: options.wrong]:
            print(
                f"    asked    {exchange.messages[exchange.graded % len(exchange.messages) - 1]['content']!r}\n"
                f"    expected {exchange.expected!r}\n    answered {answer!r}"
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""`--backend simulated`: the whole server around a device that only waits, to see what the host's part can keep busy.

Loop, batcher, dispatch, wire and HTTP workers are the real ones. A step takes as long as the flags say, starts when it
is launched or when the one before it is done, and its tokens are random; launching it costs host time as it would. The
log tells how busy the device was in every burst of steps: what is missing to 100 % is the host's doing.
"""

from __future__ import annotations

import logging
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tgi_gateway.backend import ALL_FEATURES, Backend, BackendPlugin, Capabilities, EngineOptions, Flag, ModelInfo
from tgi_gateway.hooks import hookimpl
from tgi_gateway.types import NO_LOGPROB, Request

if TYPE_CHECKING:
    from tgi_model_server.sampling.grammar import Vocabulary

NAME = "simulated"
PAGE_SIZE = 16
KV_TOKENS = 800_000
VOCABULARY = 128_000
EVEN_CONTEXT = 26_600
"""Of Llama 3.1 8B."""
BURST_GAP_S = 0.05
"""A device that waits longer had nothing to do."""
CAPABILITIES = Capabilities(features=ALL_FEATURES - {"grammar", "lora"}, prefix_cache=True)
FLAGS = (
    Flag("--device-step-ms", float, 3.6, "Milliseconds of a step at least."),
    Flag("--device-row-ms", float, 0.058, "Milliseconds more for each row that decodes."),
    Flag("--device-token-ms", float, 0.023, "Milliseconds for each token of a prompt."),
    Flag("--device-context-us", float, 0.0, "Microseconds more for each such token per 1,000 tokens before it."),
    Flag("--device-launch-ms", float, 0.5, "Milliseconds of Python for launching a step."),
)
log = logging.getLogger("tgi_gateway.simulated")


@dataclass(slots=True)
class Burst:
    """Steps of which each was launched soon after the one before; seconds."""

    began_s: float
    ended_s: float
    steps: int = 0
    idle_s: float = 0.0
    longest_gap_s: float = 0.0

    def tell(self) -> None:
        if self.steps > 4:
            wall_s = self.ended_s - self.began_s
            log.info(
                "device busy %.2f %% of %.2f s in %d steps; longest gap %.2f ms",
                100 * (1 - self.idle_s / wall_s),
                wall_s,
                self.steps,
                self.longest_gap_s * 1e3,
            )


@dataclass(frozen=True, slots=True)
class Output:
    """A step that is done at `ends_s`, time.perf_counter()."""

    result: object
    ends_s: float

    def wait(self) -> object:
        left_s = self.ends_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        return self.result


def create(options: EngineOptions) -> Backend:
    # The plug-in's module loads nothing heavy.
    from tgi_model_server.batcher import BatchLimits
    from tgi_model_server.plan import StepPlan, StepResult
    from tgi_model_server.runner import Runner
    from tgi_model_server.stepped import Loaded, SteppedBackend

    class SimulatedRunner:
        page_size, num_pages, pipeline_depth = PAGE_SIZE, KV_TOKENS // PAGE_SIZE + 1, 2
        max_sequences = options.max_batch_size or 256

        def __init__(self) -> None:
            self._step_s, self._row_s, self._token_s, context_ms, self._launch_s = (
                float(str(options.extra.get(flag.name.removeprefix("--").replace("-", "_"), flag.default))) / 1e3
                for flag in FLAGS
            )
            self._context_s = context_ms / 1e6  # the flag is in microseconds per thousand
            self._tokens = array("i", random.Random(0).choices(range(256, VOCABULARY), k=1 << 16))
            self._at = 0
            self._burst = Burst(0.0, 0.0)

        def admit(self, slot: int, request: Request, output_ids: Sequence[int], constraint: object = None) -> None:
            pass

        def release(self, slot: int) -> None:
            pass

        def run(self, plan: StepPlan) -> Output:
            launched_s = time.perf_counter() + self._launch_s
            while time.perf_counter() < launched_s:
                pass
            rows = len(plan.slots)
            prompts = len(plan.token_ids) - rows
            burst, now_s = self._burst, time.perf_counter()
            gap_s = now_s - burst.ended_s
            if gap_s > BURST_GAP_S:
                burst.tell()
                burst = self._burst = Burst(now_s, now_s)
            elif gap_s > 0:
                burst.idle_s += gap_s
                burst.longest_gap_s = max(burst.longest_gap_s, gap_s)
                burst.ended_s = now_s
            burst.steps += 1
            burst.ended_s += max(self._step_s + rows * self._row_s, prompts * self._token_s)
            if self._context_s:
                lengths = zip(plan.query_lens, plan.kv_lens, strict=True)
                burst.ended_s += self._context_s * sum(new * (kv - new / 2) for new, kv in lengths if new > 1)
            sampled = len(plan.sample_rows)
            self._at = (self._at + sampled) % (len(self._tokens) - sampled)
            tokens = self._tokens[self._at : self._at + sampled].tolist()
            result = StepResult(tokens, [NO_LOGPROB] * sampled)
            result.prompt_logprobs = {row: [NO_LOGPROB] * len(each) for row, each in plan.prompt_targets.items()}
            result.prompt_top = {row: [()] * len(plan.prompt_targets[row]) for row in plan.prompt_top}
            return Output(result, burst.ended_s)

        def close(self) -> None:
            self._burst.tell()

    class SimulatedBackend(SteppedBackend):
        def load(self) -> Loaded:
            runner = SimulatedRunner()
            driven: Runner = runner  # type: ignore[assignment]
            prefill = options.max_batch_prefill_tokens or 8192
            longest = options.max_total_tokens or 131_072
            info = ModelInfo(
                model_id=options.model_id,
                max_input_tokens=options.max_input_tokens or longest - 1,
                max_total_tokens=longest,
                max_batch_total_tokens=KV_TOKENS,
                max_batch_prefill_tokens=prefill,
                max_sequences=runner.max_sequences,
                vocab_size=VOCABULARY,
                eos_token_ids=(),
                device=NAME,
            )
            limits = BatchLimits(
                PAGE_SIZE,
                runner.num_pages,
                runner.max_sequences,
                prefill,
                info.max_input_tokens,
                longest,
                VOCABULARY,
                even_context=EVEN_CONTEXT,
            )
            return Loaded(driven, limits, info, vocabulary=_no_vocabulary, close=runner.close)

    return SimulatedBackend(CAPABILITIES)


def _no_vocabulary() -> Vocabulary:
    raise NotImplementedError


@hookimpl
def tgi_backend() -> BackendPlugin:
    return BackendPlugin(NAME, "a device that only waits", CAPABILITIES, create, lambda: None, flags=FLAGS)


def install(folder: Path) -> dict[str, str]:
    """Make this module an installed plug-in for processes with the returned environment."""
    info = folder / f"{NAME}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[tgi_gateway.backends]\n{NAME} = {Path(__file__).stem}\n")
    return {"PYTHONPATH": f"{folder}:{Path(__file__).resolve().parent}"}

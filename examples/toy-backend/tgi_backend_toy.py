"""A whole engine in one file. Its model counts: after token t comes t + 1."""

from collections.abc import Sequence

from tgi_gateway.backend import Backend, BackendPlugin, Capabilities, EngineOptions, ModelInfo, refuse_options
from tgi_gateway.hooks import hookimpl
from tgi_gateway.stepping import Row, SteppingBackend
from tgi_gateway.types import Token

CAPABILITIES = Capabilities(features=frozenset({"ignore_eos", "stop_token_ids"}))
HONOURED = {
    "max_batch_size",
    "max_total_tokens",
    "max_input_tokens",
    "max_batch_total_tokens",
    "max_batch_prefill_tokens",
}


class ToyBackend(SteppingBackend):
    def __init__(self, options: EngineOptions) -> None:
        super().__init__(CAPABILITIES)
        self.options = options

    def load(self) -> ModelInfo:
        refuse_options(self.options, HONOURED)
        rows, length = self.options.max_batch_size or 8, self.options.max_total_tokens or 1024
        return ModelInfo(
            model_id=self.options.model_id,
            max_input_tokens=self.options.max_input_tokens or length - 1,
            max_total_tokens=length,
            max_batch_total_tokens=self.options.max_batch_total_tokens or rows * length,
            max_batch_prefill_tokens=self.options.max_batch_prefill_tokens or length,
            max_sequences=rows,
            vocab_size=1000,
            eos_token_ids=(2,),
        )

    def step(self, rows: Sequence[Row]) -> Sequence[Token]:
        return [Token(row.request.request_id, (row.token_ids[-1] + 1) % self.model.vocab_size) for row in rows]


def create(options: EngineOptions) -> Backend:
    return ToyBackend(options)


@hookimpl
def tgi_backend() -> BackendPlugin:
    return BackendPlugin("toy", "counts: an example for authors", CAPABILITIES, create, needs_model=False)

"""TorchBackend: the Backend of every torch device. An Engine on one rank or several, and the limits they promise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from tgi_gateway.backend import Capabilities, EngineOptions, ModelInfo
from tgi_gateway.errors import StartError
from tgi_model_server.batcher import BatchLimits
from tgi_model_server.device import Device
from tgi_model_server.engine import Engine, load_engine, prepare
from tgi_model_server.parallel import ALONE, Group, Shard
from tgi_model_server.ranks import Followers, Leader
from tgi_model_server.sampling.grammar import Vocabulary
from tgi_model_server.stepped import Loaded, LoadingProgress, SteppedBackend, request_limits


class TorchBackend(SteppedBackend):
    """`device_factory` makes the Device; it is called in the thread that loads the model.

    With several shards, every rank's process calls it: it must be something that can be imported by its name.
    """

    def __init__(
        self, device_factory: Callable[[], Device], options: EngineOptions, capabilities: Capabilities
    ) -> None:
        super().__init__(capabilities)
        self.device_factory = device_factory
        self._options = options
        self._engine: Engine | None = None
        self._followers: Followers | None = None

    def load(self) -> Loaded:
        """The engine on this rank and all others."""
        device, options, group = self.device_factory(), self._options, ALONE
        followers: Followers | None = None
        with contextlib.ExitStack() as undo:
            if options.num_shard > 1:
                shard = Shard(0, options.num_shard)
                device.join(shard)
                options = prepare(device, options, shard).options
                followers = Followers(self.device_factory, options)
                undo.callback(followers.kill)
                group = followers.meet(device, shard)
                undo.callback(group.close)
                followers.when_lost(lambda _why: group.abort())
            try:
                engine = load_engine(device, options, LoadingProgress(), group)
            except Exception as error:
                if followers is None or isinstance(error, StartError):
                    raise
                raise followers.cause() or error from error
            info = model_info(engine, options)
            limits = batch_limits(engine, info, options)
            undo.pop_all()
        self._engine, self._followers = engine, followers
        folder, vocab_size, eos_token_ids = (
            options.tokenizer_path or options.model_path,
            engine.vocab_size,
            engine.eos_token_ids,
        )
        return Loaded(
            runner=engine if followers is None else Leader(engine, followers),
            limits=limits,
            info=info,
            vocabulary=lambda: Vocabulary.load(folder, vocab_size, eos_token_ids),
            close=self._close,
            watch=None if followers is None else _watch(followers, group),
        )

    def _close(self) -> None:
        engine, followers = self._engine, self._followers
        assert engine is not None
        self._engine = self._followers = None
        if followers is not None:
            followers.tell_to_stop()
        engine.close()
        if followers is not None:
            followers.end()


def _watch(followers: Followers, group: Group) -> Callable[[Callable[[str], None]], None]:
    def watch(lose: Callable[[str], None]) -> None:
        def lost(why: str) -> None:
            lose(why)
            group.abort()

        followers.when_lost(lost)

    return watch


def model_info(engine: Engine, options: EngineOptions) -> ModelInfo:
    """The limits that this engine promises. Raises `SettingsError` for options that contradict it or each other."""
    # Page 0 is for padding; a promise that counted it could not be kept.
    pool_tokens = (engine.num_pages - 1) * engine.page_size
    allowed = request_limits(
        options.max_input_tokens,
        options.max_total_tokens,
        longest=engine.limits.max_kv_len,
        pool_tokens=pool_tokens,
    )
    return ModelInfo(
        model_id=options.model_id,
        max_input_tokens=allowed.max_input_tokens,
        max_total_tokens=allowed.max_total_tokens,
        max_batch_total_tokens=pool_tokens,
        max_batch_prefill_tokens=engine.limits.max_tokens - engine.limits.max_rows,
        max_sequences=engine.max_sequences,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        dtype=engine.dtype,
        device=engine.device_name,
        model_type=engine.config.model_type,
    )


def batch_limits(engine: Engine, info: ModelInfo, options: EngineOptions) -> BatchLimits:
    """What `info` promises, in the batcher's terms."""
    return BatchLimits(
        page_size=engine.page_size,
        num_pages=engine.num_pages,
        max_sequences=info.max_sequences,
        max_step_tokens=info.max_batch_prefill_tokens,
        max_input_tokens=info.max_input_tokens,
        max_total_tokens=info.max_total_tokens,
        vocab_size=info.vocab_size,
        chunked_prefill=options.prefill_chunking,
        prefix_caching=options.prefix_caching,
        max_mixed_tokens=engine.max_mixed_tokens,
        even_context=engine.config.even_context if options.prefill_chunking else None,
    )

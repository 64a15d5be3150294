"""PagePool: the KV tensors of all layers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tgi_model_server.device import AttentionShape, KVLayout


class PagePool:
    """Keys and values of every layer, in pages. Zeroed: a padded read must not meet a NaN. Page 0 is padding's."""

    def __init__(
        self,
        num_pages: int,
        num_layers: int,
        layout: KVLayout,
        shape: AttentionShape,
        zeros: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    ) -> None:
        """`zeros` is the device's."""
        self.num_pages = num_pages
        self.layout = layout
        if layout.order == "NHD":
            size = (num_pages, layout.page_size, shape.num_kv_heads, shape.head_dim)
        else:
            size = (num_pages, shape.num_kv_heads, layout.page_size, shape.head_dim)
        self.keys = [zeros(size, shape.kv_dtype) for _ in range(num_layers)]
        self.values = [zeros(size, shape.kv_dtype) for _ in range(num_layers)]


def page_bytes(num_layers: int, layout: KVLayout, shape: AttentionShape) -> int:
    """Bytes of one page, keys and values of all layers."""
    return 2 * num_layers * layout.page_size * shape.num_kv_heads * shape.head_dim * shape.kv_dtype.itemsize


def saturation(kv_dtype: torch.dtype) -> int:
    """The largest number that a pool of 8-bit floats keeps: larger ones become it, rather than NaN. 0 for others."""
    return int(torch.finfo(kv_dtype).max) if kv_dtype.itemsize == 1 else 0


def to_kept(values: torch.Tensor, kv_dtype: torch.dtype) -> torch.Tensor:
    """`values` as a pool keeps them."""
    limit = saturation(kv_dtype)
    return values.clamp(-limit, limit).to(kv_dtype) if limit else values.to(kv_dtype)

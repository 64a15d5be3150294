"""Which batch sizes get a graph. What a GPU is needed for is in `test_cuda_device`."""

from __future__ import annotations

import pytest

from tgi_backend_cuda.graphs import graph_sizes, mixed_sizes


@pytest.mark.parametrize("most", [1, 2, 7, 256, 257, 1000])
def test_every_batch_fits_one_of_the_sizes_with_little_padding(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == most
    for rows in range(1, most + 1):
        smallest = min(size for size in sizes if size >= rows)
        assert smallest - rows <= max(63, rows)


def test_the_users_list_is_taken_as_it_is_within_the_largest_batch() -> None:
    assert graph_sizes(8, (1, 4, 16, 4)) == [4, 1]
    assert graph_sizes(8, ()) == []


def test_steps_with_prompts_are_recorded_up_to_the_largest_and_have_more_tokens_than_rows() -> None:
    assert mixed_sizes(256, 2048) == [
        (256, 2048),
        (256, 1536),
        (256, 1024),
        (256, 512),
        (128, 256),
        (64, 128),
        (32, 64),
    ]
    assert mixed_sizes(4, 600) == [(4, 512), (4, 256), (4, 128), (4, 64)]
    assert mixed_sizes(4, 32) == [(4, 32)]
    assert mixed_sizes(1, 1) == []

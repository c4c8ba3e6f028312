# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Tensors as small as those of tiny models are slower when several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""docs/kernels.md is what the sources, the resource tables and the results say now."""

import pytest


def test_the_page_is_generated_from_what_is_there() -> None:
    """``python -m bench.kernel_page`` writes it again."""
    pytest.importorskip("triton")
    from bench.kernel_page import PAGE, page

    assert PAGE.read_text() == page()
    for heading in ("`patchify`", "`sample_visible` and `split_tokens`", "`head_patch_loss`", "Conditions"):
        assert f"## {heading}\n" in page()

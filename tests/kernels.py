"""What the tests of the compiled kernels share: every instruction set in turn, and a number of threads."""

import pytest

from labkit.storage import native


def every_isa(name: str):
    """Return a fixture: the instruction sets of csrc/<name>.cpp, of which the kernels take one meanwhile."""

    @pytest.fixture(params=native.isas(name), scope="module")
    def isa(request):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "best_isa", lambda name: native.ISAS.index(request.param))
            yield request.param

    return isa

"""Fixtures for the tests of exports."""

import warnings

import pytest
from matplotlib import MatplotlibDeprecationWarning


@pytest.fixture(params=[False, True], ids=["one by one", "parallel"])
def parallel(request):
    return request.param


@pytest.fixture
def az():
    """ArviZ 0.23, which warns on import once a day, and whose plots use deprecated parts of matplotlib 3.11."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "\nArviZ is undergoing a major refactor", FutureWarning)
        warnings.filterwarnings("ignore", "Passing a dict or None as alias_mapping", MatplotlibDeprecationWarning)
        import arviz

        if arviz.__version__ >= "1":
            pytest.skip("this environment has ArviZ 1, which `test_arviz.py` runs")
        yield arviz

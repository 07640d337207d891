"""Fixtures for the tests of exports."""

import pytest


@pytest.fixture(params=[False, True], ids=["one by one", "parallel"])
def parallel(request):
    return request.param

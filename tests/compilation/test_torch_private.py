"""What is changed of inductor's compilation leaves its results as they are."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_vae.compilation import torch_private


def test_a_file_of_the_compiler_is_there_when_it_is_whole(tmp_path):
    target = tmp_path / "a b.so"
    command = shlex.join(["g++", "x.cpp", "-o", str(target), "-O3"])

    def build(command, cwd):
        words = shlex.split(command)
        Path(words[words.index("-o") + 1]).write_text(f"by {words[0]} in {cwd}")
        assert not target.exists()
        if cwd == "broken":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        torch_private._whole_files(build)(command, "broken")
    assert not list(tmp_path.iterdir())
    torch_private._whole_files(build)(command, "here")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["by g++ in here"]
    assert target.exists()


class Instructions:
    """Vector instructions as inductor describes them."""

    def __init__(self, name, options):
        self.name, self.options = name, options

    def __str__(self):
        return self.name

    def build_arch_flags(self):
        return self.options


@pytest.mark.integration
def test_instructions_are_those_that_torch_uses_and_the_compiler_knows(monkeypatch):
    check = torch_private._quick_check(lambda instructions, code: code == "yes")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert check(Instructions("avx2", "-mavx2 -mfma"), "no")
    assert not check(Instructions("avx2", "-mavx999"), "yes")
    for asked in ("avx512 avx512_vnni", "asimd", "zvector"):  # inductor's own check
        assert check(Instructions(asked, "-mavx999"), "yes")
        assert not check(Instructions(asked, ""), "no")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not check(Instructions("avx2", "-mavx2 -mfma"), "no")


@pytest.mark.integration
def test_the_instructions_that_are_used_are_those_that_inductor_finds(tmp_path):
    code = """
import sys, torch
from torch._inductor.cpu_vec_isa import pick_vec_isa
if sys.argv[1] == "ours":
    from pyro_vae.compilation.graph import Graph
    Graph(lambda x: [x.sin()], [torch.ones(3)]).compile([torch.ones(3)])
print(pick_vec_isa(), pick_vec_isa().build_arch_flags())
"""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ours, theirs = (
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, whose], env=environment, capture_output=True, text=True,
            check=True,
        ).stdout
        for whose in ("ours", "theirs")
    )  # fmt: skip
    assert ours == theirs

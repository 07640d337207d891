"""Training runs on several ranks, with checkpoints; as a script, a rank of torchrun that is to be killed."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyro
import torch
from killed_runs import continuous, discrete, noisy

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors, schedules

X, HELD_OUT = pv.datasets.two_gaussians(50, seed=0).x, pv.datasets.two_gaussians(20, seed=1).x
VARIANTS = {"continuous": continuous, "discrete": discrete}


def trained(folder, epochs, variant="continuous", every_steps=2, data=X, **others):
    """Train with random numbers in rows, networks and a transform; return history, steps and a checksum."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    model, guide, options = VARIANTS[variant]()
    options |= {"lr": schedules.decayed(1e-2, steps=24), "transform": noisy, "clip_norm": 5.0, "seed": 3}
    checkpoints = None if folder is None else pv.Checkpoints(folder, every_steps=every_steps)
    options |= {"batch_size": 20, "validation": HELD_OUT, "checkpoints": checkpoints} | others
    fitted = pv.fit(model, guide, data, epochs=epochs, **options)
    return dict(fitted.history), fitted.steps, checksum(pyro.get_param_store().values())


def small_vae():
    """A VAE with the same weights on all ranks."""
    torch.manual_seed(0)
    return pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, networks.linear()),
                  likelihoods.Normal(1, 2, networks.linear()))  # fmt: skip


def checksum(tensors):
    """A number of the bits of tensors."""
    content = b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()


def kill_and_restart(folder, kills, size, epochs, seed, longest, wait):
    """Train under torchrun, and kill a rank ``kills`` times, up to ``longest`` seconds after all ranks have begun.

    Train again in a new folder if a run ends before that. Return the numbers of kills by rank, and of runs.
    """
    chance, victims, runs = random.Random(seed), [0] * size, 0
    while sum(victims) < kills:
        runs += 1
        killed, pids, output = (folder / f"{name} {runs}" for name in ("killed", "pids", "output"))
        pids.mkdir()
        with output.open("w") as written:
            started = start_torchrun(killed, pids, size, epochs, kills, written)
        try:
            restart = 0
            while sum(victims) < kills and (found := begun(started, pids, restart, size, wait)):
                time.sleep(chance.uniform(0.0, longest))
                victim = chance.randrange(size)
                try:
                    os.kill(found[victim], signal.SIGKILL)
                except ProcessLookupError:  # it has come to its end
                    break
                victims[victim] += 1
                restart += 1
            assert started.wait(timeout=wait) == 0, output.read_text()
        finally:
            started.terminate()
            started.wait()
    return victims, runs


def start_torchrun(folder, pids, size, epochs, restarts, output):
    """Start this script on ranks that torchrun restarts."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    command = [sys.executable, *torchrun, __file__, str(folder), str(pids), str(epochs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    paths = [str(Path(pv.__file__).parents[1]), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def begun(started, pids, restart, size, wait):
    """Return the processes of all ranks once they have begun to train; none if the run ends before."""
    files, deadline = [pids / f"{restart}.{rank}" for rank in range(size)], time.monotonic() + wait
    while not all(file.exists() for file in files):
        if started.poll() is not None:
            return []
        assert time.monotonic() < deadline, f"restart {restart} has not begun"
        time.sleep(0.01)
    return [int(file.read_text()) for file in files]


def serve(folder, pids, epochs):
    """Train as a rank of torchrun, after a note of which process this is."""
    torch.set_num_threads(1)
    name = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}.{os.environ['RANK']}"
    partial = Path(pids) / f"{name}.partial"
    partial.write_text(str(os.getpid()))
    partial.rename(Path(pids) / name)
    trained(Path(folder), int(epochs))


if __name__ == "__main__":
    serve(*sys.argv[1:])

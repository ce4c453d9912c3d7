"""Two processes on one machine (gloo): every rank draws its own noise, and the parameters stay the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tests
from monteclora import variational_loss
from monteclora.adapters.model import MonteCLoRAModel
from tests.models import batch_for, bert, posterior_of, wrapped
from tests.training.test_trainer import TakesGradients, collate, rows

PROCESSES = 2


def worker(folder: Path) -> None:
    """What each process runs: a Trainer under DistributedDataParallel; leaves its numbers in ``folder``."""
    from monteclora import MonteCLoRATrainer
    from tests.training.test_trainer import arguments

    torch.set_num_threads(1)
    results = {}
    for name, options in {
        "noisy": {"noise": "shared"},
        "flipout": {"noise": "per_example"},
        "quiet": {"sample_scale": 0.0},
        "checkpointed": {"sample_scale": 0.0},
    }.items():
        model = wrapped(bert, **options)
        first: list[torch.Tensor] = []

        def note(*_: object, first: list[torch.Tensor] = first, model: MonteCLoRAModel = model) -> None:
            draw = posterior_of(model).current
            if draw is not None:  # the head is probed before training, at the mean
                first.append(draw.layers[0].matrix.detach().clone())

        model.base_model.model.bert.encoder.layer[0].attention.self.query.register_forward_hook(note)
        callback = TakesGradients()
        trainer = MonteCLoRATrainer(
            model=model,
            args=arguments(
                folder,
                max_steps=3,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                ddp_backend="gloo",
                gradient_checkpointing=name == "checkpointed",
                gradient_checkpointing_kwargs={"use_reentrant": False} if name == "checkpointed" else None,
            ),
            train_dataset=rows("classes", 16),
            data_collator=collate,
            callbacks=[callback],
        )
        trainer.train()
        results[name] = {
            "noise": first[0],
            "draws": posterior_of(model).draws,
            "gradients": callback.steps,
            "parameters": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
        }
    torch.save(results, folder / f"rank-{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_ranks_draw_apart_and_stay_in_step(tmp_path: Path) -> None:
    root = Path(tests.__file__).parent.parent
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "WORLD_SIZE": str(PROCESSES),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    code = f"from pathlib import Path; from {__name__} import worker; worker(Path({str(tmp_path)!r}))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(PROCESSES))
    for name in one:
        assert one[name]["draws"] == other[name]["draws"] == 6, name
        drawn_alike = torch.equal(one[name]["noise"], other[name]["noise"])
        assert drawn_alike is (name in ("quiet", "checkpointed")), name
        for key, value in one[name]["parameters"].items():
            assert torch.equal(value, other[name]["parameters"][key]), (name, key)
        for mine, theirs in zip(one[name]["gradients"], other[name]["gradients"], strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for key, value in one["quiet"]["parameters"].items():
        torch.testing.assert_close(value, one["checkpointed"]["parameters"][key], rtol=1e-5, atol=1e-7)
    # the regulariser is counted once, not once a rank
    model = wrapped(bert, sample_scale=0.0)
    variational_loss(model).backward()
    expected = posterior_of(model).rho.grad
    torch.testing.assert_close(one["quiet"]["gradients"][0]["posteriors.default.rho"], expected, rtol=1e-5, atol=1e-8)


def test_rank_zero_draws_what_a_single_process_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = wrapped(bert), wrapped(bert)
    alone = model(**batch_for(bert)).logits
    for rank, same in ((0, True), (1, False)):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        posterior_of(twin).draws = 0
        assert torch.equal(twin(**batch_for(bert)).logits, alone) is same

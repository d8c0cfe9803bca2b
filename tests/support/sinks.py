"""Sink calibration: a toy model to search on, recipes, and the tensors that it leaves."""

from __future__ import annotations

import torch

QUICK = {"calibration_samples": 4, "calibration_length": 64}


def recipe(*steps) -> dict:
    return {"version": 1, "name": "test", "operations": list(steps), "evaluate": None}


def sink(method: str, **fields) -> dict:
    return {"op": "sink_calibration", "method": method} | fields


def log_gammas(model) -> list[torch.Tensor]:
    return [tensor for name, tensor in model.state_dict().items() if name.endswith("surgery_log_gamma")]


class Toy(torch.nn.Module):
    """Its objective is the squared distance of its parameters to targets, which differ on the validation text."""

    def __init__(self, fit: list[list[float]], validation: list[list[float]]):
        super().__init__()
        self.logs = torch.nn.ParameterList(torch.zeros(len(row)) for row in fit)
        self.targets = {1: fit, 0: validation}

    def objective(self, sample, kind):
        rows = zip(self.logs, self.targets[int(sample[0])], strict=True)
        return sum((log - torch.tensor(row)).square().sum() for log, row in rows) + sample[1]

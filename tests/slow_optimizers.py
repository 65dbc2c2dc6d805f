"""LARS and LAMB one tensor at a time, as their papers write them, in the dtype that is given."""

from __future__ import annotations

import torch


class SlowLARS:
    def __init__(
        self, lr, momentum=0.9, nesterov=False, weight_decay=0.0, trust=0.001, excluded=False
    ):
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.decay = 0.0 if excluded else weight_decay
        self.trust = trust
        self.excluded = excluded
        self.velocity = None

    def step(self, weight, gradient):
        length, slope = weight.norm(), gradient.norm()
        ratio = 1.0
        if not self.excluded and length > 0 and slope > 0:
            ratio = self.trust * length / (slope + self.decay * length)
        direction = ratio * (gradient + self.decay * weight)
        if self.velocity is None:
            self.velocity = torch.zeros_like(weight)
        self.velocity = self.momentum * self.velocity + direction
        if self.nesterov:
            return weight - self.lr * (direction + self.momentum * self.velocity)
        return weight - self.lr * self.velocity


class SlowLAMB:
    def __init__(self, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, excluded=False):
        self.lr, self.betas, self.eps = lr, betas, eps
        self.decay = 0.0 if excluded else weight_decay
        self.excluded = excluded
        self.steps = 0
        self.first = self.second = None

    def step(self, weight, gradient):
        (beta1, beta2), self.steps = self.betas, self.steps + 1
        if self.first is None:
            self.first, self.second = torch.zeros_like(weight), torch.zeros_like(weight)
        self.first = beta1 * self.first + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        mean = self.first / (1 - beta1**self.steps)
        square = self.second / (1 - beta2**self.steps)
        update = mean / (square.sqrt() + self.eps) + self.decay * weight
        length, size = weight.norm(), update.norm()
        ratio = length / size if not self.excluded and length > 0 and size > 0 else 1.0
        return weight - self.lr * ratio * update

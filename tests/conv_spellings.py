"""One convolution and what follows it, written in many ways, and what of each runs together."""

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Layers that a subclass calls in a way of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.relu, self.pool = nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        self.inplace = nn.ReLU(inplace=True)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.5, 0.5)
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.uniform_(-0.5, 0.5)


class Modules(Net):
    def forward(self, x):
        x = self.pool(self.relu(self.conv(x)))
        return self.relu(x.flatten(1) - 0.1)


class Statements(Net):
    def forward(self, x):
        x = self.conv(x)
        x = self.relu(x)
        return self.pool(x)


class Names(Net):
    def forward(self, x):
        convolved = self.conv(x)
        positive = F.relu(convolved)
        pooled = F.max_pool2d(positive, 2, stride=2)
        return pooled.sum(1)


class Functions(Net):
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x), inplace=True), kernel_size=(2, 2))


class TorchFunctions(Net):
    def forward(self, x):
        return torch.max_pool2d(torch.relu(self.conv(x)), 2)


class Methods(Net):
    def forward(self, x):
        return self.pool(self.conv(x).relu())


class MethodsInPlace(Net):
    def forward(self, x):
        return self.pool(self.conv(x).relu_())


class PoolFirst(Net):
    def forward(self, x):
        return self.inplace(self.pool(self.conv(x)))


class Normed(Net):
    def forward(self, x):
        return self.pool(self.relu(self.norm(self.conv(x))))


class Loop(Net):
    def forward(self, x):
        for conv in (self.conv, self.second):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return x


class Shared(Net):
    def forward(self, x):
        x = self.pool(self.relu(self.conv(x)))
        return self.pool(self.relu(self.second(self.pool(self.relu(self.second(x))))))


class Branches(Net):
    def forward(self, x, loud: bool = False):
        if self.training:
            x = x + 1
        x = self.pool(self.relu(self.conv(x)))
        return x * 2 if loud or x.sum() > 0 else x


WHOLE = "conv + ReLU + 2×2 max-pool"
SPELLINGS = [
    (Modules, {"conv": WHOLE}),
    (Statements, {"conv": WHOLE}),
    (Names, {"conv": WHOLE}),
    (Functions, {"conv": WHOLE}),
    (TorchFunctions, {"conv": WHOLE}),
    (Methods, {"conv": WHOLE}),
    (MethodsInPlace, {"conv": WHOLE}),
    (PoolFirst, {"conv": WHOLE}),
    (Normed, {"conv": "conv + batch norm + ReLU + 2×2 max-pool"}),
    (Loop, {"conv": WHOLE, "second": WHOLE}),
    (Shared, {"conv": WHOLE, "second": WHOLE}),
    (Branches, {"conv": WHOLE}),
]

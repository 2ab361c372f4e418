"""The example of MemCNN 1.5's README, with its names and arguments: an additive coupling that inverts its own output.

python examples/memcnn_1_5.py
"""

import torch
from torch import nn

import memcnn


class ExampleOperation(nn.Module):
    """Convolution, batch norm and ReLU, which keep the shape (N, channels, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.seq = nn.Sequential(
            nn.Conv2d(in_channels=channels, out_channels=channels, kernel_size=(3, 3), padding=1),
            nn.BatchNorm2d(num_features=channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seq(x)


def main() -> None:
    torch.manual_seed(0)
    X = torch.rand(2, 10, 8, 8)

    # F and G work on half of the channels each
    invertible_module = memcnn.AdditiveCoupling(Fm=ExampleOperation(channels=10 // 2), Gm=ExampleOperation(10 // 2))
    invertible_module.eval()
    assert memcnn.is_invertible_module(invertible_module, test_input_shape=X.shape)

    # the wrapper trains it without storing activations
    wrapper = memcnn.InvertibleModuleWrapper(fn=invertible_module, keep_input=True, keep_input_inverse=True)
    wrapper.eval()
    assert memcnn.is_invertible_module(wrapper, test_input_shape=X.shape)

    Y = wrapper.forward(X)
    X2 = wrapper.inverse(Y)
    Y.sum().backward()
    print(f"largest difference between X and inverse(forward(X)): {(X - X2).abs().max():.1e}")
    assert torch.allclose(X, X2, atol=1e-6)


if __name__ == "__main__":
    main()

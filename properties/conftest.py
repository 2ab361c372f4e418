"""What all tests share: one thread, how hard hypothesis tries, the header, and the folder of real images."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import memcnn

torch.set_num_threads(1)

# A first call into torch may take a second, so no single example is held to a time.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=20, **_COMMON)
settings.register_profile("ci", max_examples=20, derandomize=True, database=None, print_blob=True, **_COMMON)
settings.register_profile("thorough", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("MEMCNN_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}, no CUDA"
    return [
        f"memcnn {memcnn.__version__}, torch {torch.__version__}, torchvision {version('torchvision')}",
        f"device: {device}, {torch.get_num_threads()} thread; "
        f"hypothesis profile: {settings.get_current_profile_name()} (MEMCNN_PROFILE=dev|ci|thorough)",
        f"MEMCNN_DATA: {os.environ.get('MEMCNN_DATA') or 'not set, tests on real CIFAR images are skipped'}",
    ]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test's weights are the same whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cifar() -> Path:
    """The folder with the official CIFAR files; a test that asks for it is skipped where there is none."""
    data = os.environ.get("MEMCNN_DATA")
    if data in (None, "", "generated"):
        pytest.skip("needs real CIFAR: set MEMCNN_DATA to the folder of cifar-10-batches-py and cifar-100-python")
    folder = Path(data)
    if not any((folder / name).is_dir() for name in ("cifar-10-batches-py", "cifar-100-python")):
        pytest.fail(f"MEMCNN_DATA is {folder}, but neither cifar-10-batches-py nor cifar-100-python is there")
    return folder

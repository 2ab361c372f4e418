"""Write the files of this folder's tests, with MemCNN 1.5.2 itself, in an environment of its own.

    python -m venv --system-site-packages VENV && VENV/bin/python -m pip install --no-deps memcnn==1.5.2
    VENV/bin/python -I properties/migration/write_files.py [FOLDER]

``bench.peers --install`` makes such an environment too. FOLDER is properties/migration/files if not given. Weights are
made up: a counter-based generator draws them, so that a test can draw the large ones again.

* blocks.pt.gz, revnets.pt.gz: whole modules, pickled, with the output and norms of gradients of each.
* training.pt.gz: the state dicts of a small RevNet and of its SGD after two steps, and the momentum of each parameter.
* networks.json.gz: parameters' names and shapes of the six networks, and their logits for two images.
* names.json: the public names of every module of MemCNN 1.5.2, and what its own tests import.
"""

import ast
import gzip
import io
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

NETWORKS = ("RevBasicBlock", "RevBottleneck")
FILES = Path(__file__).resolve().parent / "files"


def uniform(key: int, shape: tuple) -> torch.Tensor:
    """Return float64 values in [0, 1) that depend only on the arguments, in every version of numpy and PyTorch."""
    bits = np.random.Philox(key=np.array([152, key], dtype=np.uint64)).random_raw(math.prod(shape))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def made_up_state(shapes: dict) -> dict:
    """Return a made-up state dict (float64) in which no two entries are alike, for shapes by name."""
    state = {}
    for key, (name, shape) in enumerate(shapes.items()):
        kind = name.rsplit(".", 1)[-1]
        values = uniform(key, tuple(shape))
        if kind == "num_batches_tracked":
            state[name] = torch.tensor(key)
        elif kind == "running_var" or (kind == "weight" and len(shape) == 1):
            state[name] = 0.5 + values
        elif len(shape) == 4:
            state[name] = (2 * values - 1) * math.sqrt(6 / (shape[0] * shape[2] * shape[3]))
        else:
            state[name] = values - 0.5
    return state


def images() -> torch.Tensor:
    """Return two images (2, 3, 32, 32), float64 in -1 .. 1."""
    return 2 * uniform(10**6, (2, 3, 32, 32)) - 1


def small_input() -> torch.Tensor:
    """Return the input (2, 4, 4, 4) of the blocks, float64 in -1 .. 1."""
    return 2 * uniform(10**6, (2, 4, 4, 4)) - 1


def branch(channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.Tanh())


def modules() -> dict:
    """Return one module of each kind that people pickle."""
    import memcnn
    from memcnn.models import additive, affine, resnet

    def small(block: type, **options) -> nn.Module:
        return resnet.ResNet(block, [2, 1, 1], num_classes=3, channels_per_layer=[4, 4, 4, 4], strides=[1, 1, 2, 2],
                             init_kernel_size=3, **options)  # fmt: skip

    wrap = memcnn.InvertibleModuleWrapper
    return {
        "AdditiveCoupling": memcnn.AdditiveCoupling(branch(2, 2), branch(2, 2)),
        "AdditiveBlock": additive.AdditiveBlock(branch(2, 2)),
        "AffineBlock": affine.AffineBlock(memcnn.AffineAdapterNaive(branch(2, 2)), implementation_fwd=-1,
                                          implementation_bwd=-1),
        "ReversibleBlock": memcnn.ReversibleBlock(branch(2, 2), keep_input=True),
        "additive": wrap(memcnn.AdditiveCoupling(branch(2, 2), branch(2, 2), split_dim=1)),
        "affine naive": wrap(memcnn.AffineCoupling(branch(2, 2), adapter=memcnn.AffineAdapterNaive)),
        "affine sigmoid": wrap(memcnn.AffineCoupling(branch(2, 4), adapter=memcnn.AffineAdapterSigmoid)),
        "along the height": wrap(memcnn.AdditiveCoupling(branch(4, 4), split_dim=2), num_bwd_passes=2),
        "dropout": wrap(memcnn.AdditiveCoupling(nn.Sequential(branch(2, 2), nn.Dropout(0.5)))),
        "chain": nn.Sequential(*(wrap(memcnn.AdditiveCoupling(branch(2, 2))) for _ in range(2))),
        "RevBasicBlock": small(resnet.RevBasicBlock, batch_norm_fix=False),
        "RevBottleneck": small(resnet.RevBottleneck, init_max_pool=True),
    }  # fmt: skip


def fill(module: nn.Module) -> None:
    """Give a module a made-up state, in evaluation mode and float64."""
    module.double().eval()
    module.load_state_dict(made_up_state({name: value.shape for name, value in module.state_dict().items()}))


def pickled_modules() -> dict:
    """Return each module with its output and the norms of its gradients, as plain autograd gives them."""
    import memcnn

    rows = {}
    for name, module in modules().items():
        fill(module)
        x = images() if name in NETWORKS else small_input()
        wrappers = [part for part in module.modules() if isinstance(part, memcnn.InvertibleModuleWrapper)]
        for wrapper in wrappers:
            wrapper.disable = True
        x.requires_grad_()
        y = module(x)
        y.square().sum().backward()
        norms = {key: float(p.grad.norm()) for key, p in module.named_parameters()}
        module.zero_grad()
        for wrapper in wrappers:
            wrapper.disable = False
        rows[name] = {
            "module": module,
            "output": y.detach(),
            "gradient_norms": {"the input": float(x.grad.norm()), **norms},
        }
    return rows


def trained() -> dict:
    """Return the states of a small RevNet and of its optimiser after two steps, with each parameter's momentum."""
    from memcnn.models.resnet import ResNet, RevBasicBlock

    network = ResNet(RevBasicBlock, [2, 1, 1], num_classes=3, channels_per_layer=[4, 4, 4, 8], strides=[1, 1, 2, 2],
                     init_kernel_size=3, batch_norm_fix=False)  # fmt: skip
    fill(network)
    network.float()
    for module in network.modules():
        if hasattr(module, "keep_input"):
            module.disable = True
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        network(images().float()).square().mean().backward()
        optimizer.step()
    momentum = {name: float(optimizer.state[p]["momentum_buffer"].norm()) for name, p in network.named_parameters()}
    return {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "momentum_norms": momentum,
            "logits": network(images().float()).detach()}  # fmt: skip


def networks() -> dict:
    """Return names and shapes of the six networks, built as the experiments of MemCNN 1.5.2 are, and their logits."""
    import memcnn.experiment.factory as factory

    experiments = Path(factory.__file__).parents[1] / "config" / "experiments.json"
    result = {}
    for name in ("resnet32", "resnet110", "resnet164", "revnet38", "revnet110", "revnet164"):
        config = factory.load_experiment_config(str(experiments), ["cifar10", name])
        options = config["model_params"]
        options["block"] = factory.get_attr_from_module(options["block"])
        network = factory.get_attr_from_module(config["model"])(**options)
        fill(network)
        shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
        with torch.no_grad():
            result[name] = {"shapes": shapes, "logits": network(images()).tolist()}
    return result


def names() -> dict:
    """Return the public functions and classes of each module, and the names that the package's tests import."""
    import memcnn

    root, found, imported = Path(memcnn.__file__).parent, {"memcnn": sorted(memcnn.__all__)}, set()
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        if "tests" in path.parts:
            imported |= {
                f"{node.module}:{alias.name}" for node in ast.walk(tree) for alias in getattr(node, "names", ())
                if isinstance(node, ast.ImportFrom) and node.module.startswith("memcnn") and ".tests" not in node.module
            }  # fmt: skip
            continue
        defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        if public := sorted(name for name in defined if not name.startswith("_")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = public
    return {"defined": found, "imported by its tests": sorted(imported)}


def save(value: object, path: Path) -> None:
    """Write a value with ``torch.save``, compressed, because a file of small tensors is mostly padding."""
    file = io.BytesIO()
    torch.save(value, file)
    path.write_bytes(gzip.compress(file.getvalue(), mtime=0))


def main(folder: Path = FILES) -> None:
    """Write all files to ``folder``."""
    import memcnn

    if memcnn.__version__ != "1.5.2":
        raise SystemExit(f"this is MemCNN {memcnn.__version__}, wanted 1.5.2: see the commands in {__file__}")
    warnings.simplefilter("ignore")
    folder.mkdir(parents=True, exist_ok=True)
    rows = pickled_modules()
    save({name: row for name, row in rows.items() if name not in NETWORKS}, folder / "blocks.pt.gz")
    save({name: rows[name] for name in NETWORKS}, folder / "revnets.pt.gz")
    save(trained(), folder / "training.pt.gz")
    text = json.dumps(networks(), separators=(",", ":")).encode()
    (folder / "networks.json.gz").write_bytes(gzip.compress(text, mtime=0))
    (folder / "names.json").write_text(json.dumps(names(), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

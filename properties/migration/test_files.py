"""Files that MemCNN 1.5.2 wrote: whole modules load and work, states convert, and values stay what they were."""

import gzip
import io
import json
import os
import pickle
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import memcnn
from memcnn import InvertibleModuleWrapper, convert_optimizer_state, convert_state_dict
from memcnn.convert import main as convert
from memcnn.models.resnet import MODELS, CifarResNet, ResNet, RevBasicBlock, basic_branch, revnet38
from properties.migration import write_files
from properties.migration.write_files import FILES, NETWORKS, images, made_up_state, small_input
from properties.support.runs import without

NETWORK_FACTS = json.loads(gzip.decompress((FILES / "networks.json.gz").read_bytes()))
REVNET = (basic_branch, (2, 1, 1), (4, 4, 4, 8), 3)
OLD_REVNET = {"block": RevBasicBlock, "layers": [2, 1, 1], "num_classes": 3, "channels_per_layer": [4, 4, 4, 8],
              "strides": [1, 1, 2, 2], "init_kernel_size": 3, "batch_norm_fix": False}  # fmt: skip
ENVIRONMENT = Path(os.environ.get("MEMCNN_1_5", Path(__file__).parents[2] / "results" / "peers-venv"))


def read(path: Path, *, weights_only: bool) -> dict:
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=weights_only)


def pickled(folder: Path = FILES) -> dict:
    """Return the whole modules that MemCNN 1.5.2 pickled, by name, with what it computed."""
    return read(folder / "blocks.pt.gz", weights_only=False) | read(folder / "revnets.pt.gz", weights_only=False)


@pytest.fixture
def trained() -> dict:
    return read(FILES / "training.pt.gz", weights_only=True)


@pytest.mark.parametrize("name", pickled())
def test_a_pickled_module_computes_the_same_as_in_1_5(name):
    row = pickled()[name]
    module, x = row["module"], (images() if name in NETWORKS else small_input()).requires_grad_()
    y = module(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, row["output"], rtol=1e-10, atol=1e-10)
    norms = {"the input": x.grad.norm().item()} | {key: p.grad.norm().item() for key, p in module.named_parameters()}
    assert norms == pytest.approx(row["gradient_norms"], rel=1e-8)


@pytest.mark.parametrize("name", [name for name in pickled() if name not in NETWORKS])
def test_a_pickled_module_inverts_trains_and_is_saved_again(name):
    module = pickled()[name]["module"].train()
    for method in ("__repr__", "state_dict", "parameters"):
        getattr(module, method)()
    if name not in ("chain", "dropout"):  # a Sequential has no inverse; dropout's would draw other masks
        assert memcnn.is_invertible_module(module, (2, 4, 4, 4), torch.float64, 1e-8)
    again = pickle.loads(pickle.dumps(module))
    torch.manual_seed(0)
    y = module(small_input().requires_grad_())
    y.sum().backward()
    torch.manual_seed(0)
    assert torch.equal(again(small_input()), y)


def test_settings_of_1_5_are_kept_and_newer_ones_have_their_defaults():
    rows = pickled()
    fresh = InvertibleModuleWrapper(memcnn.AdditiveCoupling(nn.Identity()))
    assert vars(rows["additive"]["module"]).keys() == vars(fresh).keys()
    assert rows["AdditiveCoupling"]["module"].grid is None
    assert not hasattr(rows["AdditiveCoupling"]["module"], "implementation_fwd")
    assert rows["additive"]["module"].check_inverse is None
    assert rows["ReversibleBlock"]["module"].keep_input is True
    height = rows["along the height"]["module"]
    assert height.num_bwd_passes == 2 and height._fn.split_dim == 2


def test_dropout_in_a_pickled_module_is_replayed():
    block = pickled()["dropout"]["module"].train()
    twin = pickle.loads(pickle.dumps(block))
    twin.disable = True
    gradients = []
    for module in (block, twin):
        torch.manual_seed(3)
        x = small_input().requires_grad_()
        module(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in module.parameters())])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def test_a_pickle_from_before_1_5_says_what_to_do():
    wrapper = InvertibleModuleWrapper.__new__(InvertibleModuleWrapper)
    with pytest.raises(ValueError, match=r"a version before MemCNN 1\.5 wrote it: load it there, save its state_dict"):
        wrapper.__setstate__({"keep_input": False, "_modules": {}})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("named", [True, False])
def test_a_converted_network_gives_the_logits_of_1_5(name, named):
    state = convert_state_dict(made_up_state(NETWORK_FACTS[name]["shapes"]), name if named else None)
    network = MODELS[name](10).double()
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        logits = network.eval()(images())
    wanted = torch.tensor(NETWORK_FACTS[name]["logits"], dtype=torch.float64)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3 * wanted.abs().max()  # they depend on the image
    torch.testing.assert_close(logits, wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max().item())


def test_a_state_that_1_5_trained_loads_into_either_network(trained):
    old = ResNet(**OLD_REVNET).eval()
    old.load_state_dict(trained["model"], strict=True)
    new = CifarResNet(*REVNET, reversible=True).eval()
    new.load_state_dict(convert_state_dict(trained["model"], new), strict=True)
    for network in (old, new):
        torch.testing.assert_close(network(images().float()), trained["logits"], rtol=1e-4, atol=1e-4)


def old_names(state: dict, network: nn.Module) -> dict[str, str]:
    """Return the name that MemCNN 1.5 gave to each entry of the network's state."""
    numbered = {name: torch.full_like(value, number) for number, (name, value) in enumerate(state.items())}
    return {new: list(state)[int(value.flatten()[0])] for new, value in convert_state_dict(numbered, network).items()}


@pytest.mark.parametrize("converted", [False, True], ids=["ResNet", "CifarResNet"])
def test_each_parameter_keeps_its_momentum(trained, converted):
    """F and G have equal shapes, so no other test would find that their momenta are exchanged."""
    network = CifarResNet(*REVNET, reversible=True) if converted else ResNet(**OLD_REVNET)
    old = old_names(trained["model"], network) if converted else {name: name for name in trained["model"]}
    optimizer = torch.optim.SGD(network.parameters(), lr=1, momentum=0.5)
    optimizer.load_state_dict(convert_optimizer_state(trained["optimizer"], trained["model"], network))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (1e-4, 0.9)
    norms = {old[name]: optimizer.state[p]["momentum_buffer"].norm().item() for name, p in network.named_parameters()}
    assert norms == pytest.approx(trained["momentum_norms"], rel=1e-5)


def test_an_optimiser_state_of_another_model_is_refused(trained):
    network = ResNet(**OLD_REVNET)
    with pytest.raises(ValueError, match="the optimiser state has .* parameters, the model has"):
        convert_optimizer_state(trained["optimizer"], trained["model"], revnet38())
    groups = {**trained["optimizer"], "param_groups": 2 * trained["optimizer"]["param_groups"]}
    with pytest.raises(ValueError, match="has 2 groups of parameters, wanted one"):
        convert_optimizer_state(groups, trained["model"], network)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return made_up_state(NETWORK_FACTS["revnet38"]["shapes"])


def test_a_state_of_data_parallel_or_without_counters_converts(state):
    wanted = convert_state_dict(state)
    wrapped = convert_state_dict({f"module.{name}": value for name, value in state.items()})
    assert wrapped.keys() == wanted.keys() and all(torch.equal(wrapped[name], wanted[name]) for name in wanted)
    old = convert_state_dict({name: value for name, value in state.items() if "num_batches" not in name})
    revnet38().load_state_dict(old, strict=True)


def test_unit_pixels_take_images_of_0_to_1(state):
    logits = []
    for unit_pixels, x in ((False, 255 * images()), (True, images())):
        network = revnet38().double().eval()
        network.load_state_dict(convert_state_dict(state, unit_pixels=unit_pixels))
        logits.append(network(x))
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9 * logits[0].abs().max().item())


@pytest.mark.parametrize(("change", "model", "message"), [
    (lambda state: state, "revnet110", "is not that of revnet110: .* entries differ, such as head.*leave model out"),
    (lambda state: state, "revnet3", "model must be one of resnet32, .* or a network: got 'revnet3'"),
    (lambda state: without(state, "fc.weight"), "revnet38",
     r"1 entries differ, such as head\.4\.weight, where the state has nothing and revnet38 \(10, 112\)"),
    (lambda state: without(state, "fc.weight"), None, "is not that of revnet38: 1 entries differ"),
    (lambda state: without(state, "fc.bias") | {"fc.weight": torch.ones(10, 3)}, None, "fits none of resnet32"),
    (lambda state: {**state, "layer1.0.other.weight": torch.ones(1)}, None, "such as 'layer1.0.other.weight'"),
    (lambda state: {**state, "layer1.0.revblock._fn.Fm.bn9.bias": torch.ones(1)}, None, "such as .*Fm.bn9.bias'"),
    (convert_state_dict, "revnet38", "it has this version's names already, so load it as it is"),
])  # fmt: skip
def test_a_state_that_does_not_fit_is_refused(state, change, model, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(change(state), model)


def test_the_command_converts_a_file(state, tmp_path, capsys):
    torch.save(state, tmp_path / "old.pt")
    assert convert([str(tmp_path / "old.pt"), str(tmp_path / "new.pt")]) == 0
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    revnet38().load_state_dict(new, strict=True)
    assert torch.equal(new["stem.0.weight"], state["conv1.weight"])
    assert convert([str(tmp_path / "old.pt"), str(tmp_path / "scaled.pt"), "--model", "revnet38", "--unit-pixels"]) == 0
    scaled = torch.load(tmp_path / "scaled.pt", weights_only=True)
    assert torch.equal(scaled["stem.0.weight"], 255 * state["conv1.weight"])


@pytest.mark.parametrize(("content", "message"), [
    (None, "No such file or directory; wanted a file that torch.save wrote"),
    (b"text", "holds more than tensors"),
    (nn.Linear(1, 1), r"If it holds a whole module, load it with torch.load\(..., weights_only=False\)"),
    ({"model": {}, "epoch": 3}, "holds a dict of 'model', 'epoch', wanted a state dict"),
    ([1], "holds list, wanted a state dict"),
    ({"weight": torch.ones(1)}, "no network of MemCNN 1.5 has, such as 'weight'"),
    ({}, "the state is empty"),
], ids=["no file", "no pickle", "module", "checkpoint", "list", "other state", "empty"])  # fmt: skip
def test_the_command_refuses_what_it_cannot_convert(content, message, tmp_path, capsys):
    if isinstance(content, bytes):
        (tmp_path / "old.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "old.pt")
    with pytest.raises(SystemExit) as exit:
        convert([str(tmp_path / "old.pt"), str(tmp_path / "new.pt")])
    assert exit.value.code == 2 and not (tmp_path / "new.pt").exists()
    assert re.search(message, capsys.readouterr().err)


def test_the_command_overwrites_nothing(state, tmp_path, capsys):
    torch.save(state, tmp_path / "old.pt")
    for target, message in ((tmp_path / "old.pt", "exists already"), (tmp_path / "nowhere" / "x", "is not a folder")):
        with pytest.raises(SystemExit):
            convert([str(tmp_path / "old.pt"), str(target)])
        assert message in capsys.readouterr().err


def test_a_pickle_that_names_the_former_module_revop_can_be_read():
    stages = type(revnet38().stages[0])
    pickled = f"cmemcnn.models.revop\n{stages.__name__}\n.".encode()
    assert pickle.loads(pickled) is stages


@pytest.mark.skipif(not (ENVIRONMENT / "bin" / "python").exists(), reason="needs an environment with MemCNN 1.5.2: "
                    "python -m bench.peers --install makes one, or MEMCNN_1_5 names its folder")  # fmt: skip
def test_memcnn_1_5_2_writes_these_files(tmp_path):
    """MemCNN 1.5.2 writes today what the committed files hold."""
    command = [ENVIRONMENT / "bin" / "python", "-W", "ignore", "-I", write_files.__file__, tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert json.loads((tmp_path / "names.json").read_text()) == json.loads((FILES / "names.json").read_text())
    facts = json.loads(gzip.decompress((tmp_path / "networks.json.gz").read_bytes()))
    for name, wanted in NETWORK_FACTS.items():
        assert list(facts[name]["shapes"].items()) == list(wanted["shapes"].items())
        torch.testing.assert_close(
            torch.tensor(facts[name]["logits"]), torch.tensor(wanted["logits"]), rtol=1e-4, atol=0
        )
    for name, row in pickled(tmp_path).items():
        wanted = pickled()[name]
        torch.testing.assert_close(row["module"].state_dict(), wanted["module"].state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(row["output"], wanted["output"], rtol=1e-8, atol=1e-8)
        assert row["gradient_norms"] == pytest.approx(wanted["gradient_norms"], rel=1e-6)
    trained = read(tmp_path / "training.pt.gz", weights_only=True)
    wanted = read(FILES / "training.pt.gz", weights_only=True)
    assert list(trained["model"]) == list(wanted["model"])
    assert trained["momentum_norms"] == pytest.approx(wanted["momentum_norms"], rel=1e-3)

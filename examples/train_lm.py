"""Train a reversible language model on a text that ships with Python, and let it continue a sentence.

    python examples/train_lm.py

The text is Python's own help (``pydoc_data.topics``), read as bytes. The loss is in nats a byte: ln 256 = 5.55 is that
of a model that knows nothing. Takes about a minute on one core of a laptop.
"""

import argparse
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor

from memcnn.memory import measure_step_memory
from memcnn.models.reformer import ReversibleLM


def cross_entropy(model: ReversibleLM, text: Tensor) -> Tensor:
    """Return the mean cross-entropy of each next byte of ``text``, int64 of shape (N, T)."""
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--prompt", default="The following ")
    args = parser.parse_args()
    torch.manual_seed(0)
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    train, test = text[: -len(text) // 10], text[-len(text) // 10 :]
    print(f"{len(train):,} bytes to train on, {len(test):,} to test on")

    def batch(source: Tensor) -> Tensor:
        starts = torch.randint(len(source) - args.context, (args.batch, 1))
        return source[starts + torch.arange(args.context + 1)]

    sizes = {"vocabulary": 256, "depth": args.depth, "dim": 96, "heads": 4, "context": args.context}
    model = ReversibleLM(**sizes)
    for label, other in (("reversible", model), ("twin", ReversibleLM(**sizes, disable=True))):
        memory = measure_step_memory(other, lambda other=other: cross_entropy(other, batch(train)).backward())
        print(f"{label}: {memory.activation_bytes / 2**20:.1f} MiB of activations")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.steps)
    recent: list[float] = []
    for step in range(args.steps):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch(train))
        loss.backward()
        optimizer.step()
        schedule.step()
        recent = [*recent[-9:], loss.item()]
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:4}: loss {sum(recent) / len(recent):.3f}", flush=True)
    with torch.no_grad():
        losses = [cross_entropy(model, batch(test)).item() for _ in range(20)]
    print(f"test loss {sum(losses) / len(losses):.3f}")
    prompt = torch.tensor([list(args.prompt.encode())])
    written = model.generate(prompt, args.context - prompt.shape[1], temperature=0.5)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()

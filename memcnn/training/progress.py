"""The progress of a run: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

PLAIN_SECONDS = 30  # between two plain lines
BAR_SECONDS = 0.5  # between two readings of the loss, which wait for the device


class Progress:
    """Count images; show rate, loss, accuracy and time left on standard error.

    Args:
        label: the run's name.
        iterations: iterations of the recipe.
        done: iterations done before this start.
        batch_size: images of an iteration.
        shown: False for silence.
    """

    def __init__(self, label: str, *, iterations: int, done: int, batch_size: int, shown: bool = True) -> None:
        self.label, self.iterations, self.batch_size, self.shown = label, iterations, batch_size, shown
        self.first, self.started, self.looked = done, time.monotonic(), time.monotonic()
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(
                total=iterations * batch_size, initial=done * batch_size, desc=label, unit=" images", unit_scale=True
            )

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.shown:
            tqdm.write(text, file=sys.stderr)

    def due(self) -> bool:
        """Return whether loss and accuracy should be read and shown again."""
        interval = BAR_SECONDS if self.bar is not None else PLAIN_SECONDS
        return self.shown and time.monotonic() - self.looked > interval

    def step(self) -> None:
        """Count one iteration."""
        if self.bar is not None:
            self.bar.update(self.batch_size)

    def show(self, iteration: int, **values: str) -> None:
        """Show values by name, such as loss and accuracy, after ``iteration`` iterations."""
        self.looked = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix(values)
        elif self.shown:
            rate = (iteration - self.first) * self.batch_size / (self.looked - self.started)
            words = [f"{name} {value}" for name, value in values.items()]
            if rate > 0:
                left = (self.iterations - iteration) * self.batch_size / rate
                words += [f"{rate:.0f} images/s", f"{tqdm.format_interval(left)} left"]
            self.say(f"{self.label} {iteration}/{self.iterations}: {', '.join(words)}")

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

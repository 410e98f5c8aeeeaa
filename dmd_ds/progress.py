"""How far a run is, on stderr: a bar where that is a terminal, else a line now and then."""

import collections
import statistics
import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
SHOWN = ("loss/", "grad_norm/")  # of the numbers; of the others there are files
BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}, {remaining} left, {postfix}"


class Progress:
    def __init__(self, first_step: int, max_steps: int):
        self.first_step, self.step, self.max_steps = first_step, first_step, max_steps
        self.began = self.told = time.monotonic()
        self.seen: dict[str, float] = {}
        self.seconds: collections.deque[float] = collections.deque(maxlen=20)
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(initial=first_step, total=max_steps, file=sys.stderr, dynamic_ncols=True, bar_format=BAR, mininterval=0.2)

    def advance(self, step: int, numbers: dict[str, float]) -> None:
        """To `step` steps taken. A number that a step does not have, as the generator's between its turns, stays as it was."""
        self.step = step
        self.seen |= {name: number for name, number in numbers.items() if name.startswith(SHOWN) or name == "memory_gb"}
        self.seconds.append(numbers["seconds"])
        if self.bar is not None:
            self.bar.set_postfix_str(self.numbers(), refresh=False)
            self.bar.update(step - self.bar.n)
        elif step == self.max_steps or time.monotonic() - self.told >= SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            self.say(f"step {step}/{self.max_steps}, {self.left()} left, {self.numbers()}")

    def numbers(self) -> str:
        """`0.41 s a step, dm 0.123, fake_score 0.0451, |g| generator 0.8, |g| fake_score 1.2, 1.4 GB`."""
        words = [f"{statistics.median(self.seconds):.3g} s a step"]  # of late; the median passes over looks and saves
        for kind, mark in zip(SHOWN, ("", "|g| "), strict=True):
            words += [f"{mark}{name.removeprefix(kind)} {number:.3g}" for name, number in self.seen.items() if name.startswith(kind)]
        return ", ".join([*words, f"{self.seen['memory_gb']:.1f} GB"])

    def left(self) -> str:
        """The time to the last step, from the steps of this command so far: `2:35` or `1:02:35`."""
        taken = max(1, self.step - self.first_step)
        return tqdm.format_interval((time.monotonic() - self.began) / taken * (self.max_steps - self.step))

    def say(self, text: str) -> None:
        """A line, above the bar where there is one."""
        if self.bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

"""`python mix.py` from an empty folder: its stages, what it takes in memory, and what ends up.

    python tests/bench/whole.py                            # with nothing compiled, and again
    python tests/bench/whole.py --beside ../other -- --sequences 160 --base-sequences 640

Other checkouts may stand beside this one; they take turns. `again` has what torch compiled before,
but no sample and no base. `ratio` is of the seconds, to this checkout's; the last column is the
sha256 of the model's weights, by its first digits, which must not change with speed.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from prepare import ArgumentParser, cli, sha256_of

STAGES = ("sample", "base", "search", "comparison")


def run(checkout: Path, folder: Path, cache: Path, options: list[str]) -> tuple[dict, float, str]:
    """The seconds of every stage and in all, the most memory in GB, and the hash of the weights."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    began = time.perf_counter()
    command = [sys.executable, checkout.resolve() / "mix.py", *options]
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = {"all": time.perf_counter() - began}
    assert status == 0, said
    wall_time = re.search("wall time: .*", said)[0]
    seconds |= {name: int(s) for name, s in re.findall(r"(\w+) (\d+) s,", wall_time)}
    scale = 1 if sys.platform == "darwin" else 1024
    weights = folder / "out/mix/model.safetensors"
    return seconds, usage.ru_maxrss * scale / 1e9, sha256_of(weights)[:8]


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--beside", nargs="+", default=[], type=Path, metavar="CHECKOUT")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("options", nargs="*", help="of mix.py, after --")
    args = parser.parse_args()
    head = "".join(f"{stage:>12}" for stage in (*STAGES, "all"))
    print(f"{'checkout':<24}{'':<6}{head}{'ratio':>7}{'GB':>6}  weights", flush=True)
    for _ in range(args.turns):
        own = {}
        for checkout in (ROOT, *args.beside):
            with tempfile.TemporaryDirectory() as cache:
                for when in ("first", "again"):
                    with tempfile.TemporaryDirectory() as folder:
                        seconds, memory, name = run(
                            checkout, Path(folder), Path(cache), args.options
                        )
                    own.setdefault(when, seconds["all"])
                    line = f"{checkout.resolve().name[:23]:<24}{when:<6}"
                    line += "".join(f"{seconds.get(s, 0):>12.0f}" for s in (*STAGES, "all"))
                    ratio = seconds["all"] / own[when]
                    print(f"{line}{ratio:>7.2f}{memory:>6.2f}  {name}", flush=True)


if __name__ == "__main__":
    cli(main)

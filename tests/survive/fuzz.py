"""Searches for bytes that a reader does not withstand, guided by the lines that they reach (atheris, libFuzzer).

    PYTHONPATH=tests python -m survive.fuzz --seconds 300 --findings DIR

What is found lies in DIR as <target>-<kind>-<digest>, and `--replay DIR/<file>` shows it again. A file that stays
useful goes into tests/survive/corpus/<target>/, which the tests replay.
"""

import argparse
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
LARGEST = 100_000
# One input that takes longer is a finding.
SLOWEST_S = 10
MOST_MB = 2000


def search(name: str, seconds: int, findings: Path, corpus: Path) -> None:
    """In a process of its own, which libFuzzer ends. corpus: an empty folder for what reaches new lines."""
    import atheris

    with atheris.instrument_imports(
        include=["handlers", "tools.archive", "tools.serve.store", "tools.sign", "PIL", "zipfile"]
    ):
        from survive.targets import TARGETS, seeds
    for number, seed in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(seed)
    arguments = [
        sys.argv[0],
        str(corpus),
        *([str(CORPUS / name)] if (CORPUS / name).is_dir() else []),
        f"-max_total_time={seconds}",
        f"-artifact_prefix={findings}/{name}-",
        f"-max_len={LARGEST}",
        f"-timeout={SLOWEST_S}",
        f"-rss_limit_mb={MOST_MB}",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup(arguments, TARGETS[name])
    atheris.Fuzz()


def replay(path: Path, name: str) -> None:
    """Raises what the target raises."""
    from survive.targets import TARGETS

    TARGETS[name](path.read_bytes())


def main() -> int:
    from survive.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300, help="of all targets together (default: %(default)s)")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="(default: %(default)s)")
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS), help="these alone")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="show one finding again, by its name")
    args = parser.parse_args()
    if args.replay:
        replay(args.replay, args.replay.name.partition("-")[0])
        return 0
    args.findings.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.target:
        with tempfile.TemporaryDirectory(prefix="marina-") as corpus:
            given = name, max(1, args.seconds // len(args.target)), args.findings.resolve(), Path(corpus)
            process = get_context("spawn").Process(target=search, args=given)
            process.start()
            process.join()
        if process.exitcode:
            failed.append(name)
    print(f"FAILED {', '.join(failed)}; findings are in {args.findings}" if failed else "ok     nothing found")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

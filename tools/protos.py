"""Generate and check the code made from protos/: `python tools/protos.py generate | check`.

`check` lints with buf (from its npm package, sha256 verified, kept in .tools/) and fails when the
committed stubs are not what the protos give.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
BUF_PACKAGE = "@bufbuild/buf-linux-x64@1.75.0"
BUF_SHA256 = "fad1e38d6909bbb583a4da81d8c02a01046e2cd663bde7e337dd24277393764b"


def generate(into: Path) -> None:
    """Write *_pb2.py, *_pb2_grpc.py and their .pyi below `into`, mirroring protos/."""
    import grpc_tools

    include = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    # protoc starts the mypy plugins by name: they are installed beside this interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    outputs = [f"--{kind}_out={into}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{PROTOS}", f"-I{include}", *outputs, *sources]) != 0:
        raise SystemExit("protoc failed")


def buf() -> Path:
    """The buf binary, fetched once from its npm package and verified."""
    binary = ROOT / ".tools" / "buf-1.75.0"
    if not binary.exists():
        binary.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            npm = shutil.which("npm")
            if npm is None:
                raise SystemExit("npm is needed once, to fetch buf for the proto lint")
            subprocess.run([npm, "pack", "--silent", BUF_PACKAGE], cwd=scratch, check=True)
            (archive,) = Path(scratch).glob("*.tgz")
            with tarfile.open(archive) as tar:
                member = tar.extractfile("package/bin/buf")
                assert member is not None
                binary.write_bytes(member.read())
    if hashlib.sha256(binary.read_bytes()).hexdigest() != BUF_SHA256:
        raise SystemExit(f"{binary} is not the expected buf: delete it and try again")
    binary.chmod(0o755)
    return binary


def check() -> None:
    """Exit non-zero when the protos do not lint or the stubs are stale."""
    subprocess.run([buf(), "lint"], cwd=PROTOS, check=True)
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = [p.relative_to(scratch) for p in Path(scratch).rglob("*_pb2*")]
        stale = [p for p in fresh if not filecmp.cmp(Path(scratch, p), ROOT / p, shallow=False)]
        if stale:
            raise SystemExit(f"stale stubs, run `make protos`: {', '.join(map(str, stale))}")
    print(f"protos: lint clean, {len(fresh)} generated files fresh")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["generate"]:
            generate(ROOT)
        case ["check"]:
            check()
        case _:
            raise SystemExit(__doc__)

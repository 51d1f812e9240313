"""The sandbox as a tool: outcomes, files, commands, who may have one, what it says where it cannot be had."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox_helpers import SMALL, small_sandbox
from trinity.base.errors import UserError
from trinity.rl.sandbox import cgroup, pool, seccomp, self_check, wire
from trinity.rl.sandbox.limits import Limits, Outcome
from trinity.rl.sandbox.pool import Sandbox, examine
from trinity.rl.sandbox.worker import LostWorkerError, MissingLayerError, Worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
SOURCE = str(Path(__file__).parent.parent / "src")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with small_sandbox() as made:
        yield made


def test_outcomes(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert (outcome.status, outcome.stdout, outcome.stderr) == (0, b"out\n", b"err\n")
    assert outcome.completed
    assert not outcome.timed_out
    assert outcome.text == "out\nerr\n"
    assert outcome.max_memory > 1 << 20
    assert sandbox.run("raise SystemExit(7)").status == 7
    assert sandbox.run("import sys; sys.exit('a reason')").stderr == b"a reason\n"
    failed = sandbox.run("def f():\n    return 1 / 0\nf()")
    assert failed.status == 1
    assert b'File "program.py", line 2, in f\n    return 1 / 0' in failed.stderr  # with the line itself
    assert b"guest" not in failed.stderr
    assert b"SyntaxError" in sandbox.run("x = ").stderr
    assert sandbox.run(b"\xff").status == 1


def test_the_end_of_a_program_is_python_s(sandbox: Sandbox) -> None:
    source = """
import atexit, threading, time
atexit.register(lambda: print("at exit"))
threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
print(__name__, sum(range(3)))
"""
    assert sandbox.run(source).stdout.split() == [b"__main__", b"3", b"thread", b"at", b"exit"]


def test_files_arguments_input(sandbox: Sandbox) -> None:
    source = "import sys; from pkg.part import x; print(x, sys.argv[1:], input(), open('data.txt').read())"
    outcome = sandbox.run(
        "import sys; sys.path.insert(0, '.')\n" + source,
        arguments=["a", "b c"],
        stdin="typed\n",
        files={"pkg/part.py": "x = 5", "data.txt": b"read"},
    )
    assert outcome.stdout == b"5 ['a', 'b c'] typed read\n"


def test_commands(sandbox: Sandbox) -> None:
    assert sandbox.command(["python", "-c", "print(6 * 7)"]).stdout == b"42\n"
    outcome = sandbox.command(["sh", "-c", "cat; cat file; exit 3"], stdin="in ", files={"file": "text"})
    assert (outcome.status, outcome.stdout, outcome.completed) == (3, b"in text", False)
    assert sandbox.command(["no-such-tool"]).status == 127
    assert sandbox.command(["/etc/passwd"]).status == 126
    test = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\n"
    assert sandbox.command(["python", "-m", "unittest", "-q"], files={"test_x.py": test}).status == 0
    with pytest.raises(UserError, match="needs a name"):
        sandbox.command([])


def test_programs_give_the_same_each_time(sandbox: Sandbox) -> None:
    source = "print({'a', 'b', 'c', 'd', 'e'}, hash('x'))"
    first = sandbox.run(source).stdout
    with small_sandbox() as another:
        assert another.run(source).stdout == first
    assert (
        sandbox.run("import random; print(random.random())").stdout
        != sandbox.run("import random; print(random.random())").stdout
    )


def test_many_threads_share_one(sandbox: Sandbox) -> None:
    with Sandbox(SMALL, workers=2) as two, ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda n: two.run(f"print({n})").stdout, range(40)))
        assert found == [b"%d\n" % n for n in range(40)]
        assert [o.stdout for o in two.run_all(["print(1)", "print(2)"])] == [b"1\n", b"2\n"]
    with pytest.raises(UserError, match="closed"):
        two.run("")


def test_tools_of_the_interpreter(sandbox: Sandbox) -> None:
    """What tests of code tasks commonly use works inside."""
    source = """
import asyncio, concurrent.futures, multiprocessing, subprocess, tempfile, ctypes, hashlib, sqlite3, queue
async def one(): await asyncio.sleep(0); return 1
print(asyncio.run(one()))
with concurrent.futures.ThreadPoolExecutor(2) as e: print(list(e.map(abs, [-1, 2])))
with multiprocessing.Pool(2) as p: print(p.map(abs, [-3, 4]))
print(subprocess.run(["echo", "x"], capture_output=True, text=True).stdout.strip())
with tempfile.TemporaryDirectory() as d: open(d + "/f", "w").write("y")
print(sqlite3.connect(":memory:").execute("select 1").fetchone())
"""
    outcome = sandbox.run(source)
    assert outcome.completed, outcome.text
    assert outcome.stdout.split(b"\n")[:5] == [b"1", b"[1, 2]", b"[3, 4]", b"x", b"(1,)"]


def test_packages_are_seen_read_only(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "helper.py").write_text("value = 11")
    with pytest.raises(UserError, match="No module named 'helper'"):
        Sandbox(SMALL, workers=1, preload=["helper"])
    with Sandbox(SMALL, workers=1, packages=[tmp_path / "own"], preload=["helper"]) as made:
        assert made.run("import helper; print(helper.value)").stdout == b"11\n"
        assert made.command(["python", "-c", "import helper; print(helper.value)"]).stdout == b"11\n"
        assert made.run(f"open({str(tmp_path / 'own' / 'x')!r}, 'w')").status == 1
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["helper.py"]


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="memory must be above 0"):
        Limits(memory=0)


def test_a_lost_worker_is_replaced(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_sandbox() as made:
        worker = made._idle.get()
        assert isinstance(worker, Worker)
        os.kill(worker._process.pid, 9)
        made._idle.put(worker)
        with pytest.raises(UserError, match="was lost while it ran"):
            made.run("print(1)")
        assert made.run("print(1)").stdout == b"1\n"

        def interrupted(*args: object, **kwargs: object) -> Outcome:
            raise KeyboardInterrupt

        monkeypatch.setattr(Worker, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.run("print(1)")
        monkeypatch.undo()
        assert made.run("print(2)").stdout == b"2\n"
    assert issubclass(LostWorkerError, Exception)


def test_no_control_group_is_left() -> None:
    with small_sandbox() as made:
        worker = made._idle.get()
        assert isinstance(worker, Worker)
        folders = list(worker.group.folders.values())
        assert all(folder.is_dir() for folder in folders)
        made._idle.put(worker)
    assert not any(folder.exists() for folder in folders)


def test_a_sandbox_that_nobody_closes_and_owners_that_were_killed() -> None:
    with small_sandbox():
        pass
    owner = """
import os, sys
from trinity.rl.sandbox.pool import Sandbox
sandbox = Sandbox(workers=1)
worker = sandbox._idle.get()
print(worker._process.pid, *worker.group.folders.values(), flush=True)
sandbox._idle.put(worker)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""
    for end in ("left", "killed"):
        command = [sys.executable, "-c", owner, end]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, text=True, check=False
        )
        worker, *folders = done.stdout.split()
        for _ in range(200):
            if not Path("/proc", worker).exists():
                break
            time.sleep(0.05)
        assert not Path("/proc", worker).exists()
        if end == "killed":
            with small_sandbox():
                pass  # who comes next tidies up
        assert not any(Path(folder).exists() for folder in folders), end


def test_where_no_control_group_may_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_parents", lambda controller: [])
    with small_sandbox() as made:
        absent = {layer.name: layer for layer in made.layers if layer.problem}
        assert set(absent) == {"memory of all together", "processes of all together"}
        assert not any(layer.needed for layer in absent.values())
        assert made.run("print(1)").completed


def test_every_layer_is_examined(sandbox: Sandbox) -> None:
    assert not [layer for layer in examine() if layer.needed and layer.problem]
    names = {layer.name for layer in sandbox.layers}
    assert {"user namespace", "system call filter", "no network", "read-only view", "no capabilities"} <= names


@pytest.mark.parametrize("name", ["user", "mount", "process", "network", "ipc", "uts", "cgroup"])
def test_a_missing_namespace_is_named(name: str, tmp_path: Path) -> None:
    """A system that allows one kind of namespace too few, made by the kernel's own limit on them."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import json, os, sys
from trinity.rl.sandbox import kernel
from trinity.base.errors import UserError
uid, gid = os.geteuid(), os.getegid()
kernel.unshare(kernel.NAMESPACES["user"])
open("/proc/self/setgroups", "w").write("deny")
open("/proc/self/uid_map", "w").write(f"0 {{uid}} 1")
open("/proc/self/gid_map", "w").write(f"0 {{gid}} 1")
kind = dict(mount="mnt", process="pid", network="net").get({name!r}, {name!r})
open(f"/proc/sys/user/max_{{kind}}_namespaces", "w").write("0")
from trinity.rl.sandbox.pool import Sandbox
try:
    Sandbox(workers=1)
    print("made")
except UserError as error:
    print(error)
if {name!r} in ("user", "network"):
    sandbox = Sandbox(workers=1, unsafe=True)
    print(sandbox.isolated, [layer.problem for layer in sandbox.layers], sandbox.run("print(1)").stdout)
""")
    with small_sandbox():
        pass  # skips where there is none
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert f"the layer '{name} namespace' is missing" in lines[0], done.stderr
    if name in ("user", "network"):
        assert lines[1] == "False ['left out on demand'] b'1\\n'"


def test_a_layer_that_does_not_hold_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_sandbox():
        pass
    monkeypatch.setattr(self_check, "PROGRAM", "import json; print(json.dumps({'no network': False}))")
    with pytest.raises(MissingLayerError, match="'no network' is missing"):
        Sandbox(SMALL, workers=1)
    (layer,) = examine()
    assert layer.name == "no network"
    monkeypatch.setattr(self_check, "PROGRAM", "1/0")
    with pytest.raises(MissingLayerError, match="ZeroDivisionError"):
        Sandbox(SMALL, workers=1)


def test_without_isolation_on_demand_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left without namespaces: limits, the filter, an empty environment, an end of the whole family."""

    class Bare(Worker):
        def __init__(self, *args: object, isolated: bool, **more: object) -> None:
            if isolated:
                raise MissingLayerError("user namespace", "for the test")
            super().__init__(*args, isolated=False, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(pool, "Worker", Bare)
    with pytest.raises(MissingLayerError):
        Sandbox(SMALL, workers=1)
    with Sandbox(SMALL, workers=1, unsafe=True) as bare:
        assert not bare.isolated
        outcome = bare.run("import os; print(os.getcwd(), len(os.environ), open('f').read())", files={"f": "x"})
        folder, size, content = outcome.stdout.decode().split()
        assert folder.startswith("/tmp/trinity-program-")
        assert not Path(folder).exists()
        assert (int(size) < 12, content) == (True, "x")
        assert b"sent" not in bare.run("import socket; socket.socket(socket.AF_INET); print('sent')").stdout
        family = "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(99)\ntime.sleep(99)"
        assert bare.run(family, seconds=0.3).timed_out
        assert bare.run("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(99)").completed
        assert not grandchildren_of(os.getpid())


def grandchildren_of(pid: int) -> list[str]:
    """What a program left would hang below its worker."""
    found: list[str] = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += Path(f"/proc/{child}/task/{child}/children").read_text().split()
    return found


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="the suite itself runs without root's rights")
def test_as_an_ordinary_user(tmp_path: Path) -> None:
    """Root makes the view with its own rights, others in a user namespace: both ways must hold."""
    with small_sandbox():
        pass
    tmp_path.chmod(0o755)
    user, start = tmp_path / "user.py", tmp_path / "start.py"
    user.write_text(f"""
import sys
sys.path.insert(0, {SOURCE!r})
from trinity.rl.sandbox.pool import Sandbox, examine
print([layer.name for layer in examine() if layer.needed and layer.problem])
with Sandbox(workers=1) as sandbox:
    print(sandbox.run("import os; print(os.getresuid(), os.getpid())").stdout.decode().strip())
    print(sandbox.run("import socket; socket.socket()").status, sandbox.run("open('/usr/x', 'w')").status)
    fork = "import os\\nn = 0\\ntry:\\n    for n in range(99):\\n        if os.fork() == 0:\\n            import time; time.sleep(9)\\nexcept OSError:\\n    print(n)"
    print(sandbox.run(fork).stdout.decode().strip())
""")
    # The interpreter and the package may lie in a folder of root's own: in a mount namespace, others may see them too.
    start.write_text(f"""
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, {SOURCE!r})
from trinity.rl.sandbox import kernel
from trinity.rl.sandbox.view import interpreter
kernel.unshare(kernel.NAMESPACES["mount"])
kernel.mount(None, "/", kernel.MS_REC | kernel.MS_PRIVATE)
wanted = {{os.path.realpath(sys.base_prefix), {SOURCE!r}, {str(tmp_path)!r}}}
closed = {{next((a for a in reversed(Path(w).parents) if not a.stat().st_mode & 1), None) for w in wanted}} - {{None}}
trees = {{w: kernel.open_tree(w) for w in wanted if closed & set(Path(w).parents)}}
for folder in closed:
    kernel.mount("tmpfs", str(folder), 0, "mode=755")
for path, tree in trees.items():
    os.makedirs(path)
    kernel.move_mount(tree, path)
done = subprocess.run([interpreter(), "-S", {str(user)!r}], user=61000, group=61000, extra_groups=[], cwd="/")
sys.exit(done.returncode)
""")
    done = subprocess.run([sys.executable, str(start)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["[]", "(1000, 1000, 1000) 2", "1 1"]
    assert int(lines[3]) == Limits().processes - 1


def test_the_filter_is_the_same_idea_on_both_machines() -> None:
    intel, arm = seccomp.numbers("x86_64"), seccomp.numbers("aarch64")
    assert set(arm) < set(intel)
    assert {"read", "write", "execve", "clone", "mmap", "exit_group"} <= set(arm)
    for numbers in (intel, arm):
        assert len(set(numbers.values())) == len(numbers)
        assert not {"ptrace", "mount", "bpf", "keyctl", "unshare", "setns", "memfd_create", "io_uring_setup"} & set(
            numbers
        )
    assert len(seccomp.bpf("x86_64")) // 8 < 4096
    with pytest.raises(KeyError):
        seccomp.bpf("riscv64")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_step_by_step(machine: str) -> None:
    """The BPF program, interpreted, decides as the table says, and jumps nowhere out of it."""
    known = seccomp.numbers(machine)
    arch = seccomp.ARCHITECTURES[machine][0]
    allow, refuse = 0x7FFF0000, 0x00050001
    for number in range(600):
        names = [name for name, value in known.items() if value == number]
        got = decide(seccomp.bpf(machine), number, arch, (0, 0))
        if names and names[0] not in seccomp.CHECKED:
            assert got == allow, names
        elif not names:
            assert got == refuse, number
    program = seccomp.bpf(machine)
    assert decide(program, known["clone"], arch, (17, 0)) == allow
    assert decide(program, known["clone"], arch, (17 | 0x10000000, 0)) == refuse
    assert decide(program, known["clone3"], arch, (0, 0)) == 0x00050000 | 38
    assert decide(program, known["socket"], arch, (1, 1)) == allow
    assert decide(program, known["socket"], arch, (2, 1)) == 0x00050000 | 97
    assert decide(program, known["ioctl"], arch, (0, 0x5401)) == allow
    assert decide(program, known["ioctl"], arch, (0, 0x5412)) == 0x00050000 | 25
    assert decide(program, known["prctl"], arch, (22, 2)) == refuse
    assert decide(program, known["prlimit64"], arch, (0, 7)) == allow
    assert decide(program, known["prlimit64"], arch, (1, 7)) == refuse
    assert decide(program, known["setsockopt"], arch, (3, 1, 2)) == allow
    assert decide(program, known["setsockopt"], arch, (3, 1, 26)) == refuse
    assert decide(program, known["read"], 0x40000003, (0, 0)) == 0x80000000
    assert decide(program, 0x40000000 | known["read"], arch, (0, 0)) == 0x80000000


def decide(program: bytes, number: int, arch: int, arguments: tuple[int, ...]) -> int:
    import struct

    steps = list(struct.iter_unpack("=HBBI", program))
    data = {0: number, 4: arch, **{16 + 8 * i: value for i, value in enumerate((*arguments, 0))}}
    at, value = 0, 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == 0x20:
            value = data[k]
        elif code == 0x06:
            return k
        else:
            holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
            at += yes if holds else no


def test_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sandbox as bench  # bench/sandbox.py

    with small_sandbox():
        pass
    out = tmp_path / "out.json"
    arguments = ["sandbox.py", "--programs", "10", "--repeats", "1", "--workers", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    assert json.loads(out.read_text())["cores_over_cpu_time"] > 0


def test_requests_as_bytes() -> None:
    header, parts = wire.unpack(wire.pack({"a": ["x", 1]}, [b"", b"\0\xff", b"text"]))
    assert header == {"a": ["x", 1]}
    assert parts == [b"", b"\0\xff", b"text"]
    assert json.dumps(header)

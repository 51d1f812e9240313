"""What programs see of the file system: Python, the system's libraries and tools, an empty /tmp.

All but /tmp is read-only.
"""

import os
import sys

from trinity.rl.sandbox import kernel

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_TEXTS = {
    "/etc/passwd": "sandbox:x:1000:1000::/tmp:/bin/sh\n",
    "/etc/group": "sandbox:x:1000:\n",
    "/etc/hosts": "127.0.0.1 localhost\n",
}
TOOLS = "/run/bin"
"""Holds `python` and `python3`."""
PACKAGES = "/run/packages"
PATH = f"{TOOLS}:/usr/bin:/bin"


def interpreter() -> str:
    """The real file of the running interpreter, without virtual environments and links."""
    base: str = getattr(sys, "_base_executable", "") or sys.executable
    return os.path.realpath(base)


def package_folders(packages: list[str]) -> list[str]:
    """Where packages are seen, in the order of their folders outside."""
    return [f"{PACKAGES}/{i}" for i in range(len(packages))]


def _sources(packages: list[str]) -> dict[str, str]:
    """Folder outside by its place in the view. Raises OSError where Python's own place is taken."""
    found = {path: path for path in _SYSTEM if os.path.isdir(path) and not os.path.islink(path)}
    for path in (os.path.realpath(sys.base_prefix), os.path.dirname(interpreter())):
        if path.startswith("/tmp/"):
            raise OSError(17, f"Python is installed in {path}, where programs have their own /tmp")
        if not any(path == above or path.startswith(above + "/") for above in found):
            found[path] = path
    return found | dict(zip(package_folders(packages), packages, strict=True))


def build(packages: list[str]) -> None:
    """Make the view and change to it; the caller has a mount namespace of its own and may mount.

    The old root is gone afterwards. Raises OSError where the kernel refuses a step.
    """
    kernel.mount(None, "/", kernel.MS_REC | kernel.MS_PRIVATE)
    links = {path: os.readlink(path) for path in _SYSTEM if os.path.islink(path)}
    trees = {place: kernel.open_tree(path) for place, path in _sources(packages).items()}
    devices = {f"/dev/{name}": kernel.open_tree(f"/dev/{name}") for name in _DEVICES}
    texts = {**_TEXTS, **_copy_of("/etc/ld.so.cache")}
    executable = interpreter()
    kernel.mount("tmpfs", "/tmp", kernel.MS_NOSUID | kernel.MS_NODEV, "size=4m,mode=0755")
    os.chdir("/tmp")
    for path, tree in trees.items():
        _folder(path)
        kernel.set_attributes(tree, kernel.ATTR_RDONLY | kernel.ATTR_NOSUID | kernel.ATTR_NODEV)
        kernel.move_mount(tree, "/tmp" + path)
    for path, tree in devices.items():
        _file(path, b"")
        kernel.set_attributes(tree, kernel.ATTR_RDONLY | kernel.ATTR_NOSUID)
        kernel.move_mount(tree, "/tmp" + path)
    for path, text in texts.items():
        _file(path, text.encode() if isinstance(text, str) else text)
    for path, target in links.items():
        os.symlink(target, "/tmp" + path)
    _folder(TOOLS)
    for name in ("python", "python3"):
        os.symlink(executable, f"/tmp{TOOLS}/{name}")
    _folder("/tmp")
    os.symlink("/tmp", "/tmp/dev/shm")
    kernel.pivot_root(".", ".")
    kernel.detach(".")
    os.chdir("/")
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    for tree in (*trees.values(), *devices.values()):
        os.close(tree)
    kernel.set_read_only(root)
    os.close(root)


def _copy_of(path: str) -> dict[str, bytes]:
    """A small file as it is, if it is there."""
    if not os.path.isfile(path):
        return {}
    with open(path, "rb") as file:
        return {path: file.read()}


def _folder(path: str) -> None:
    os.makedirs("/tmp" + path, mode=0o755, exist_ok=True)


def _file(path: str, content: bytes) -> None:
    _folder(os.path.dirname(path))
    with open("/tmp" + path, "wb") as file:
        file.write(content)

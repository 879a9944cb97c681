# SPDX-License-Identifier: BSD-3-Clause
"""What is measured: this filter, what people use in its place, and the limit.

Each server is one process that serves one writable disk (or several exports) on a
Unix socket, over a base that it does not change.
"""

import glob
import os
import signal
import subprocess
import sys
import time

K, M, G = 1 << 10, 1 << 20, 1 << 30

# The name of each, in the order of the tables: what it is.
KINDS = {
    "limit": "nbdkit's file plugin, no overlay",
    "cow": "this filter",
    "nbdkit": "nbdkit's own cow filter, at its defaults (64K)",
    "nbdkit-4k": "nbdkit's own cow filter, cow-block-size=4096",
    "qemu-snapshot": "qemu-nbd --snapshot",
    "qemu-qcow2": "qemu-nbd on a qcow2 overlay",
    "nbd-server": "nbd-server with copyonwrite (an overlay for each connection)",
}
ALTERNATIVES = [k for k in KINDS if k not in ("limit", "cow")]
QEMU = ["qemu-snapshot", "qemu-qcow2"]

# What takes part only where a snapshot is held.
SNAPSHOTS = {"qemu-cbw": "qemu-storage-daemon, copy-before-write and snapshot-access"}

# Set by main: where the filter is, a directory for files in memory, and one on a disk.
filter = None
work = None
disk_work = None


class CannotDo(Exception):
    """What is asked of a server is nothing that it does."""


def warm(count):
    """Touch COUNT bytes of memory and give them back: on a virtual machine, memory
    that the kernel hands out for the first time is several times slower.
    """
    piece = bytes(M)
    path = os.path.join(work, "touch")
    with open(path, "wb", buffering=0) as f:
        for _ in range(0, count, M):
            f.write(piece)
    os.unlink(path)


def listens(path):
    """Does somebody listen on this socket?  (It is there a moment before.)"""
    listening = "00010000"
    with open("/proc/net/unix") as f:
        return any(line.endswith(" %s\n" % path) and line.split()[3] == listening
                   for line in f)


class Base:
    """What lies under the overlay: NBDKIT, the words that make nbdkit serve it, with
    {file} for the file.  That is also what the other servers open; if not OTHERS, only
    nbdkit can, and qemu gets it from there.
    """

    def __init__(self, file, nbdkit="file {file}", others=True):
        self.file = file
        self.nbdkit = nbdkit.format(file=file).split()
        self.others = others


class Server:
    """A server of this KIND.  Leaving the `with` ends it, by a signal, and removes
    what it has left.
    """

    def __init__(self, kind, base, *options, stdout=None, name="sock", tmpdir=None):
        self.kind = kind
        self.base = base
        self.tmpdir = tmpdir or work  # where the overlay is
        self.sock = os.path.join(work, name)
        self.stdout = stdout
        self.base_server = None
        self.process = self.pid = None
        self.remove_files()
        try:
            self.start(options)
            self.idle = self.pipes()
        except BaseException:
            self.end(signal.SIGKILL)
            raise

    # ------------------------------------------------------------------
    # How each is started

    def start(self, options):
        env = dict(os.environ, TMPDIR=self.tmpdir)
        self.process = subprocess.Popen(self.command(options), env=env, cwd=work,
                                        stdout=self.stdout, stderr=self.log())
        self.wait_until(lambda: listens(self.sock), self.process)
        self.pid = self.process.pid
        if self.kind == "nbd-server":
            with open(self.pid_file()) as f:
                self.pid = int(f.read())

    def log(self):
        return open(os.path.join(work, "log"), "a")

    def command(self, options):
        nbdkit = ["nbdkit", "-f", "-U", self.sock]
        if self.kind == "limit":
            return [*nbdkit, *self.base.nbdkit, *options]
        if self.kind == "cow":
            return [*nbdkit, "--filter=" + filter, *self.base.nbdkit, *options]
        if self.kind == "nbdkit":
            return [*nbdkit, "--filter=cow", *self.base.nbdkit, *options]
        if self.kind == "nbdkit-4k":
            return [*nbdkit, "--filter=cow", *self.base.nbdkit,
                    "cow-block-size=4096", *options]
        if options:
            raise CannotDo
        if self.kind == "nbd-server":
            return self.nbd_server()
        return self.qemu()

    def qemu(self):
        """What qemu cannot open itself, nbdkit serves to it."""
        image = self.base.file
        common = ["-k", self.sock, "-t", "-e", "8", "--discard=unmap"]
        if not self.base.others:
            image = self.serve_base()
        if self.kind == "qemu-snapshot":
            return ["qemu-nbd", *common, "-f", "raw", "--snapshot", image]
        overlay = self.sock + ".qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw",
                        "-b", image, overlay], check=True)
        return ["qemu-nbd", *common, "-f", "qcow2", overlay]

    def serve_base(self):
        sock = self.sock + ".base"
        self.base_server = subprocess.Popen(
            ["nbdkit", "-f", "-U", sock, *self.base.nbdkit], stderr=self.log())
        self.wait_until(lambda: listens(sock), self.base_server)
        return "nbd+unix:///?socket=" + sock

    def nbd_server(self):
        """It goes into the background: in the foreground it serves one client."""
        if not self.base.others:
            raise CannotDo
        config = self.sock + ".conf"
        with open(config, "w") as f:
            f.write("[generic]\nunixsock=%s\n"
                    "[disk]\nexportname=%s\ncopyonwrite=true\n"
                    % (self.sock, self.base.file))
        return ["nbd-server", "-C", config, "-p", self.pid_file()]

    def pid_file(self):
        return self.sock + ".pid"

    def wait_until(self, ready, process):
        deadline = time.monotonic() + 30
        while not ready():
            if process.poll() or time.monotonic() > deadline:
                with open(os.path.join(work, "log")) as f:
                    sys.exit("bench: %s did not start; the servers' log is:\n%s"
                             % (KINDS[self.kind], f.read()))
            time.sleep(0.0005)

    # ------------------------------------------------------------------
    # Its end

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        # After an error it may have clients, for which it would wait.
        status = self.end(signal.SIGKILL if error else signal.SIGTERM)
        if status and not error:
            sys.exit("bench: %s failed, with status %d" % (KINDS[self.kind], status))

    def end(self, number):
        """End it, and remove what it has left.  Returns its exit status."""
        try:
            return self.end_process(number)
        finally:
            for process in self.process, self.base_server:
                if process and process.poll() is None:
                    process.kill()
                    process.wait()
            self.remove_files()

    def end_process(self, number):
        if self.kind == "nbd-server" and self.pid:
            # No child of ours any more, so there is no status.
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return 1
            while os.path.exists("/proc/%d" % self.pid):
                time.sleep(0.0005)
            return 0
        if not self.process:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait()

    def remove_files(self):
        for path in [self.sock, *glob.glob(self.sock + ".*"),
                     *glob.glob(os.path.join(work, "*.diff"))]:
            if os.path.exists(path):
                os.unlink(path)

    # ------------------------------------------------------------------
    # How clients find it

    def uri(self, export=None):
        if export is None:
            export = "disk" if self.kind == "nbd-server" else ""
        return "nbd+unix:///%s?socket=%s" % (export, self.sock)

    # ------------------------------------------------------------------
    # What it takes

    def links(self):
        """Its open files: the path of each in /proc, and where that leads."""
        fds = "/proc/%d/fd/" % self.pid
        for fd in os.listdir(fds):
            try:
                yield fds + fd, os.readlink(fds + fd)
            except FileNotFoundError:
                pass

    def pipes(self):
        return sum(to.startswith("pipe:") for _, to in self.links())

    def settle(self, pipes=None):
        """Wait until connections have gone, of which pipes are the last things that
        nbdkit lets go: all of them, or until so many pipes are left.
        """
        while self.pipes() > (self.idle if pipes is None else pipes):
            time.sleep(0.0002)

    def space(self):
        """Bytes that overlays take: files without a name, and that of qemu."""
        paths = [path for path, to in self.links() if to.endswith("(deleted)")]
        return sum(os.stat(path).st_blocks * 512
                   for path in paths + glob.glob(self.sock + ".qcow2"))

    def status(self, field):
        with open("/proc/%d/status" % self.pid) as f:
            for line in f:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * K
        raise KeyError(field)

    def memory(self):
        """Resident bytes of its own: pages of files and libraries do not count."""
        return self.status("RssAnon")

    def written(self):
        """Bytes that it has written to files (what goes to sockets is not in this)."""
        with open("/proc/%d/io" % self.pid) as f:
            fields = dict(line.split(": ") for line in f)
        return int(fields["wchar"])
